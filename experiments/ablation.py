"""python -m experiments.ablation: the paper's two findings, switched off one by one, on digits.

Trains the grid routing x inhibition x pool x position embedding, for SiT and for AttNet, over seeds, and writes to OUT
a table, raw JSON and a figure for each. Every arm is a run of train_sit.py or train_attnet.py in RUNS, with its
held-out figures in result.json; a run that is there is not trained again.
"""

import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.ablation_plot import draw
from experiments.runs import parsed, parser_of, side_by_side
from sit_atconv.bench.results import Results
from sit_atconv.classification.evaluation import last_evaluation
from sit_atconv.classification.plan import steps_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.resolved import resolved
from sit_atconv.config import Recipe, differences, load_recipe, to_dict
from sit_atconv.data.digits import Digits
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.layers.atconv import INHIBITIONS, ROUTINGS
from sit_atconv.ops.atconv import POOLS
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, command
from sit_atconv.runtime.files import library_versions, made_here, named, write_out
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.reading import COUNT, Malformed, read_json
from sit_atconv.training import checkpoint
from sit_atconv.training.resolved import changes

TIMES = 16  # of every held-out image, one in each of as many equal parts of [0, 1]
RESULT = "result.json"
RESULT_FORM = {"system": str, "arm": str, "seed": COUNT, "command": [str]}  # and the figures
KEYS = ("system", "seeds", "versions", "results")  # of a system's JSON


@dataclass(frozen=True)
class Arm:
    """A cell of the grid. Static kernels look at no tokens, so they have no pool."""

    routing: str
    inhibition: str
    pool: str | None
    pos_embed: bool

    @property
    def name(self) -> str:
        parts = [self.routing, self.inhibition, self.pool, "pos" if self.pos_embed else "nopos"]
        return "-".join(part for part in parts if part)

    def options(self) -> dict[str, str]:
        """By the names of the models' options."""
        stated = {"routing": self.routing, "inhibition": self.inhibition, "pos_embed": str(self.pos_embed).lower()}
        return stated if self.pool is None else {**stated, "pool": self.pool}


def arms() -> list[Arm]:
    """The grid: 6 adaptive and 3 static cells, with and without position embedding."""
    pools = {"adaptive": POOLS, "static": (None,)}
    return [
        Arm(routing, inhibition, pool, pos_embed)
        for routing in ROUTINGS
        for inhibition in INHIBITIONS
        for pool in pools[routing]
        for pos_embed in (False, True)
    ]


@dataclass(frozen=True)
class System:
    """What is trained, and what of it is compared: the first of `figures`, the lower the better."""

    name: str
    script: str
    schema: type
    recipe: str
    prefix: str  # of the model's options in the recipe
    overrides: tuple[str, ...]
    steps: Callable[[Any], int]  # of a recipe's run
    figures: dict[str, str]  # by their keys in result.json, what they are
    changes: Callable[[dict[str, Any], Any], list[str]]  # what keeps the run of a stored recipe from being this one's
    measured: Callable[[Path, Any], dict[str, float]]  # the figures of an arm's run

    def folder(self, runs: Path, arm: Arm, seed: int) -> Path:
        return runs / f"{self.name}-{arm.name}-seed{seed}"

    def command(self, runs: Path, arm: Arm, seed: int) -> list[str]:
        """The arguments of the run, after python."""
        options = [f"{self.prefix}{key}={value}" for key, value in arm.options().items()]
        own = [f"run.out={self.folder(runs, arm, seed)}", f"run.seed={seed}"]
        return [self.script, self.recipe, *self.overrides, *options, *own]


@torch.no_grad()
def flow_figures(run: Path, digits: Digits | None = None) -> dict[str, float]:
    """Of a SiT's EMA: its loss over the held-out digits, at times and with noise that are the same for every run.

    digits: others, of which `images` (N, 1, 8, 8) and `labels` (N,) are looked at.
    """
    model, digits = checkpoint.load_trained(run).model, digits or Digits("test")
    labels, path, prediction = torch.tensor(digits.labels), PATHS[model.config.path](), model.config.prediction
    total = 0.0

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, t, labels, return_dict=False)[0]

    for part in range(TIMES):
        indices = np.stack([np.arange(len(labels)), np.full(len(labels), part)], 1)
        noise = draws.normal_batch((1, 8, 8), 0, Stream.NOISE, indices)
        t = (part + torch.from_numpy(draws.uniform_batch(0, Stream.TIME, indices)).float()) / TIMES
        losses = flow_loss(network, path, digits.images, noise, t, prediction)
        total += losses.double().mean().item() / TIMES
    return {"loss": total}


def classifier_figures(run: Path) -> dict[str, float]:
    """Of an AttNet's EMA, as its run has written them at its end."""
    row = last_evaluation(run) or {}
    return {"loss": row.get("ema_loss"), "top1": row.get("ema_top1")}


