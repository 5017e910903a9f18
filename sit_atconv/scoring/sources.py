"""Images to be scored, from wherever they lie, never all in memory: npz files, folders, recipes, arrays.

Torch loads for tensors and recipes, not for what lies in files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sit_atconv.config import Data, Loading, load_recipe
from sit_atconv.data.arrays import CHUNK, PixelArray, check_kind
from sit_atconv.data.images import IMG_EXTENSIONS, Reader, image_files, is_image, read_image
from sit_atconv.runtime.claims import SETTINGS, writing
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import check_writable, resolved, sha256
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.runtime.reading import POSITIVE, SHAPE, Malformed, read_json, read_yaml

if TYPE_CHECKING:
    import torch

MANIFEST, SAMPLES = "manifest.json", "samples.npz"
MOST_BATCH = 1 << 32  # bytes of a batch


class Source:
    """n images of one size, uint8, by index, with what is known of them.

    n: at least 2. image_shape: (C, H, W), C 1 or 3. labels: class ids, int64 (n,), or None. class_names: by id, None
    where nobody says. manifest: of the samples command, or None. place: a path that is of these images alone, None of
    those in memory.
    lossy: whether images that lost something (JPEG, WebP) were read. background: the colour that transparent ones were
    composited on, None where none was read. data: of a recipe, which images there are.
    A subclass has `_read`. One thread at a time may read.
    """

    lossy = False
    background: str | None = None
    data: dict[str, Any] | None = None
    _digest: str | None = None

    def __init__(
        self, name: str, n: int, image_shape: Sequence[int], labels=None, manifest: Path | None = None,
        place: Path | None = None,
    ):  # fmt: skip
        self.name, self.n, self.image_shape, self.place = name, n, tuple(image_shape), place
        self.manifest = None if manifest is None else _read_manifest(manifest)
        self.manifest_sha256 = None if manifest is None else sha256(manifest)
        if n < 2:
            raise InputError(f"{name}: {n} image{'s' * (n != 1)} make no distribution; give at least 2")
        if (pixels := self.image_shape[1] * self.image_shape[2]) > Loading.max_pixels:
            raise InputError(
                f"{name}: images of {pixels:,} pixels; at most {Loading.max_pixels:,} are scored: give smaller ones"
            )
        if self.manifest is not None:
            num, stated = self.manifest["num"], self.manifest["labels"]
            if n != num:
                raise InputError(f"{name}: {n} images, but its manifest says {num}; make the missing ones again")
            shape = tuple(self.manifest.get("image_shape") or self.image_shape)
            if shape != self.image_shape:
                raise InputError(f"{name}: images of shape {self.image_shape}, but its manifest says {shape}")
            if labels is None:
                labels = stated
            elif stated is not None and not np.array_equal(labels, np.asarray(stated)):
                raise InputError(f"{name}: arr_1 and the manifest's labels differ; make the samples again")
        self.labels = None if labels is None else _check_labels(name, labels, n)
        self.class_names = (self.manifest or {}).get("class_names")

    def _note(self, reader: Reader) -> None:
        self.lossy |= reader.lossy is not None
        if reader.transparent:
            self.background = reader.background

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop - 1, (stop - start, H, W, C), in memory that is the caller's."""
        raise NotImplementedError

    def pixels(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop - 1, uint8 (stop - start, H, W, C). Raises InputError as `batches` does."""
        if (stop - start) * math.prod(self.image_shape) > MOST_BATCH:
            raise InputError(
                f"{self.name}: {stop - start} images of {self.image_shape} at once are over 4 GiB; lower the batch"
            )
        return self._read(start, stop)

    def _content(self) -> Iterator[bytes | np.ndarray]:
        """All pixels in index order, NHWC."""
        step = max(1, CHUNK // int(np.prod(self.image_shape)))
        return (self._read(first, min(first + step, self.n)) for first in range(0, self.n, step))

    def batches(self, start: int = 0, stop: int | None = None, size: int = 64) -> Iterator[torch.Tensor]:
        """Images start to stop - 1 (default: all) as uint8 (B, C, H, W), B = size but for the last; memory is NHWC.

        Raises InputError for an image that cannot be read, or is not like the others.
        """
        import torch

        stop = self.n if stop is None else stop
        for first in range(start, stop, size):
            yield torch.from_numpy(self.pixels(first, min(first + size, stop))).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of all pixels in index order, each image (H, W, C): that of arr_0's bytes, wherever the images lie.

        Reads all images once. Raises InputError for one that cannot be read, or is not like the others.
        """
        if self._digest is None:
            digest = hashlib.sha256()
            for part in self._content():
                digest.update(part)
            self._digest = digest.hexdigest()
        return self._digest

    def describe(self) -> dict[str, Any]:
        """What a result records: name, digest of the pixels, labels' digest, and the manifest but for its labels.

        Also `background`, `data` and `class_names`, where there is something to say.
        """
        own = ("labels", "class_names")
        manifest = self.manifest and {key: value for key, value in self.manifest.items() if key not in own}
        about = {
            "path": self.name,
            "pixels_sha256": self.digest(),
            "labels_sha256": None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "lossy": self.lossy,
            "manifest": manifest,
            "manifest_sha256": self.manifest_sha256,
        }
        read_as = {"background": self.background, "data": self.data, "class_names": self.class_names}
        return about | {key: value for key, value in read_as.items() if value is not None}


def class_histogram(labels: np.ndarray | None) -> dict[str, int] | None:
    """Number of images of each class that there is, by class id; None without labels."""
    if labels is None:
        return None
    return {str(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)}


def check_root(root: str | None) -> None:
    """Raise InputError for a folder of features that cannot be made."""
    if root is not None:
        with writing(place := resolved(root, option("features")), option("features")):
            if not place.is_dir():  # what lies in one may be all that is needed
                check_writable(place)


def check_there(path: str | Path) -> None:
    """Raise InputError unless there is a file or folder, in which images may be."""
    path = Path(path)
    if not (path.is_file() or path.is_dir()):
        embedded = "; the embedded digits are a reference to score against, and no folder" * (str(path) == "digits")
        raise InputError(f"images {str(path)!r}: no such file or folder{embedded}")


def open_source(path: str | Path, allow_lossy: bool = False, overrides: Sequence[str] = ()) -> Source:
    """The images at `path`: an npz, a folder, or what a recipe trains on.

    npz: `arr_0`, uint8 (N, H, W, C), stored or compressed, and perhaps labels `arr_1`, integers (N,).
    Folder with manifest.json: its samples.npz, or one image file per index, which is the number in the file's name.
    Any other folder: its image files, subfolders too, in the order of their paths.
    Recipe (.yaml): the images that it trains on, at its size, none mirrored. overrides: key=value, laid over it.
    allow_lossy: let JPEG and WebP in, which a recipe's images may be anyway.
    Raises InputError for anything else, and for images that break a rule of `Source`.
    """
    path = Path(path)
    check_overrides(path, overrides)
    if is_recipe(path):
        return _Recipe(path, overrides)
    if path.is_file():
        beside = path.with_name(MANIFEST)
        return _Npz(path, beside if path.name == SAMPLES and beside.is_file() else None)
    check_there(path)
    manifest = path / MANIFEST if (path / MANIFEST).is_file() else None
    if manifest is None and (path / SETTINGS).is_file():
        if "extractor" in begun_as(path):
            raise InputError(f"{str(path)!r} holds features; give the images that they are of")
        raise InputError(f"{str(path)!r} holds unfinished samples; run the command that began them again, it goes on")
    if (path / SAMPLES).is_file():
        if manifest is None:
            raise InputError(f"images {str(path)!r}: {SAMPLES} without {MANIFEST} is unfinished; finish it, or give it")
        return _Npz(path / SAMPLES, manifest, path)
    return _Folder(path, manifest, allow_lossy)


def is_recipe(path: str | Path) -> bool:
    """Whether a path is that of a recipe, by its name."""
    return str(path).endswith((".yaml", ".yml")) and not Path(path).is_dir()


def check_overrides(path: str | Path, overrides: Sequence[str]) -> None:
    """Raise InputError for overrides of what is no recipe."""
    if overrides and not is_recipe(path):
        raise InputError(f"{overrides[0]}: {str(path)!r} is no recipe (.yaml), and has no keys; leave it out")


def recipe_data(path: str | Path, overrides: Sequence[str] = ()) -> Data:
    """The section `data` of a recipe. Raises InputError for one that cannot be read, and for a classifier's."""
    try:
        return load_recipe(path, overrides).data
    except InputError:
        if _is_classifiers(path):
            raise InputError(
                f"{str(path)!r} is the recipe of a classifier, which reads images in another way; give the folder of "
                "its images, or write a recipe of `sit-atconv train` with these images under data"
            ) from None
        raise


def _is_classifiers(path: str | Path) -> bool:
    """Whether a file has sections that a classifier's recipe has and no other."""
    try:
        stated = read_yaml(path)
    except (OSError, ValueError):
        return False
    return isinstance(stated, dict) and bool({"augment", "eval"} & stated.keys())


def begun_as(path: Path) -> dict[str, Any]:
    """The settings.json of a folder, which says what it is going to be; {} where there is none that can be read."""
    try:
        return read_json(path / SETTINGS)
    except (OSError, Malformed):
        return {}


def from_arrays(pixels: torch.Tensor, labels=None, name: str = "images") -> Source:
    """Images that are in memory: uint8 (N, C, H, W). labels: integers (N,).

    Raises InputError for what breaks a rule of `Source`.
    """
    return _Arrays(name, pixels, labels)


class _Arrays(Source):
    def __init__(self, name: str, pixels: torch.Tensor, labels):
        import torch

        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            found = f"{pixels.dtype} {tuple(pixels.shape)}".removeprefix("torch.")
            raise InputError(f"{name}: {found}; give uint8 (N, C, H, W) with 1 or 3 channels")
        self._pixels = pixels
        super().__init__(name, len(pixels), pixels.shape[1:], labels)

    def _read(self, start: int, stop: int) -> np.ndarray:
        import torch

        pixels = self._pixels[start:stop].clone(memory_format=torch.contiguous_format)
        return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


class _Npz(Source):
    def __init__(self, path: Path, manifest: Path | None, place: Path | None = None):
        self._pixels = PixelArray(path, f"images {str(path)!r}")
        n, height, width, channels = self._pixels.shape
        shape = (channels, height, width)
        super().__init__(self._pixels.name, n, shape, self._pixels.labels, manifest, place or path)

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._pixels.read(start, stop)

    def _content(self) -> Iterator[bytes]:
        return self._pixels.content()


class _Recipe(Source):
    """The images that a recipe trains on, without those that it holds out, read by threads a batch at a time."""

    def __init__(self, path: Path, overrides: Sequence[str]):
        from sit_atconv.data import describe_images, open_dataset
        from sit_atconv.data.held_out import split

        data = recipe_data(path, overrides)
        if data.streaming:
            raise InputError("data.streaming=true: scores need to reach every image; leave it out")
        share = data.held_out
        if data.kind == "latents":
            if data.source is None:  # where a record says that they lie is not opened
                raise InputError(f"{str(path)!r}: data.kind=latents: say with data.source=PLACE where its images lie")
            cache = open_dataset(dataclasses.replace(data, verify=False))
            data, images = cache.images_data, cache.images()
        else:
            images = open_dataset(data)
        self._reader = getattr(images, "reader", None)  # where there are files
        self._dataset, _ = split(images, share)
        if len(bad := np.flatnonzero(self._dataset.labels < 0)):
            self._dataset[bad[0], False]  # raises: it cannot be read
        self.data = describe_images(data) | ({} if share is None else {"held_out": share})
        shape = (self._dataset.channels, self._dataset.image_size, self._dataset.image_size)
        which = hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()
        super().__init__(
            f"images of {str(path)!r}", len(self._dataset), shape, self._dataset.labels, None,
            path.with_name(f"{path.stem}-{which[:8]}.yaml"),
        )  # fmt: skip
        self.class_names = list(self._dataset.class_names)
        self._threads = _threads()

    def _read(self, start: int, stop: int) -> np.ndarray:
        import torch

        images = torch.stack([*self._threads.map(lambda index: self._dataset[index, False][0], range(start, stop))])
        images = images if images.dtype == torch.uint8 else to_uint8(images)  # of digits
        if self._reader is not None:
            self._note(self._reader)
        return images.permute(0, 2, 3, 1).contiguous().numpy()


class _Folder(Source):
    """Image files, decoded by threads a batch at a time."""

    def __init__(self, path: Path, manifest: Path | None, allow_lossy: bool):
        name = f"images {str(path)!r}"
        try:
            found = (file for file in path.iterdir() if is_image(file.name)) if manifest else image_files(path)
            files = sorted(map(Path, found))
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error}; make all of it readable") from None
        if not files:
            raise InputError(f"{name}: the folder holds no images ({', '.join(IMG_EXTENSIONS)})")
        self._allow_lossy, self._threads = allow_lossy, _threads()
        self._files = _by_index(name, files, _read_manifest(manifest)["num"]) if manifest else files
        self._first = first = self._decode(self._files[0])
        shape = (len(first.getbands()), first.height, first.width)
        super().__init__(name, len(files), shape, None, manifest, path)

    def _read(self, start: int, stop: int) -> np.ndarray:
        channels, height, width = self.image_shape
        images = np.empty((stop - start, height, width, channels), np.uint8)
        files = self._files[start:stop]
        for file, row, image in zip(files, images, self._threads.map(self._decode, files), strict=True):
            if (image.size, image.mode) != (self._first.size, self._first.mode):
                raise InputError(
                    f"image {str(file)!r} is {_form(image)}, {self._files[0].name} is {_form(self._first)}; "
                    "give images of one size and mode",
                    every_rank=True,
                )
            row[:] = np.asarray(image).reshape(row.shape)
        return images

    def _decode(self, file: Path) -> Image.Image:
        reader = Reader(channels=None)  # of its own, which tells of this image alone
        image = reader(read_image(str(file)), str(file))
        if reader.lossy and not self._allow_lossy:
            raise InputError(
                f"image {str(file)!r} is {reader.lossy}, which moves the scores; give PNGs, or "
                f"{option('allow_lossy', True)}",
                every_rank=True,
            )
        self._note(reader)
        return image


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")


