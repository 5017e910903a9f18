"""Files that are there whole or not at all, whose they are, and what identifies them.

The one rule, also in docs/files.md: a path is resolved first; only what carries this program's mark, or what this
process made, is replaced or removed; anything else is refused, or by force set aside under another name.
"""

import errno
import functools
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, option, reason, told
from sit_atconv.runtime.reading import read_json, spelt
from sit_atconv.version import __version__

if TYPE_CHECKING:
    from PIL import Image

LOCK = ".lock"
MARK = "sit_atconv"
OWNER = f".{MARK}"  # in a folder that this program may clear: what lies beside it there is its own
# Names of what a killed process was writing: .NAME.(12 hex digits).unfinished; of earlier versions NAME.(12 or 32).tmp.
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.unfinished|.+\.(?:[0-9a-f]{12}|[0-9a-f]{32})\.tmp", re.DOTALL)
STEP = re.compile("step-([0-9]+)")
MARKDOWN = f"<!-- made by {MARK} -->"
LONG = 1 << 28  # bytes that take so long to read or write that it is told
PIECE = 1 << 22  # bytes that are read at once
LARGEST_RESULT = 1 << 28  # bytes of a file that is read to see whose it is
_held: set[Path] = set()  # what this process is writing, as system locks do not part its threads


def resolved(path: str | Path, what: str | None = None) -> Path:
    """The path without links and "..", relative where it lies below the current folder. Raises InputError for a path
    that cannot be; what: its name there, by default that of the argument `out`."""
    kinds = OSError, ValueError, RuntimeError  # too long, NUL, links in a circle
    with told(f"{what or option('out')} {str(path)!r} cannot be written", *kinds, remedy="choose another place"):
        full = Path(path).resolve()
        full.exists()
    return _from_here(full)


def set_aside(path: Path, suffix: str = "aside") -> Path:
    """Rename a file or folder to NAME.SUFFIX, or NAME.SUFFIX-2 and so on; the new path. Nothing is lost.

    Raises InputError for the current folder and those above it, OSError where the disk does not take it.
    """
    check_movable(path)
    names = (f"{path.name}.{suffix}", *(f"{path.name}.{suffix}-{number}" for number in range(2, 10_000)))
    aside = next(each for name in names if not os.path.lexists(each := path.with_name(name)))
    path.rename(aside)
    return aside


def check_movable(path: Path) -> None:
    """Raise InputError for the current folder and those above it, which stay where they are."""
    if Path.cwd().is_relative_to(path.absolute()):
        raise InputError(f"{str(path)!r} is the current folder, or above it, and stays; choose another name")


