"""Files that others wrote, read within bounds that hold before memory is taken."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MOST_JSON = 128 << 20  # bytes: the labels of ten million samples fit
MOST_ENTRIES = 1_000_000  # lists and objects of a JSON
MOST_YAML = 1 << 17  # bytes
MOST_NODES = 10_000  # of a YAML, an alias counted as what it stands for
MOST_NESTED = 50  # lists and objects, one in the other
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
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return content


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises OSError where there is none, ValueError for whatever `parse_json` refuses."""
    return parse_json(read_bytes(path, MOST_JSON))


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for what is none, is too large, or nested deeper than MOST_NESTED."""
    if len(text) > MOST_JSON:
        raise ValueError(f"it is larger than {MOST_JSON:,} bytes")
    text = text.decode() if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > MOST_ENTRIES:
        raise ValueError(f"it holds more than {MOST_ENTRIES:,} lists and objects")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MOST_NESTED):
        level = [inner for each in level for inner in _inside(each) if isinstance(inner, list | dict)]
    if level:
        raise ValueError(f"it is nested deeper than {MOST_NESTED} lists and objects")
    return value


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_yaml(path: str | Path, regular: bool = False) -> Any:
    """What a YAML file holds, in plain dictionaries and lists; nothing in it is worked out, see `check_literal`.

    regular: whether it must be a file; else it may be a pipe, of which a bounded part is read.
    Raises OSError where there is none, ValueError that tells what is wrong and where, and none of the content.
    """
    try:
        with opened(path) if regular else open(path, "rb") as file:
            text = bounded(file, MOST_YAML).decode()
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """`read_yaml` of a text."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if _nodes(node, {}) > MOST_NODES:
            raise ValueError(f"it holds more than {MOST_NODES:,} entries")
        if isinstance(node, yaml.ScalarNode):  # which OmegaConf takes for a key, or does not take
            return yaml.safe_load(text)
        value = OmegaConf.to_container(OmegaConf.create(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("it is no YAML" + (f": see line {mark.line + 1}" if mark else "")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply, or contains itself") from None
    except (OmegaConfBaseException, AttributeError, TypeError, AssertionError):
        raise ValueError("its keys are no names, or its values no plain ones") from None
    check_literal(value)
    return value


def _nodes(node: yaml.Node | None, known: dict[int, float], depth: int = 0) -> float:
    """Number of entries of a YAML, infinite for one that contains itself, or is nested too deeply."""
    if depth > MOST_NESTED:
        return float("inf")
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_nodes(part, known, depth + 1) for part in parts)
    return known[id(node)]


def check_literal(value: Any) -> None:
    """Raise ValueError for a text with "${" at any depth: OmegaConf would put something else in its place, such as a
    variable of the environment, and what is stored with a model would tell it."""
    if isinstance(value, str) and "${" in value:
        raise ValueError("'${...}' is not worked out: write the value itself")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for each in value if isinstance(value, list) else ():
        check_literal(each)
