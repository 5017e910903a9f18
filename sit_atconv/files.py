"""Files that are there whole or not at all, and what identifies them."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import reprlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from sit_atconv.errors import InputError
from sit_atconv.version import __version__

LOCK = ".lock"

# Forms of values in a JSON document, see `has_form`.
COUNT, POSITIVE = range(2**63), range(1, 2**63)
SHA256 = re.compile("[0-9a-f]{64}")
FILE = re.compile(r"(?!\.\.?$)[^/\\]+")  # the name of a file in the same folder
SHAPE = [POSITIVE] * 3  # (C, H, W) of images
INSIDE = re.compile(r"(?!/|(.*/)?\.\.?(/|$))[^\\]+")  # the path of a file below it
_NAMES = {
    object: "anything", dict: "an object", list: "a list", str: "text", bool: "true or false", None: "null",
    int: "a whole number of 64 bits", float: "a finite number", SHA256: "a SHA-256", FILE: "the name of a file",
    INSIDE: "the path of a file below the folder",
}  # fmt: skip


class Malformed(InputError):
    """A text that is no JSON, or a document that lacks what it must hold; the message names the place and the rule."""


def read_json(path: Path, form: Any = dict, finite: bool = False) -> Any:
    """The JSON document in a file; see `parse_json`. Raises Malformed, and OSError for a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{path.name} is no JSON that can be read: {error}") from None
    return parse_json(text, path.name, form, finite)


def parse_json(text: str | bytes, name: str, form: Any = dict, finite: bool = False) -> Any:
    """The JSON document that a text is, where it has the form; name: how a message calls it. finite: Python's NaN and
    infinities, which JSON does not have, are refused wherever they are.

    A form says what a reader needs, so that it need not look again:
        int, float, str, bool, dict, list, object   of that type; a float is finite, an int is within 64 bits
        range(1, 9)                                 a whole number in it
        re.compile(...)                             a text that it matches as a whole
        {"key": form, "other?": form}               an object with these keys, those with ? where they are there
        {str: form}, [form]                         an object, a list, all of whose values have the form; in the place
                                                    of str, what all keys match; [form, form] a list of so many
        (form, form), "text", None, ...             one of these; that value
    Raises Malformed.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        document = json.loads(text)
        if finite:
            json.dumps(document, allow_nan=False)
        if "\\u" in text:  # the way to what no name of a file and no page can hold: a lone surrogate, a NUL
            json.dumps(document, ensure_ascii=False).encode()
            if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
                raise ValueError("it has a NUL in a text")
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Malformed(f"{name} is no JSON that can be read: {said}") from None
    if fault := fault_of(document, form):
        raise Malformed(f"{name}: {fault}")
    return document


def fault_of(value: Any, form: Any) -> str | None:
    """What keeps a JSON value from having a form, see `parse_json`; None where nothing does."""
    return _fault(value, form, "")


def _fault(value: Any, form: Any, place: str) -> str | None:
    """What keeps the value at a place from having the form, None where nothing does."""
    if isinstance(form, tuple):
        faults = [_fault(value, each, place) for each in form]
        deeper = [fault for fault in faults if fault != _misfit(value, form[faults.index(fault)], place)]
        return None if None in faults else next(iter(deeper), _misfit(value, form, place))
    if isinstance(form, dict) and isinstance(value, dict):
        for key, wanted in form.items():
            if isinstance(key, str):
                name = key.removesuffix("?")
                if name not in value and name == key:
                    return f"{place}{name} is missing"
                names = [name] if name in value else []
            else:
                names = list(value)
                if strange := next((name for name in names if _fault(name, key, "")), None):
                    return f"{place}{strange!r} is a key that must be {_named(key)}"
            faults = (_fault(value[name], wanted, f"{place}{name}.") for name in names)
            if fault := next(filter(None, faults), None):
                return fault
        return None
    if isinstance(form, list) and isinstance(value, list):
        if len(form) > 1 and len(value) != len(form):
            return _misfit(value, form, place)
        forms = form if len(form) > 1 else form * len(value)
        faults = (
            _fault(each, wanted, f"{place}{index}.")
            for index, (each, wanted) in enumerate(zip(value, forms, strict=True))
        )
        return next(filter(None, faults), None)
    if form is object:
        fits = True
    elif form is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    elif form is int or isinstance(form, range):
        fits = type(value) is int and value in (range(-(2**63), 2**63) if form is int else form)
    elif isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value) is not None
    elif isinstance(form, type):
        fits = type(value) is form
    else:
        fits = type(value) is type(form) and value == form
    return None if fits else _misfit(value, form, place)


def _misfit(value: Any, form: Any, place: str) -> str:
    return f"{place.rstrip('.') or 'it'} is {reprlib.repr(value)}, and must be {_named(form)}"


def _named(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_named, form))
    if isinstance(form, range):
        return f"a whole number, {form.start} to {form.stop - 1}"
    if isinstance(form, re.Pattern) and form not in _NAMES:
        return f"a text of the form {form.pattern}"
    if isinstance(form, list) and len(form) > 1:
        return f"a list of {len(form)}"
    if isinstance(form, dict | list):
        return _NAMES[type(form)]
    return json.dumps(form) if isinstance(form, str | int) else _NAMES[form]


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
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise InputError(f"{name} is in use by another process; end that one, or choose another folder") from None
    return file


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
    """Force a file or folder to the disk."""
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
