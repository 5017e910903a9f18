"""make drill: runs of every command that meet every fault there is, compared to the bit with one that was left alone.

    python -m experiments.drill [sit|scores|init|mixer|lora|meanflow|attnet|commands] [--runs 30] [--out runs/drill]

Runs of train_sit.py (from nothing, from the weights of another model, of LoRA, of MeanFlow) and of train_attnet.py are
killed with SIGKILL at random moments of their steps, previews, scores, EMA snapshots, evaluations and checkpoint
writes, and run again. Then single faults: signals, a full disk, NaNs, damaged checkpoints, other people's files, a
deleted shard of a cache of latents, deleted images. The other commands are killed before a random change of a file or
at a random time, and meet a full disk and other people's files. Prints a table of what was done and lost, and exits
with status 1 where something was.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from experiments.drill import commands
from experiments.drill.child import DONE, forked
from experiments.drill.forked import Ended, Forked, preload, python
from experiments.drill.places import files_in, save_images, save_latent_data, small_disk
from experiments.drill.rows import Row, expect, expect_same, many, row_of, table
from experiments.drill.subjects import LETTERS, STEPS, SUBJECTS, Subject
from sit_atconv.commands.options import add_number
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import scratch
from sit_atconv.runtime.reading import read_rows
from sit_atconv.training import checkpoint

EVERY_STEP = "run.log_every=1"


@dataclass
class Drill:
    """Where a subject's runs lie, and its recipe; `whole` is the run that was left alone."""

    subject: Subject
    out: Path
    recipe: Path

    @property
    def whole(self) -> Path:
        return self.out / "whole"

    def poisoned(self, run: Path, fault: str, rank: int, *overrides: str) -> list[str]:
        """The arguments to Python of a run with a fault put in, in step 7 of one process."""
        words = [self.subject.name, fault, str(rank), "7", str(self.recipe), f"run.out={run}"]
        return ["-m", "experiments.drill.child", *words, *overrides, EVERY_STEP]

    @classmethod
    def on(cls, subject: Subject, recipe: dict, out: Path) -> "Drill":
        """A drill on a recipe, all in a folder."""
        out.mkdir(parents=True, exist_ok=True)
        file = out / "recipe.yaml"
        file.write_text(yaml.safe_dump({**recipe, "run": {**recipe.get("run", {}), "out": str(out / "run")}}))
        return cls(subject, out, file)

    def train(self, run: Path, *overrides: str) -> Ended:
        """The command of a user, to its end."""
        return python(self.subject.script, str(self.recipe), f"run.out={run}", *overrides)

    def stopped(self, run: Path, times: int) -> int:
        """Begin a run that SIGTERM ends in its given step; the step it was saved at."""
        child = Child(self, run, EVERY_STEP)
        child.wait_for("step", times)
        os.kill(child.pid, signal.SIGTERM)
        child.end().expect(0, "goes on from there")
        step, rows = newest(run), progress(run)
        expect(step == rows, f"{rows} steps were taken, {step} saved")
        return step

    def goes_on(self, run: Path) -> int:
        """Run it again after a stop, to the bits of the run left alone; the step that it went on from."""
        step = newest(run)
        self.train(run, EVERY_STEP).expect(0)
        trim(run, self.whole, step)
        self.expect_same(run)
        return step

    def expect_same(self, run: Path, whole: Path | None = None) -> None:
        """Raise Failed unless a run's folder is that of the run left alone, to the bit."""
        whole = whole or self.whole
        left = [path.name for path in run.rglob("*") if path.suffix in (".tmp", ".unfinished")]
        expect(not left, f"left behind: {left}")
        expect_same(contents(run), contents(whole))
        expect(self.timeless(run) == self.timeless(whole), "another log")

    def timeless(self, run: Path) -> list[dict]:
        return [{key: row[key] for key in self.subject.timeless} for row in read_rows(run / "log.jsonl")]


