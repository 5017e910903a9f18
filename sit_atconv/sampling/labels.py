"""The classes of samples by index: evenly over the classes, at random, or from a file."""

import json
import re

from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.reading import MOST_JSON, bounded, parse_json
from sit_atconv.sampling.sampling import random_label

RULES = ("balanced", "random")


def labels_rule(option: str) -> str:
    """What a manifest says of --labels: "balanced", "random" or "file"."""
    return option if option in RULES else "file"


def sample_labels(option: str, num: int, total: int, seed: int, num_classes: int) -> list[int]:
    """The classes of images 0 to total - 1, of which num are kept; the rest fills the last block.

    option: "balanced" (image i has class i mod classes), "random" (one drawn from (seed, i)), or the name of a file:
    one class id a line, or a JSON list of them, for the num images; the rest is balanced then.
    Raises InputError for a file that does not hold num class ids of the model, naming the line.
    """
    if option == "random":
        return [random_label(seed, index, num_classes) for index in range(total)]
    balanced = [index % num_classes for index in range(total)]
    return balanced if option == "balanced" else [*_read(option, num, num_classes), *balanced[num:]]


def _read(name: str, num: int, num_classes: int) -> list[int]:
    if not name:
        raise InputError(f"{option('labels')} '': choose from {list(RULES)} or give a file")
    try:
        with open(name, "rb") as file:  # which may be a pipe
            text = bounded(file, MOST_JSON).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{option('labels')} {name}: no text; give one class id a line, or a JSON list") from None
    except ValueError as error:  # too large, or a NUL in the name
        raise InputError(f"{option('labels')} {name!r}: {error}; give one class id a line, or a JSON list") from None
    except OSError as error:
        remedy = f"choose from {list(RULES)} or give a file"
        raise InputError(f"{option('labels')} {name}: {error.strerror}; {remedy}") from None
    if text.lstrip().startswith("["):
        entries, unit = [json.dumps(entry) for entry in parse_json(text, f"{option('labels')} {name}", list)], "entry"
    else:
        entries, unit = text.rstrip().splitlines(), "line"
    labels = []
    for number, entry in enumerate(entries, 1):
        where = f"{option('labels')} {name}, {unit} {number}"
        if number > num:
            raise InputError(f"{where}: there are {len(entries)} class ids for {option('num', num)}; make them equal")
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", entry.strip()):
            raise InputError(f"{where}: {entry.strip()[:40]!r} is no class id; give an integer")
        label = int(entry)
        if not 0 <= label < num_classes:
            raise InputError(f"{where}: class id {label} is out of range; this model has 0 to {num_classes - 1}")
        labels.append(label)
    if len(labels) < num:
        raise InputError(
            f"{option('labels')} {name} ends with {unit} {len(labels)}: {option('num', num)} needs as many; make them "
            "equal"
        )
    return labels