def _form(image: Image.Image) -> str:
    return f"{image.width} x {image.height} {'RGB' if image.mode == 'RGB' else 'grey'}"


def _by_index(name: str, files: list[Path], num: int) -> list[Path]:
    """The files of images 0 to num - 1, from the numbers that are their names."""
    by_index: dict[int, Path] = {}
    for file in files:
        if not re.fullmatch(r"\d+", file.stem, re.ASCII):
            raise InputError(f"{name}: {file.name!r} is no index, as the manifest's images have; take it away")
        other = by_index.setdefault(int(file.stem), file)
        if other is not file:
            raise InputError(f"{name}: index {int(file.stem)} is there twice, {other.name} and {file.name}; remove one")
    missing = next((index for index in range(num) if index not in by_index), None)
    if missing is not None or len(by_index) != num:
        which = f"index {max(by_index)} is beyond" if missing is None else f"index {missing} is missing"
        raise InputError(
            f"{name}: {len(by_index)} images, but its manifest says {num}: {which}; make the samples again"
        )
    return [by_index[index] for index in range(num)]


MANIFEST_FORM = {
    "num": POSITIVE, "labels": (list, None), "image_shape?": (SHAPE, None), "labels_rule?": (str, None),
    "class_names?": ([str], None),
}  # fmt: skip


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, MANIFEST_FORM, finite=True)
    except (OSError, Malformed) as error:
        raise InputError(
            f"{str(path)!r} is not the manifest of samples ({error}); take it away, or make them again"
        ) from None


def _check_labels(name: str, labels, n: int) -> np.ndarray:
    """int64 (n,), not negative."""
    try:
        array = np.asarray(labels)
    except ValueError:
        array = np.empty(0, object)
    check_kind(name, array, n)
    if array.min() < 0:
        raise InputError(f"{name}: label {array.min()} is below 0; give class ids")
    if array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name}: label {array.max()} is beyond int64; give class ids")
    return np.ascontiguousarray(array, dtype=np.int64)