class Child(Forked):
    """A run in the background, which tells what it is doing."""

    def __init__(self, drill: Drill, run: Path, *overrides: str, announced: bool = True):
        super().__init__(forked, drill.subject.name, [str(drill.recipe), f"run.out={run}", *overrides], announced)

    def wait_for(self, phase: str, times: int) -> bool:
        """Wait until a phase begins for the given time; False where the run ends before."""
        for _ in range(times):
            while (letter := self.read()) != LETTERS[phase]:
                if not letter:
                    return False
        return True

    def durations(self) -> dict[str, list[float]]:
        """How long each phase took, by phase, until the run ends."""
        taken, begun, names = {name: [] for name in LETTERS}, [], {letter: name for name, letter in LETTERS.items()}
        while letter := self.read():
            if letter != DONE:
                begun.append((names[letter], time.perf_counter()))
            else:
                name, since = begun.pop()
                taken[name].append(time.perf_counter() - since)
        return taken


# Of a run, but for the files that the clock or the folder's name is in.
contents = partial(files_in, apart=("log.jsonl", "recipe.yaml", "manifest.json"))


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    found = checkpoint.newest_valid(run) if run.exists() else None
    return found[1]["step"] if found else 0


def progress(run: Path) -> int:
    """The last step in the log."""
    file = run / "log.jsonl"
    rows = read_rows(file) if file.exists() else []
    return rows[-1]["step"] if rows else 0


def trim(run: Path, whole: Path, step: int) -> None:
    """Take away the checkpoint that only a stopped run has."""
    extra = checkpoint.folder_of(run, step)
    if extra.exists() and not checkpoint.folder_of(whole, step).exists():
        shutil.rmtree(extra)


