"""Files that are there whole or not at all, and what identifies them."""

import errno
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sit_atconv.errors import InputError
from sit_atconv.version import __version__

LOCK = ".lock"


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all, even where two processes do; makes the folders above.

    What a killed process leaves is named NAME.SOMETHING.tmp; after an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lock(folder: Path, name: str) -> TextIO:
    """Take a folder for this process, as long as the file that this returns is open; makes the folder.

    name: of the folder, for the InputError that is raised where another process has it. A process that is killed lets
    go of it, and so does one that ends; its children do not have it. File systems without locks are passed over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+")  # noqa: SIM115 (stays open)
    try:
        _lock(file)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise InputError(f"{name} is in use by another process; end that one, or choose another folder") from None
    return file


def _lock(file: TextIO) -> None:
    """Lock a file for this process, or raise OSError."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_new(out: Path) -> None:
    """Raise InputError where `out` exists, or what should be a folder above it is none."""
    try:
        exists, above = out.exists(), next(path for path in out.absolute().parents if path.exists())
    except OSError as error:
        raise InputError(f"--out {str(out)!r}: {error.strerror}") from None
    if exists:
        raise InputError(f"--out {str(out)!r}: exists already; choose a new name")
    if not above.is_dir():
        raise InputError(f"--out {str(out)!r}: {str(above)!r} is no folder; choose another place")


def check_writable(out: Path) -> None:
    """Raise InputError where no file can be made at `out`: one is made in the nearest folder there is, and goes."""
    try:
        above = next(path for path in out.absolute().parents if path.exists())
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise InputError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from None


@contextmanager
def new_path(out: Path, what: str = "--out") -> Iterator[Path]:
    """A path beside `out` to write a file or folder to, which then becomes `out`; after a fault nothing is left of it.

    Makes the folders above. Raises InputError where the disk does not take it; what: the name of `out` there.
    """
    out = out.absolute()
    unfinished = out.with_name(f".{out.name}.unfinished")

    def clear() -> None:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear()
        try:
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                sync(path)
            unfinished.rename(out)
        finally:
            clear()
    except OSError as error:
        raise InputError(f"{what} {str(out)!r} cannot be written: {error.strerror or error}") from None


def free_space(path: Path) -> int:
    """Bytes that are free where `path` lies or will lie."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


class DiskFull(InputError):
    """The disk does not take what was to be written; what was there before is as it was."""


def check_space(path: Path, needed: int) -> None:
    """Raise the OSError that writing `needed` bytes at `path` would end in, as far as that is known beforehand."""
    if free_space(path) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full(error: Exception) -> bool:
    """Whether an error of writing says that the disk, a quota or the largest file allowed is reached.

    safetensors has the system's number in its text alone.
    """
    number = getattr(error, "errno", None) or next(map(int, re.findall(r"os error (\d+)", str(error))), None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def shown(path: Path) -> str:
    """A path as a record has it: relative to the working directory where it lies below, so that it means something
    on another machine; else absolute."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def sync(path: Path) -> None:
    """Force a file or folder to the disk; Windows opens no folder, and needs no more than its files."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def settle(folder: Path) -> None:
    """Force a new folder and all in it to the disk, readable for whom the umask says.

    safetensors makes its files for their owner alone, whatever the umask.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"  # os.umask tells by changing it, for all threads
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions(*more: str) -> dict[str, str]:
    """Versions of what decides a result: this library, Python, the numerical libraries, and `more` distributions."""
    names = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "safetensors", *more)
    return {
        "sit_atconv": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
