"""Images to be scored, from wherever they lie, never all in memory: npz files, folders, arrays."""

import hashlib
import math
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.npz import UNREADABLE, Array, arrays_of, fill, read_header
from sit_atconv.claims import SETTINGS
from sit_atconv.config import Loading
from sit_atconv.data.images import DAMAGED, MOST_BYTES, image_files, open_image
from sit_atconv.errors import InputError
from sit_atconv.files import sha256
from sit_atconv.reading import POSITIVE, SHAPE, Malformed, read_bytes, read_json

LOSSLESS, LOSSY = ("PNG", "BMP"), ("JPEG", "WEBP")
SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg", ".webp")
MANIFEST, SAMPLES = "manifest.json", "samples.npz"
CHUNK = 1 << 22  # bytes that are hashed at once
MOST_BATCH = 1 << 32  # bytes of a batch
WANTED = "give an npz with arr_0, uint8 (N, H, W, C) with 1 or 3 channels"


class Source:
    """n images of one size, uint8, by index, with what is known of them.

    n: at least 2. image_shape: (C, H, W), C 1 or 3. labels: class ids, int64 (n,), or None. manifest: of the samples
    command, or None. lossy: whether images that lost something (JPEG, WebP) were let in.
    A subclass has `_read`. One thread at a time may read.
    """

    lossy = False

    def __init__(self, name: str, n: int, image_shape: Sequence[int], labels=None, manifest: Path | None = None):
        self.name, self.n, self.image_shape = name, n, tuple(image_shape)
        self.manifest = None if manifest is None else _read_manifest(manifest)
        self.manifest_sha256 = None if manifest is None else sha256(manifest)
        if n < 2:
            raise InputError(f"{name}: {n} image{'s' * (n != 1)} make no distribution; give at least 2")
        if (pixels := self.image_shape[1] * self.image_shape[2]) > Loading.max_pixels:
            raise InputError(
                f"{name}: images of {pixels:,} pixels; at most {Loading.max_pixels:,} are scored: give smaller ones"
            )
        if self.manifest is not None:
            labels = self._agree_with_manifest(labels)
        self.labels = None if labels is None else _check_labels(name, labels, n)

    def _agree_with_manifest(self, labels):
        """The labels, after the manifest's number of images, their shape and their labels are found to be these."""
        num, stated = self.manifest["num"], self.manifest["labels"]
        if self.n != num:
            raise InputError(f"{self.name}: {self.n} images, but its manifest says {num}; make the missing ones again")
        shape = tuple(self.manifest.get("image_shape") or self.image_shape)
        if shape != self.image_shape:
            raise InputError(f"{self.name}: images of shape {self.image_shape}, but its manifest says {shape}")
        if labels is None or stated is None:
            return stated if labels is None else labels
        if not np.array_equal(labels, np.asarray(stated)):
            raise InputError(f"{self.name}: arr_1 and the manifest's labels differ; make the samples again")
        return labels

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop - 1, (stop - start, H, W, C), in memory that is the caller's."""
        raise NotImplementedError

    def _content(self) -> Iterator[bytes | np.ndarray]:
        """All pixels in index order, NHWC."""
        step = max(1, CHUNK // int(np.prod(self.image_shape)))
        return (self._read(first, min(first + step, self.n)) for first in range(0, self.n, step))

    def batches(self, start: int = 0, stop: int | None = None, size: int = 64) -> Iterator[torch.Tensor]:
        """Images start to stop - 1 (default: all) as uint8 (B, C, H, W), B = size but for the last; memory is NHWC.

        Raises InputError for an image that cannot be read, or is not like the others.
        """
        stop = self.n if stop is None else stop
        if min(size, stop - start) * math.prod(self.image_shape) > MOST_BATCH:
            raise InputError(
                f"{self.name}: {size} images of {self.image_shape} at once are over 4 GiB; lower the batch"
            )
        for first in range(start, stop, size):
            yield torch.from_numpy(self._read(first, min(first + size, stop))).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of all pixels in index order, each image (H, W, C): that of arr_0's bytes, wherever the images lie.

        Reads all images once. Raises InputError for one that cannot be read, or is not like the others.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in self._content():
            digest.update(part)
        return digest.hexdigest()

    def class_histogram(self) -> dict[str, int] | None:
        """Number of images of each class that there is; None without labels."""
        return class_histogram(self.labels)

    def describe(self) -> dict[str, Any]:
        """What a result records: name, digest of the pixels, labels' digest, and the manifest but for its labels."""
        manifest = self.manifest and {key: value for key, value in self.manifest.items() if key != "labels"}
        return {
            "path": self.name,
            "pixels_sha256": self.digest(),
            "labels_sha256": None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "lossy": self.lossy,
            "manifest": manifest,
            "manifest_sha256": self.manifest_sha256,
        }


def class_histogram(labels: np.ndarray | None) -> dict[str, int] | None:
    """Number of images of each class that there is, by class id; None without labels."""
    if labels is None:
        return None
    return {str(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)}


def open_source(path: str | Path, allow_lossy: bool = False) -> Source:
    """The images at `path`: an npz, or a folder.

    npz: `arr_0`, uint8 (N, H, W, C), stored or compressed, and perhaps labels `arr_1`, integers (N,).
    Folder with manifest.json: its samples.npz, or one image file per index, which is the number in the file's name.
    Any other folder: its image files, subfolders too, in the order of their paths.
    allow_lossy: let JPEG and WebP in.
    Raises InputError for anything else, and for images that break a rule of `Source`.
    """
    path = Path(path)
    if path.is_file():
        beside = path.with_name(MANIFEST)
        return _Npz(path, beside if path.name == SAMPLES and beside.is_file() else None)
    if not path.is_dir():
        embedded = "; the embedded digits are what `score --ref digits` compares with" * (str(path) == "digits")
        raise InputError(f"images {str(path)!r}: no such file or folder{embedded}")
    manifest = path / MANIFEST if (path / MANIFEST).is_file() else None
    if manifest is None and (path / SETTINGS).is_file():
        if "extractor" in begun_as(path):
            raise InputError(f"{str(path)!r} holds features; give the images that they are of")
        raise InputError(f"{str(path)!r} holds unfinished samples; run the command that began them again, it goes on")
    if (path / SAMPLES).is_file():
        if manifest is None:
            raise InputError(f"images {str(path)!r}: {SAMPLES} without {MANIFEST} is unfinished; finish it, or give it")
        return _Npz(path / SAMPLES, manifest)
    return _Folder(path, manifest, allow_lossy)


def begun_as(path: Path) -> dict[str, Any]:
    """The settings.json of a folder, which says what it is going to be; {} where there is none that can be read."""
    try:
        return read_json(path / SETTINGS)
    except (OSError, Malformed):
        return {}


def from_arrays(pixels: torch.Tensor | Sequence[torch.Tensor], labels=None, name: str = "images") -> Source:
    """Images that are in memory: uint8 (N, C, H, W), or batches of that form. labels: integers (N,).

    Raises InputError for what breaks a rule of `Source`.
    """
    return _Arrays(name, [pixels] if isinstance(pixels, torch.Tensor) else list(pixels), labels)


class _Arrays(Source):
    def __init__(self, name: str, parts: list[torch.Tensor], labels):
        for part in parts:
            if part.dtype != torch.uint8 or part.ndim != 4 or part.shape[1] not in (1, 3):
                found = f"{part.dtype} {tuple(part.shape)}".removeprefix("torch.")
                raise InputError(f"{name}: {found}; give uint8 (N, C, H, W) with 1 or 3 channels")
            if part.shape[1:] != parts[0].shape[1:]:
                raise InputError(f"{name}: of shapes {tuple(parts[0].shape[1:])} and {tuple(part.shape[1:])}; give one")
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        super().__init__(name, int(self._starts[-1]), parts[0].shape[1:] if parts else (), labels)

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = zip(self._parts, self._starts.tolist(), strict=False)
        chosen = [part[max(0, start - first) : max(0, stop - first)] for part, first in parts]
        return np.ascontiguousarray(torch.cat(chosen).permute(0, 2, 3, 1).cpu().numpy())


class _Npz(Source):
    """arr_0 of an npz: what is stored is read at its place in the file, what is compressed is streamed."""

    def __init__(self, path: Path, manifest: Path | None):
        name = f"images {str(path)!r}"
        self._path = path
        try:
            arrays = arrays_of(path, ("arr_0", "arr_1"))
            pixels, labels = arrays["arr_0"], arrays.get("arr_1")
            shape, dtype, fortran = pixels.shape, pixels.dtype, pixels.fortran
            if labels is not None:
                _check_kind(name, labels, shape[0] if shape else 0)
                labels = labels.read()
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{name} cannot be read: {_said(error)}; {WANTED}") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise InputError(f"{name}: arr_0 is {dtype} {shape}{', in Fortran order' * fortran}; {WANTED}")
        self._member, self._offset, self._header = pixels.entry, pixels.place, pixels.start
        self._row, n = math.prod(shape[1:]), shape[0]
        if not pixels.whole:
            raise InputError(f"{name} is truncated: arr_0 holds fewer bytes than {shape} needs; make it again")
        self._stream, self._next = None, 0  # of compressed pixels, and the image that it stands at
        super().__init__(name, n, (shape[3], *shape[1:3]), labels, manifest)

    def _read(self, start: int, stop: int) -> np.ndarray:
        channels, *size = self.image_shape
        images = np.empty((stop - start, *size, channels), np.uint8)
        try:
            if self._offset is not None:  # read, not mapped: a file that shrinks is an error then, not a fatal signal
                with open(self._path, "rb", buffering=0) as file:
                    file.seek(self._offset + start * self._row)
                    fill(file, images)
            else:
                if self._stream is None or self._next > start:
                    self._open()
                self._stream.seek((start - self._next) * self._row, os.SEEK_CUR)  # reads what it passes over
                fill(self._stream, images)
                self._next = stop
        except UNREADABLE as error:
            raise self._damaged(error) from None
        return images

    def _open(self) -> None:
        self.close()
        archive = zipfile.ZipFile(self._path)  # stays open as long as the member does
        self._stream, self._next = archive.open(self._member), 0
        archive.close()
        read_header(self._stream)

    def close(self) -> None:
        """Close the file, which the next read opens again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _content(self) -> Iterator[bytes]:
        """As zipfile reads it, which compares the member's CRC."""
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as file:
                file.read(self._header)
                while chunk := file.read(CHUNK):
                    yield chunk
        except UNREADABLE as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"{self.name} is truncated or damaged: {_said(error)}; make it again", every_rank=True)


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