def kill_and_run_again(drill: Drill, index: int, durations: dict[str, list[float]]) -> dict:
    """One run, killed in a phase and at a moment of it that its index draws, and run again."""
    draw, run, phases = random.Random(index), drill.out / f"killed-{index:02}", drill.subject.killed_in
    phase = phases[index % len(phases)]
    occurrence = draw.randint(1, len(durations[phase]))
    delay = draw.random() * sorted(durations[phase])[len(durations[phase]) // 2]
    overrides = (f"data.workers={index % 2}", EVERY_STEP)
    child = Child(drill, run, *overrides)
    begun = child.wait_for(phase, occurrence)
    time.sleep(delay)
    child.kill()
    ended = child.end()
    expect(begun and ended.status == -signal.SIGKILL, f"was not killed in {phase} {occurrence}: {ended.said[-300:]}")
    reached, saved = progress(run), newest(run)
    Child(drill, run, *overrides, announced=False).end().expect(0)
    drill.expect_same(run)
    shutil.rmtree(run)
    return {"phase": phase, "occurrence": occurrence, "delay_s": delay, "reached": reached, "resumed_from": saved}


def sigkill(drill: Drill, runs: int) -> Row:
    child = Child(drill, drill.whole, EVERY_STEP)
    durations = child.durations()
    child.end().expect(0)
    done, failures = many(drill.subject.script, runs, partial(kill_and_run_again, drill, durations=durations))
    (drill.out / "sigkill.json").write_text(json.dumps(done, indent=1))
    killed_in = [entry["phase"] for entry in done]
    phases = ", ".join(f"{killed_in.count(phase)} {phase}" for phase in dict.fromkeys(drill.subject.killed_in))
    repeated = max((entry["reached"] - entry["resumed_from"] for entry in done), default=0)
    seen = f"{len(done)} of {runs} end with the same bits (killed in {phases})"
    lost = f"nothing; up to {repeated} steps repeated"
    fault = "SIGKILL" if drill.subject.faults else f"SIGKILL, {drill.subject.name}"
    return Row(drill.subject.script, fault, runs, "; ".join([seen, *failures[:3]]), lost, not failures)


def sigterm(drill: Drill) -> str:
    run = drill.out / "sigterm"
    step = drill.stopped(run, 10)
    drill.goes_on(run)
    return f"exit status 0, saved at step {step}, then the same bits"


def sigterm_to_all(drill: Drill) -> str:
    """As a scheduler ends a job, once an evaluation has started its loader process beside that of training."""
    run = drill.out / "sigterm-all"
    child = Child(drill, run, EVERY_STEP, "data.workers=1")
    child.wait_for("evaluation", 3)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    while len(loaders := children.read_text().split()) < 2:
        expect(child.is_alive(), "ended without a second loader process")
    for pid in (child.pid, *map(int, loaders)):
        os.kill(pid, signal.SIGTERM)
    child.end().expect(0, "goes on from there")
    step = drill.goes_on(run)
    return f"exit status 0, saved at step {step}, then the same bits"


def sigint_twice(drill: Drill) -> str:
    run = drill.out / "sigint"
    child = Child(drill, run, EVERY_STEP)
    child.wait_for("checkpoint", 3)
    os.kill(child.pid, signal.SIGINT)
    while "finishing the step" not in child.said():
        expect(child.is_alive(), "ended without a word")
    os.kill(child.pid, signal.SIGINT)
    status = child.end().status
    expect(status in (-signal.SIGINT, 0), f"exit status {status}")
    step = drill.goes_on(run)
    return f"stopped at once, whole up to step {step}, then the same bits"


def full_disk(drill: Drill) -> str:
    """On a tmpfs with room for one checkpoint and a half; where none can be mounted, by a limit on files."""
    run, overrides = drill.out / "full" / "run", (EVERY_STEP, *drill.subject.bare)
    size = sum(path.stat().st_size for path in checkpoint.step_folders(drill.whole)[-1].rglob("*"))
    with small_disk(run.parent, int(1.5 * size)) as filler:
        mounted = filler.exists()
        child = Child(drill, run, *overrides)
        if not mounted:
            child.wait_for("checkpoint", 2)
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        line = child.end().expect(2, "it needs")
        expect(newest(run) == 4, f"the checkpoint of step 4 is gone, {newest(run)} is left")
        filler.unlink(missing_ok=True)
        drill.train(run, *overrides).expect(0)
        drill.train(drill.out / "full-whole", *overrides).expect(0)
        drill.expect_same(run, drill.out / "full-whole")
    how = "a tmpfs" if mounted else "a limit on files"
    return f"on {how}: '{line.partition('error: ')[2][:90]}...', step 4 kept, then the same bits"


def with_nan(drill: Drill, run: Path, fault: str, rank: int, processes: int) -> list[dict]:
    """A run with NaN in step 7 of one process, which skips that step alone and goes on to its end; its log."""
    words = drill.poisoned(run, fault, rank, "train.lr=1e-4")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python(*(launch if processes > 1 else []), *words, ACCELERATE_USE_CPU="true").expect(0)
    log = drill.timeless(run)
    skipped = [row["skipped"] for row in log]
    expect(skipped == [0] * 6 + [1] * (STEPS - 6), f"{processes} processes: not that step alone was skipped")
    return log


def nan_on_one_rank(drill: Drill) -> str:
    # Of two processes, the second one alone is hit: the first one writes the log.
    two = with_nan(drill, drill.out / "nan-2", "nan", 1, 2)
    said = "both skip step 7, counted once, and have equal weights at every checkpoint"
    if not drill.subject.splits:
        return said
    one = with_nan(drill, drill.out / "nan-1", "nan", 0, 1)  # which has all the samples of the step
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if a["step"] != 7]  # which has none
    worst = max(abs(a - b) / a for a, b in pairs)
    expect(worst < 1e-5, f"two processes went another way than one with the same fault: {worst:.1e}")
    return f"{said}; losses as of one process with the same fault, to {worst:.0e}"


def nan_in_the_images(drill: Drill) -> str:
    """NaN in the loss alone leaves the model as it was; NaN that went through the whole of it must do so too."""
    runs = {fault: drill.out / fault for fault in ("nan", "nan-images")}
    loss, images = (with_nan(drill, run, fault, 0, 1) for fault, run in runs.items())
    expect_same(*map(contents, runs.values()))
    expect(loss[:6] + loss[7:] == images[:6] + images[7:], "another log after it")
    return "step 7 skipped; the same bits as with NaN in its loss alone"


