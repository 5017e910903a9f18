"""What a page asks its user for, and what it is given to show; the page knows no kind of model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from PIL import Image

from sit_atconv.runtime.errors import InputError

Form = Mapping[str, Any]  # what the user entered, by the names of the controls; None or "" where nothing


@dataclass(frozen=True)
class Control:
    """A field of the form.

    kind: "text", "number", "choice" (one of `choices`) or "choices" (any of them). about: said beside the field. rare:
    whether few people need it; it lies behind a fold.
    """

    name: str
    label: str
    kind: str
    value: Any = None
    choices: tuple[str, ...] = ()
    about: str | None = None
    rare: bool = False


@dataclass(frozen=True)
class Stop:
    """A place on the way from noise to data: its time t, a PNG of the states, and one of the data expected there."""

    time: float
    states: bytes
    expected: bytes


@dataclass(frozen=True)
class Drawn:
    """What one model drew.

    png: one picture of all. images: each by itself. evaluations: of the network, per image. seconds: of all images
    together. repeat: the text that draws the same again. way: gives the stop that is nearest to a time; None where the
    states are not kept.
    """

    png: bytes
    images: list[Image.Image]
    evaluations: float
    seconds: float
    repeat: str
    way: Callable[[float], Stop] | None = field(default=None, repr=False)


class Bar(Protocol):
    """Is told how far a drawing has come, as `runtime.console.Progress` is."""

    def note(self, text: str, part: float | None = None) -> None: ...

    def update(self, count: int = 1) -> None: ...


class Side(Protocol):
    """A model that draws on the page.

    title: what it is called. about: a line on it. controls: what its form has. language: of `Drawn.repeat`, "shell" or
    "python". live: whether it draws fast enough to follow each change of the form. has_way: whether what it draws keeps
    the way from noise to data.
    """

    title: str
    about: str
    controls: list[Control]
    language: str
    live: bool
    has_way: bool

    def draw(self, form: Form, bar: Callable[[int], Bar]) -> Drawn:
        """Draw what the form asks for. bar: makes what is told of so many images. Raises InputError."""


def shared(sides: Sequence[Side]) -> list[Control]:
    """The fields of one form for all sides: those of the first, blank where the others begin with something else.

    Raises InputError where the sides do not ask for the same.
    """
    first, *others = [side.controls for side in sides]
    names = [control.name for control in first]
    for side, controls in zip(sides[1:], others, strict=True):
        if [control.name for control in controls] != names:
            raise InputError(f"{side.title!r} asks for other things than {sides[0].title!r}; give two of one kind")
    return [
        own if all(other.value == own.value for other in rest)
        else replace(own, value=None, about="blank: what fits each model")
        for own, *rest in zip(first, *others, strict=True)
    ]  # fmt: skip


def number(form: Form, name: str) -> float | None:
    """The number in a field; None where it is blank. Raises InputError for anything else."""
    value = form[name]
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name}={value!r}: give a number") from None


def whole_number(form: Form, name: str, default: int | None) -> int | None:
    """The whole number in a field; the default where it is blank. Raises InputError for anything else."""
    value = form[name]
    if value in (None, ""):
        return default
    try:
        whole = int(value)
        if whole == (value if isinstance(value, int | float) else whole):
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name}={value!r}: give a whole number")
