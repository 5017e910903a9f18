"""The plot that the timing commands draw."""

from collections.abc import Iterable

from sit_atconv.runtime.files import figure_png

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
