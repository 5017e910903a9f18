"""python -m experiments.meanflow: average velocities (MeanFlow) against flow matching on digits, over evaluations.

ATConv and attention, over seeds. Beside a MeanFlow run of STEPS steps are a flow run of as many steps, and one of as
many as cost the same time. Writes to OUT a table, raw JSON and a figure: Fréchet distance and recognised share of NUM
samples over network evaluations. Every arm is a run of train_sit.py in RUNS, with its scores in result.json; a run that
is there is neither trained nor scored again.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.ablation import RESULT, SYSTEMS, System, make, spread
from experiments.runs import parsed, parser_of, side_by_side
from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_number
from sit_atconv.config import load_recipe
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, command
from sit_atconv.runtime.files import figure_png, library_versions, named
from sit_atconv.runtime.limits import number
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.sampling.sampling import generate
from sit_atconv.sampling.settings import Sampling
from sit_atconv.scoring.score import TrainingScorer
from sit_atconv.training import checkpoint

KEYS = ("system", "seeds", "num", "versions", "results")  # of the JSON
MIXERS = {"atconv": "#0072b2", "attention": "#d55e00"}  # and their colours
FRECHET, RECOGNISED = "frechet_distance", "recognised"
EVALUATIONS = {"meanflow": (1, 2, 4, 8), "flow": (1, 2, 4, 8, 20, 50)}
AT_ONCE = 500  # samples in a batch
RATIO = number(1, 100, "a step of MeanFlow computes what a flow step does, and a derivative besides")
SETTINGS = (
    "meanflow.share=0.5", "meanflow.tangent=network", "flow.time_sampling=logit-normal", "flow.time_mean=0.4",
)  # fmt: skip
# What is aimed at: an average velocity's evaluations against so many of the flow that was trained for the same time.
AIMS = ((1, 8), (2, 50))


@dataclass(frozen=True)
class Arm:
    """Training of a mixer by an objective, for so many steps. stated: overrides of its own."""

    mixer: str
    objective: str
    steps: int
    stated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = [self.mixer, self.objective, str(self.steps), *(each.replace("/", "_") for each in self.stated)]
        return "-".join(words)

    @property
    def said(self) -> str:
        return f"{'MeanFlow' if self.objective == 'meanflow' else 'flow'}, {self.steps:,} steps"

    def options(self) -> dict[str, Any]:
        return {"mixer": self.mixer, "objective": self.objective, "steps": self.steps, "stated": self.stated}


def arms(steps: int, ratios: Sequence[float], stated: Sequence[str]) -> list[Arm]:
    """Of every mixer a MeanFlow run with what is stated, a flow run of as many steps, and one of `ratios` times as
    many."""
    found = []
    for mixer, ratio in zip(MIXERS, ratios, strict=True):
        found.append(Arm(mixer, "meanflow", steps, tuple(stated)))
        found += [Arm(mixer, "flow", each) for each in (steps, round(steps * ratio))]
    return found


@dataclass(frozen=True)
class Averaging(System):
    """Training of an arm."""

    def command(self, runs: Path, arm: Arm, seed: int) -> list[str]:
        taken = [f"train.max_steps={arm.steps}", f"checkpoint.every={arm.steps}"]
        own = [f"model.token_mixer={arm.mixer}", f"run.out={self.folder(runs, arm, seed)}", f"run.seed={seed}"]
        return [self.script, self.recipe, *self.overrides, *arm.stated, *taken, *own]


def averaging(arm: Arm, num: int, scorer: TrainingScorer | None = None) -> Averaging:
    """The runs of an arm, scored by `num` samples. scorer: None where none is to be scored."""
    figures = [key(name, count) for count in EVALUATIONS[arm.objective] for name in (FRECHET, RECOGNISED)]
    own = {
        "name": "meanflow", "recipe": "digits", "overrides": ("preview.every=0",),
        "figures": dict.fromkeys(["seconds", *figures, "num"], ""),
        "measured": lambda run, arm: {**scores(run, arm, num, scorer), "num": num},
    }  # fmt: skip
    return Averaging(**{**vars(SYSTEMS[0]), **own})


def key(figure: str, evaluations: int) -> str:
    """The name of a score in result.json."""
    return f"{figure}_{evaluations}"


def scores(run: Path, arm: Arm, num: int, scorer: TrainingScorer) -> dict[str, float]:
    """Seconds of training, and the scores of samples of the average of a run, by their names in result.json.

    num: samples of each, of the classes in turn, whose noise is of the run's seed; neither guided nor cut.
    """
    labels, trained = (
        [index % 10 for index in range(num)],
        checkpoint.load_trained(checkpoint.folder_of(run, arm.steps)),
    )
    found, seed = {"seconds": trained.manifest["seconds"]}, trained.manifest["recipe"]["run"]["seed"]
    for evaluations in EVALUATIONS[arm.objective]:
        sampling = Sampling("euler", steps=evaluations, guidance_scale=1.0)
        blocks = [range(first, min(first + AT_ONCE, num)) for first in range(0, num, AT_ONCE)]
        images = [
            generate(trained.model, IdentityCodec(), block, labels[block[0] : block[-1] + 1], sampling, seed)[0]
            for block in blocks
        ]
        found |= {key(name, evaluations): value for name, value in scorer(torch.cat(images), labels).items()}
    return found


def curve(arm: Arm, results: Sequence[dict], figure: str) -> dict[int, list[float]]:
    """The values of a score over the seeds, by evaluations."""
    own = sorted((each for each in results if each["arm"] == arm.name), key=lambda each: each["seed"])
    return {count: [each[key(figure, count)] for each in own] for count in EVALUATIONS[arm.objective]}


def table(some: Sequence[Arm], results: Sequence[dict[str, Any]]) -> str:
    """Markdown, mean ± standard deviation over seeds: the distances, the shares recognised, and what AIMS compare, as
    the mean of the differences within a seed ± its standard error."""
    columns, parts = EVALUATIONS["flow"], []
    for figure, said in ((FRECHET, "Fréchet distance"), (RECOGNISED, "Recognised share")):
        rows = []
        for arm in some:
            values = curve(arm, results, figure)
            seconds = [each["seconds"] for each in results if each["arm"] == arm.name]
            cells = [spread(values[count]) if count in values else "" for count in columns]
            rows.append([arm.mixer, arm.said, spread(seconds), *cells])
        head = ["mixer", "training", "seconds of training", *map(str, columns)]
        parts.append(f"{said} by network evaluations per image:\n\n{markdown_table(head, rows, head[:2])}")
    rows = []
    for average in (arm for arm in some if arm.objective == "meanflow"):
        longest = max((arm for arm in some if arm.mixer == average.mixer and arm is not average), key=_steps)
        ours, theirs = (curve(arm, results, FRECHET) for arm in (average, longest))
        gaps = [[a - b for a, b in zip(ours[own], theirs[other], strict=True)] for own, other in AIMS]
        rows.append([average.mixer, *map(_with_error, gaps)])
    head = ["mixer", *(f"MeanFlow's {own} less the flow's {other}" for own, other in AIMS)]
    said = (
        "Fréchet distance of MeanFlow less that of the flow that was trained for the same time, mean of the "
        "differences within a seed ± its standard error:"
    )
    return "\n\n".join([*parts, f"{said}\n\n{markdown_table(head, rows, head[:1])}"]) + "\n"


def _steps(arm: Arm) -> int:
    return arm.steps


def _with_error(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def draw(some: Sequence[Arm], results: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: the distance over evaluations, a colour for each mixer, means with the standard deviation over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm in some:
        values, shortest = curve(arm, results, FRECHET), min(map(_steps, some))
        style = "-" if arm.objective == "meanflow" else ":" if arm.steps == shortest else "--"
        distances = torch.tensor(list(values.values()), dtype=torch.float64)
        axes.errorbar(
            list(values), distances.mean(1), distances.std(1) if distances.shape[1] > 1 else None,
            color=MIXERS[arm.mixer], linestyle=style, marker="o", markersize=4, capsize=3,
            label=f"{arm.mixer}, {arm.said}",
        )  # fmt: skip
    counts = EVALUATIONS["flow"]
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="Fréchet distance")
    axes.set_xticks(counts, map(str, counts))
    axes.set_xticks([], minor=True)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # labels of more ticks would overlap
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure_png(figure)


@command
def main(argv: list[str] | None = None) -> None:
    parser = parser_of("meanflow", __doc__)
    add_number(parser, "--steps", limits.STEPS, 2400, "steps of MeanFlow")
    add_number(
        parser, "--flow-ratio", RATIO, [1.94, 2.06], "how many times a flow step's time a MeanFlow step takes",
        nargs=2, metavar=tuple(mixer.upper() for mixer in MIXERS),
    )  # fmt: skip
    parser.add_argument(
        "--set",
        nargs="+",
        default=list(SETTINGS),
        metavar="KEY=VALUE",
        help=f"overrides of the recipe, of the MeanFlow runs alone (default: {' '.join(SETTINGS)})",
    )
    add_number(parser, "--num", limits.IMAGES, 2000, "samples of each score")
    args = parsed(parser, argv)
    written = Results(named(args.out / "meanflow", ".md", ".json", ".png"), args.force, *KEYS)
    some = arms(args.steps, args.flow_ratio, args.set)
    scorer = None if args.dry_run else TrainingScorer("digits")

    def one(arm: Arm, seed: int) -> dict | None:
        system = averaging(arm, args.num, scorer)
        result = make(system, args.runs, arm, seed, args.dry_run)
        if result and result["num"] != args.num:
            file = system.folder(args.runs, arm, seed) / RESULT
            raise InputError(
                f"--num {args.num}: {str(file)!r} has scores of {result['num']:,} samples; give that, or remove the "
                "file, and it is made anew"
            )
        return result

    for arm in some:  # a mistake in --set is told before the first run
        _, recipe, *overrides = averaging(arm, args.num).command(args.runs, arm, 0)
        load_recipe(recipe, overrides)
    results = side_by_side([partial(one, arm, seed) for seed in args.seeds for arm in some], "meanflow", args)
    if args.dry_run:
        return
    report = table(some, results)
    facts = {
        "system": "meanflow", "seeds": args.seeds, "num": args.num, "steps": args.steps, "flow_ratio": args.flow_ratio,
        "set": args.set, "scorer": scorer.about, "versions": library_versions(), "results": results,
    }  # fmt: skip
    written.write(report, facts, draw(some, results))
    print(report, end="")


if __name__ == "__main__":
    main()
