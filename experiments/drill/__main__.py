"""make drill: training runs that meet every fault there is, compared to the bit with one that was left alone.

    python -m experiments.drill [--runs 30] [--out runs/drill]

Runs are killed with SIGKILL at random moments of their steps, previews, EMA snapshots and checkpoint writes, and run
again. Then single faults: signals, a full disk, a NaN on one of two processes, a truncated checkpoint, a deleted shard
of a cache of latents. Prints a table of what was done and lost, and exits with status 1 where something was.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from experiments.drill.child import DONE, PHASES
from sit_atconv import checkpoint

STEPS = 60
RECIPE = {
    "model": {
        "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 2, "learn_sigma": False, "token_mixer": "hybrid",
    },
    "data": {"flip": True},
    "train": {"max_steps": STEPS, "batch_size": 16, "lr": 1e-3, "max_grad_norm": 1.0},
    "ema": {"kind": "power", "snapshot_every": 7},
    "checkpoint": {"every": 4, "keep_last": 2, "keep_every": 20},
    "preview": {"every": 5, "num": 10, "steps": 4},
}  # fmt: skip
KILLED_IN = ("step", "checkpoint", "preview", "checkpoint", "step", "snapshot")
# Of a log's row: what does not depend on the clock or the machine.
TIMELESS = ("step", "images_seen", "loss", "loss_by_time", "grad_norm", "lr", "update_ratio", "skipped", "bad_images")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass
class Row:
    """A line of the table: a fault, how often it was made, what it should and did lead to."""

    fault: str
    runs: int
    seen: str
    lost: str
    passed: bool


class Failed(Exception):
    """What should have happened did not."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


def train(run: Path, *overrides: str, recipe: Path, **options) -> subprocess.CompletedProcess:
    """The command of a user, to its end."""
    command = [sys.executable, "train_sit.py", str(recipe), f"run.out={run}", *overrides]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, **options)


def trained(run: Path, *overrides: str, recipe: Path) -> None:
    done = train(run, *overrides, recipe=recipe)
    expect(done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-300:]}")


class Child:
    """A run in the background that tells what it is doing."""

    def __init__(self, run: Path, *overrides: str, recipe: Path, **options):
        read, write = os.pipe()
        command = [sys.executable, "-m", "experiments.drill.child", "--announce", str(write), "--", str(recipe)]
        self.process = subprocess.Popen(
            [*command, f"run.out={run}", *overrides],
            env=ENVIRONMENT, pass_fds=[write], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        os.close(write)
        self.pipe = os.fdopen(read, "rb", buffering=0)

    def wait_for(self, phase: str, times: int) -> bool:
        """Wait until a phase begins for the given time; False where the run ends before."""
        for _ in range(times):
            while (letter := self.pipe.read(1)) != PHASES[phase]:
                if not letter:
                    return False
        return True

    def durations(self) -> dict[str, list[float]]:
        """How long each phase took, by phase, until the run ends."""
        taken, begun, names = {name: [] for name in PHASES}, [], {letter: name for name, letter in PHASES.items()}
        while letter := self.pipe.read(1):
            if letter != DONE:
                begun.append((names[letter], time.perf_counter()))
            else:
                name, since = begun.pop()
                taken[name].append(time.perf_counter() - since)
        return taken

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        out, err = self.process.communicate()
        self.pipe.close()
        return self.process.returncode, out, err


def timeless(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in TIMELESS} for row in rows]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but those that the clock or the folder's name is in."""
    apart = ("log.jsonl", "recipe.yaml", "manifest.json")
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in apart]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def expect_same(run: Path, whole: Path) -> None:
    """Raise Failed unless a run's folder is that of the run left alone, to the bit."""
    expect(not list(run.rglob("*.tmp")), f"left behind: {[path.name for path in run.rglob('*.tmp')]}")
    own, other = contents(run), contents(whole)
    expect(own.keys() == other.keys(), f"other files: {sorted(own.keys() ^ other.keys())[:4]}")
    changed = [name for name in own if own[name] != other[name]]
    expect(not changed, f"other bits in {changed[:4]}")
    expect(timeless(run) == timeless(whole), "another log")


def newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    found = checkpoint.newest_valid(run) if run.exists() else None
    return found[1]["step"] if found else 0


def progress(run: Path) -> int:
    """The last step in the log."""
    file = run / "log.jsonl"
    lines = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return json.loads(lines[-1])["step"] if lines else 0


