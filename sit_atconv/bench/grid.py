"""Grids of sampling settings: a YAML file as the list of all combinations that it names; read without torch.

A grid is a list of blocks. A block maps settings to a value, or to a list of values, and stands for every combination
of these. A setting that is a list of numbers itself (LISTS) takes a list of lists where it has several values.
A block with `models` is for these alone.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import InputError, check_choice, named, told
from sit_atconv.runtime.reading import read_yaml
from sit_atconv.sampling.settings import Sampling, flag

SWITCHES = ("compile",)  # true or false; flags without a value
OTHERS = ("scheduler", "cache", "dtype", *SWITCHES)  # what else a command that samples takes, and a grid may state
MODELS = "models"  # of a block: those that it is for, by default all
KEYS = (*(entry.name for entry in fields(Sampling)), *OTHERS)
LISTS = ("guidance_interval", "grid")  # a value of these may be a list of numbers
MOST, MOST_WHOLE = 1_000, 1e15  # combinations; a float that is written as a whole number
VALUES = (str, int, float, bool, type(None))

Stated = dict[str, Any]  # settings by their names, those alone that a grid states


def read_grid(path: str | Path, models: Collection[str]) -> dict[str, list[Stated]]:
    """The combinations that a file names for each of the models, in its order, each once; null leaves a setting out.

    Raises InputError for a file that is no grid, an unknown setting or model, a model without a combination, and for
    none or too many combinations.
    """
    with named(f"grid {str(path)!r}"):
        with told("it cannot be read", OSError, ValueError, remedy="give a YAML list of blocks of settings"):
            stated = read_yaml(path, regular=True)
        if not isinstance(stated, list) or not stated or not all(isinstance(block, dict) for block in stated):
            raise InputError("it is no list of blocks of settings; begin each with a dash: - sampler: [euler, heun]")
        blocks = [(_models(block, models), _settings(block)) for block in stated]
        number = sum(math.prod(map(len, values.values())) for _, values in blocks)
        if not 0 < number <= MOST:
            raise InputError(f"it has {number:,} combinations; give at least 1 and at most {MOST:,}")
        found: dict[str, list[Stated]] = {model: [] for model in models}
        for named_by, values in blocks:
            for combination, model in itertools.product(_combinations(values), named_by):
                if combination not in found[model]:
                    found[model].append(combination)
        if lacking := [model for model, own in found.items() if not own]:
            raise InputError(f"no block is for the model {lacking[0]!r}; name it in one, or leave the model out")
        return found


def _models(block: dict[str, Any], models: Collection[str]) -> Sequence[str]:
    """The models that a block is for: those that it names, by default all."""
    stated = block.get(MODELS, list(models))
    for each in (stated := stated if isinstance(stated, list) else [stated]):
        check_choice(MODELS, each, models)
    return stated


def _settings(block: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: _values(key, value) for key, value in block.items() if key != MODELS}


def _values(key: Any, value: Any) -> list[Any]:
    """What a block says of one setting, as a list of its values."""
    with told("", InputError, remedy=f"the keys are {', '.join((*KEYS, MODELS))}"):
        check_choice("key", key, (*KEYS, MODELS))
    of_numbers = isinstance(value, list) and any(isinstance(each, int | float) for each in value)
    several = isinstance(value, list) and not (key in LISTS and of_numbers)
    values = [_whole(each) for each in (value if several else [value])]
    for each in values:
        if not all(isinstance(part, VALUES) for part in (each if isinstance(each, list) else [each])):
            raise InputError(f"{key}={each!r}: give a value, or a list of values")
        if key in SWITCHES and not isinstance(each, bool | None):
            raise InputError(f"{key}={each!r}: give true or false")
    if not values:
        raise InputError(f"{key}=[]: give a value, or leave it out")
    return values


def _whole(value: Any) -> Any:
    """A value with whole numbers as such: 1e3 is how YAML writes a float."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < MOST_WHOLE else value


def _combinations(block: dict[str, list[Any]]) -> Iterator[Stated]:
    for values in itertools.product(*block.values()):
        pairs = zip(block, values, strict=True)
        yield {key: value for key, value in pairs if value is not None and (key not in SWITCHES or value)}


def words_of(stated: Stated) -> list[str]:
    """The combination as the options of a command that samples."""
    words = []
    for key, value in stated.items():
        parts = [] if key in SWITCHES else value if isinstance(value, list) else [value]
        words += [flag(key), *map(str, parts)]
    return words


def in_words(stated: Stated) -> str:
    """The combination for a reader: sampler=heun steps=4."""
    return (
        " ".join(key if key in SWITCHES else f"{key}={in_short(value)}" for key, value in stated.items()) or "defaults"
    )


def label_of(stated: Stated) -> str:
    """The combination for a picture: heun, 4 steps, guidance_scale=2."""
    bare = {"sampler": "{}", "scheduler": "{}", "steps": "{} steps"}
    parts = (bare.get(key, "{}" if key in SWITCHES else f"{key}={{}}") for key in stated)
    values = (key if key in SWITCHES else in_short(value) for key, value in stated.items())
    return ", ".join(part.format(value) for part, value in zip(parts, values, strict=True)) or "defaults"


def in_short(value: Any) -> str:
    """A value for a reader."""
    if isinstance(value, list):
        return ",".join(map(in_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
