"""The figure of an ablation: every run a dot, every arm a line with its mean."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sit_atconv.runtime.files import figure_png

COLOURS = {"learned": "#0072b2", "full": "#d55e00", "none": "#666666"}  # of the inhibition


def draw(system: str, what: str, arms: list[str], results: list[dict]) -> bytes:
    """A PNG: a line per arm from best to worst, dots of its seeds, a bar at their mean. The lower the better."""
    values = {arm: [each["loss"] for each in results if each["arm"] == arm] for arm in arms}
    ordered = sorted(arms, key=lambda arm: sum(values[arm]) / len(values[arm]), reverse=True)
    figure = Figure(figsize=(8, 0.32 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    for height, arm in enumerate(ordered):
        colour = COLOURS[arm.split("-")[1]]
        marker = "o" if arm.startswith("adaptive") else "s"
        axes.scatter(values[arm], [height] * len(values[arm]), color=colour, marker=marker, s=22, alpha=0.75, zorder=3)
        mean = sum(values[arm]) / len(values[arm])
        axes.plot([mean, mean], [height - 0.3, height + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(ordered)), [arm.replace("-", " · ") for arm in ordered], fontsize=8)
    axes.set_xlabel(f"{what} (lower is better)")
    axes.set_title(f"{system}: every dot a seed, every bar a mean", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=f"inhibition {name}")
        for name, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color="black", marker=marker, linestyle="", fillstyle="none", label=f"routing {name}")
        for name, marker in (("adaptive", "o"), ("static", "s"))
    ]
    axes.legend(handles=handles, fontsize=8, loc="best")
    return figure_png(figure)
