"""What a setting says of itself beside its range (`sit_atconv.limits`), in the metadata of its dataclass field: when it
acts, what null stands for then, its choices, and whether a later start of a run may change it."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.limits import RANGE, Range

# The metadata of a setting, or a section, that a later start of the same run may state differently: what is reported
# and kept, where things lie and how the work is cut up (what is computed stays the same, to float rounding), and what
# follows from the data, which is checked against them at every start. In the place of True, a function tells by the
# values beside it.
MUTABLE = {"mutable": True}
WHEN, DEFAULT, CHOICES, HELP = "when", "default", "choices", "help"


@dataclass(frozen=True)
class When:
    """What a setting needs beside it in its section to do anything: in words, and as a function of the section."""

    text: str
    holds: Callable[[Any], bool]


def chosen(default: str, choices: Iterable[str], **metadata: Any) -> Any:
    """A dataclass field with a default, that takes one of the choices; its class checks it. metadata: more of it."""
    return dataclasses.field(default=default, metadata=metadata | {CHOICES: tuple(choices)})


def setting(when: When, default: Any = None, within: Range | None = None, idle: Any = None, **metadata: Any) -> Any:
    """A dataclass field that acts when this holds, and is refused when it does not, see `settle`.

    default: what null stands for when it acts; None where null is a choice of its own. within: its range. idle: its
    value when it does not act. metadata: more of the field's.
    """
    metadata |= {WHEN: when, DEFAULT: default} | ({} if within is None else {RANGE: within})
    return dataclasses.field(default=idle, metadata=metadata)


def settle(name: str, section: Any) -> None:
    """Put what null stands for in its place, in every setting of a section that acts; the others stay as they are.

    name: of the section; "" for settings that are of none. Raises InputError for one that is stated and does nothing.
    """
    for entry in dataclasses.fields(section):
        when: When | None = entry.metadata.get(WHEN)
        if when is None:
            continue
        key, value = f"{name}.{entry.name}" if name else entry.name, getattr(section, entry.name)
        if when.holds(section):
            if value is None:
                setattr(section, entry.name, copy.copy(entry.metadata[DEFAULT]))
        elif value not in (None, entry.default):
            remedy = idle(key, json.dumps(entry.default)) if name else "leave it out"
            raise InputError(f"{key}={value} goes with {when.text}; {remedy}")


def idle(key: str, nothing: str = "null") -> str:
    """What to do about a key that acts on nothing: in a file, and over a file on a command line."""
    return f"leave it out, or state {key}={nothing}"


def expand_home(section: Any, *names: str) -> None:
    """Put the home folder in the place of ~, which a shell leaves standing after a `=`."""
    for name in names:
        value = getattr(section, name)
        if isinstance(value, str) and value.startswith("~"):
            setattr(section, name, os.path.expanduser(value))