class _Folder(Source):
    """Image files, decoded by threads a batch at a time."""

    def __init__(self, path: Path, manifest: Path | None, allow_lossy: bool):
        name = f"images {str(path)!r}"
        try:
            if manifest:
                found = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
            else:
                found = map(Path, image_files(path))
            files = sorted(found)
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error}; make all of it readable") from None
        if not files:
            raise InputError(f"{name}: the folder holds no images ({', '.join(SUFFIXES)})")
        for file in files:
            if file.suffix.lower() not in SUFFIXES:
                raise InputError(
                    f"image {str(file)!r}: {', '.join(SUFFIXES)} are scored, and no image is left out; convert it, or "
                    "take it away"
                )
        self._allow_lossy = allow_lossy
        self._files = _by_index(name, files, _read_manifest(manifest)["num"]) if manifest else files
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")
        height, width, *channels = _decode(self._files[0], self._allow_lossy)[0].shape
        super().__init__(name, len(files), (*channels, height, width), None, manifest)

    def _read(self, start: int, stop: int) -> np.ndarray:
        channels, height, width = self.image_shape
        images = np.empty((stop - start, height, width, channels), np.uint8)
        decoded = self._pool.map(lambda file: _decode(file, self._allow_lossy), self._files[start:stop])
        for file, row, (image, lossy) in zip(self._files[start:stop], images, decoded, strict=True):
            if image.shape != row.shape:
                raise InputError(
                    f"image {str(file)!r} is {_size(image)}, {self._files[0].name} is {_size(row)}; "
                    "give images of one size and mode",
                    every_rank=True,
                )
            row[:] = image
            self.lossy |= lossy
        return images


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} {'RGB' if image.shape[2] == 3 else 'grey'}"


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


