"""The arrays of an npz, each known by its header before memory is taken for it."""

import math
import os
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sit_atconv.data.archive import LOCAL_HEADER, METHODS
from sit_atconv.runtime.bounded import opened

# What numpy and zipfile raise for a file that is no npz, or a broken one.
UNREADABLE = (
    OSError, EOFError, TypeError, ValueError, KeyError, RuntimeError, OverflowError, MemoryError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
MOST_BYTES = 1 << 30  # of an array in memory: the covariance of 11,585 features
MOST_DEFLATED = 1032  # bytes that deflate makes of one, at most


@dataclass(frozen=True)
class Array:
    """An array of an npz. start: bytes of its header. place: of its values in the file, where they are not compressed.

    whole: whether the file holds as many bytes as the shape needs.
    """

    path: Path
    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int
    place: int | None

    @property
    def size(self) -> int:
        """Number of values, which numpy would take modulo 2^64."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        return self.entry.file_size == self.start + self.nbytes

    def check(self) -> None:
        """Raise ValueError for what `read` does not read: objects, what is truncated, more than MOST_BYTES."""
        if self.dtype.hasobject:
            raise ValueError(f"{self.entry.filename} holds Python objects, which allow_pickle=False does not read")
        if not self.whole:
            raise ValueError(f"{self.entry.filename} is truncated: it holds fewer bytes than {self.shape} needs")
        if self.nbytes > MOST_BYTES:
            raise ValueError(f"{self.entry.filename} takes {self.nbytes:,} bytes, over {MOST_BYTES:,}")

    def read(self) -> np.ndarray:
        """The values. Raises one of UNREADABLE, and before memory is taken what `check` raises."""
        self.check()
        values = np.empty(self.shape, self.dtype, "F" if self.fortran else "C")
        with opened(self.path) as held, zipfile.ZipFile(held) as archive, archive.open(self.entry) as file:
            read_header(file)
            fill(file, values.T if self.fortran else values)
            file.read(1)  # at the end zipfile compares the sum
        return values


def arrays_of(path: Path, wanted: Collection[str]) -> dict[str, Array]:
    """Those of the wanted arrays that an npz holds, by name.

    Raises one of UNREADABLE for a file that is none, or an entry that states more bytes than its file can hold.
    """
    with opened(path) as held, zipfile.ZipFile(held) as archive:
        size = os.fstat(held.fileno()).st_size
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        return {name: _array(path, archive, entries[name], size) for name in wanted if name in entries}


def _array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> Array:
    if entry.compress_type not in METHODS:
        raise ValueError(f"{entry.filename} is compressed in a rare way")
    most = entry.compress_size * (MOST_DEFLATED if entry.compress_type else 1)
    if entry.header_offset + entry.compress_size > size or entry.file_size > most:
        raise ValueError(f"{entry.filename} states {entry.file_size:,} bytes, and the file cannot hold them")
    with archive.open(entry) as file:
        shape, fortran, dtype = read_header(file)
        start = file.tell()
    if any(side < 0 for side in shape):
        raise ValueError(f"{entry.filename} has the shape {shape}")
    archive.fp.seek(entry.header_offset)
    lengths = LOCAL_HEADER.unpack(archive.fp.read(LOCAL_HEADER.size))[1:]
    place = entry.header_offset + LOCAL_HEADER.size + sum(lengths) + start
    return Array(path, entry, shape, fortran, dtype, start, None if entry.compress_type else place)


def read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a .npy, which `file` then stands behind."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f".npy of version {version}")


def fill(file, array: np.ndarray) -> None:
    """Read as many bytes as the array holds. Raises EOFError where there are fewer."""
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("the file ends early")
        view = view[count:]
