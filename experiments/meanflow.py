"""python -m experiments.meanflow: average velocities (MeanFlow) against flow matching on digits, over evaluations.

ATConv and attention, over seeds. A MeanFlow run takes STEPS steps; a flow run goes on to as many as take the same time,
and is scored at both. Writes to OUT a table, raw JSON and a figure: Fréchet distance and recognised share of NUM
samples over network evaluations. Every arm is a run of train_sit.py in RUNS, with its scores in result.json; a run that
is there is neither trained nor scored again.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.ablation import RESULT, SYSTEMS, System, make, spread
from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_number, add_out
from sit_atconv.config import load_recipe
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, InputError, command
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
# What is aimed at: an average velocity's evaluations against so many of the flow that was trained for the same time.
AIMS = ((1, 8), (2, 50))


@dataclass(frozen=True)
class Arm:
    """Training of a mixer by an objective. steps: after which its average is scored. stated: overrides of its own."""

    mixer: str
    objective: str
    steps: tuple[int, ...]
    stated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.mixer, self.objective, *(each.replace("/", "_") for each in self.stated)])

    def options(self) -> dict[str, Any]:
        return {"mixer": self.mixer, "objective": self.objective, "stated": self.stated}

    def points(self) -> Iterator[tuple[int, int]]:
        """(step, evaluations) of all scores."""
        return ((step, count) for step in self.steps for count in EVALUATIONS[self.objective])


def arms(steps: int, ratios: Sequence[float], stated: Sequence[str] = ()) -> list[Arm]:
    """Of every mixer a MeanFlow run with what is stated, and a flow run that goes on for `ratios` times its steps."""
    found = []
    for mixer, ratio in zip(MIXERS, ratios, strict=True):
        found.append(Arm(mixer, "meanflow", (steps,), tuple(stated)))
        found.append(Arm(mixer, "flow", tuple(dict.fromkeys((steps, round(steps * ratio))))))
    return found


@dataclass(frozen=True)
class Averaging(System):
    """Training of an arm, whose checkpoints are kept where they are scored."""

    def command(self, runs: Path, arm: Arm, seed: int) -> list[str]:
        first, last = arm.steps[0], arm.steps[-1]
        taken = [f"train.max_steps={last}", f"checkpoint.every={first}", f"checkpoint.keep_every={first}"]
        share = ["meanflow.share=0.5"] if arm.objective == "meanflow" else []
        own = [f"model.token_mixer={arm.mixer}", f"run.out={self.folder(runs, arm, seed)}", f"run.seed={seed}"]
        return [self.script, self.recipe, *self.overrides, *share, *arm.stated, *taken, *own]


def averaging(arm: Arm, num: int, decay: float, scorer: TrainingScorer | None = None) -> Averaging:
    """The runs of an arm, scored by `num` samples. scorer: None where none is to be scored."""
    overrides = ("preview.every=0", "train.lr_schedule=constant", "train.warmup_steps=100", f"ema.decay={decay:g}")
    figures = [f"seconds_{step}" for step in arm.steps]
    figures += [key(name, *point) for point in arm.points() for name in (FRECHET, RECOGNISED)]
    own = {
        "name": "meanflow", "recipe": "digits", "overrides": overrides, "figures": dict.fromkeys([*figures, "num"], ""),
        "measured": lambda run, arm: {**scores(run, arm, num, scorer), "num": num},
    }  # fmt: skip
    return Averaging(**{**vars(SYSTEMS[0]), **own})


def key(figure: str, step: int, evaluations: int) -> str:
    """The name of a score in result.json."""
    return f"{figure}_{step}_{evaluations}"


def scores(run: Path, arm: Arm, num: int, scorer: TrainingScorer) -> dict[str, float]:
    """Seconds of training, and the scores of samples of the averages of a run, by their names in result.json.

    num: samples of each, of the classes in turn, whose noise is of the run's seed; neither guided nor cut.
    """
    found, labels = {}, [index % 10 for index in range(num)]
    for step in arm.steps:
        trained = checkpoint.load_trained(checkpoint.folder_of(run, step))
        found[f"seconds_{step}"] = trained.manifest["seconds"]
        for evaluations in EVALUATIONS[arm.objective]:
            sampling = Sampling("euler", steps=evaluations, guidance_scale=1.0)
            blocks = [range(first, min(first + AT_ONCE, num)) for first in range(0, num, AT_ONCE)]
            seed = trained.manifest["recipe"]["run"]["seed"]
            images = [
                generate(trained.model, IdentityCodec(), block, labels[block[0] : block[-1] + 1], sampling, seed)[0]
                for block in blocks
            ]
            for name, value in scorer(torch.cat(images), labels).items():
                found[key(name, step, evaluations)] = value
    return found


def trained_as(arm: Arm, step: int) -> str:
    return f"{'MeanFlow' if arm.objective == 'meanflow' else 'flow'}, {step:,} steps"


def curves(some: Sequence[Arm], results: Sequence[dict], figure: str) -> dict[tuple[Arm, int], dict[int, list[float]]]:
    """The values of a score over the seeds, by evaluations, of every arm at every step that is scored."""
    found = {}
    for arm in some:
        own = sorted((each for each in results if each["arm"] == arm.name), key=lambda each: each["seed"])
        for step, evaluations in arm.points():
            values = [each[key(figure, step, evaluations)] for each in own]
            found.setdefault((arm, step), {})[evaluations] = values
    return found


def table(some: Sequence[Arm], results: Sequence[dict[str, Any]]) -> str:
    """Markdown, mean ± standard deviation over seeds: the distances, the shares recognised, and what AIMS compare, as
    differences within a seed."""
    columns = EVALUATIONS["flow"]
    parts = []
    for figure, said in ((FRECHET, "Fréchet distance"), (RECOGNISED, "Recognised share")):
        rows = []
        for (arm, step), values in curves(some, results, figure).items():
            seconds = [each[f"seconds_{step}"] for each in results if each["arm"] == arm.name]
            cells = [spread(values[count]) if count in values else "" for count in columns]
            rows.append([arm.mixer, trained_as(arm, step), spread(seconds), *cells])
        head = ["mixer", "training", "seconds of training", *map(str, columns)]
        parts.append(f"{said} by network evaluations per image:\n\n{markdown_table(head, rows, head[:2])}")
    rows, distances = (
        [],
        {(arm.mixer, arm.objective): each for (arm, _), each in curves(some, results, FRECHET).items()},
    )
    for mixer in MIXERS:
        average, flow = distances[mixer, "meanflow"], distances[mixer, "flow"]
        gaps = [[a - b for a, b in zip(average[own], flow[other], strict=True)] for own, other in AIMS]
        rows.append([mixer, *map(spread, gaps)])
    head = ["mixer", *(f"MeanFlow's {own} less the flow's {other}" for own, other in AIMS)]
    said = "Fréchet distance of MeanFlow less that of the flow that was trained for the same time, within a seed:"
    return "\n\n".join([*parts, f"{said}\n\n{markdown_table(head, rows, head[:1])}"]) + "\n"


def draw(some: Sequence[Arm], results: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: the distance over evaluations, a colour for each mixer, means with the standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (arm, step), values in curves(some, results, FRECHET).items():
        style = "-" if arm.objective == "meanflow" else "--" if step == arm.steps[-1] else ":"
        distances = torch.tensor(list(values.values()), dtype=torch.float64)
        axes.errorbar(
            list(values), distances.mean(1), distances.std(1) if distances.shape[1] > 1 else None,
            color=MIXERS[arm.mixer], linestyle=style, marker="o", markersize=4, capsize=3,
            label=f"{arm.mixer}, {trained_as(arm, step)}",
        )  # fmt: skip
    counts = EVALUATIONS["flow"]
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="Fréchet distance")
    axes.set_xticks(counts, map(str, counts))
    axes.set_xticks([], minor=True)
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure_png(figure)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.meanflow", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", **limits.SEED.flag, default=[0, 1, 2])
    add_number(parser, "--steps", limits.STEPS, 2400, "steps of MeanFlow")
    add_number(
        parser, "--flow-ratio", RATIO, [2.1, 2.3], "how many times a flow step's time a MeanFlow step takes",
        nargs=2, metavar=tuple(mixer.upper() for mixer in MIXERS),
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe, of the MeanFlow runs alone"
    )
    add_number(parser, "--ema-decay", number(0, 1, "it is the weight of the past", under=True), 0.995, "of every run")
    add_number(parser, "--num", limits.IMAGES, 2000, "samples of each score")
    parser.add_argument("--runs", type=Path, default=Path("runs/meanflow"), help="folder of the runs")
    add_out(parser, "folder of the table", type=Path, default=Path("experiments/results/meanflow"))
    parser.add_argument(
        "--processes", **limits.PROCESSES.flag, default=os.cpu_count(), help="runs at once (default: one per core)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the commands that are left, and run none")
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {args.seeds}: give different ones")
    written = Results(named(args.out / "meanflow", ".md", ".json", ".png"), args.force, *KEYS)
    some = arms(args.steps, args.flow_ratio, args.set)
    scorer = None if args.dry_run else TrainingScorer("digits")

    def one(arm: Arm, seed: int) -> dict | None:
        system = averaging(arm, args.num, args.ema_decay, scorer)
        result = make(system, args.runs, arm, seed, args.dry_run)
        if result and result["num"] != args.num:
            file = system.folder(args.runs, arm, seed) / RESULT
            raise InputError(
                f"--num {args.num}: {str(file)!r} has scores of {result['num']:,} samples; give that, or remove the "
                "file, and it is made anew"
            )
        return result

    for arm in some:  # a mistake in --set is told before the first run
        _, recipe, *overrides = averaging(arm, args.num, args.ema_decay).command(args.runs, arm, 0)
        load_recipe(recipe, overrides)
    with ThreadPoolExecutor(args.processes) as pool:
        tasks = [pool.submit(partial(one, arm, seed)) for seed in args.seeds for arm in some]
        bar = Progress(tasks, desc="meanflow", unit="run", disable=args.dry_run, delay=1)
        try:
            results = [task.result() for task in bar]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
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