def _decode(file: Path, allow_lossy: bool) -> tuple[np.ndarray, bool]:
    """Pixels (H, W, 1 or 3) of an 8-bit grey or RGB image, and whether its format loses something."""
    wanted = "give 8-bit grey or RGB images without alpha"
    try:
        content = read_bytes(file, MOST_BYTES)
        with open_image(content, formats=(*LOSSLESS, *LOSSY)) as image:
            lossy, mode = image.format not in LOSSLESS, image.mode
            deep = image.format == "PNG" and content[24] == 16  # bits, of which Pillow drops half for RGB, and says 8
            clear = "transparency" in image.info
            if mode in ("L", "RGB") and not deep and not clear and (allow_lossy or not lossy):
                pixels = np.asarray(image)
                return (pixels[:, :, None] if mode == "L" else pixels), lossy
    except DAMAGED as error:
        raise InputError(
            f"image {str(file)!r} does not decode ({_said(error)}); repair or remove it", every_rank=True
        ) from None
    if lossy and not allow_lossy:
        raise InputError(
            f"image {str(file)!r} is {image.format}, which moves the scores; give PNGs, or --allow-lossy",
            every_rank=True,
        )
    what = "16-bit" if deep or mode.startswith("I") else "transparent" if clear else f"of mode {mode}"
    raise InputError(f"image {str(file)!r} is {what}; {wanted}", every_rank=True)


MANIFEST_FORM = {"num": POSITIVE, "labels": (list, None), "image_shape?": (SHAPE, None), "labels_rule?": (str, None)}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, MANIFEST_FORM, finite=True)
    except (OSError, Malformed) as error:
        raise InputError(
            f"{str(path)!r} is not the manifest of samples ({error}); take it away, or make them again"
        ) from None


def _check_kind(name: str, array: np.ndarray | Array, n: int) -> None:
    """Raise InputError unless it is integers (n,)."""
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: labels must be integers, not {array.dtype}; give one class id per image")
    if array.shape != (n,):
        raise InputError(f"{name}: {n} images but labels of shape {array.shape}; give one class id per image")


def _check_labels(name: str, labels, n: int) -> np.ndarray:
    """int64 (n,), not negative."""
    try:
        array = np.asarray(labels)
    except ValueError:
        array = np.empty(0, object)
    _check_kind(name, array, n)
    if array.min() < 0:
        raise InputError(f"{name}: label {array.min()} is below 0; give class ids")
    if array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name}: label {array.max()} is beyond int64; give class ids")
    return np.ascontiguousarray(array, dtype=np.int64)
