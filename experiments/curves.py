"""python -m experiments.curves FILE: how the runs of a table learnt, at equal steps and at equal time.

FILE is a YAML file of experiments.table, whose runs are trained already. OUT gets curves.md, curves.json and
curves.png: the loss of held-out images over steps and over the seconds that were spent in steps. A time is fair only
where the runs had the machine for themselves, or shared it alike, and their learning rate is constant.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.table import CURVES, Model, Table, is_trained, load_table, models
from sit_atconv import config
from sit_atconv.bench.results import Results
from sit_atconv.runtime.comparison import differences
from sit_atconv.runtime.errors import ArgumentParser, InputError, add_force, command, told
from sit_atconv.runtime.files import figure_png
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.reading import COUNT, read_rows
from sit_atconv.training.activities import VALIDATION

KEYS = ("table", "runs", "seconds")  # of the JSON
ROW = {"step": COUNT, "seconds": (float, None), "loss": (float, None), "num": COUNT}  # of the log


@dataclass(frozen=True)
class Curve:
    """The loss of `num` held-out images of one run. steps, seconds, losses: (N,), of its validations in their order."""

    label: str
    entry: str
    seed: int
    steps: np.ndarray
    seconds: np.ndarray
    losses: np.ndarray
    batch: int
    num: int

    @property
    def images_per_second(self) -> float:
        """Images trained on, over the seconds that were spent in steps."""
        return self.steps[-1] * self.batch / self.seconds[-1]

    def at(self, seconds: float) -> float:
        """The loss at a time, by the straight line between the validations around it. Raises InputError for a time
        that no validation comes before."""
        if seconds < self.seconds[0]:
            raise InputError(
                f"run {self.label!r} has its first loss at {self.seconds[0]:.4g} s, and is to be compared at "
                f"{seconds:.4g} s, where another ends; train both with a lower validation.every"
            )
        return float(np.interp(seconds, self.seconds, self.losses))


def read_curve(model: Model, entry: str) -> Curve:
    """The curve of a run of a table. Raises InputError where the run is not the table's, or has no whole curve."""
    file, recipe = model.ckpt / VALIDATION, model.recipe
    if not is_trained(model):
        raise InputError(f"{str(model.ckpt)!r} is no run of the table's recipe that has ended; make the table first")
    if not file.is_file():
        raise InputError(f"{str(file)!r} is not there; train the run anew, with data.held_out and validation.every")
    with told(f"{str(file)!r} is damaged", InputError, OSError, remedy="train the run anew"):
        rows = read_rows(file, ROW)
    if not rows or rows[-1]["step"] != recipe.train.max_steps:
        last = f"step {recipe.train.max_steps:,}"
        raise InputError(f"{str(file)!r} has no line of {last}; train the run anew, with validation.every to its end")
    if rows[-1]["loss"] is None:
        raise InputError(f"{str(file)!r}: the last loss is not finite, and cannot be compared; take the entry out")
    if any(row["seconds"] is None for row in rows):
        raise InputError(f"{str(file)!r} says no seconds; train the run anew")
    if len(nums := {row["num"] for row in rows}) > 1:
        raise InputError(f"{str(file)!r} has losses of {min(nums):,} images and of {max(nums):,}; train the run anew")
    found = [row for row in rows if row["loss"] is not None]
    columns = (np.array([row[key] for row in found], float) for key in ("step", "seconds", "loss"))
    return Curve(model.label, entry, recipe.run.seed, *columns, recipe.train.batch_size, nums.pop())


def curves_of(table: Table) -> list[Curve]:
    """Those of all runs that a table trains. Raises InputError where there are none, or they cannot be compared."""
    entries = {f"{entry.name}-seed{seed}": entry.name for entry in table.entries for seed in entry.seeds}
    trained = [model for model in models(table) if model.recipe is not None]
    if not trained:
        raise InputError("the table trains no run; give entries with a recipe")
    stated = [_compared(model.recipe) for model in trained]
    for model, each in zip(trained, stated, strict=True):
        if changed := differences(stated[0], each):
            both = f"runs {trained[0].label!r} and {model.label!r}"
            raise InputError(f"{both} cannot be compared: {changed[0]}; give them the same")
    found = [read_curve(model, entries[model.label]) for model in trained]
    if other := next((curve for curve in found if curve.num != found[0].num), None):
        raise InputError(
            f"runs {found[0].label!r} and {other.label!r} cannot be compared: their losses are of {found[0].num:,} and "
            f"of {other.num:,} images; train them anew, with one validation.num"
        )
    return found


