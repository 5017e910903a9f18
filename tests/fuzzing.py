"""What the fuzz tests share: odd values, edits of documents, and a command that must end well with them."""

import contextlib
import copy
import io
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sit_atconv.runtime.errors import InputError

SECONDS = 30  # a call that takes longer hangs
MEMORY = 6 << 30  # bytes of address space that a call may take on top of what the process has
DELETED = object()
ODD = (
    None, True, False, 0, 1, -1, 5, 0.5, 10**6, 10**12, 2**31, 2**63, 2**64, 10**400, 1e300, -1e300, 1e-300,
    float("nan"), float("inf"), float("-inf"), "", "x", "a\0b", "\ud800", "a\nb", "../x", "/", "a" * 300, "1", "null",
    "${x}", "${", "???",
    [], [1], [None], ["x"], [[1]], [1, 2, 3], [1e300, "x"], {}, {"x": 1}, {"": None}, {"file": "../x"}, DELETED,
)  # fmt: skip
TEXTS = ("", "5", "null", "[]", "{", "\0", "[" * 100_000, '{"a": ' * 100_000, "9" * 5000, "NaN", '"x"', "{}")


def places(document: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every part of a document, itself too, the first entries of lists alone."""
    yield place
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*place, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:2]):
            yield from places(value, (*place, index))


def edited(document: Any, place: tuple, value: Any) -> Any:
    """A copy of the document with another value at a place, or none there; the document itself is never left out."""
    if not place:
        return document if value is DELETED else value
    result = copy.deepcopy(document)
    part = result
    for key in place[:-1]:
        part = part[key]
    if value is DELETED:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return result


def read_document(file: Path) -> Any:
    """What a file says: JSON, YAML, the last line of a log, or the JSON in the metadata of arrays and tensors."""
    if file.suffix == ".yaml":
        return yaml.safe_load(file.read_text())
    if file.suffix == ".jsonl":
        return json.loads(file.read_text().splitlines()[-1])
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return json.loads(str(arrays["meta"]))
    if file.suffix == ".safetensors":
        return json.loads(_metadata(file)[1])
    return json.loads(file.read_text())


def _metadata(file: Path) -> tuple[str, str]:
    """The entry of a safetensors file's metadata that is JSON."""
    with safe_open(file, framework="pt") as opened:
        return next((key, text) for key, text in opened.metadata().items() if key != "format")


def text_of(file: Path, document: Any) -> str:
    """A document as the kind of file has it."""
    return yaml.safe_dump(document) if file.suffix == ".yaml" else json.dumps(document)


def write_document(file: Path, text: str) -> None:
    """Put a text in the place of what `read_document` reads; the rest of the file stays."""
    if file.suffix == ".jsonl":
        text = "".join([*file.read_text().splitlines(keepends=True)[:-1], f"{text}\n"])
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            np.savez(file, **(dict(arrays) | {"meta": np.array(text)}))
    elif file.suffix == ".safetensors":
        key, tensors = _metadata(file)[0], {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={key: text})
    else:
        file.write_text(text)


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
            well = stop.code == 2 and lines and "usage: " not in said.getvalue()  # argparse's own takes several lines
            return f"refused: {lines[-1]}" if well else f"traceback: exit {stop.code}: {said.getvalue()[-200:]}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "/site-packages/" not in f.filename and "/tests/" not in f.filename]
            at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            last = f"{Path(where[-1].filename).name}:{where[-1].lineno}"
            return f"traceback: {type(error).__name__} at {at} ({last}): {str(error)[:150]}"