def kill_and_run_again(index: int, out: Path, recipe: Path, durations: dict[str, list[float]]) -> dict:
    """One run, killed in a phase and at a moment of it that its index draws, and run again."""
    draw, run, whole = random.Random(index), out / f"killed-{index:02}", out / "whole"
    phase = KILLED_IN[index % len(KILLED_IN)]
    occurrence = draw.randint(1, len(durations[phase]))
    delay = draw.random() * sorted(durations[phase])[len(durations[phase]) // 2]
    child = Child(run, f"data.workers={index % 2}", "run.log_every=1", recipe=recipe)
    begun = child.wait_for(phase, occurrence)
    time.sleep(delay)
    child.process.kill()
    status, _, err = child.end()
    expect(begun and status == -signal.SIGKILL, f"was not killed in {phase} {occurrence}: {err[-300:]}")
    reached, saved = progress(run), newest(run)
    trained(run, f"data.workers={index % 2}", "run.log_every=1", recipe=recipe)
    expect_same(run, whole)
    shutil.rmtree(run)
    return {"phase": phase, "occurrence": occurrence, "delay_s": delay, "reached": reached, "resumed_from": saved}


def sigkill(out: Path, recipe: Path, runs: int) -> Row:
    child = Child(out / "whole", "run.log_every=1", recipe=recipe)
    durations = child.durations()
    status, _, err = child.end()
    expect(status == 0, f"the run left alone failed: {err[-300:]}")
    done, failures = [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        tasks = [pool.submit(kill_and_run_again, index, out, recipe, durations) for index in range(runs)]
        for index, task in enumerate(tqdm(tasks, desc="SIGKILL", unit="run")):
            try:
                done.append(task.result())
            except Failed as failure:
                failures.append(f"run {index}: {failure}")
    (out / "sigkill.json").write_text(json.dumps(done, indent=1))
    phases = {phase: sum(entry["phase"] == phase for entry in done) for phase in PHASES}
    repeated = max((entry["reached"] - entry["resumed_from"] for entry in done), default=0)
    seen = (
        f"{len(done)} of {runs} end with the same bits (killed in {', '.join(f'{n} {p}' for p, n in phases.items())})"
    )
    return Row(
        "SIGKILL", runs, "; ".join([seen, *failures[:3]]), f"nothing; up to {repeated} steps repeated", not failures
    )


def sigterm(out: Path, recipe: Path) -> str:
    run = out / "sigterm"
    child = Child(run, "run.log_every=1", recipe=recipe)
    child.wait_for("step", 10)
    child.process.send_signal(signal.SIGTERM)
    status, said, err = child.end()
    expect(status == 0 and "goes on from there" in said, f"exit status {status}: {err[-300:]}")
    step, rows = newest(run), progress(run)
    expect(step == rows, f"{rows} steps were taken, {step} saved")
    trained(run, "run.log_every=1", recipe=recipe)
    trim(run, out / "whole", step)
    expect_same(run, out / "whole")
    return f"exit status 0, saved at step {step}, then the same bits"


def trim(run: Path, whole: Path, step: int) -> None:
    """Take away the checkpoint that only a stopped run has."""
    extra = checkpoint.folder_of(run, step)
    if extra.exists() and not checkpoint.folder_of(whole, step).exists():
        shutil.rmtree(extra)


def sigint_twice(out: Path, recipe: Path) -> str:
    run = out / "sigint"
    child = Child(run, "run.log_every=1", recipe=recipe)
    child.wait_for("checkpoint", 3)
    child.process.send_signal(signal.SIGINT)
    while "finishing the step" not in (line := child.process.stderr.readline()):
        expect(bool(line), "ended without a word")
    child.process.send_signal(signal.SIGINT)
    status, _, _ = child.end()
    expect(status in (-signal.SIGINT, 0), f"exit status {status}")
    step = newest(run)
    trained(run, "run.log_every=1", recipe=recipe)
    trim(run, out / "whole", step)
    expect_same(run, out / "whole")
    return f"stopped at once, whole up to step {step}, then the same bits"


def full_disk(out: Path, recipe: Path) -> str:
    """On a tmpfs with room for one checkpoint and a half; where none can be mounted, by a limit on files."""
    run, whole = out / "full" / "run", out / "whole"
    size = sum(path.stat().st_size for path in checkpoint.step_folders(whole)[-1].rglob("*"))
    run.parent.mkdir()
    overrides = ("run.log_every=1", "preview.every=0", "checkpoint.keep_last=1", "ema.snapshot_every=null")
    overrides += ("checkpoint.keep_every=null", "ema.kind=constant")
    small = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(run.parent)])
    mounted = small.returncode == 0
    try:
        child = Child(run, *overrides, recipe=recipe)
        if not mounted:
            child.wait_for("checkpoint", 2)
            resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        status, _, err = child.end()
        line = err.splitlines()[-1]
        expect(status == 2 and line.startswith("error: ") and "it needs" in line, f"exit status {status}: {err[-300:]}")
        expect(newest(run) == 4, f"the checkpoint of step 4 is gone, {newest(run)} is left")
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", str(run.parent)], check=True)
        trained(run, *overrides, recipe=recipe)
        trained(out / "full-whole", *overrides, recipe=recipe)
        expect_same(run, out / "full-whole")
    finally:
        if mounted:
            subprocess.run(["umount", str(run.parent)], check=True)
    how = "a tmpfs" if mounted else "a limit on files"
    return f"on {how}: '{re.sub(r'^error: ', '', line)[:90]}...', step 4 kept, then the same bits"