def skip_streak(drill: Drill) -> str:
    """NaN from step 7 on: the run ends with an error, and no checkpoint is of a step that was skipped."""
    run = drill.out / "streak"
    python(*drill.poisoned(run, "nan-from", 0)).expect(2, "no finite loss")
    saved = [checkpoint.step_of(folder) for folder in checkpoint.step_folders(run)]
    expect(saved == [4], f"checkpoints are of the steps {saved}")
    drill.goes_on(run)
    return f"ends after step {progress(run)}: step 4 is the newest checkpoint, then the same bits"


def damaged_kept(drill: Drill) -> str:
    """A file of the newest checkpoint is gone: what is left of it stays until a whole one has followed."""
    run = drill.out / "damaged"
    step = drill.stopped(run, 18)
    damaged = checkpoint.folder_of(run, step)
    (damaged / "trainer.json").unlink()
    before = contents(damaged)
    child = Child(drill, run, EVERY_STEP)
    begun = child.wait_for("checkpoint", 1)
    child.kill()
    child.end()
    expect(begun, "ended before its first checkpoint")
    aside = damaged.with_name(f"{damaged.name}.damaged")
    expect(aside.is_dir() and contents(aside) == before, "what was left of the newest checkpoint is gone")
    drill.train(run, EVERY_STEP).expect(0)
    drill.expect_same(run)
    return f"step {step} set aside until a whole one had followed, then the same bits"


