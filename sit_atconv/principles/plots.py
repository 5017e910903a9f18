"""The figures of reports: curves over depth, inhibition factors, receptive fields."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from sit_atconv.runtime.files import REPORT, figure_png, write_out

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666", "#e69f00", "#56b4e9")  # of the targets
LINES = {"ATConv": "o-", "static ATConv": "D-.", "depthwise": "s:", "attention": "^--"}
MAPS = 6  # of a target at most, evenly spaced over its layers
DECADES = 4  # of a receptive field's squared gradient that are told apart
FIGURES = ("routing.png", "inhibition.png", "redundancy.png", "field_radius.png", "fields.png")

Value = Callable[[dict], float | None]


def distinct(names: list[str]) -> list[str]:
    """The names, those that come again with a number."""
    return [
        name if names.index(name) == at else f"{name} ({names[: at + 1].count(name)})" for at, name in enumerate(names)
    ]


def draw(reports: list[dict], out: Path, force: bool = False) -> list[str]:
    """Write FIGURES of the reports of one or several targets to the folder `out`, but for one that shows nothing, which
    is removed there; the names of those that are written."""
    routing = {"differ between samples": lambda layer: layer["routing"]["over_samples"]}
    if any(layer["routing"]["over_times"] is not None for report in reports for layer in report["layers"]):
        routing["differ between times t"] = lambda layer: layer["routing"]["over_times"]
    if any(layer["kind"] == "attention" for report in reports for layer in report["layers"]):
        routing["differ between positions"] = lambda layer: layer["routing"]["over_positions"]
    redundancy = {
        "kernels: mean cosine of pairs": lambda layer: layer["kernel_redundancy"]["cosine"],
        "kernels: rms cosine of pairs": lambda layer: layer["kernel_redundancy"]["cosine_rms"],
        "kernels: effective rank / its limit": _rank("kernel_redundancy"),
        "channels: mean cosine of pairs": lambda layer: layer["channel_redundancy"]["cosine"],
        "channels: rms cosine of pairs": lambda layer: layer["channel_redundancy"]["cosine_rms"],
        "channels: effective rank / its limit": _rank("channel_redundancy"),
    }
    radii = {
        f"{share} % of the squared gradient": lambda layer, share=share: layer["receptive_field"][f"share_{share}"]
        for share in (50, 90)
    }
    title = "Effective receptive field, from the model's input to the layer"
    figures = (
        _curves(reports, routing, "share of the kernels' mean square", "Adaptive routing"),
        _inhibition(reports),
        _curves(reports, redundancy, "", "Redundancy of kernels and of what they give"),
        _curves(reports, radii, "radius / half of the image's side", title),
        _fields(reports),
    )
    for name, figure in zip(FIGURES, figures, strict=True):
        if figure is not None:
            write_out(out / name, figure_png(figure), force=force)
        elif REPORT(out / name):
            (out / name).unlink()
    return [name for name, figure in zip(FIGURES, figures, strict=True) if figure is not None]


def _rank(key: str) -> Value:
    return lambda layer: layer[key]["rank"] / layer[key]["rank_limit"]


def _curves(reports: list[dict], panels: dict[str, Value], label: str, title: str) -> Figure:
    """A panel per entry; in it, over the depth of the layers, a line for each target and kind of layer."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4 * columns + 1, 7), 3.1 * rows + 1.1), layout="constrained")
    shown, depths = {}, [np.linspace(0, 1, len(report["layers"])) for report in reports]
    for axes, (name, value) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=True):
        for number, (report, places) in enumerate(zip(reports, depths, strict=True)):
            for kind in dict.fromkeys(layer["kind"] for layer in report["layers"]):
                points = [
                    (place, value(layer))
                    for place, layer in zip(places, report["layers"], strict=True)
                    if layer["kind"] == kind and value(layer) is not None
                ]
                if points:
                    (shown[f"{report['target']}, {kind}"],) = axes.plot(
                        *zip(*points, strict=True), LINES[kind], markersize=4.5, linewidth=1.4,
                        color=COLOURS[number % len(COLOURS)],
                    )  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        axes.margins(y=0.08)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("depth of the layer, 0 the first, 1 the last")
    for axes in figure.axes[::columns]:
        axes.set_ylabel(label)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _inhibition(reports: list[dict]) -> Figure | None:
    """A row per target with ATConv: boxes of its factors by layer, and the kernels' mean before and after."""
    rows = []
    for report in reports:
        having = [(number, layer) for number, layer in enumerate(report["layers"], 1) if layer["inhibition"]]
        if having:
            rows.append((report["target"], having))
    if not rows:
        return None
    figure = Figure(figsize=(11, 2.9 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (name, having) in zip(grid, rows, strict=True):
        numbers = [number for number, _ in having]
        width = 0.6 * min(np.diff(numbers), default=1)
        boxes = []
        for _, layer in having:
            low, first, middle, third, high = layer["inhibition"]["quantiles"]
            boxes.append({"whislo": low, "q1": first, "med": middle, "q3": third, "whishi": high, "fliers": []})
        left.bxp(
            boxes, positions=numbers, widths=width, showfliers=False, patch_artist=True, manage_ticks=False,
            boxprops={"facecolor": "#9ecae1", "edgecolor": "#0072b2"}, medianprops={"color": "#d55e00"},
            whiskerprops={"color": "#0072b2"}, capprops={"color": "#0072b2"},
        )  # fmt: skip
        for key, mark in (("min", "v"), ("max", "^")):
            extremes = [layer["inhibition"][key] for _, layer in having]
            left.scatter(numbers, extremes, marker=mark, s=12, color="#666666", zorder=3)
        left.set_title(f"{name}: factors", fontsize=10)
        left.set_ylabel("share of the mean subtracted")
        for when, line, colour in (("before", "-o", "#666666"), ("after", "-s", "#0072b2")):
            means = np.array([layer["inhibition"][f"mean_{when}"] for _, layer in having], float)  # None is NaN
            right.plot(numbers, means, line, color=colour, markersize=4.5, label=f"{when} inhibition")
        right.set_title(f"{name}: mean of the kernels", fontsize=10)
        right.set_ylabel("root mean square / kernels'")
        right.set_ylim(bottom=-0.04 * right.get_ylim()[1])  # 0, of full inhibition, is to be seen
        right.legend(fontsize=8)
        for axes in (left, right):
            axes.set_xlim(numbers[0] - 1, numbers[-1] + 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("number of the layer, as the table counts them")
    figure.suptitle(
        "Lateral inhibition. Boxes: quartiles, whiskers 5 and 95 %, triangles least and greatest", fontsize=11
    )
    return figure


def _fields(reports: list[dict]) -> Figure:
    """A row of receptive fields per target, of layers evenly spaced over its depth, first and last among them."""
    chosen = []
    for report in reports:
        layers = report["layers"]
        picks = sorted({round(number) for number in np.linspace(0, len(layers) - 1, min(MAPS, len(layers)))})
        chosen.append([(number + 1, layers[number]) for number in picks])
    columns = max(len(picks) for picks in chosen)
    figure = Figure(figsize=(max(2.05 * columns + 1.2, 6), 2.35 * len(reports) + 0.6), layout="constrained")
    grid = figure.subplots(len(reports), columns, squeeze=False)
    image = None
    for row, report, picks in zip(grid, reports, chosen, strict=True):
        for axes in row[len(picks) :]:
            axes.set_axis_off()
        for axes, (number, layer) in zip(row, picks, strict=False):
            field = layer["receptive_field"]
            values = np.array(field["map"])
            height, width = field["size"]
            with np.errstate(divide="ignore"):
                shares = np.log10(values / max(values.max(), 1e-300))
            image = axes.imshow(
                np.clip(shares, -DECADES, 0), vmin=-DECADES, vmax=0, cmap="viridis",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )  # fmt: skip
            for share, style in ((50, "-"), (90, "--")):
                if radius := field[f"radius_{share}"]:
                    line = {"edgecolor": "white", "linestyle": style, "linewidth": 1.2}
                    axes.add_patch(Circle(field["centre"][::-1], radius, fill=False, **line))
            half, most = field["radius_50"], field["radius_90"]
            said = "no gradient" if half is None else f"r50 {half:.1f}, r90 {most:.1f}"
            axes.set_title(f"{number} · {layer['kind']}\n{said}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{report['target']}\n{width} x {height} px", fontsize=9)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30, pad=0.01, ticks=range(-DECADES, 1))
    bar.ax.set_yticklabels([f"≤ 1e{-DECADES}", *(f"1e{power}" for power in range(1 - DECADES, 0)), "1"], fontsize=8)
    bar.set_label("squared gradient / its maximum", fontsize=8)
    figure.suptitle("Effective receptive fields: 50 % within the line, 90 % within the dashes", fontsize=10)
    return figure
