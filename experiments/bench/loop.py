"""Time what the training loop costs beside the model: data, draws, EMA, log; and whether its memory grows.

    python -m experiments.bench.loop

Real steps of SiT-S/2 on a cache of latents and steps whose forward and backward pass are left out take turns in two
runs of the trainer. Then 2,000 steps of a tiny model, whose memory is compared over time.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments.bench.cache import make_cache
from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import device_name
from sit_atconv.commands.options import add_number, add_out
from sit_atconv.config import make_recipe
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions
from sit_atconv.training import train
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.trainer import Trainer

LATENTS = 8192
GOALS = {"overhead": 0.05, "growth": 0.02}


class Steps:
    """Times every step of a trainer from one fetch to the next, and may leave the model's own work out."""

    def __init__(self, without_model: bool = False):
        self.without_model, self.times, self.memory = without_model, [], []

    def __enter__(self) -> "Steps":
        self.kept = Trainer._fetch, FlowObjective.losses
        fetch, steps = self.kept[0], self

        def timed_fetch(trainer, signals):
            steps.times.append(time.perf_counter())
            steps.memory.append(resident())
            return fetch(trainer, signals)

        def no_losses(objective, batch, forward):
            objective.encode(batch)
            return [torch.zeros(len(batch["t"]), requires_grad=True)]

        Trainer._fetch = timed_fetch
        if self.without_model:
            FlowObjective.losses = no_losses
        return self

    def __exit__(self, *error) -> None:
        Trainer._fetch, FlowObjective.losses = self.kept

    def each(self) -> list[float]:
        """Seconds of the steps, the first left out: it starts what the others use."""
        return [after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def resident() -> int:
    """Bytes of memory of this process that are there now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(out: Path, steps: int, batch: int, **sections: dict) -> None:
    """Train by a recipe of these sections."""
    train(make_recipe({"run": {"out": str(out)}, "train": {"max_steps": steps, "batch_size": batch}, **sections}))


def overhead(folder: Path, batch: int, steps: int, rounds: int) -> dict:
    """Medians of a whole step and of one without the model, seconds, from short runs in turn."""
    make_cache(folder, LATENTS)
    data = {"kind": "latents", "root": str(folder), "flip": True, "verify": False}
    sections = {"data": data, "latents": {"codec": "vae"}, "model": {"name": "SiT-S/2"}, "preview": {"every": 0}}
    whole, rest = [], []
    for number in Progress(range(rounds), desc="loop", unit="round"):
        for without_model, times, count in ((False, whole, steps), (True, rest, 10 * steps)):
            with Steps(without_model) as timed:
                run(folder / f"run-{number}-{without_model}", count, batch, **sections)
            times += timed.each()
    whole_s, rest_s = statistics.median(whole), statistics.median(rest)
    return {"step_s": whole_s, "without_model_s": rest_s, "overhead": rest_s / (whole_s - rest_s), "batch": batch}


def growth(folder: Path, steps: int) -> dict:
    """Resident memory after a tenth of the steps of a tiny run, at its end, and how much it grew."""
    tiny = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 1, "token_mixer": "atconv"}
    with Steps() as timed:
        often = {"every": steps // 20}
        run(folder / "tiny", steps, 4, model=tiny, preview={**often, "num": 4, "steps": 2}, checkpoint=often)
    early, late = max(timed.memory[: steps // 10]), max(timed.memory)
    return {"steps": steps, "early_bytes": early, "most_bytes": late, "growth": late / early - 1}


def report(result: dict) -> Iterator[str]:
    loop_part, memory = result["loop"], result["memory"]
    yield f"{result['device']}; SiT-S/2, batch {loop_part['batch']}"
    yield f"step                        {1e3 * loop_part['step_s']:.1f} ms"
    yield f"the same without the model  {1e3 * loop_part['without_model_s']:.1f} ms"
    yield f"overhead                    {loop_part['overhead']:.1%} of the model's step (goal: {GOALS['overhead']:.0%})"
    grown = " -> ".join(f"{memory[key] / 2**20:.0f}" for key in ("early_bytes", "most_bytes"))
    over = f"memory over {memory['steps']:,} steps"
    yield f"{over:<28}{grown} MiB, {memory['growth']:+.1%} (goal: {GOALS['growth']:.0%})"


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.loop", description=__doc__.splitlines()[0])
    add_number(parser, "--batch", limits.BATCH, 32, "latents per batch")
    add_number(parser, "--steps", limits.ROUNDS, 5, "real steps of a round")
    add_number(parser, "--rounds", limits.ROUNDS, 3, "runs of each kind, in turn")
    add_number(parser, "--tiny-steps", limits.ROUNDS, 2000, "steps over which memory is watched")
    add_out(parser, "file of all figures", default="runs/loop.json", metavar="JSON")
    args = parser.parse_args(argv)
    file = Results([args.out], args.force, "loop", "memory", "versions")
    with tempfile.TemporaryDirectory() as folder:
        memory = growth(Path(folder), args.tiny_steps)
        loop_part = overhead(Path(folder), args.batch, args.steps, args.rounds)
    device = device_name(torch.device("cpu"))
    result = {"device": device, "loop": loop_part, "memory": memory, "versions": library_versions()}
    file.write(result)
    print("\n".join(report(result)))


if __name__ == "__main__":
    main()
