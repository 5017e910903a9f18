"""Curves and intervals as inline SVG; colours come from the page's style, by the number of the series."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from sit_atconv.report.markup import Markup, tag

POINTS = 300  # of a curve at most; beyond it, neighbours are drawn as their mean, in a band from least to greatest
CROWDED = 0.4  # of the height that they would have if all values were spread evenly: with less, the least ones crowd
GAIN = 1.5  # how much higher they must be on a logarithmic axis for it to be worth its harder reading
WIDTH, HEIGHT = 400, 240  # of a chart, as wide on the page as a phone: the type keeps its size
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 38
COLOURS, DASHES = 6, ("", "8 6", "2 5", "10 5 2 5")  # with gaps through which a line below is seen
Points = Sequence[tuple[float, float | None]]
Axis = Callable[[float], float]  # from a value to its place


@dataclass
class Series:
    """One curve: its legend, its number (colour and dash), and points (x, y); y None where nothing was measured."""

    name: str
    number: int
    points: Points

    @property
    def values(self) -> list[float]:
        return [y for _, y in self.points if y is not None]


def style_of(number: int) -> dict[str, str]:
    """Class and dash of a series; the first ones are told apart by either."""
    return {"class_": f"s{number % COLOURS}", "stroke_dasharray": DASHES[number % len(DASHES)] or None}


def thinned(points: Points) -> list[tuple[float, float | None, float | None, float | None]]:
    """Points (x, mean, least, greatest), POINTS at most, each of equally many neighbours."""
    size = math.ceil(len(points) / POINTS) or 1
    result = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        x, values = math.fsum(x for x, _ in part) / len(part), [y for _, y in part if y is not None]
        mean = math.fsum(values) / len(values) if values else None
        result.append((x, mean, min(values, default=None), max(values, default=None)))
    return result


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high: `about` of them, and two at least."""
    most = 1.5 * (high - low) / about  # of a step; two fit in for `about` from 3 on
    power = 10.0 ** math.floor(math.log10(most))
    step = max(factor * power for factor in (1, 2, 2.5, 5) if factor * power <= most * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, every other one where they are many; where they are few, round numbers between
    them, too; where all lies within a factor of two or so, the numbers of a linear axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 7)]
    return ticks(low, high)


def logarithmic(values: Sequence[float]) -> bool:
    """Whether an axis is to be logarithmic: all values are above 0, and their lower half, or quarter, which crowds at
    the bottom of a linear axis, is higher on a logarithmic one.

    So it is for curves that fall over decades, and for those that fall fast and then lie on one another; not for a line
    that falls evenly, nor for what jitters about a mean.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if low <= 0 or low == high:
        return False
    for share in (1 / 2, 1 / 4):
        upper = ordered[math.ceil(share * len(ordered)) - 1]
        linear = (upper - low) / (high - low)
        if linear < CROWDED * share and math.log(upper / low) / math.log(high / low) >= GAIN * linear > 0:
            return True
    return False


def four_digits(value: float) -> str:
    """A number with four digits: 0.5748, 1e-5."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def short(value: float) -> str:
    """A number of few signs: 25k, 0.002, 1e-5."""
    for power, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.4g}{unit}"
    return four_digits(value)


def _axis(
    values: Sequence[float], room: float, start: float, stop: float, log: bool = False
) -> tuple[float, float, Axis]:
    """What an axis goes from and to, which is the values and a share of their range beyond; and the axis."""
    low, high = min(values), max(values)
    if log:
        beyond = (high / low) ** room if high > low else 2.0
        low, high = low / beyond, high * beyond
    else:
        span = (high - low) or abs(high) or 1.0
        span = max(span, 1e-9 * max(abs(low), abs(high)))  # fewer digits than that no label shows
        low, high = low - room * span, high + room * span

    def at(value: float) -> float:
        least, most, value = (math.log(each) if log else each for each in (low, high, value))
        return start + (stop - start) * (value - least) / (most - least)

    return low, high, at