SYSTEMS = (
    System(
        "sit",
        "train_sit.py",
        Recipe,
        "experiments/recipes/digits_sit_atconv.yaml",
        "model.",
        ("train.max_steps=300", "checkpoint.every=300", "preview.every=0"),
        lambda recipe: recipe.train.max_steps,
        {"loss": "held-out flow loss"},
        changes,
        lambda run, arm: flow_figures(run),
    ),
    System(
        "attnet",
        "train_attnet.py",
        ClassifierRecipe,
        "experiments/recipes/digits_attnet.yaml",
        "model.options.",
        ("train.epochs=6", "eval.every_epochs=6", "checkpoint.every=1000"),
        lambda recipe: steps_of(recipe, recipe.train.epochs, len(Digits("train"))),
        {"loss": "held-out cross-entropy", "top1": "top-1 (%)"},
        lambda stored, recipe: differences(stored, to_dict(resolved(recipe)), ClassifierRecipe, resolved),
        lambda run, arm: classifier_figures(run),
    ),
)


def make(system: System, runs: Path, arm: Arm, seed: int, dry_run: bool) -> dict | None:
    """The result of a run, trained if it is not there. Raises InputError where the command fails."""
    folder, words = system.folder(runs, arm, seed), system.command(runs, arm, seed)
    file, recipe = folder / RESULT, load_recipe(words[1], words[2:], system.schema)
    found = checkpoint.newest_valid(folder) if file.exists() else None
    if found and found[1]["step"] == system.steps(recipe) and not system.changes(found[1]["recipe"], recipe):
        try:
            return read_json(file, {**RESULT_FORM, **dict.fromkeys(system.figures, float)})
        except (OSError, Malformed) as error:
            raise InputError(f"{str(file)!r} cannot be read ({error}); remove it, and it is made anew") from None
    if dry_run:
        print(f"$ {shlex.join(['python', *words])}")
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        raise InputError(f"{shlex.join(words)} ended with status {done.returncode}: {said.removeprefix('error: ')}")
    found = checkpoint.newest_valid(folder)
    manifest = found[1] if found else {"step": 0}
    if manifest["step"] != system.steps(recipe):
        raise InputError(f"{shlex.join(words)} was stopped at step {manifest['step']:,}; the same command goes on")
    figures = system.measured(folder, arm)
    if lost := [name for name, value in figures.items() if value is None or not math.isfinite(value)]:
        raise InputError(f"{shlex.join(words)}: {lost[0]} of its EMA is not finite; look at {str(folder)!r}")
    weights = {name: digest for name, digest in manifest["files"].items() if name.startswith("ema/")}
    result = {
        "system": system.name, "arm": arm.name, **arm.options(), "seed": seed, **figures, "command": words,
        "step": manifest["step"], "weights_sha256": weights, "versions": manifest["versions"],
    }  # fmt: skip
    write_out(file, json.dumps(result, indent=1, allow_nan=False), "result", ours=made_here("system", "arm", "seed"))
    return result


def table(system: System, results: list[dict]) -> str:
    """Markdown: a row per arm, mean ± standard deviation over seeds; then the means over all arms of each setting.

    Beside those, how the first figure differs from the setting's first value: mean ± standard deviation over seeds of
    the difference within a seed, which leaves out what seeds differ by.
    """
    keys, seeds = list(system.figures), sorted({each["seed"] for each in results})
    head = ["routing", "inhibition", "pool", "position embedding", *system.figures.values()]
    rows = []
    for arm in arms():
        of_arm = [each for each in results if each["arm"] == arm.name]
        cells = [arm.routing, arm.inhibition, arm.pool or "", "yes" if arm.pos_embed else "no"]
        rows.append(cells + [spread([each[key] for each in of_arm]) for key in keys])
    by_arm = markdown_table(head, rows, head[:4])
    head = ["setting", "arms", *system.figures.values(), "difference within a seed"]
    rows = []
    for setting in ("routing", "inhibition", "pool", "pos_embed"):
        first = None
        for value in dict.fromkeys(each.get(setting) for each in results if each.get(setting)):
            # Pools are compared among adaptive kernels, which alone have one.
            of_value = [each for each in results if each.get(setting) == value]
            by_seed = {
                key: [statistics.fmean(each[key] for each in of_value if each["seed"] == seed) for seed in seeds]
                for key in keys
            }
            cells = [f"{setting} {value}", str(len({each["arm"] for each in of_value}))]
            compared = by_seed[keys[0]]
            gaps = [own - other for own, other in zip(compared, first, strict=True)] if first else []
            rows.append(cells + [spread(by_seed[key]) for key in keys] + [spread(gaps) if gaps else ""])
            first = first or compared
    return "\n".join([by_arm, "", markdown_table(head, rows, head[:1])])


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, of one seed the value alone."""
    digits = 2 if max(map(abs, values)) > 10 else 4
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@command
def main(argv: list[str] | None = None) -> None:
    parser = parser_of("ablation", __doc__)
    parser.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS], default=["sit", "attnet"])
    args = parsed(parser, argv)
    systems = [system for system in SYSTEMS if system.name in args.systems]
    files = [Results(named(args.out / system.name, ".md", ".json", ".png"), args.force, *KEYS) for system in systems]
    for system, written in zip(systems, files, strict=True):
        calls = [
            partial(make, system, args.runs, arm, seed, args.dry_run)
            for arm, seed in itertools.product(arms(), args.seeds)
        ]
        results = side_by_side(calls, system.name, args)
        if args.dry_run:
            continue
        report = table(system, results)
        facts = {"system": system.name, "seeds": args.seeds, "versions": library_versions(), "results": results}
        picture = draw(system.name, system.figures["loss"], [arm.name for arm in arms()], results)
        written.write(report, facts, picture)
        print(f"{system.name}\n\n{report}\n")


if __name__ == "__main__":
    main()
