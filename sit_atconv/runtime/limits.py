"""Which numbers a setting takes, and why no others: said once, beside the setting, and checked by one function.

A key of a dataclass is declared as `num: int = ranged(16, PICTURE)`, a flag as `add_argument("--num", **PICTURE.flag)`.
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sit_atconv.runtime.errors import InputError

RANGE = "range"  # under this name a field's metadata hold its Range


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, without `least` itself where `over`, without `most` where `under`.

    most: a number, or the name of another field of the same dataclass. why: the reason, for the message.
    whole: whole numbers alone.
    """

    least: float
    most: float | str
    why: str
    over: bool = False
    under: bool = False
    whole: bool = True

    @property
    def flag(self) -> dict[str, Any]:
        """What `add_argument` is told, for a flag whose number or numbers lie in this range."""
        return {"type": int if self.whole else float, "action": _Number, "within": self}

    def check(self, name: str, value: Any, most: float | None = None) -> None:
        """Raise InputError unless a number, or every number in a list or mapping, lies in the range.

        None and text are let by.

        name: of the setting as the message begins, with what parts it from its value. most: where it is another
        field's value.
        """
        end = self.most if most is None else most
        if not self._holds(value, end):
            shown = " ".join(map(str, value)) if name.startswith("--") and isinstance(value, list) else value
            raise InputError(f"{name}{_short(shown)}: must be {self.text(end)}, since {self.why}")

    def _holds(self, value: Any, end: float) -> bool:
        if isinstance(value, list | tuple | dict):
            return all(self._holds(part, end) for part in (value.values() if isinstance(value, dict) else value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        above = value > self.least if self.over else value >= self.least
        return above and (value < end if self.under else value <= end)

    def text(self, end: float) -> str:
        """The range in words."""
        above, below = "over" if self.over else "at least", "under" if self.under else "at most"
        most = f"{self.most}={end}" if isinstance(self.most, str) else _shown(end)
        return f"{above} {_shown(self.least)} and {below} {most}"


def number(least: float, most: float | str, why: str, over: bool = False, under: bool = False) -> Range:
    """A range of any numbers, see Range."""
    return Range(least, most, why, over, under, whole=False)


def declared(default: Any, **metadata: Any) -> Any:
    """A dataclass field with a default, which may be a list or a mapping, and what it says of itself."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def ranged(default: Any, limits: Range, **metadata: Any) -> Any:
    """`declared`, of what takes a number, or a list or mapping of numbers, in a range."""
    return declared(default, **{RANGE: limits}, **metadata)


def check(schema: type, values: Mapping[str, Any], prefix: str = "", stored: bool = False) -> None:
    """Raise InputError unless the numbers in `values`, by the fields of a dataclass, lie in the ranges of these.

    A field that is a dataclass has a mapping of its own. prefix: of the keys in the message. stored: the settings were
    accepted once, maybe when a range was wider; then no number is too large, and none that is not whole too small.
    """
    for entry in dataclasses.fields(schema):
        value, limits = values[entry.name], entry.metadata.get(RANGE)
        if dataclasses.is_dataclass(entry.type):
            check(entry.type, value, f"{prefix}{entry.name}.", stored)
        elif limits is not None:
            most = values[limits.most] if isinstance(limits.most, str) else limits.most
            if stored:
                least, most = (limits.least if limits.whole else -math.inf), math.inf
                limits = dataclasses.replace(limits, least=least, over=not limits.whole, under=True)
            limits.check(f"{prefix}{entry.name}=", value, most)


def check_kernel(name: str, kernel_size: Any, grid: tuple[int, int]) -> None:
    """Raise InputError for a kernel that is larger than the grid of tokens; ATConv's 3 is taken on every grid."""
    most = max(3, min(grid))
    if isinstance(kernel_size, int) and kernel_size > most:
        raise InputError(
            f"{name}={kernel_size}: must be at most {most}, since the grid has {grid[0]} x {grid[1]} tokens, and a "
            "kernel is pooled from them"
        )


class _Number(argparse.Action):
    """Takes a number, or several, of a range."""

    def __init__(self, *args, within: Range, **options):
        super().__init__(*args, **options)
        self.within = within

    def __call__(self, parser, namespace, values, option_string=None):
        self.within.check(f"{self.option_strings[-1]} ", values)
        setattr(namespace, self.dest, values)


def _short(value: Any) -> str:
    """A value for a message: of a long one, its beginning."""
    if isinstance(value, int) and value.bit_length() > 999:  # Python refuses to write many digits
        return f"(a number of {value.bit_length():,} bits)"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


# Settings that several commands or both recipes have.
SEED = Range(0, 2**64 - 1, "torch's generators take 64 bits")
STEPS = Range(1, 2**32 - 1, "random draws are told apart by the step, in 32 bits")
STEPS_OR_NONE = dataclasses.replace(STEPS, least=0)
SHARE = number(0, 1, "it is a share of the whole")
SHARE_UNDER_1 = number(0, 1, "it is a share, and at 1 nothing would be left", under=True)
LEARNING_RATE = number(1e-12, 1e30, "with any other, a step in fp32 moves no weight, or every one to infinity")
WEIGHT = number(0, 1e6, "beside a loss of this weight no other one counts in fp32")
EPOCHS = number(0, 100_000, "more of them take longer than any run", over=True)
BLOCKS = Range(1, 1_000, "the weights of each are in memory")
MLP_RATIO = number(0, 1_000, "the hidden width is this many times the block's", over=True)
CLASSES = Range(1, 10_000_000, "each has a row of weights")
GLOBAL_BATCH = Range(1, 1_000_000, "a step goes through all of them before the weights move")
WEIGHT_DECAY = number(0, 1_000, "a step takes lr times it of every weight away")
EMA_STD = number(
    1e-8, 0.288, "the narrowest is of one step of the longest run, and at 12^-1/2 the profile of a power of it ends",
    under=True,
)  # fmt: skip
LAST_STEP_SIZE = number(
    0, 0.999, "it is a part of the way from t = 0 to 1, and needs a step before it", over=True, under=True
)
CHANNELS = Range(1, 65_536, "a layer has its square in weights")
KERNEL = Range(1, 127, "its weights grow with its fourth power, and no grid of tokens calls for a larger one")
PIXELS = Range(1, 16_384, "an image of it is held in memory as a whole")
BATCH = Range(1, 65_536, "all of them go through the network at once, and are in memory together")
WORKERS = Range(0, 1_024, "each is a process with memory of its own")
PROCESSES = Range(1, 1_024, "each is a process with memory of its own")
ROUNDS = Range(1, 1_000_000, "all their times are kept, and a median settles after a few")
EVALUATIONS = Range(1, 100_000, "each step is a pass of the network or several, and more steps do not change an image")
OPTION = number(-65_536, 65_536, "a layer that wide has more weights than fit in memory")
CLASS_ID = Range(0, CLASSES.most - 1, "classes are counted from 0")
IMAGES = Range(1, 10_000_000, "their labels are in memory, and in the manifest")
SHARD_IMAGES = Range(1, 1_000_000, "what is stored of them is in memory until their file is written")
TIME = number(0, 1, "it is a time, of t = 0 noise to t = 1 data")
TIME_SHIFT = number(0.001, 1_000, "nearly all t would lie at one end")
EPSILON = number(1e-6, 0.5, "under it fp32 soon tells no t from 1, and it is to leave something of [0, 1]", under=True)
PICTURE = Range(1, 4_096, "they are drawn into one picture, which is held in memory")
GUIDANCE = number(-1_000, 1_000, "at scales far over 10 every pixel is black or white")
EVERY = Range(1, 100_000, "there are not more evaluations")
DIFFUSION_NORM = number(0, 1_000, "without noise it is an ODE, and more noise than that drowns the image", over=True)
