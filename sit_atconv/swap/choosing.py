"""Which of a model's attentions are swapped."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sit_atconv.errors import InputError, check_choice

Select = str | float | Sequence[str] | Callable[[str, nn.Module], bool]


def choose(names: Mapping[str, nn.Module], select: Select, exclude: str | Sequence[str] = ()) -> list[str]:
    """The names that `select` takes and `exclude` does not, in the model's order.

    select: "all" ("auto" too, which chooses among all later), "odd" (0-based, as in a SiT hybrid), a share in (0, 1]
        spread evenly, a regular expression found in the name, a list of names, or a callable (name, module) -> bool.
    exclude: names, each that layer alone, or regular expressions found in them.
    Raises InputError for a name that is not there, an expression that does not compile or that excludes nothing, a
    share out of range, and where nothing is left.
    """
    everything = list(names)
    wrong = f"select={select!r}: give 'all', a share in (0, 1], a regular expression, names or a callable"
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
        elif select == "odd":
            chosen = everything[1::2]
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


def _compiled(what: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{what}={pattern!r} is no regular expression: {error}") from error
