"""The plots that the timing commands draw."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from sit_atconv.runtime.files import figure_png

STYLES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (10, 3)), (0, (1, 4)))  # of lines
BESIDE = 36  # characters of a line beside a picture
LIMIT = ", GEMM limit"  # a line of this name is dashed, in the colour of the line that it limits


def plot_latency(points: Iterable[tuple[str, str, float, float]], title: str, x_label: str, y_label: str) -> bytes:
    """A PNG of points (pass, name, x, y): a panel per pass, in it a line for each name; both axes logarithmic."""
    from matplotlib.figure import Figure  # here: slow to import, and commands that draw nothing do without
    from matplotlib.ticker import LogLocator, NullLocator

    panels: dict[str, dict[str, list]] = {}
    for step, name, x, y in points:
        lines = panels.setdefault("forward and backward" if step == "backward" else step, {})
        lines.setdefault(name, []).append((x, y))
    figure = Figure(figsize=(5 * len(panels) + 1, 5.5), layout="constrained")
    shown, colors = {}, {}
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            base = label.removesuffix(LIMIT)
            color = colors.setdefault(base, f"C{len(colors)}")
            style = "--." if label != base else "-o"
            (shown[label],) = axes.plot(*zip(*points, strict=True), style, color=color, label=label)
        axes.set(xscale="log", yscale="log", title=name, xlabel=x_label)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(y_label)
    columns = min(2 * len(panels), len(shown))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, fontsize="small")
    figure.suptitle(title, fontsize="small")
    return figure_png(figure)


def plot_frontier(points: Sequence[dict[str, Any]], title: str, y_label: str) -> bytes:
    """A PNG of scores over milliseconds per image, the latter logarithmic, with error bars in both.

    points: as frontier.json has them. A thin line goes along the steps of each set of other settings. Of several models
    each has a colour, and each set of settings a style of line; of one model each set has a colour. Circles are ODEs,
    squares SDEs. The heavy line is the Pareto set of the model; what stands in that of all has a number, and beside the
    picture stand the settings of each number.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(point["model"] for point in points))
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault((point["model"], point["line"]), []).append(point)
    names = [model if len(models) > 1 else line for model, line in lines]
    colors = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(names))}
    several = len(models) > 1
    kinds = enumerate(dict.fromkeys(line for _, line in lines))
    styles = {line: STYLES[(number if several else number // 10) % len(STYLES)] for number, line in kinds}
    shown = {}
    for name, ((_, line), own) in zip(names, lines.items(), strict=True):
        own = sorted(own, key=lambda each: each["ms"])
        axes.plot(*_places(own), color=colors[name], linewidth=0.9, alpha=0.6, linestyle=styles[line])
        for kind, form in (("ODE", "o"), ("SDE", "s")):
            if some := [each for each in own if each["kind"] == kind]:
                x, y = _places(some)
                wide = [abs(each["ms"] - each["ms_quartiles"][end]) for end in (0, 1) for each in some]
                bars = axes.errorbar(
                    x, y, [each["score"]["error"] or 0.0 for each in some], [wide[: len(some)], wide[len(some) :]],
                    fmt=form, color=colors[name], markersize=5, elinewidth=1, capsize=2,
                )  # fmt: skip
                shown.setdefault(f"{name} ({kind})", bars)
    for model in models:
        own = sorted(
            (each for each in points if each["model"] == model and each["pareto"]), key=lambda each: each["ms"]
        )
        color = colors[model] if len(models) > 1 else "black"
        axes.plot(*_places(own), color=color, linewidth=2, alpha=0.6, zorder=1)
    best = sorted((each for each in points if each["pareto"] == "all"), key=lambda each: each["ms"])
    for number, point in enumerate(best, 1):
        away = -4 - 9 * (number % 2)  # to where no point is: it would be quicker and better
        axes.annotate(
            str(number), (point["ms"], point["score"]["value"]), textcoords="offset points", fontsize="small",
            xytext=(away, away), ha="right", va="top",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="ms per image", ylabel=y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    if several and len(styles) > 1:
        shown |= {line: Line2D([], [], color="grey", linestyle=style) for line, style in styles.items()}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, fontsize="small")
    told = (
        f"{number}: {point['model'] + ': ' if several else ''}{point['label']}" for number, point in enumerate(best, 1)
    )
    figure.legend(
        [Line2D([], [], linestyle="none")] * len(best), [textwrap.fill(each, BESIDE) for each in told],
        loc="outside right upper", title="Pareto set", fontsize="small", handlelength=0, handletextpad=0,
    )  # fmt: skip
    figure.suptitle(title, fontsize="small")
    return figure_png(figure)


def _places(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [each["ms"] for each in points], [each["score"]["value"] for each in points]
