"""Which of a model's attentions are swapped."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sit_atconv.runtime.errors import InputError, check_choice, told

Select = str | float | Sequence[str] | Callable[[str, nn.Module], bool]
MARGIN = 1.25  # how many times as long as its attention a layer may take before select="auto" leaves it out


def choose(
    names: Mapping[str, nn.Module],
    select: Select,
    exclude: str | Sequence[str] = (),
    counted: Sequence[str] | None = None,
) -> list[str]:
    """The names that `select` takes and `exclude` does not, in the model's order.

    select: "all" ("auto" too, which chooses among all later), "even" or "odd" (by 0-based place in `counted`, as in a
        SiT hybrid), a share in (0, 1] spread evenly, a regular expression found in the name, a list of names, or a
        callable (name, module) -> bool.
    exclude: names, each that layer alone, or regular expressions found in them.
    counted: all layers of the model, those among them that are swapped already; None: `names`.
    Raises InputError for a name that is not there, an expression that does not compile or that excludes nothing, a
    share out of range, and where nothing is left.
    """
    everything = list(names)
    wrong = (
        f"select={select!r}: give 'all', 'auto', 'even', 'odd', a share in (0, 1], a regular expression, names or a "
        "callable"
    )
    if callable(select):
        chosen = [name for name in everything if select(name, names[name])]
    elif isinstance(select, bool):
        raise InputError(wrong)
    elif isinstance(select, int | float):
        if not 0 < select <= 1:
            raise InputError(f"select={select!r}: a share must lie in (0, 1]")
        chosen = evenly(everything, select)
    elif isinstance(select, str):
        if select in ("all", "auto"):
            chosen = everything
        elif select in ("even", "odd"):
            chosen = [name for name in list(counted or names)[select == "odd" :: 2] if name in names]
        else:
            chosen = [name for name in everything if _compiled("select", select).search(name)]
    elif not isinstance(select, Sequence | set):
        raise InputError(wrong)
    else:
        for name in select:
            check_choice("select", name, everything)
        chosen = [name for name in everything if name in set(select)]
    excluded = [exclude] if isinstance(exclude, str) else exclude
    if not isinstance(excluded, Sequence | set) or not all(isinstance(each, str) for each in excluded):
        raise InputError(f"exclude={exclude!r}: give names or regular expressions")
    kept = set()
    for each in excluded:
        pattern = _compiled("exclude", each)
        found = [each] if each in names else [name for name in everything if pattern.search(name)]
        if not found:
            check_choice("exclude", each, everything)
        kept.update(found)
    left = [name for name in chosen if name not in kept]
    if not left:
        some = ", ".join(everything[:3]) + (f", ... ({len(everything)} in all)" if len(everything) > 3 else "")
        raise InputError(f"select={select!r}, exclude={exclude!r} leave nothing to swap; to be had are {some}")
    return left


def evenly(names: Sequence[str], share: float) -> list[str]:
    """floor(share * number) of the names, spread evenly; of a half, every second one."""
    return [
        name
        for index, name in enumerate(names)
        if math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)
    ]


@dataclass
class Candidate:
    """What select="auto" knows of a layer.

    saved: multiply-accumulates of a call, attention less layer. error: relative, of the model's output where this layer
    alone is swapped. slowdown: see `Timing`. All None: the
    attention was not called.
    """

    name: str
    saved: int | None
    error: float | None
    slowdown: float | None


@dataclass
class Choice:
    """names: of the chosen layers, in the model's order. reasons: why each of the others is none.

    error: relative, of the model's output with all chosen ones swapped; None: not measured.
    refusal: why none was chosen, with what the user can do.
    """

    names: list[str]
    error: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None


def choose_best(
    candidates: Sequence[Candidate],
    whole: int,
    max_error: float | None,
    speedup: float | None,
    together: Callable[[list[str]], float],
) -> Choice:
    """The layers with the least error at the model's output per multiply-accumulate saved.

    Taken in this order, ties in the model's, are as many as keep the error of the model's output with all of them
    swapped within `max_error` (infinite if None), but no more than make the model's multiply-accumulates, `whole`,
    `speedup` times fewer, if that is given. A layer that saves none, one whose error alone is beyond `max_error`, and
    one that takes over 1.25 times as long as its attention is never taken.
    together: measures the error with these layers swapped; called about log2 of their number times, since errors of
    layers add up to no one knows what (independent ones as the root of the sum of squares).
    """
    limit = math.inf if max_error is None else max_error
    reasons = {each.name: reason for each in candidates if (reason := _unfit(each, limit)) is not None}
    fit = [each for each in candidates if each.name not in reasons]
    order = sorted(fit, key=lambda each: (each.error / each.saved, -each.saved))
    if not order:
        return Choice([], None, reasons, _nothing_fits(candidates, limit))
    wanted = len(order)
    if speedup is not None:
        fewer = [whole / max(1, whole - saved) for saved in itertools.accumulate(each.saved for each in order)]
        wanted = next((count for count, found in enumerate(fewer, 1) if found >= speedup), 0)
    count, error = _longest_within(limit, order[:wanted], together) if wanted else (0, None)
    if speedup is None or 0 < wanted == count:
        reasons |= dict.fromkeys((each.name for each in order[count:wanted]), "too much with those chosen")
        reasons |= dict.fromkeys((each.name for each in order[wanted:]), "not needed for speedup")
        return Choice([each.name for each in candidates if each.name not in reasons], error, reasons)
    reasons |= dict.fromkeys((each.name for each in order), "too little with all that would do")
    refusal = (
        f"the {wanted} layers that make the model's multiply-accumulates {speedup:g} times fewer put its output off by "
        f"more than {limit:g}; raise max_error or lower speedup"
    )
    if not wanted:
        refusal = (
            f"the {len(order)} of {len(candidates)} layers that would do make the model's multiply-accumulates "
            f"{fewer[-1]:.3g} times fewer, not {speedup:g} times; "
            + ("lower speedup" if max_error is None else "raise max_error or lower speedup")
        )
    return Choice([], None, reasons, refusal)


def _unfit(each: Candidate, limit: float) -> str | None:
    if each.saved is None:
        return "not called on the calibration inputs"
    if each.saved <= 0:
        return "saves no MACs"
    if each.slowdown is not None and each.slowdown > MARGIN:
        return f"{each.slowdown:.3g} times as long"
    if not math.isfinite(each.error):
        return "output not finite"
    return "above max_error" if each.error > limit else None


def _nothing_fits(candidates: Sequence[Candidate], limit: float) -> str:
    faster = [each for each in candidates if _unfit(each, math.inf) in (None, "output not finite")]
    if not faster:
        uncalled = sum(each.saved is None for each in candidates)
        useless = sum(each.saved is not None and each.saved <= 0 for each in candidates)
        slower = len(candidates) - uncalled - useless
        counts = {
            f"take over {MARGIN} times as long as their attention on this machine": slower,
            "save no multiply-accumulates": useless,
            "are not called on the calibration inputs": uncalled,
        }
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return (
            f"no layer saves time at this size (of {len(candidates)}, {told}); give select='all' to swap all, or "
            "larger inputs as calib"
        )
    best = min(faster, key=lambda each: each.error)
    wanted = "finite" if math.isinf(limit) else f"within {limit:g}"
    return (
        f"no layer that saves anything keeps the model's output {wanted} (least error: {best.error:.3g}, "
        f"{best.name}; {len(faster)} of {len(candidates)} save something); raise max_error, or give "
        "select='all' to swap all"
    )


def _longest_within(limit: float, order: list[Candidate], together: Callable) -> tuple[int, float]:
    """How many of `order`, each within the limit by itself, stay within it together, and their error: by bisection."""
    count, error, over, trial = 1, order[0].error, len(order) + 1, len(order)
    while over - count > 1:
        found = together([each.name for each in order[:trial]])
        if math.isfinite(found) and found <= limit:
            count, error = trial, found
        else:
            over = trial
        trial = (count + over) // 2
    return count, error


def _compiled(what: str, pattern: str) -> re.Pattern:
    with told(f"{what}={pattern!r} is no regular expression", re.error):
        return re.compile(pattern)
