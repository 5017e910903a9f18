"""The digits from end to end in bf16, by the commands: trained, gone on with, sampled; and once more under FSDP2."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from statistics import mean

from sit_atconv.bench.gpu.worker import ABSENT, Bench
from sit_atconv.runtime.reading import read_rows

STEPS, MORE = 200, 300
FEW, FEW_MORE = 2, 3
DIGITS, NEWEST = 10, 20
# What `accelerate launch` tells the process of a launch on one GPU under FSDP2.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SiTBlock,SiTATConvBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def run(bench: Bench) -> None:
    run, picture = bench.scratch / "digits", bench.folder / "digits.png"
    first, last = (FEW, FEW_MORE) if bench.rehearsal else (STEPS, MORE)

    def trained() -> list[dict]:
        for steps in (first, last):
            train(bench, run, steps)
        losses = loss_rows(run)
        bench.check("digits: steps after going on", float(abs(losses[-1]["step"] - last)), 0)
        bench.check("digits: the first start ended where the second began", float(not any_at(losses, first)), 0)
        if not bench.rehearsal:
            bench.check("digits: the loss fell", losses[-1]["loss"], losses[0]["loss"])
        bench.row("digits", launch="one process", steps=last, loss=losses[-1]["loss"], first_loss=losses[0]["loss"])
        return losses

    losses = bench.attempt("digits, trained and gone on with", trained)
    if losses is None:
        return

    def sampled() -> None:
        classes = map(str, range(2 if bench.rehearsal else DIGITS))
        words = ["sample", "--ckpt", str(run), "--steps", "2" if bench.rehearsal else "50", "--dtype", "bf16"]
        call(bench, *words, "--force", "--out", str(picture), "--classes", *classes)
        bench.check("digits: a picture of samples", float(not picture.is_file()), 0)

    bench.attempt("digits, sampled", sampled)
    if bench.device.type != "cuda":
        bench.leave_out("FSDP2", ABSENT, "Accelerate enables it on a GPU alone")
        return

    def sharded() -> None:
        for steps in (first, last):
            train(bench, bench.scratch / "sharded", steps, launch())
        found = loss_rows(bench.scratch / "sharded")
        distance = abs(newest(found) - newest(losses)) / newest(losses)
        bench.check(f"FSDP2: the mean of the last {NEWEST} losses is that of one process", distance, 0.1)
        bench.row("digits", launch="FSDP2, one GPU", steps=last, loss=found[-1]["loss"], first_loss=found[0]["loss"])

    bench.attempt("digits under FSDP2", sharded)


def call(bench: Bench, *words: str, environment: dict[str, str] | None = None) -> None:
    """Run a command of the library. Raises RuntimeError where it fails; what it said is in the log."""
    hidden = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if bench.device.type == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-m", "sit_atconv", *words], env={**os.environ, **hidden, **(environment or {})}
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with status {done.returncode}; the log says more")


def train(bench: Bench, run: Path, steps: int, environment: dict[str, str] | None = None) -> None:
    settings = (
        "model.token_mixer=atconv", "train.precision=bf16", "train.warmup_steps=0", "train.lr_schedule=constant",
        "train.lr=1e-3", f"train.max_steps={steps}", f"run.out={run}", "run.log_every=1", "preview.every=0",
        *(("model.depth=1",) if bench.rehearsal else ()),
    )  # fmt: skip
    call(bench, "train", "digits", *settings, environment=environment)


def launch() -> dict[str, str]:
    """The environment of the one process of a launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**FSDP2, **alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def loss_rows(run: Path) -> list[dict]:
    """The lines of a run's log. Raises RuntimeError for a loss that is not finite."""
    rows = read_rows(run / "log.jsonl")
    if not rows or not all(math.isfinite(row["loss"]) for row in rows):
        raise RuntimeError("a loss is not finite, or there is none")
    return rows


def newest(rows: list[dict]) -> float:
    """The mean of the last NEWEST losses: one alone is mostly noise of its times and images."""
    return mean(row["loss"] for row in rows[-NEWEST:])


def any_at(rows: list[dict], step: int) -> bool:
    return [row["step"] for row in rows].count(step) == 1