def chart(series: Sequence[Series], x_label: str, alt: str) -> tuple[Markup, bool]:
    """The curves over one another, at least one of which has a value; also whether the axis is logarithmic."""
    values = [value for each in series for value in each.values]
    log = logarithmic(values)
    left, right, x = _axis([x for each in series for x, _ in each.points], 0.02, LEFT, WIDTH - RIGHT)
    low, high, y = _axis(values, 0.06, HEIGHT - BOTTOM, TOP, log)
    marks = log_ticks(low, high) if log else ticks(low, high)
    lines: list[Markup] = []
    for value in marks:
        lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="rule"))
        lines.append(tag("text", short(value), x=LEFT - 6, y=y(value) + 4, text_anchor="end"))
    for value in ticks(left, right):
        lines.append(tag("text", short(value), x=x(value), y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    lines.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    for each in series:
        lines += _curve(each, x, y)
    return tag("svg", lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=alt, class_="chart"), log


def _curve(series: Series, x: Axis, y: Axis) -> list[Markup]:
    """A line per stretch without gaps, over the band where points stand for several; a lone point as a dot."""
    drawn, style = [], style_of(series.number)
    for measured, points in groupby(thinned(series.points), lambda point: point[1] is not None):
        stretch = list(points) if measured else []
        line = [f"{x(at):.1f},{y(mean):.1f}" for at, mean, _, _ in stretch]
        if any(least != greatest for _, _, least, greatest in stretch):
            upper = [f"{x(at):.1f},{y(greatest):.1f}" for at, _, _, greatest in stretch]
            lower = [f"{x(at):.1f},{y(least):.1f}" for at, _, least, _ in reversed(stretch)]
            drawn.append(tag("polygon", points=" ".join(upper + lower), class_=f"band {style['class_']}"))
        if len(stretch) > 1:
            drawn.append(tag("polyline", points=" ".join(line), **style | {"class_": f"line {style['class_']}"}))
        if len(stretch) == 1 or len(series.points) <= 12:
            for at, mean, _, _ in stretch:
                drawn.append(tag("circle", cx=x(at), cy=y(mean), r=3.5, class_=f"dot {style['class_']}"))
    return drawn


def swatch(number: int) -> Markup:
    """A piece of a series' line, as a legend has it."""
    style = style_of(number)
    line = tag("line", x1=1, x2=27, y1=6, y2=6, **style | {"class_": f"line {style['class_']}"})
    return tag("svg", line, viewBox="0 0 28 12", class_="swatch", aria_hidden="true")


@dataclass
class Spot:
    """A point of a scatter: x above 0, with the least and greatest that stand for its error; y with its standard error,
    0 where none is known. number: of the series. square: its form, in place of a circle. mark: what stands beside it.
    """

    number: int
    x: float
    x_range: tuple[float, float]
    y: float
    error: float
    square: bool = False
    mark: str = ""


def scatter(spots: Sequence[Spot], paths: Sequence[Sequence[int]], x_label: str, alt: str) -> Markup:
    """Points with bars in both directions; the axis of x is logarithmic, that of y where low values crowd.

    paths: lines through points, each their places in `spots`, all of one series. At least one spot.
    """
    ends = [spot.y + sign * spot.error for spot in spots for sign in (-1, 1)]
    log = min(ends) > 0 and logarithmic([spot.y for spot in spots])
    low, high, y = _axis(ends, 0.06, HEIGHT - BOTTOM, TOP, log)
    across = [each for spot in spots for each in (spot.x, *spot.x_range)]
    left, right, x = _axis(across, 0.05, LEFT, WIDTH - RIGHT, log=True)
    lines: list[Markup] = []
    for value in log_ticks(low, high) if log else ticks(low, high):
        lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="rule"))
        lines.append(tag("text", short(value), x=LEFT - 6, y=y(value) + 4, text_anchor="end"))
    for value in log_ticks(left, right):
        lines.append(tag("text", short(value), x=x(value), y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    lines.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    lines.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
    for path in paths:
        style = style_of(spots[path[0]].number)
        along = " ".join(f"{x(spots[place].x):.1f},{y(spots[place].y):.1f}" for place in path)
        lines.append(tag("polyline", points=along, **style | {"class_": f"line {style['class_']}"}))
    for spot in spots:
        at_x, at_y, colour = x(spot.x), y(spot.y), style_of(spot.number)["class_"]
        level = {"x1": x(spot.x_range[0]), "x2": x(spot.x_range[1]), "y1": at_y, "y2": at_y}
        upright = {"x1": at_x, "x2": at_x, "y1": y(spot.y - spot.error), "y2": y(spot.y + spot.error)}
        lines += [tag("line", **bar, class_=f"error {colour}") for bar in (level, upright)]
        if spot.square:
            lines.append(tag("rect", x=at_x - 3.5, y=at_y - 3.5, width=7, height=7, class_=f"dot {colour}"))
        else:
            lines.append(tag("circle", cx=at_x, cy=at_y, r=4.0, class_=f"dot {colour}"))
    marked = [spot for spot in spots if spot.mark]
    for place, spot in enumerate(marked):  # to where no other point is, which would be quicker and better
        away = 4 + 10 * (place % 2)  # two that lie close together are told apart
        at = {"x": x(spot.x) - away, "y": min(y(spot.y) + 10 + away, HEIGHT - BOTTOM - 4.0)}
        lines.append(tag("text", spot.mark, **at, text_anchor="end", class_="mark"))
    return tag("svg", lines, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=alt, class_="chart scatter")


@dataclass
class Interval:
    """A value, its standard error and its corrected value, each None where not measured; number: of the series.

    upper_bound: the error is at most this, and the corrected value at least. needs: images without which there is no
    corrected value, None where that is not why.
    """

    number: int
    value: float | None
    se: float | None
    corrected: float | None
    upper_bound: bool = False
    needs: int | None = None


STRIP, ROW = 220, 18  # width of a strip of intervals, height of one of them


def intervals(rows: Sequence[Interval], alt: str) -> Markup:
    """Dots at the values with a bar to one standard error and a line to two on either side, corrected as a diamond.

    At least one row has a value.
    """
    shown = [row for row in rows if row.value is not None]
    ends = [row.value + sign * 2 * (row.se or 0) for row in shown for sign in (-1, 1)]
    ends += [row.corrected for row in shown if row.corrected is not None]
    low, high, x = _axis(ends, 0.08, 8, STRIP - 8)
    height = ROW * len(rows) + 22
    lines = [tag("line", x1=8, x2=STRIP - 8, y1=height - 18, y2=height - 18, class_="axis")]
    for value in ticks(low, high, 3):
        lines.append(tag("line", x1=x(value), x2=x(value), y1=2, y2=height - 15, class_="rule"))
        near = "start" if x(value) < 24 else "end" if x(value) > STRIP - 24 else "middle"
        lines.append(tag("text", short(value), x=x(value), y=height - 4, text_anchor=near))
    for index, row in enumerate(rows):
        if row.value is None:
            continue
        y, colour = ROW * index + ROW / 2 + 2, style_of(row.number)["class_"]
        for count, width in ((2, 1.5), (1, 5)) if row.se else ():
            ends = {"x1": x(row.value - count * row.se), "x2": x(row.value + count * row.se)}
            lines.append(tag("line", **ends, y1=y, y2=y, stroke_width=width, class_=f"error {colour}"))
        if row.corrected is not None:
            at = x(row.corrected)
            points = f"{at - 5:.1f},{y} {at:.1f},{y - 5} {at + 5:.1f},{y} {at:.1f},{y + 5}"
            lines.append(tag("polygon", points=points, class_=f"corrected {colour}"))
        lines.append(tag("circle", cx=x(row.value), cy=y, r=4.5, class_=f"dot {colour}"))
    return tag("svg", lines, viewBox=f"0 0 {STRIP} {height}", role="img", aria_label=alt, class_="strip")