def nan_on_one_rank(out: Path, recipe: Path) -> str:
    runs = {}
    for processes in (1, 2):
        run = runs[processes] = out / f"nan-{processes}"
        # One process has all the samples of the step; of two, the second one alone is hit.
        fault = ["-m", "experiments.drill.child", "--nan", f"{processes - 1}:7", "--", str(recipe), f"run.out={run}"]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *fault]
        command = [sys.executable, *(launch if processes > 1 else fault), "train.lr=1e-4", "run.log_every=1"]
        environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        expect(done.returncode == 0, f"{processes} processes: {done.stderr[-300:]}")
    one, two = timeless(runs[1]), timeless(runs[2])
    expect([row["skipped"] for row in two] == [0] * 6 + [1] * (STEPS - 6), "not that step alone was skipped")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if a["step"] != 7]  # which has none
    worst = max(abs(a - b) / a for a, b in pairs)
    expect(worst < 1e-5, f"two processes went another way than one with the same fault: {worst:.1e}")
    return f"both skip step 7, counted once; losses as of one process with the same fault, to {worst:.0e}"


def truncated_checkpoint(out: Path, recipe: Path) -> str:
    run = out / "truncated"
    trained(run, "run.log_every=1", "train.max_steps=30", recipe=recipe)
    file = checkpoint.step_folders(run)[-1] / "ema" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    done = train(run, "run.log_every=1", recipe=recipe)
    expect(done.returncode == 0 and "trying the one before" in done.stderr, f"not passed over: {done.stderr[-300:]}")
    expect_same(run, out / "whole")
    return "named and passed over, the one before taken, then the same bits"


def deleted_shard(out: Path, recipe: Path) -> str:
    from diffusers import AutoencoderKL

    folder = out / "latents"
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)):
        image = folder / "images" / "ab"[index % 2] / f"{index:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    own = folder / "recipe.yaml"
    images = {"kind": "imagefolder", "root": str(folder / "images"), "image_size": 16, "flip": True}
    latents = {"codec": "vae", "vae": str(folder / "vae")}
    own.write_text(yaml.safe_dump({**RECIPE, "data": images, "latents": latents, "run": {"out": str(folder / "run")}}))
    encode = [sys.executable, "-m", "sit_atconv.latents", "encode", str(own), "--out", str(folder / "cache")]
    cached = ("data.kind=latents", f"data.root={folder / 'cache'}", "run.log_every=1", "train.max_steps=12")
    subprocess.run([*encode, "--shard-images", "16"], env=ENVIRONMENT, check=True, capture_output=True)
    before = contents(folder / "cache")
    trained(folder / "whole", *cached, recipe=own)
    trained(folder / "run", *cached[:-1], "train.max_steps=6", recipe=own)
    victim = sorted((folder / "cache").glob("*.safetensors"))[1]
    victim.unlink()
    refused = train(folder / "run", *cached, recipe=own)
    expect(refused.returncode == 2 and victim.name in refused.stderr, f"not refused: {refused.stderr[-300:]}")
    subprocess.run([*encode, "--shard-images", "16"], env=ENVIRONMENT, check=True, capture_output=True)
    expect(contents(folder / "cache") == before, "the cache made whole again is another one")
    trained(folder / "run", *cached, recipe=own)
    trim(folder / "run", folder / "whole", 6)
    expect_same(folder / "run", folder / "whole")
    return "refused by name, that shard alone made again to the bit, then the same bits"


FAULTS = {
    "SIGTERM": sigterm,
    "SIGINT, twice, while saving": sigint_twice,
    "full disk while saving": full_disk,
    "NaN on one of two processes": nan_on_one_rank,
    "newest checkpoint truncated": truncated_checkpoint,
    "shard of the latent cache deleted": deleted_shard,
}


def table(rows: list[Row]) -> str:
    lines = ["| fault | runs | what was seen | lost | |", "|---|---:|---|---|---|"]
    lines += [
        f"| {row.fault} | {row.runs} | {row.seen} | {row.lost} | {'ok' if row.passed else 'FAILED'} |" for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.drill", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="runs killed with SIGKILL")
    parser.add_argument("--out", type=Path, default=Path("runs/drill"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    start = time.perf_counter()
    recipe = args.out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "run": {"out": str(args.out / "run")}}))
    rows = [sigkill(args.out, recipe, args.runs)]
    for name, fault in tqdm(FAULTS.items(), desc="other faults", unit="fault"):
        try:
            rows.append(Row(name, 1, fault(args.out, recipe), "nothing", True))
        except Failed as failure:
            rows.append(Row(name, 1, str(failure), "?", False))
    report = f"{table(rows)}\n\n{(time.perf_counter() - start) / 60:.1f} minutes"
    (args.out / "drill.md").write_text(report + "\n")
    print(report)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