class Made:
    """Folders and files that this process made: `take_back` removes these, and no folder that holds anything else."""

    def __init__(self):
        self.paths: list[Path] = []

    def folder(self, path: Path) -> bool:
        """Make a folder and those above it; whether it is new."""
        missing = [each for each in (path, *path.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir()
            self.paths.append(each)
        return bool(missing)

    def take_back(self) -> None:
        for path in reversed(self.paths):
            with suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self.paths = []


def made_here(*keys: str) -> Callable[[Path], bool]:
    """Says of a file whether it is a result that the same command may write anew: of JSON, an object with these keys or
    a list of such; of Markdown, HTML and PNG, one with this program's mark."""

    def is_ours(path: Path) -> bool:
        try:
            if path.stat().st_size > LARGEST_RESULT:
                return False
            if path.suffix == ".json":
                stored = read_json(path, (dict, [dict]))
                each = stored if isinstance(stored, list) else [stored]
                return bool(keys and each) and all(set(keys) <= one.keys() for one in each)
            if path.suffix == ".md":
                return path.read_text().rstrip().endswith(MARKDOWN)
            if path.suffix in (".html", ".htm"):
                return f'content="{MARK}' in path.read_text()[:4096]
            if path.suffix.lower() == ".png":
                return _is_marked_png(path)
        except (OSError, ValueError, AttributeError, SyntaxError, RecursionError):
            pass  # of another kind, whatever it is
        return False

    return is_ours


def _is_marked_png(path: Path) -> bool:
    from PIL import Image  # here, as safetensors below: commands that write neither do without them

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == MARK
    except Image.DecompressionBombError:
        return False


def tensors_made_here(key: str) -> Callable[[Path], bool]:
    """Says of a file whether it is safetensors whose metadata have the key of one kind of this program's files."""

    def is_ours(path: Path) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return key in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    return is_ours


REPORT = made_here()
# Beside the weights of a model, which it is of: what a cache goes by. No manifest lists it, since it may come later.
MAG_RATIOS = "mag_ratios.json"


def png(image: "Image.Image") -> bytes:
    """A PNG with this program's mark."""
    from PIL.PngImagePlugin import PngInfo

    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", MARK)
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def figure_png(figure) -> bytes:
    """A figure of matplotlib as a PNG with this program's mark."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": MARK})
    return buffer.getvalue()


def check_out(
    out: str | Path, what: str | None = None, force: bool = False, ours: Callable[[Path], bool] = lambda path: False
) -> Path:
    """Where a command writes to, `resolved`; nothing is changed there, but what was left by one that was killed once
    `out` was whole goes.

    ours: says of a file that it may be replaced. force: whatever is there may be set aside; see `put`.
    Raises InputError where something else is there, and where nothing can be written.
    """
    # `force` is the caller's to say, but where a command writes what no argument of its own names.
    aside = option("force", True) + ", which sets it aside"
    remedy = "move it away" if what and aside.startswith("--") else aside
    what = what or option("out")
    out = resolved(out, what)
    name = f"{what} {str(out)!r}"
    with told(f"{name} cannot be written", OSError):
        if os.path.lexists(out):
            if not (out.is_dir() or out.is_file()):
                raise InputError(f"{name} is neither file nor folder; choose a new name")
            check_movable(out)
            if not (force or (out.is_file() and ours(out))):
                _clear_claimed(out)
                is_there = "exists already, and is a folder" if out.is_dir() else "exists already"
                raise InputError(f"{name}: {is_there}; choose a new name, or {remedy}")
        above = _nearest(out.absolute().parent)
        if not above.is_dir():
            raise InputError(f"{name} cannot be written: {str(above)!r} is no folder; choose another place")
        tempfile.TemporaryFile(dir=above).close()
        out.exists()
    return out


def _nearest(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def check_writable(folder: Path) -> None:
    """Raise the OSError that making a file in a folder, which need not be there yet, is known to end in."""
    above = _nearest(folder.absolute())
    if not above.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def named(stem: str, *ends: str) -> list[Path]:
    """The files of a command whose `out` is the beginning of their names. Raises InputError for one that is none."""
    path = Path(stem)
    if not path.name:
        raise InputError(f"{option('out')} {stem!r}: give the beginning of a file's name, such as runs/new")
    return [path.with_name(path.name + end) for end in ends]


def put(new: Path, out: Path, what: str, force: bool, ours: Callable[[Path], bool]) -> None:
    """Give a file or folder the name `out`. There, what is `ours` is replaced, and what is not is set aside by force.

    Raises InputError as `check_out`.
    """
    check_out(out, what, force, ours)
    if os.path.lexists(out) and not (out.is_file() and new.is_file() and ours(out)):
        aside = set_aside(out)
        print(f"{what} {str(out)!r}: what was there is now {str(aside)!r}", file=sys.stderr)
    new.rename(out)
    sync(out.parent)


def _short(name: str) -> str:
    """The beginning of a name, so that there is room for more in the 255 bytes of a file's."""
    return os.fsdecode(os.fsencode(name)[:200])


def step_name(step: int) -> str:
    """The name of a checkpoint, a snapshot or a preview of a step: seven digits, or more where the step has more."""
    return f"step-{step:07d}"


def step_in(name: str) -> int | None:
    """The step in such a name; None in any other."""
    found = STEP.fullmatch(name)
    return found and int(found[1])


def by_step(paths: Iterable[Path], suffix: str = "") -> list[Path]:
    """Those with the name of a step and this suffix, by their steps, which is not the order of their names."""
    steps = {path: step_in(path.name.removesuffix(suffix)) for path in paths if path.name.endswith(suffix)}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: (steps[path], path))


def temporary(path: Path) -> Path:
    """A new name beside `path`, which `is_leftover` knows."""
    return path.with_name(f".{_short(path.name)}.{uuid.uuid4().hex[:12]}.unfinished")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing in a folder of this program. Call it while no other one writes."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def whole(path: Path, synced: bool = True) -> Iterator[Path]:
    """A path to write a file to, which then becomes `path` in a folder of this program: it is there whole or not at
    all, even where two processes write it.

    synced: even where the machine crashes then. What a killed process leaves goes by `clear_leftovers`; after an error
    nothing is left.
    """
    unfinished = temporary(path)
    try:
        yield unfinished
        if synced:
            sync(unfinished)
        unfinished.replace(path)
        if synced:
            sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file of a folder of this program, which is made, see `whole`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        unfinished.write_bytes(encoded(content))


def write_out(
    out: str | Path, content: str | bytes, what: str | None = None, force: bool = False,
    ours: Callable[[Path], bool] = REPORT,
) -> None:  # fmt: skip
    """Write a result, whole or not at all, which the next call may replace: see `put`. Markdown gets its mark here.

    Raises InputError where something else is there, and where the disk does not take it.
    """
    out = Path(out)
    if out.suffix == ".md":
        content = f"{content.rstrip()}\n\n{MARKDOWN}\n"
    with new_path(out, what, force, ours) as unfinished:
        unfinished.write_bytes(encoded(content))


def lock(folder: Path, name: str, file: str = LOCK) -> TextIO:
    """Take a folder for this process, as long as the file that this returns is open; makes the folder.

    name: of the folder, for the InputError that is raised where another process has it. A process that is killed lets
    go of it, and so does one that ends; its children do not have it. File systems without locks are passed over.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / file, "a+")  # noqa: SIM115 (stays open)
        try:
            _lock(held)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                held.close()
                raise InputError(
                    f"{name} is in use by another process; end that one, or choose another folder"
                ) from None
        if _is_same(held.fileno(), folder / file):
            return held
        held.close()  # the one that had it has removed it since


# How fcntl's record of a lock is laid out, by system: where its type is among its fields.
FLOCK = {"linux": ("hhqqi4x", 0), "darwin": ("qqihh", 3)}


def in_use(folder: Path, file: str = LOCK) -> bool | None:
    """Whether another process has taken a folder, see `lock`; None where the system does not tell. Nothing is taken.

    Not for a process that has a lock there itself: the system lets go of it when this closes the file.
    """
    if sys.platform not in FLOCK:
        return None
    import fcntl

    form, place = FLOCK[sys.platform]
    fields = [0] * 5  # from the beginning, to the end, by nobody
    fields[place] = fcntl.F_WRLCK
    try:
        with open(folder / file, "rb") as asked:
            found = fcntl.fcntl(asked, fcntl.F_GETLK, struct.pack(form, *fields))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return struct.unpack(form, found)[place] != fcntl.F_UNLCK


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


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


class Lease:
    """Keeps others from removing what a file stands for, as long as this object is there: see `lease`."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __del__(self, close=os.close):  # as Python ends, the names of this module may be gone
        close(self._descriptor)


def lease(file: Path, exclusive: bool = False) -> Lease | None:
    """What keeps a file that is read from removal; None where it is gone, or about to go. Any number may have one.

    exclusive: what keeps readers off a file that is to be removed; None where one has a lease. File systems without
    locks are passed over.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    held = Lease(descriptor)
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except (OSError, ImportError):
        pass
    return held if _is_same(descriptor, file) else None


@contextmanager
def new_path(
    out: str | Path, what: str | None = None, force: bool = False, ours: Callable[[Path], bool] = lambda path: False
) -> Iterator[Path]:
    """A path to write a file or folder to, which then becomes `out`, see `put`; after a fault nothing is left of it.

    It lies in the folder .NAME.unfinished beside `out`, which is one process's: another one that writes to `out` is
    refused, and the next one clears what a killed one left. Makes the folders above.
    Raises InputError as `check_out`, and where the disk does not take it; what: the name of `out` there.
    """
    what = what or option("out")
    out, made = check_out(out, what, force, ours), Made()
    name, claimed = f"{what} {str(out)!r}", being_written(out)
    key = claimed.absolute()
    if key in _held:
        raise InputError(f"{name} is being written by another thread; wait for it, or choose a new name")
    _held.add(key)
    try:
        made.folder(out.parent)
        if os.path.lexists(claimed) and not is_cleared_by_us(claimed):
            raise InputError(f"{name}: {str(claimed)!r} is in the way; move it, or choose a new name")
        with lock(claimed, name, OWNER):
            try:
                empty(claimed)
                yield claimed / out.name
                _sync_all([*(claimed / out.name).rglob("*"), claimed / out.name])
                put(claimed / out.name, out, what, force, ours)
            finally:
                _unclaim(claimed)
    except Exception as error:
        # torch's writer raises its own error where a file's says that the disk is full.
        fault = error.__context__ if isinstance(error, RuntimeError) else error
        if not (isinstance(fault, OSError) or _is_of_safetensors(fault)):
            raise
        raise InputError(f"{name} cannot be written: {reason(fault)}") from None
    finally:
        _held.discard(key)
        if not os.path.lexists(out):
            made.take_back()


def _is_of_safetensors(error: BaseException | None) -> bool:
    """Whether an error is safetensors' own, which there is only where something has loaded it."""
    library = sys.modules.get("safetensors")
    return library is not None and isinstance(error, library.SafetensorError)


def being_written(out: Path) -> Path:
    """The folder in which one process writes what becomes `out`, and in which a folder `out` is removed."""
    return out.with_name(f".{_short(out.name)}.unfinished")


def _unclaim(claimed: Path) -> None:
    empty(claimed)
    (claimed / OWNER).unlink()
    claimed.rmdir()


def _clear_claimed(out: Path) -> None:
    """Remove what is left of a command that wrote `out` and was killed then, unless one is writing there now."""
    claimed = being_written(out)
    if claimed.absolute() not in _held and (claimed / OWNER).is_file() and is_cleared_by_us(claimed):
        with suppress(InputError, OSError), lock(claimed, str(out), OWNER):
            _unclaim(claimed)


def is_cleared_by_us(folder: Path) -> bool:
    """Whether a folder says that this program may clear it, or holds nothing."""
    return folder.is_dir() and not folder.is_symlink() and ((folder / OWNER).is_file() or not any(folder.iterdir()))


def empty(folder: Path) -> None:
    """Remove what lies in a folder that says that this program may clear it."""
    for path in folder.iterdir():
        if path.name != OWNER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def scratch(folder: str | Path) -> Path:
    """An empty folder for what is made anew each time: one that says that this program may clear it is cleared, and
    any other is set aside."""
    folder = resolved(folder, "folder")
    if os.path.lexists(folder) and not is_cleared_by_us(folder):
        print(f"{str(folder)!r} is now {str(set_aside(folder))!r}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER).write_text("What lies here is removed by the next run of the command that made it.\n")
    empty(folder)
    return folder


def free_space(path: Path) -> int:
    """Bytes that are free where `path` lies or will lie."""
    return shutil.disk_usage(_nearest(path.absolute())).free


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
    return spelt(str(_from_here(path)))


def _from_here(path: Path) -> Path:
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def encoded(content: str | bytes) -> bytes:
    """The bytes of a file; of a text, also where it holds what UTF-8 does not, as names of files may."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def sync(path: Path) -> None:
    """Force a file or folder to the disk; Windows opens no folder, and needs no more than its files."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)


def _sync_all(paths: list[Path]) -> None:
    """`sync` of each, the largest of which may take as long as it took to write them."""
    sizes = [path.stat().st_size for path in paths]
    with _of_bytes("to the disk", sum(sizes)) as bar:
        for path, size in zip(paths, sizes, strict=True):
            sync(path)
            bar.update(size)


def settle(folder: Path) -> None:
    """Force a new folder and all in it to the disk, readable for whom the umask says.

    safetensors makes its files for their owner alone, whatever the umask.
    """
    probe = temporary(folder / "probe")  # os.umask tells by changing it, for all threads
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
    digest = hashlib.sha256()
    with open(path, "rb") as file, _of_bytes("SHA-256", os.fstat(file.fileno()).st_size) as bar:
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _of_bytes(what: str, size: int) -> Progress:
    """The progress of a file, or of several, shown where it takes seconds; of threads, which share a bar of their
    caller's, and of processes but the main one, nothing."""
    alone = threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0"
    options = {"unit": "B", "unit_scale": True, "delay": 2, "leave": False, "disable": size < LONG or not alone}
    return Progress(total=size, desc=what, **options)


_version = functools.cache(importlib.metadata.version)  # that of a process, which has imported it


def library_versions(*more: str) -> dict[str, str]:
    """Versions of what decides a result: this library, Python, the numerical libraries, and `more` distributions."""
    names = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "safetensors", *more)
    return {
        "sit_atconv": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def check_checkpoint(path: str | Path) -> None:
    """Raise InputError unless there is a folder, in which a checkpoint may be; the folder is not looked into."""
    if not Path(path).is_dir():
        raise InputError(f"checkpoint {str(path)!r}: no such folder; give a run, a step-... folder or its ema/ folder")
