"""The classes of samples by index: evenly over the classes, at random, or from a file."""

from collections.abc import Callable
from typing import Any

from sit_atconv.runtime.bounded import bounded
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.errors import InputError, named, option
from sit_atconv.runtime.reading import MOST_JSON, parse_json
from sit_atconv.sampling.sampling import random_label

RULES = ("balanced", "random")


def labels_rule(option: str) -> str:
    """What a manifest says of --labels: "balanced", "random" or "file"."""
    return option if option in RULES else "file"


def sample_labels(option: str, num: int, total: int, seed: int, classes: Classes) -> list[int]:
    """The classes of images 0 to total - 1, of which num are kept; the rest fills the last block.

    option: "balanced" (image i has class i mod classes), "random" (one drawn from (seed, i)), or the name of a file:
    a class a line, by its id or its name, or a JSON list of these, for the num images; the rest is balanced then.
    Raises InputError for a file that does not hold num classes of the model, naming the line.
    """
    if option == "random":
        return [random_label(seed, index, classes.number) for index in range(total)]
    balanced = [index % classes.number for index in range(total)]
    return balanced if option == "balanced" else [*_read(option, num, classes), *balanced[num:]]


def _read(name: str, num: int, classes: Classes) -> list[int]:
    if not name:
        raise InputError(f"{option('labels')} '': choose from {list(RULES)} or give a file")
    try:
        with open(name, "rb") as file:  # which may be a pipe
            text = bounded(file, MOST_JSON).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{option('labels')} {name}: no text; give one class a line, or a JSON list") from None
    except ValueError as error:  # too large, or a NUL in the name
        raise InputError(f"{option('labels')} {name!r}: {error}; give one class a line, or a JSON list") from None
    except OSError as error:
        remedy = f"choose from {list(RULES)} or give a file"
        raise InputError(f"{option('labels')} {name}: {error.strerror}; {remedy}") from None
    if text.lstrip().startswith("["):
        entries, unit, read = parse_json(text, f"{option('labels')} {name}", list), "entry", classes.named
    else:
        entries, unit, read = text.rstrip().splitlines(), "line", classes.read
    labels = []
    for number, entry in enumerate(entries, 1):
        where = f"{option('labels')} {name}, {unit} {number}"
        if number > num:
            raise InputError(f"{where}: there are {len(entries)} classes for {option('num', num)}; make them equal")
        with named(where):
            labels.append(_class_of(entry, read, classes))
    if len(labels) < num:
        raise InputError(
            f"{option('labels')} {name} ends with {unit} {len(labels)}: {option('num', num)} needs as many; make them "
            "equal"
        )
    return labels


def _class_of(entry: Any, read: Callable[[str], int], classes: Classes) -> int:
    """The class of an entry of a file; read: for a text."""
    if isinstance(entry, str) and entry.strip():
        return read(entry)
    if isinstance(entry, int) and not isinstance(entry, bool):
        return classes.checked(entry)
    raise InputError(f"{str(entry)[:40]!r} is no class; give an id or a name")
