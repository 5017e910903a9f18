"""Bytes of files that others wrote, read within bounds that hold before memory is taken."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20  # bytes
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def opened(path: str | Path) -> BinaryIO:
    """A regular file, open for reading. Raises OSError also for what is none: a FIFO would keep one waiting, a device
    may have no end."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder says itself what is wrong
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(mode), 'a device')}, no file", str(path))
    return open(path, "rb")


def read_bytes(path: str | Path, most: int) -> bytes:
    """A regular file of at most that many bytes. Raises OSError for another, ValueError for a larger one."""
    with opened(path) as file:
        return bounded(file, most)


def bounded(file: BinaryIO, most: int) -> bytes:
    """All that is left of a file. Raises ValueError where that is more than `most` bytes."""
    pieces, left = [], most + 1
    while left and (piece := file.read(min(left, PIECE))):  # one read of all would take memory for `most` at once
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise ValueError(f"it is larger than {most:,} bytes")
    return b"".join(pieces)
