"""What a setting says of itself beside its range (`limits`), in the metadata of its dataclass field: when it acts, what
null stands for then, its choices, whether it is a path, and whether a later start of a run may change it."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.runtime.limits import RANGE, Range, declared

# The metadata of a setting, or a section, that a later start of the same run may state differently: what is reported
# and kept, where things lie and how the work is cut up (what is computed stays the same, to float rounding), and what
# follows from the data, which is checked against them at every start. In the place of True, a function tells by the
# values beside it.
MUTABLE = {"mutable": True}
PATH = {"path": True}  # in whose text ~ stands for the home folder; a shell leaves it standing after a `=`
WHEN, DEFAULT, CHOICES, HELP = "when", "default", "choices", "help"
FLAG = "flag"  # how `add_argument` takes it, where that does not follow from range, choices and default


@dataclass(frozen=True)
class When:
    """What a setting needs beside it in its section to do anything: in words, and as a function of the section."""

    text: str
    holds: Callable[[Any], bool]


def chosen(default: Any, choices: Iterable[Any], **metadata: Any) -> Any:
    """A dataclass field with a default, that takes one of the choices, a list of them, or None, see `settle`.

    metadata: more of the field's.
    """
    return declared(default, **{CHOICES: tuple(choices)}, **metadata)


def setting(when: When, default: Any = None, within: Range | None = None, idle: Any = None, **metadata: Any) -> Any:
    """A dataclass field that acts when this holds, and is refused when it does not, see `settle`.

    default: what null stands for when it acts; None where null is a choice of its own. within: its range. idle: its
    value when it does not act. metadata: more of the field's.
    """
    metadata |= {WHEN: when, DEFAULT: default} | ({} if within is None else {RANGE: within})
    return dataclasses.field(default=idle, metadata=metadata)


def settle(name: str, section: Any) -> None:
    """Put what null stands for in its place, in every setting of a section that acts; the others stay as they are.

    The home folder takes the place of ~ in paths. name: of the section; "" for settings that are of none.
    Raises InputError for a setting that is stated and does nothing, or is none of its choices.
    """
    for entry in dataclasses.fields(section):
        key, value = f"{name}.{entry.name}" if name else entry.name, getattr(section, entry.name)
        if "path" in entry.metadata and isinstance(value, str) and value.startswith("~"):
            setattr(section, entry.name, os.path.expanduser(value))
        when: When | None = entry.metadata.get(WHEN)
        if when is not None and when.holds(section):
            if value is None:
                value = copy.copy(entry.metadata[DEFAULT])
                setattr(section, entry.name, value)
        elif when is not None and value not in (None, entry.default):
            remedy = idle(key, json.dumps(entry.default)) if name else "leave it out"
            raise InputError(f"{key}={value} goes with {when.text}; {remedy}")
        if CHOICES in entry.metadata and value is not None:
            for each in value if isinstance(value, list) else [value]:
                check_choice(key, each, entry.metadata[CHOICES])


class Section:
    """A section of a recipe, whose name is that of its class; made, it is settled."""

    def __post_init__(self):
        settle(type(self).__name__.lower(), self)


def idle(key: str, nothing: str = "null") -> str:
    """What to do about a key that acts on nothing: in a file, and over a file on a command line."""
    return f"leave it out, or state {key}={nothing}"
