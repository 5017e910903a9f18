"""Which settings are worth taking, of points with a score and a time each; and the table that says so."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sit_atconv.bench.grid import in_short, in_words
from sit_atconv.runtime.markdown import markdown_table, plain
from sit_atconv.scoring import METRICS

Point = dict[str, Any]  # as frontier.json has it
MARKS = {"model": "model", "all": "**all**"}  # of a point in the Pareto set of its model alone, and in that of all


def estimate(values: Sequence[float], errors: Sequence[float | None]) -> dict[str, Any]:
    """A score over the seeds of sampling, from the value and the jackknife's error of each.

    value: their mean. error: its standard error, from the spread over the seeds; of one seed the jackknife's.
    jackknife: the mean of the seeds' own errors, None without.
    """
    known = [each for each in errors if each is not None]
    jackknife = statistics.fmean(known) if len(known) == len(values) else None
    several = len(values) > 1
    return {
        "value": statistics.fmean(values),
        "error": statistics.stdev(values) / math.sqrt(len(values)) if several else jackknife,
        "jackknife": jackknife,
        "values": list(values),
    }


def error_of(point: Point) -> float:
    """The standard error of a point's score; 0 where none is known."""
    return point["score"]["error"] or 0.0


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points than which no other is both as quick and as good, and one of the two more; by their time."""
    found, best = [], math.inf
    for point in sorted(points, key=lambda each: (each["ms"], each["score"]["value"])):
        twin = found and (found[-1]["ms"], found[-1]["score"]["value"]) == (point["ms"], point["score"]["value"])
        if point["score"]["value"] < best or twin:
            found.append(point)
            best = point["score"]["value"]
    return found


def recommended(points: Sequence[Point]) -> Point:
    """The cheapest point within one standard error of the best: its score is at most that of the best and the best's
    error."""
    best = min(points, key=lambda each: (each["score"]["value"], each["ms"]))
    most = best["score"]["value"] + error_of(best)
    return min((each for each in points if each["score"]["value"] <= most), key=lambda each: each["ms"])


def is_better(more: Point, fewer: Point) -> bool:
    """Whether a point is better than another by more than the error of their difference; also where none is known."""
    errors = [each["score"]["error"] for each in (more, fewer)]
    return None in errors or more["score"]["value"] < fewer["score"]["value"] - math.hypot(*errors)


def with_error(value: float, error: float | None) -> str:
    """Both with as many digits as the error has a use for."""
    digits = min(6, max(0, 1 - math.floor(math.log10(error)))) if error else 4
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown(result: dict[str, Any]) -> str:
    """The table of frontier.json, what was dropped, and the commands to copy."""
    points, metric = result["points"], result["metric"]
    keys = list(dict.fromkeys(key for point in points for key in point["settings"] if key not in result["common"]))
    also = [name for name in points[0]["metrics"] if name != metric]
    head = ["model", *keys, "kind", "NFE", METRICS[metric][0], "jackknife", *(METRICS[name][0] for name in also)]
    head += ["ms per image", "middle half", "Pareto"]
    rows = []
    for point in sorted(points, key=lambda each: each["ms"]):
        settings, score = point["settings"], point["score"]
        rows.append(
            [
                plain(point["model"]),
                *(plain(in_short(settings.get(key, ""))) for key in keys),
                point["kind"],
                f"{point['nfe']:g}",
                with_error(score["value"], score["error"]),
                "" if score["jackknife"] is None else f"{score['jackknife']:.2g}",
                *(with_error(point["metrics"][name]["value"], point["metrics"][name]["error"]) for name in also),
                f"{point['ms']:.4g}",
                " to ".join(f"{each:.4g}" for each in point["ms_quartiles"]),
                MARKS.get(point["pareto"], ""),
            ]
        )
    lines = ["# Score over time", "", *(f"- {plain(note)}" for note in result["notes"]), ""]
    if result["common"]:
        lines[-1:-1] = [f"- all points: {plain(in_words(result['common']))}"]
    lines += [markdown_table(head, rows, ("model", *keys, "kind", "Pareto")), ""]
    if result["dropped"]:
        dropped = (f"{each['model']}, {each['point']}: {each['why']}" for each in result["dropped"])
        lines += ["Dropped:", "", *(f"- {plain(each)}" for each in dropped), ""]
    lines.append("The cheapest setting within one standard error of the best:")
    for each in result["recommended"]:
        of = "of all models" if each["of"] is None else f"of {each['of']}"
        lines += ["", plain(f"{of}: {each['model']}, {each['point']}: {each['told']}"), ""]
        lines += [f"    {each['command']}", f"    {each['score_command']}"]
    return "\n".join(lines) + "\n"
