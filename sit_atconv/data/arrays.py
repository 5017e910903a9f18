"""Images in an npz, as ADM has them: arr_0, uint8 (N, H, W, C), and their classes arr_1."""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import Image

from sit_atconv.config import Loading
from sit_atconv.data.images import (
    MOST_CLASSES,
    ONE_CLASS,
    Images,
    center_crop,
    check_labels,
    check_size,
    with_channels,
)
from sit_atconv.data.npz import UNREADABLE, Array, arrays_of, fill, read_header
from sit_atconv.runtime.errors import InputError, told

CHUNK = 1 << 22  # bytes that are read at once
WANTED = "give an npz with arr_0, uint8 (N, H, W, C) with 1 or 3 channels"


class PixelArray:
    """arr_0 of an npz: what is stored is read at its place in the file, what is compressed is streamed.

    name: what messages call it. shape: (N, H, W, C), C 1 or 3. labels: arr_1, integers (N,), or None.
    Raises InputError for a file without such arrays, or one that is cut.
    """

    def __init__(self, path: Path, name: str):
        self.name, self._path = name, path
        with told(f"{name} cannot be read", *UNREADABLE, remedy=WANTED):
            arrays = arrays_of(path, ("arr_0", "arr_1"))
            self._array, labels = arrays["arr_0"], arrays.get("arr_1")
            self.shape = self._array.shape
            if labels is not None:
                check_kind(name, labels, self.shape[0] if self.shape else 0)
                labels = labels.read()
        dtype, fortran = self._array.dtype, self._array.fortran
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] not in (1, 3) or fortran:
            raise InputError(f"{name}: arr_0 is {dtype} {self.shape}{', in Fortran order' * fortran}; {WANTED}")
        if not self._array.whole:
            raise InputError(f"{name} is truncated: arr_0 holds fewer bytes than {self.shape} needs; make it again")
        self.labels, self._row = labels, math.prod(self.shape[1:])
        self._stream, self._next = None, 0  # of compressed pixels, and the image that it stands at

    @property
    def compressed(self) -> bool:
        """Whether an image is found by reading those before it alone."""
        return self._array.place is None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start to stop - 1, (stop - start, H, W, C). One thread at a time may read what is compressed."""
        images = np.empty((stop - start, *self.shape[1:]), np.uint8)
        with self._damage_told():
            if not self.compressed:  # read, not mapped: a file that shrinks is an error then, not a fatal signal
                with open(self._path, "rb", buffering=0) as file:
                    file.seek(self._array.place + start * self._row)
                    fill(file, images)
            else:
                if self._stream is None or self._next > start:
                    self._open()
                self._stream.seek((start - self._next) * self._row, os.SEEK_CUR)  # reads what it passes over
                fill(self._stream, images)
                self._next = stop
        return images

    def whole(self) -> np.ndarray:
        """All images, in memory. Raises InputError where they are too many for that, or damaged."""
        with told(self.name, *UNREADABLE, remedy="store it without compression, as numpy.savez does"):
            return self._array.read()

    def _open(self) -> None:
        if self._stream is not None:
            self._stream.close()
        archive = zipfile.ZipFile(self._path)  # stays open as long as the member does
        self._stream, self._next = archive.open(self._array.entry), 0
        archive.close()
        read_header(self._stream)

    def content(self) -> Iterator[bytes]:
        """All bytes in order, as zipfile reads them, which compares the member's CRC."""
        with (
            self._damage_told(),
            zipfile.ZipFile(self._path) as archive,
            archive.open(self._array.entry) as file,
        ):
            file.read(self._array.start)
            while chunk := file.read(CHUNK):
                yield chunk

    def _damage_told(self) -> AbstractContextManager[None]:
        return told(f"{self.name} is truncated or damaged", *UNREADABLE, remedy="make it again", every_rank=True)


def check_kind(name: str, labels: np.ndarray | Array, n: int) -> None:
    """Raise InputError, beginning with `name`, unless labels are integers (n,)."""
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name}: labels must be integers, not {labels.dtype}; give one class id per image")
    if labels.shape != (n,):
        raise InputError(f"{name}: {n} images but labels of shape {labels.shape}; give one class id per image")


class Npz(Images):
    """The images of an npz; classes are the numbers up to the largest label, or one class where there is no arr_1.

    channels: 1, 3, or None for those of arr_0. What is compressed is held in memory.
    Raises InputError for a file that is no such npz, or whose images are larger than max_pixels.
    """

    def __init__(
        self, root: str, image_size: int, channels: int | None = None, max_pixels: int = Loading.max_pixels
    ):  # fmt: skip
        where = f"data.root={root!r}"
        self._pixels = PixelArray(Path(root), where)
        number, height, width, own = self._pixels.shape
        if not number:
            raise InputError(f"{where} holds no images")
        try:
            check_size(width, height, max_pixels)
        except ValueError as error:
            raise InputError(f"{where}: images of {error}; give others") from None
        labels, names = self._pixels.labels, ONE_CLASS
        if labels is None:
            labels = np.zeros(number, np.int64)
        else:
            names = range(min(int(labels.max()), MOST_CLASSES - 1) + 1)
        super().__init__(image_size, map(str, names))
        check_labels(where, labels, self.class_names)
        self.root, self.labels, self.channels = root, labels.astype(np.int64), channels or own
        self._held = self._pixels.whole() if self._pixels.compressed else None

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def picture(self, index: int, size: int | None = None) -> tuple[Image.Image, int]:
        """As of every kind. Raises InputError: a file of which one image cannot be read is damaged as a whole."""
        pixels = self._pixels.read(index, index + 1)[0] if self._held is None else self._held[index]
        image = with_channels(Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), self.channels)
        return (image if size is None else center_crop(image, size)), int(self.labels[index])
