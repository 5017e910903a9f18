"""Images to be scored: a folder of PNGs with its manifest, or an npz file."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sit_atconv.errors import InputError

# What numpy raises for a file that is no npz, or a broken one.
UNREADABLE = (OSError, EOFError, TypeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Images:
    """uint8 images (N, C, H, W), their labels if known (N,), and the manifest that came with them."""

    pixels: torch.Tensor
    labels: torch.Tensor | None
    manifest: dict | None


def read_images(path: str | Path) -> Images:
    """Read a folder of images, subfolders too, in the order of their names, or an npz.

    The npz holds `arr_0`, uint8 (N, H, W, C), and perhaps labels `arr_1` (N,).

    Raises InputError for a missing path, a folder without images, images of different sizes, or one that does not
    decode.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise InputError(f"images {str(path)!r}: no such file or folder")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, labels = arrays["arr_0"], arrays.get("arr_1")
    except UNREADABLE as error:
        raise InputError(f"images {str(path)!r} cannot be read: {error}; give an npz with arr_0 (N, H, W, C)") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        found = f"{pixels.dtype} {pixels.shape}"
        raise InputError(f"images {str(path)!r}: arr_0 is {found}; give uint8 (N, H, W, C) with 1 or 3 channels")
    return _images(path, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, None)


def _images(path: Path, pixels: torch.Tensor, labels, manifest: dict | None) -> Images:
    try:
        labels = None if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError):
        raise InputError(f"images {str(path)!r}: labels must be integers") from None
    if labels is not None and labels.shape != pixels.shape[:1]:
        raise InputError(f"images {str(path)!r}: {len(pixels)} images but labels of shape {tuple(labels.shape)}")
    return Images(pixels, labels, manifest)


def _read_folder(path: Path) -> Images:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    try:
        manifest = json.loads((path / "manifest.json").read_text()) if (path / "manifest.json").is_file() else None
        num, labels = (manifest["num"], manifest["labels"]) if manifest else (len(files), None)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{str(path / 'manifest.json')!r} is not the manifest of samples") from None
    if not files:
        raise InputError(f"images {str(path)!r}: the folder holds no images ({', '.join(SUFFIXES)})")
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                arrays.append(np.array(image if image.mode in ("L", "RGB") else image.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"image {str(file)!r} does not decode ({error}); repair or remove it") from None
        if arrays[-1].shape != arrays[0].shape:
            raise InputError(f"image {str(file)!r} is {arrays[-1].shape}, {files[0].name} is {arrays[0].shape}")
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    if len(files) != num:
        raise InputError(f"images {str(path)!r}: {len(files)} images, but its manifest says {num}")
    return _images(path, pixels, labels, manifest)
