"""What the fuzz tests share: odd values, edits of JSON documents, and a command that must end well with them."""

import contextlib
import copy
import io
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError

SECONDS = 30  # a call that takes longer hangs
MEMORY = 6 << 30  # bytes of address space that a call may take on top of what the process has
DELETED = object()
ODD = (
    None, True, False, 0, 1, -1, 5, 0.5, 10**6, 10**12, 2**31, 2**63, 2**64, 10**400, 1e300, -1e300, 1e-300,
    float("nan"), float("inf"), float("-inf"), "", "x", "a\0b", "\ud800", "a\nb", "../x", "/", "a" * 300, "1", "null",
    [], [1], [None], ["x"], [[1]], [1, 2, 3], [1e300, "x"], {}, {"x": 1}, {"": None}, {"file": "../x"}, DELETED,
)  # fmt: skip
TEXTS = ("", "5", "null", "[]", "{", "\0", "[" * 100_000, '{"a": ' * 100_000, "9" * 5000, "NaN", '"x"', "{}")


def places(document: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every part of a JSON document, the first entries of lists alone."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*place, key)
            yield from places(value, (*place, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:2]):
            yield (*place, index)
            yield from places(value, (*place, index))


def edited(document: Any, place: tuple, value: Any) -> Any:
    """A copy of the document with another value at a place, or none."""
    result = copy.deepcopy(document)
    part = result
    for key in place[:-1]:
        part = part[key]
    if value is DELETED:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return result


class Hangs(BaseException):
    """A call took too long; no Exception, which the program might catch."""


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, and lets what takes too much memory fail."""

    def late(*_):
        raise Hangs(f"still at it after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(call: Callable[[], Any]) -> str:
    """ "taken", "refused: ...", or "traceback: ..." of a function that may raise InputError, or of a command."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            with bounded():
                call()
            return "taken"
        except InputError as error:
            return f"refused: {error}"
        except SystemExit as stop:
            lines = [line for line in said.getvalue().splitlines() if "error: " in line]  # after a bar, perhaps
            if stop.code in (0, None):
                return "taken"
            return f"refused: {lines[-1]}" if stop.code == 2 and lines else f"traceback: exit {stop.code}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "/site-packages/" not in f.filename and "/tests/" not in f.filename]
            at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            last = f"{Path(where[-1].filename).name}:{where[-1].lineno}"
            return f"traceback: {type(error).__name__} at {at} ({last}): {str(error)[:150]}"
