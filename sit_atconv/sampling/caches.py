"""Caches of diffusers: they leave out most blocks of a network in some evaluations, and put in what earlier ones gave.

A cache is asked for by a text, `parse` tells which:

    first_block:THRESHOLD           runs the first block, and leaves out the others while what that block adds to its
                                    input has changed by at most this share, over the whole batch, since they ran last
    taylorseer[:INTERVAL[:ORDER]]   runs the blocks in three evaluations and then in every INTERVAL-th; in the others,
                                    what the last block gives is extrapolated by differences up to ORDER
    mag:THRESHOLD                   leaves out all blocks while the change of what they add, as it was calibrated, sums
                                    up to no more than the threshold

diffusers' hooks take seconds to load, and are loaded where a cache is switched on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sit_atconv.flow.times import within
from sit_atconv.runtime.errors import InputError, check_choice, option
from sit_atconv.runtime.limits import Range, number

if TYPE_CHECKING:
    from torch import nn

MAG, TAYLORSEER = "mag", "taylorseer"
THRESHOLD = number(0, 1_000, "it is a relative change, and at 1,000 blocks are left out wherever they can be")
INTERVAL = Range(1, 1_000, "the blocks run in one evaluation of so many, and 1 leaves nothing out")
ORDER = Range(0, 5, "higher differences of a few evaluations are noise")
# {kind: {number: (its range, its default)}}; None is for what must be given.
KINDS = {
    "first_block": {"threshold": (THRESHOLD, None)},
    TAYLORSEER: {"interval": (INTERVAL, 5), "order": (ORDER, 1)},
    MAG: {"threshold": (THRESHOLD, None)},
}
FULL = 3  # evaluations at the start in which taylorseer runs everything, diffusers' default


@dataclass(frozen=True)
class Cache:
    """A cache that is asked for. kind: one of KINDS; numbers: those of its kind, in their order there."""

    kind: str
    numbers: tuple[float, ...]

    def __str__(self) -> str:
        return ":".join([self.kind, *(f"{each:.15g}" for each in self.numbers)])


def parse(spec: str) -> Cache:
    """The cache that a text asks for, such as "first_block:0.1", "taylorseer", "taylorseer:4:2" or "mag:0.06".

    Raises InputError for an unknown kind, and for numbers that are missing, too many or out of range.
    """
    kind, *words = str(spec).split(":")
    name = option("cache", spec)
    check_choice(option("cache"), kind, KINDS)
    wanted = KINDS[kind]
    form = kind + "".join(f":{each.upper()}" for each in wanted)
    if len(words) > len(wanted):
        raise InputError(f"{name}: {kind} takes no more than {form}")
    numbers = []
    for index, (called, (limits, default)) in enumerate(wanted.items()):
        value = default
        if index < len(words):
            try:
                value = (int if limits.whole else float)(words[index])
            except ValueError:
                whole = "whole " if limits.whole else ""
                raise InputError(f"{name}: the {called} {words[index]!r} is no {whole}number; give {form}") from None
        if value is None:
            raise InputError(f"{name}: {kind} needs a {called}; give {form}, such as {kind}:0.1")
        limits.check(f"{name}: the {called} ", value)
        numbers.append(value)
    return Cache(kind, tuple(numbers))


def check(
    cache: Cache, times: Sequence[float], interval: Sequence[float] | None = None, every: int = 1, batches: int = 1
) -> None:
    """Raise InputError where a cache cannot work, or leaves nothing out, in evaluations at these times, in their order.

    interval: of t, in which classifier-free guidance doubles the batch; None without it. every: of its evaluations
    there so many have guidance evaluated once. batches: it goes through the network in.
    """
    name, least = option("cache", str(cache)), FULL + 1 if cache.kind == TAYLORSEER else 2
    if len(times) < least:
        raise InputError(
            f"{name}: {len(times)} evaluations leave {cache.kind} nothing to leave out; take {least} or more"
        )
    again = next((b for a, b in pairwise(times) if b <= a), None)
    if cache.kind == TAYLORSEER and again is not None:
        raise InputError(
            f"{name}: it extrapolates along rising times, and this sampler comes to t = {again:.3g} twice; take one "
            "with an evaluation a step, such as euler, or first_block"
        )
    if batches > 1:
        raise InputError(f"guidance_batches={batches}: {name} tells batches apart by their size; leave one out")
    if every > 1 and cache.kind != "first_block":
        raise InputError(f"guidance_every={every}: {name} counts evaluations of one size of batch; leave one out")
    if cache.kind == MAG and interval is not None and len({within(t, interval) for t in times}) == 2:
        raise InputError(
            f"{name}: it counts evaluations of one size of batch, and guidance in an interval has two; guide "
            "everywhere or nowhere, or take first_block"
        )


def enable(model: nn.Module, cache: Cache, ratios: Sequence[float] | None = None) -> None:
    """Switch a cache on in a SiT, in the place of one that is on.

    ratios: for mag, that of each evaluation which is to come, see `ratios_at`.
    Raises InputError for a model of one block.
    """
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
    from torch import float32

    depth = len(model.blocks)
    if depth < 2:
        raise InputError(f"{option('cache', str(cache))}: the model has a single block; leave the cache out")
    disable(model)
    if cache.kind == TAYLORSEER:
        interval, order = cache.numbers
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=FULL,
            max_order=order,
            taylor_factors_dtype=float32,
            # What the last block gives is extrapolated; what the others give is not asked for.
            skip_predict_identifiers=[rf"blocks\.{index}" for index in range(depth - 1)],
            cache_identifiers=[rf"blocks\.{depth - 1}"],
        )
    elif cache.kind == MAG:
        config = MagCacheConfig(*cache.numbers, num_inference_steps=len(ratios), mag_ratios=list(ratios))
    else:
        config = FirstBlockCacheConfig(*cache.numbers)
    model.enable_cache(config)


def disable(model: nn.Module) -> None:
    """Switch the cache of a SiT off, if one is on, and leave the model as it was."""
    from sit_atconv.runtime.compat.diffusers import drop_left_forward

    if not model.is_cache_enabled:
        return
    model.disable_cache()
    for block in model.blocks:
        drop_left_forward(block)


def context(model: nn.Module, batch: int) -> AbstractContextManager[None]:
    """What an evaluation of a batch of that size runs in. A cache keeps states of one shape each: evaluations with and
    without guidance, which differ in it, have states of their own."""
    return model.cache_context(f"batch of {batch}") if model.is_cache_enabled else nullcontext()


def check_ratios(found: Mapping[str, Any]) -> None:
    """Raise InputError unless there are `times`, which rise within [0, 1], and a positive number of `ratios` for each:
    how long what the blocks add is, on average over the tokens, beside the evaluation before; 1 at the first."""
    try:
        times, ratios = found["times"], found["ratios"]
        fits = len(times) == len(ratios) > 1 and all(a < b for a, b in pairwise(times))
        fits = fits and times[0] >= 0 and times[-1] <= 1 and all(ratio > 0 for ratio in ratios)
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise InputError(
            "ratios: times must rise within [0, 1], with a ratio over 0 each; give what `sit-atconv calibrate` writes"
        )


def ratios_at(found: Mapping[str, Any], times: Sequence[float]) -> list[float]:
    """The ratios of evaluations at other times: quotients of one curve over time, the logarithm of which is straight
    between the calibrated times, and goes on straight beyond them."""
    import numpy as np

    logs = np.cumsum(np.log(found["ratios"])) - math.log(found["ratios"][0])
    known = np.array(found["times"])
    for end, (a, b) in ((0.0, (0, 1)), (1.0, (-1, -2))):
        if end not in known:
            slope = (logs[b] - logs[a]) / (known[b] - known[a])
            place = 0 if end == 0 else len(known)
            known, logs = np.insert(known, place, end), np.insert(logs, place, logs[a] + (end - known[a]) * slope)
    return [1.0, *np.exp(np.diff(np.interp(times, known, logs))).tolist()]
