"""python -m experiments.finetune: fine-tuning against training from nothing, on digits, at equal steps.

Two tasks. classes: digits 5 to 9 as new classes, for a model of digits 0 to 4. mixer: ATConv in two of the five blocks
of a model that has attention, on all digits. Each is done from nothing, from the trained model (`train.init`), and by
LoRA on it, of rank 8 and with four times the learning rate. The arms of a task take equally many steps; those of the
trained model are not counted. Writes to OUT a table and raw JSON. Every arm is a run of train_sit.py in RUNS, with its
held-out loss in result.json; a run that is there is not trained again.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation import SYSTEMS, System, flow_figures, make, spread
from experiments.runs import parsed, parser_of, side_by_side
from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_number
from sit_atconv.data.digits import Digits
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, command
from sit_atconv.runtime.files import library_versions, named, write_atomic
from sit_atconv.runtime.markdown import markdown_table

KEYS = ("system", "seeds", "steps", "versions", "results")  # of the JSON
FIRST, SECOND = range(5), range(5, 10)
LORA = ("lora.rank=8", "train.lr=4e-3")
HALF = "train.init_anew=[blocks.1.attn,blocks.3.attn]"


@dataclass(frozen=True)
class Arm:
    """A run: the digits that it is trained and held out on, what its recipe states, and the arm that it begins from."""

    name: str
    said: str
    digits: range = range(10)
    stated: tuple[str, ...] = ()
    source: "Arm | None" = None

    def options(self) -> dict[str, str]:
        return {"source": self.source.name if self.source else ""}


OF_FIRST = Arm("source-classes", "digits 0 to 4", FIRST)
OF_ATTENTION = Arm("source-mixer", "attention")
ANEW, HYBRID = "train.init_anew=[y_embedder]", "model.token_mixer=hybrid"
TASKS = {
    "digits 5 to 9 as new classes": (
        Arm("classes-nothing", "from nothing", SECOND),
        Arm("classes-init", "train.init, y_embedder anew", SECOND, (ANEW,), OF_FIRST),
        Arm("classes-lora", "LoRA, y_embedder anew", SECOND, (ANEW, *LORA), OF_FIRST),
    ),
    "ATConv in half of the blocks": (
        Arm("mixer-nothing", "from nothing", stated=(HYBRID,)),
        Arm("mixer-init", "train.init, new mixers anew", stated=(HYBRID, HALF), source=OF_ATTENTION),
        Arm("mixer-lora", "LoRA, new mixers anew", stated=(HYBRID, HALF, *LORA), source=OF_ATTENTION),
    ),
}


def of_classes(split: str, classes: range) -> Digits:
    """The digits of those classes, which are counted from 0, in the 256 levels of an npz."""
    digits = Digits(split)
    chosen = np.isin(digits.labels, classes)
    digits.images = ((digits.images[chosen] + 1) * 127.5).round() / 127.5 - 1
    digits.labels = digits.labels[chosen] - classes[0]
    return digits


def write_digits(file: Path, classes: range) -> None:
    """Training digits of those classes as an npz, `data.kind=npz`. Raises InputError where another file is there."""
    digits, stored = of_classes("train", classes), io.BytesIO()
    pixels = ((digits.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(stored, arr_0=pixels, arr_1=digits.labels.astype(np.int64))
    if file.exists() and file.read_bytes() != stored.getvalue():
        raise InputError(f"{str(file)!r} is not what this experiment writes there; move it, or name other --runs")
    write_atomic(file, stored.getvalue())


@dataclass(frozen=True)
class Tuning(System):
    """Training of an arm, which begins from the run of another of the same seed."""

    def command(self, runs: Path, arm: Arm, seed: int) -> list[str]:
        data = ["data.kind=npz", f"data.root={runs / data_name(arm.digits)}", "data.image_size=8"]
        own = [f"run.out={self.folder(runs, arm, seed)}", f"run.seed={seed}", *(data if len(arm.digits) < 10 else [])]
        if arm.source is not None:
            own.append(f"train.init={self.folder(runs, arm.source, seed)}")
        return [self.script, self.recipe, *self.overrides, *arm.stated, *own]


def data_name(digits: range) -> str:
    return f"digits-{digits[0]}-{digits[-1]}.npz"


def tuning(steps: int) -> Tuning:
    """Runs of so many steps."""
    overrides = (
        f"train.max_steps={steps}", f"checkpoint.every={steps}", "preview.every=0", "train.lr_schedule=constant",
        "train.warmup_steps=0", "train.lr=1e-3", "ema.kind=warmup",
    )  # fmt: skip
    first = replace(SYSTEMS[0], name="finetune", recipe="digits", overrides=overrides)

    def measured(run: Path, arm: Arm) -> dict[str, float]:
        return flow_figures(run, of_classes("test", arm.digits))

    return Tuning(**{**vars(first), "measured": measured})


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per arm, mean ± standard deviation over seeds of the held-out flow loss, and of its difference to
    training from nothing within a seed."""
    loss = {(each["arm"], each["seed"]): each["loss"] for each in results}
    seeds, rows = sorted({seed for _, seed in loss}), []
    for task, (nothing, *others) in TASKS.items():
        for arm in (nothing, *others):
            gaps = [loss[arm.name, seed] - loss[nothing.name, seed] for seed in seeds]
            values = spread([loss[arm.name, seed] for seed in seeds])
            rows.append([task, arm.said, values, "" if arm is nothing else spread(gaps)])
    return markdown_table(
        ["task", "begins", "held-out flow loss", "difference within a seed"], rows, ["task", "begins"]
    )


@command
def main(argv: list[str] | None = None) -> None:
    parser = parser_of("finetune", __doc__)
    add_number(parser, "--steps", limits.STEPS, 200, "steps of every arm")
    add_number(parser, "--source-steps", limits.STEPS, 1200, "steps of the models that arms begin from")
    args = parsed(parser, argv)
    written = Results(named(args.out / "finetune", ".md", ".json"), args.force, *KEYS)
    if not args.dry_run:
        args.runs.mkdir(parents=True, exist_ok=True)
        for classes in (FIRST, SECOND):
            write_digits(args.runs / data_name(classes), classes)
    arms = [arm for task in TASKS.values() for arm in task]
    results = []
    for some, steps in (([OF_FIRST, OF_ATTENTION], args.source_steps), (arms, args.steps)):
        one = partial(make, tuning(steps), args.runs, dry_run=args.dry_run)
        results += side_by_side([partial(one, arm, seed) for arm in some for seed in args.seeds], "finetune", args)
    if args.dry_run:
        return
    report = table(results)
    steps = {"arms": args.steps, "sources": args.source_steps}
    facts = {"system": "finetune", "seeds": args.seeds, "steps": steps, "versions": library_versions()}
    written.write(report, {**facts, "results": results})
    print(report)


if __name__ == "__main__":
    main()
