"""The picture of the README: a grid of digits beside latency against resolution.

The grid is the one that `make demo` draws. The times are those of the table "Latency against resolution" in
docs/benchmarks.md, or of a JSON of `sit-atconv speed`.
"""

import textwrap
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import NamedTuple

from sit_atconv.runtime.errors import ArgumentParser, InputError, add_force, command
from sit_atconv.runtime.files import REPORT, check_out, figure_png, write_out
from sit_atconv.runtime.reading import read_json

GRID, OUT = Path("runs/demo/grid.png"), Path("docs/front_page.png")
TABLE = Path("docs/benchmarks.md")
HEADING = "## Latency against resolution"  # of the section in TABLE
MODELS = ("SiT-XL/2", "SiT-ATConv-XL/2")
LABELS = ("attention", "ATConv")
COLORS = ("#8a8f98", "#d1495b")
INK, FAINT_INK, FAINT = "#1f2328", "#59636e", "#d8dee4"
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # the ticks


class Point(NamedTuple):
    """Milliseconds per network evaluation of both models at one size."""

    dtype: str
    size: int
    attention: float
    atconv: float


class Speed(NamedTuple):
    """Points, and what they were measured with, in words."""

    points: list[Point]
    caption: str


def from_table(text: str) -> Speed:
    """The first table under HEADING in docs/benchmarks.md; the settings follow the colon of the first sentence there.

    Raises InputError where there is no such table.
    """
    section = text.partition(f"{HEADING}\n")[2]
    lines = dropwhile(lambda line: not line.startswith("|"), section.splitlines())
    table = takewhile(lambda line: line.startswith("|"), lines)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    head, points = rows[0] if rows else [], []
    if [cell.partition(" (")[0] for cell in head[2:4]] == list(MODELS):
        points = [Point(row[0], int(row[1]), float(row[2]), float(row[3])) for row in rows[2:]]
    if not points:
        raise InputError(f"{str(TABLE)!r} has no table of {' and '.join(MODELS)} under {HEADING!r}; write it there")
    sentence = " ".join(section.split()).partition(". ")[0]
    return Speed(points, sentence.partition(": ")[2])


def from_speed(path: Path) -> Speed:
    """The points of a JSON of `sit-atconv speed`. Raises InputError where it lacks one of the models."""
    form = {"dtype": str, "device": str, "batch": int, "compiled": bool, "rounds": int}
    result = read_json(path, form | {"rows": [{"model": str, "size": int, "pass": str, "ms_per_nfe": float}]})
    rows = (row for row in result["rows"] if row["pass"] == "forward")
    times = {(row["model"], row["size"]): row["ms_per_nfe"] for row in rows}
    sizes = sorted({size for _, size in times if all((name, size) in times for name in MODELS)})
    if not sizes:
        raise InputError(f"{str(path)!r} has no forward pass of {' and '.join(MODELS)} at one size; time both")
    points = [Point(result["dtype"], size, *(times[name, size] for name in MODELS)) for size in sizes]
    mode = "compiled blocks" if result["compiled"] else "eager"
    return Speed(
        points, f"batch {result['batch']}, {mode}, {result['device']}, medians of {result['rounds']} interleaved rounds"
    )


def draw(grid: Path, speed: Speed) -> bytes:
    """A PNG: the grid at the left, at the right a panel of latency for each dtype."""
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    dtypes = list(dict.fromkeys(point.dtype for point in speed.points))
    with Image.open(grid) as image:
        digits = np.asarray(image.convert("L"))
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    with plt.rc_context({"font.size": 11, **colors}):
        figure = plt.figure(figsize=(11, 4.1), layout="constrained", facecolor="white")
        whole, right = figure.subfigures(1, 2, width_ratios=(4.6, 6.4))
        left = whole.subplots()
        left.imshow(digits, cmap="gray", interpolation="nearest")
        left.set_axis_off()
        left.set_title("Digits from a small SiT-ATConv", fontsize=12, fontweight="bold", pad=10)
        panels = right.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            _panel(axes, [point for point in speed.points if point.dtype == dtype], dtype)
        times = [time / 1e3 for point in speed.points for time in (point.attention, point.atconv)]
        panels[0].set_ylim(min(times) / 1.6, max(times) * 1.6)
        panels[0].set_ylabel("seconds per network evaluation")
        caption = textwrap.fill(f"×: attention's time over ATConv's; {speed.caption}", 100)
        right.supxlabel(caption, fontsize=8.5, color=FAINT_INK)
        png = figure_png(figure)
        plt.close(figure)
    return png


def _panel(axes, points: list[Point], dtype: str) -> None:
    """One dtype: a line per mixer, on logarithmic axes; above the upper line, how many times as fast ATConv is."""
    from matplotlib.ticker import NullLocator

    sizes = [point.size for point in points]
    lines = [[point.attention / 1e3 for point in points], [point.atconv / 1e3 for point in points]]
    axes.fill_between(sizes, *lines, color=COLORS[1], alpha=0.10, linewidth=0)
    for line, label, color in zip(lines, LABELS, COLORS, strict=True):
        axes.plot(sizes, line, "-o", color=color, label=label, linewidth=2.4, markersize=6)
    for size, slow, quick in zip(sizes, *lines, strict=True):
        axes.annotate(
            f"{slow / quick:.1f}×", (size, slow), xytext=(-9, 5), textcoords="offset points", ha="right",
            fontweight="bold", color=COLORS[1],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="image size (px)", xlim=(min(sizes) / 1.7, max(sizes) * 1.25))
    axes.set_title(f"SiT-XL/2, {dtype}", fontsize=12, fontweight="bold", pad=10)
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.set_yticks(SECONDS, [f"{second:g}" for second in SECONDS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.front_page", description=__doc__)
    parser.add_argument("--grid", type=Path, default=GRID, metavar="PNG", help=f"grid of samples (default: {GRID})")
    parser.add_argument("--speed", type=Path, metavar="JSON", help=f"of `sit-atconv speed` (default: {TABLE}'s table)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG", help=f"the picture (default: {OUT})")
    add_force(parser)
    args = parser.parse_args(argv)
    check_out(args.out, force=args.force, ours=REPORT)
    if not args.grid.is_file():
        raise InputError(f"--grid {args.grid}: no such file; `make demo` draws it")
    speed = from_speed(args.speed) if args.speed else from_table(TABLE.read_text())
    write_out(args.out, draw(args.grid, speed), force=args.force)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