def foreign_files(drill: Drill) -> str:
    """A folder of somebody else's at run.out, and files of theirs in a run that goes on."""
    theirs = drill.out / "theirs"
    theirs.mkdir()
    (theirs / "model.pt").write_bytes(b"mine")
    for where in (theirs, drill.out / "new" / ".." / "theirs"):
        drill.train(where, EVERY_STEP).expect(2)
        expect(contents(theirs) == {"model.pt": b"mine"}, f"other files: {list(contents(theirs))}")
    run = drill.out / "foreign"
    drill.stopped(run, 10)
    mine = [run / name for name in ("notes.tmp", ".x.unfinished", "step-notes.txt", "step-0000004.aside/mine.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    step = newest(run)
    drill.train(run, EVERY_STEP).expect(0)
    expect(all(path.is_file() and path.read_bytes() == b"mine" for path in mine), "other people's files are gone")
    for path in mine:
        path.unlink()
    mine[-1].parent.rmdir()
    trim(run, drill.whole, step)
    drill.expect_same(run)
    return "a folder is refused, files in a run stay, then the same bits"


def truncated_checkpoint(drill: Drill) -> str:
    run = drill.out / "truncated"
    step = drill.stopped(run, 30)
    file = checkpoint.folder_of(run, step) / "ema" / drill.subject.weights
    os.truncate(file, file.stat().st_size // 2)
    drill.train(run, EVERY_STEP).expect(0, "trying the one before")
    drill.expect_same(run)
    return "named and passed over, the one before taken, then the same bits"


def deleted_shard(drill: Drill) -> str:
    folder = drill.out / "latents"
    recipe = {**drill.subject.recipe, **save_latent_data(folder)}
    recipe["data"]["flip"] = True
    own, cache = Drill.on(drill.subject, recipe, folder), folder / "cache"
    encode = ("-m", "sit_atconv.latents", "encode", str(own.recipe), "--out", str(cache), "--shard-images", "16")
    cached = ("data.kind=latents", f"data.root={cache}", EVERY_STEP, "train.max_steps=12")
    python(*encode).expect(0)
    before = contents(cache)
    own.train(own.whole, *cached).expect(0)
    own.train(folder / "run", *cached[:-1], "train.max_steps=6").expect(0)
    victim = sorted(cache.glob("*.safetensors"))[1]
    victim.unlink()
    own.train(folder / "run", *cached).expect(2, victim.name)
    python(*encode).expect(0)
    expect(contents(cache) == before, "the cache made whole again is another one")
    own.train(folder / "run", *cached).expect(0)
    trim(folder / "run", own.whole, 6)
    own.expect_same(folder / "run")
    return "refused by name, that shard alone made again to the bit, then the same bits"


def deleted_images(drill: Drill, part: str) -> str:
    """The images to train on, or those held out, vanish in step 10, and come back before the next start."""
    folder = drill.out / f"images-{part}"
    folders = {name: save_images(folder / name, number, number) for name, number in (("train", 48), ("held-out", 30))}
    roots = {"kind": "imagefolder", "root": str(folders["train"]), "val_root": str(folders["held-out"])}
    recipe = {**drill.subject.recipe, "eval": {"every_epochs": 7 * 16 / 48}}
    recipe["data"] = {**recipe["data"], **roots}
    recipe["train"] = {**recipe["train"], "epochs": 24 * 16 / 48, "warmup_epochs": 1}
    own = Drill.on(drill.subject, recipe, folder)
    own.train(own.whole, EVERY_STEP).expect(0)
    run = folder / "run"
    child = Child(own, run, EVERY_STEP)
    child.wait_for("step", 10)
    away = folders[part].rename(folder / "away")
    child.end().expect(2, str(folders[part]))
    step, at = newest(run), progress(run)
    expect(10 <= step == at < 24, f"{at} steps were taken, {step} saved")
    own.train(run, EVERY_STEP).expect(2)
    expect(newest(run) == step, "the checkpoint went with the images")
    away.rename(folders[part])
    own.goes_on(run)
    return f"one line, saved at step {step}, refused while they are away, then the same bits"


FAULTS: dict[str, Callable[[Drill], str]] = {
    "SIGTERM": sigterm,
    "SIGINT, twice, while saving": sigint_twice,
    "full disk while saving": full_disk,
    "NaN on one of two processes": nan_on_one_rank,
    "NaN in the images of a step": nan_in_the_images,
    "newest checkpoint truncated": truncated_checkpoint,
    "newest checkpoint lacks a file": damaged_kept,
    "NaN from one step on": skip_streak,
    "other people's files": foreign_files,
}
OWN_FAULTS: dict[str, dict[str, Callable[[Drill], str]]] = {
    "sit": {"shard of the latent cache deleted": deleted_shard},
    "attnet": {
        "SIGTERM to loader processes too, while evaluating": sigterm_to_all,
        "images to train on deleted": partial(deleted_images, part="train"),
        "held-out images deleted": partial(deleted_images, part="held-out"),
    },
}


def drilled(name: str, out: Path, runs: int) -> list[Row]:
    """All faults made on a subject, in a folder of its own."""
    subject = SUBJECTS[name]
    recipe = subject.recipe
    if subject.source is not None:
        source = Drill.on(subject, subject.source, out / "source")
        source.train(source.out / "run").expect(0)
        recipe = {**recipe, "train": {**recipe["train"], "init": str(source.out / "run")}}
    drill = Drill.on(subject, recipe, out)
    rows = [sigkill(drill, runs)]
    others = FAULTS | OWN_FAULTS[name] if subject.faults else {}
    for fault, make in Progress(others.items(), desc=f"{subject.script}: other faults", unit="fault"):
        rows.append(row_of(subject.script, fault, partial(make, drill)))
    return rows


PARTS: dict[str, Callable[[Path, int], list[Row]]] = {
    **{name: partial(drilled, name) for name in SUBJECTS}, "commands": commands.drilled,
}  # fmt: skip


@command
def main() -> None:
    parser = ArgumentParser(prog="python -m experiments.drill", description=__doc__.splitlines()[0])
    parser.add_argument("subject", nargs="?", choices=PARTS, help="one part alone; left out, all")
    add_number(parser, "--runs", limits.ROUNDS, 30, "runs of each command that are killed with SIGKILL")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"))
    args = parser.parse_args()
    scratch(args.out)
    preload()
    start = time.perf_counter()
    names = [args.subject] if args.subject else list(PARTS)
    rows = [row for name in names for row in PARTS[name](args.out / name, args.runs)]
    report = f"{table(rows)}\n\n{(time.perf_counter() - start) / 60:.1f} minutes"
    (args.out / "drill.md").write_text(report + "\n")
    print(report)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
