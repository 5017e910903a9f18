"""Files that others wrote, read within bounds that hold before memory is taken."""

import json
import re
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sit_atconv.runtime.bounded import bounded, opened, read_bytes
from sit_atconv.runtime.errors import InputError, told

if TYPE_CHECKING:  # what reads JSON alone does without these libraries
    import yaml

MOST_JSON = 128 << 20  # bytes: the labels of ten million samples fit
MOST_CONFIG = 4 << 20  # bytes of the configuration that a class is made by; the names of 22,000 classes fit
MOST_SIZE = 1 << 20  # the largest whole number there: what a constructor counts by
MOST_LINE = 1 << 20  # bytes of a line of a log
MOST_ENTRIES = 1_000_000  # lists and objects of a JSON
MOST_YAML = 1 << 17  # bytes
MOST_NODES = 10_000  # of a YAML, an alias counted as what it stands for
MOST_CARD = 1 << 20  # bytes of the YAML on top of a README.md, which may name thousands of classes
MOST_CARD_NODES = 100_000
MOST_NESTED = 50  # lists and objects, one in the other
# What Hugging Face takes for the YAML of a README.md.
CARD = re.compile(r"\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")

# Forms of values in a JSON document, see `parse_json`.
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


def read_tensors(path: Path, what: str, remedy: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a safetensors file by name, mapped into memory, and its metadata.

    Raises InputError, which begins with `what` and the path and ends with the remedy, for one that is cut or damaged.
    """
    from safetensors import SafetensorError, safe_open

    with (
        told(f"{what} {str(path)!r} is cut or damaged", OSError, SafetensorError, remedy=remedy),
        safe_open(path, framework="pt") as file,
    ):
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)


def read_shapes(path: Path, what: str, remedy: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by name, from its header; no tensor is read.

    Raises InputError as `read_tensors` does.
    """
    from safetensors import SafetensorError, safe_open

    with (
        told(f"{what} {str(path)!r} is cut or damaged", OSError, SafetensorError, remedy=remedy),
        safe_open(path, framework="np") as file,
    ):
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


class Malformed(InputError):
    """A text that is no JSON, or a document that lacks what it must hold; the message names the place and the rule."""


def read_json(path: str | Path, form: Any = dict, finite: bool = False, most: int = MOST_JSON) -> Any:
    """The JSON document in a regular file of at most that many bytes, see `parse_json`.

    Raises Malformed, OSError where there is no such file.
    """
    name = Path(path).name
    try:
        text = read_bytes(path, most)
    except ValueError as error:
        raise Malformed(f"{name} is no JSON that can be read: {error}") from None
    return parse_json(text, name, form, finite)


def read_config(path: str | Path, form: Any = dict, most: int = MOST_CONFIG) -> dict[str, Any]:
    """`read_json` of a configuration that a class of diffusers or timm is made by.

    Its whole numbers are sizes: they are at most MOST_SIZE, at any depth, whatever the class takes them for.
    """
    config = read_json(path, form, most=most)
    level = [("", config)]
    while level:
        level = [(f"{place}.{key}".lstrip("."), inner) for place, each in level for key, inner in entries(each)]
        for place, value in level:
            if type(value) is int and abs(value) > MOST_SIZE:
                rule = f"{place} is {reprlib.repr(value)}, and must be at most {MOST_SIZE:,}"
                raise Malformed(f"{Path(path).name}: {rule}")
    return config


def read_rows(path: str | Path, form: Any = dict) -> list[Any]:
    """The rows of a log, a JSON document of that form a line, but for a last one that was cut as it was written.

    Raises Malformed, which names the line, OSError where there is no such file.
    """
    name, rows = Path(path).name, []
    with opened(path) as file:
        while line := file.readline(MOST_LINE + 1):
            what = f"{name}, line {len(rows) + 1}"
            if len(line) > MOST_LINE:
                raise Malformed(f"{what} is longer than {MOST_LINE:,} bytes")
            try:
                rows.append(parse_json(line, what, form))
            except Malformed:
                if line.endswith(b"\n"):  # which only the last can lack
                    raise
    return rows


def as_stored(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples are lists, and keys are text."""
    return json.loads(json.dumps(value))


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
    Raises Malformed, also for a text that is too large, or nested deeper than MOST_NESTED.
    """
    try:
        document = _document(text)
        if finite:
            json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise Malformed(f"{name} is no JSON that can be read: {error}") from None
    if fault := fault_of(document, form):
        raise Malformed(f"{name}: {fault}")
    return document


def _document(text: str | bytes) -> Any:
    if len(text) > MOST_JSON:
        raise ValueError(f"it is larger than {MOST_JSON:,} bytes")
    text = text.decode() if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > MOST_ENTRIES:
        raise ValueError(f"it holds more than {MOST_ENTRIES:,} lists and objects")
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [document]
    for _ in range(MOST_NESTED):
        if not level:
            break
        level = [inner for each in level for _, inner in entries(each) if isinstance(inner, list | dict)]
    if level:
        raise ValueError(f"it is nested deeper than {MOST_NESTED} lists and objects")
    if "\\u" in text:  # the way to what no name of a file and no page can hold: a lone surrogate, a NUL
        json.dumps(document, ensure_ascii=False).encode()
        if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
            raise ValueError("it has a NUL in a text")
    return document


def entries(value: Any) -> Any:
    """(key or index, value) of what lies in a dictionary or list; nothing of anything else."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def fault_of(value: Any, form: Any, place: str = "") -> str | None:
    """What keeps a JSON value, at that place, from having a form, see `parse_json`; None where nothing does."""
    if isinstance(form, tuple):
        faults = [fault_of(value, each, place) for each in form]
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
                if strange := next((name for name in names if fault_of(name, key)), None):
                    return f"{place}{strange!r} is a key that must be {_named(key)}"
            faults = (fault_of(value[name], wanted, f"{place}{name}.") for name in names)
            if fault := next(filter(None, faults), None):
                return fault
        return None
    if isinstance(form, list) and isinstance(value, list):
        if len(form) > 1 and len(value) != len(form):
            return _misfit(value, form, place)
        forms = form if len(form) > 1 else form * len(value)
        pairs = enumerate(zip(value, forms, strict=True))
        return next(filter(None, (fault_of(each, wanted, f"{place}{index}.") for index, (each, wanted) in pairs)), None)
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


def read_yaml(path: str | Path, regular: bool = False) -> Any:
    """What a YAML file holds, in plain dictionaries and lists; nothing in it is worked out, see `check_literal`.

    regular: whether it must be a file; else it may be a pipe, of which a bounded part is read.
    Raises OSError where there is none, ValueError that tells what is wrong and where, and none of the content.
    """
    import yaml
    from omegaconf import OmegaConf

    try:
        with opened(path) if regular else open(path, "rb") as file:
            text = bounded(file, MOST_YAML).decode()
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None
    with _told():
        node = _composed(text, MOST_NODES)
        if isinstance(node, yaml.ScalarNode):  # which OmegaConf takes for a key, or does not take
            return yaml.safe_load(text)
        value = OmegaConf.to_container(OmegaConf.create(text))
    check_literal(value)
    return value


def read_card(path: str | Path) -> Any:
    """What the YAML on top of a README.md says, or a whole .yaml, as Hugging Face reads them; None where there is none.

    Raises OSError where there is no such file, ValueError that tells what is wrong, and none of the content.
    """
    import yaml

    with opened(path) as file:
        text, more = file.read(MOST_CARD).decode(errors="replace"), bool(file.read(1))
    if Path(path).suffix == ".md":
        found = CARD.match(text)
        if found is None and not text.lstrip().startswith("---"):
            return None
        more = more and (found is None or found.end() == len(text))
        text = found[1] if found else ""
    if more:
        raise ValueError(f"its YAML is larger than {MOST_CARD:,} bytes")
    with _told():
        _composed(text, MOST_CARD_NODES)
        return yaml.safe_load(text)


@contextmanager
def _told() -> Iterator[None]:
    """Tell what is wrong with a YAML as a ValueError."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("it is no YAML" + (f": see line {mark.line + 1}" if mark else "")) from None
    except RecursionError:
        raise ValueError("it is nested too deeply, or contains itself") from None
    except (OmegaConfBaseException, AttributeError, TypeError, AssertionError):
        raise ValueError("its keys are no names, or its values no plain ones") from None


def _composed(text: str, most: int) -> "yaml.Node | None":
    """The nodes of a YAML. Raises ValueError for more than that many."""
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    if _nodes(node, {}) > most:
        raise ValueError(f"it holds more than {most:,} entries")
    return node


def _nodes(node: "yaml.Node | None", known: dict[int, float], depth: int = 0) -> float:
    """Number of entries of a YAML, infinite for one that contains itself, or is nested too deeply."""
    import yaml

    if depth > MOST_NESTED:
        return float("inf")
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_nodes(part, known, depth + 1) for part in parts)
    return known[id(node)]


def spelt(text: str) -> str:
    """A text as a JSON document of ours can hold it: a NUL is written out, and so are the bytes of a file's name that
    are no UTF-8, which Python has as halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def check_literal(value: Any) -> None:
    """Raise ValueError for a text with "${" at any depth: OmegaConf would put something else in its place, such as a
    variable of the environment, and what is stored with a model would tell it. And for one that cannot be stored."""
    if isinstance(value, str) and "${" in value:
        raise ValueError("'${...}' is not worked out: write the value itself")
    if isinstance(value, str) and spelt(value) != value:
        raise ValueError("it holds a text with a NUL, or with half a character")
    for key, each in entries(value):
        check_literal(key)
        check_literal(each)