def _compared(recipe: config.Recipe) -> dict[str, Any]:
    """What runs must have in common, so that their losses are of the same images, noises, times and steps."""
    stored = config.to_dict(recipe)
    train = {key: stored["train"][key] for key in ("max_steps", "batch_size")}
    return {"train": train, **{section: stored[section] for section in ("data", "latents", "flow")}}


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds; of one seed the value alone."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    digits = min(max(0, 1 - math.floor(math.log10(error))), 4) if error else 4
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def report(curves: Sequence[Curve]) -> tuple[str, float]:
    """A Markdown table, a row for each entry, and the seconds of "equal time": those of the run that ended first.

    Beside the losses stands how they differ from the first entry's, mean ± standard error of the difference within a
    seed, which leaves out what seeds differ by.
    """
    seconds = min(float(curve.seconds[-1]) for curve in curves)
    names = list(dict.fromkeys(curve.entry for curve in curves))
    by_entry = {name: {curve.seed: curve for curve in curves if curve.entry == name} for name in names}
    last = {name: {seed: float(each.losses[-1]) for seed, each in own.items()} for name, own in by_entry.items()}
    timed = {name: {seed: each.at(seconds) for seed, each in own.items()} for name, own in by_entry.items()}
    steps = int(curves[0].steps[-1])
    head = [
        "model", "seeds", f"validation loss at step {steps:,}", f"less {names[0]}'s",
        f"validation loss at {seconds:,.0f} s", f"less {names[0]}'s ", "training images/s", "seconds of training",
    ]  # fmt: skip
    rows = []
    for name, own in by_entry.items():
        cells = [name, ", ".join(map(str, own))]
        for losses in (last, timed):
            shared = [seed for seed in losses[name] if seed in losses[names[0]]]
            gaps = [losses[name][seed] - losses[names[0]][seed] for seed in shared]
            compared = mean_and_error(gaps) if gaps and name != names[0] else ""
            cells += [mean_and_error([*losses[name].values()]), compared]
        cells.append(mean_and_error([each.images_per_second for each in own.values()]))
        rows.append([*cells, mean_and_error([float(each.seconds[-1]) for each in own.values()])])
    return markdown_table(head, rows, head[:2]), seconds


def draw(curves: Sequence[Curve]) -> bytes:
    """A PNG: the losses over steps and over seconds, a colour for each entry, a thin line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    names = list(dict.fromkeys(curve.entry for curve in curves))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, over, label in ((left, "steps", "step"), (right, "seconds", "seconds spent in steps")):
        for curve in curves:
            first = curve is next(each for each in curves if each.entry == curve.entry)
            colour = f"C{names.index(curve.entry)}"
            axes.plot(
                getattr(curve, over), curve.losses, color=colour, linewidth=1.1, alpha=0.85,
                label=curve.entry if first else None,
            )  # fmt: skip
        axes.set(xlabel=label, yscale="log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
    left.set_ylabel("loss of held-out images, EMA")
    left.legend(fontsize="small")
    figure.suptitle("A line for each seed", fontsize="small")
    return figure_png(figure)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.curves", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="YAML file of a table, see experiments/tables")
    add_force(parser)
    args = parser.parse_args(argv)
    table = load_table(Path(args.file))
    written = Results([Path(table.out) / name for name in CURVES], args.force, *KEYS)
    curves = curves_of(table)
    text, seconds = report(curves)
    note = (
        "Mean ± standard error over seeds; differences are within a seed. Losses are of the EMA on held-out images. "
        "Equal time: the seconds of the run that ended first, spent in steps alone. It is fair where all runs had the "
        "machine alike, and a constant train.lr_schedule: a falling rate is lowest in the run that ends first."
    )
    facts: dict[str, Any] = {
        "table": Path(args.file).name,
        "seconds": seconds,
        "runs": [
            {
                "entry": curve.entry, "seed": curve.seed, "step": curve.steps.astype(int).tolist(),
                "seconds": curve.seconds.tolist(), "loss": curve.losses.tolist(),
                "images_per_second": curve.images_per_second,
            }
            for curve in curves
        ],
    }  # fmt: skip
    written.write(f"{text}\n\n{note}\n", facts, draw(curves))
    print(f"{text}\n\n{note}")


if __name__ == "__main__":
    main()
