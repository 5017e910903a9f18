"""python -m experiments.bench.meanflow: time a step of training average velocities (MeanFlow) against a flow step.

Forward and backward passes of the objectives, for ATConv and for attention, at three token counts and three shares of
samples with two times; all steps of a token count take turns, and the median of rounds counts. Optimiser and average of
the weights, equal for all, are left out.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from sit_atconv.bench.forms import assert_close
from sit_atconv.bench.results import Results
from sit_atconv.bench.speed import with_random_weights
from sit_atconv.bench.timing import caption, commit, device_name, memory_kept, timed
from sit_atconv.commands.options import add_device, add_number, add_out
from sit_atconv.config import Recipe, make_recipe
from sit_atconv.data.samples import Batch, TrainingSamples
from sit_atconv.flow.meanflow import change
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.runtime import limits
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives import objective_of
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.objective import Forward

MIXERS = ("atconv", "attention")
SHARES = (0.25, 0.5, 1.0)  # of the samples that have two times
FLOW = 0.0  # in the place of a share: the flow objective
# A derivative in fp32 by central differences is known this well, over its norm.
STRIDE, TOLERANCE = 3e-3, 0.02


@dataclass(frozen=True)
class Case:
    """A model and a batch. shape: (C, H, W) of the latents."""

    shape: tuple[int, int, int]
    batch: int
    model: dict[str, Any]

    @property
    def tokens(self) -> int:
        _, height, width = self.shape
        return height * width // self.model["patch_size"] ** 2

    def recipe(self, mixer: str, share: float) -> Recipe:
        sections = {"run": {"out": "nowhere"}, "model": {**self.model, "token_mixer": mixer}}
        return make_recipe({**sections, "train": {"batch_size": self.batch}, "meanflow": {"share": share or None}})

    def objective(self, mixer: str, share: float, device: torch.device) -> FlowObjective:
        """Of a share, or of the flow for FLOW; with random weights, since zeros can be quicker."""
        recipe = self.recipe(mixer, share)
        made = objective_of(recipe)(recipe, Facts(self.shape, len(Latents.class_names), self.batch))
        made.open(IdentityCodec())
        with_random_weights(made.model.to(device), lambda name: (0.0, 0.02)).train()
        return made

    def drawn(self, share: float, device: torch.device) -> Batch:
        samples = TrainingSamples(Latents(self), self.shape, self.recipe("atconv", share))
        return {name: tensor.to(device) for name, tensor in samples.fetch(range(self.batch))[0].items()}


WIDE = {"patch_size": 2, "hidden_size": 192, "depth": 4, "num_heads": 3, "learn_sigma": False}
DIGITS = {"patch_size": 1, "hidden_size": 64, "depth": 5, "num_heads": 4, "learn_sigma": False, "pos_embed": True}
CASES = (Case((1, 8, 8), 32, DIGITS), Case((4, 32, 32), 8, WIDE), Case((4, 64, 64), 4, WIDE))


class Latents(Dataset):
    """Random latents of these classes, as many as a batch of the case."""

    class_names, moments = tuple("0123456789"), False

    def __init__(self, case: Case):
        self.images = torch.randn(case.batch, *case.shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        return self.images[key[0]], key[0] % len(self.class_names)


def step(objective: FlowObjective, batch: Batch) -> None:
    """What a step of training computes: the losses and their gradients."""
    *_, loss = objective.losses(batch, Forward(objective.trained, nullcontext, 0, 0))
    objective.model.zero_grad()
    loss.mean().backward()


def check(what: str, objective: FlowObjective, batch: Batch) -> None:
    """Raise RuntimeError unless the change of the average velocity is what differences say: one of 0 is quicker."""
    velocity = batch["image"] - batch["noise"]

    def average(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return objective.model(x, t, batch["label"], return_dict=False, timestep_r=torch.ones_like(t))[0]

    t, x = batch["t"].clamp(STRIDE, 1 - STRIDE), batch["noise"]
    with torch.no_grad():
        after, before = (average(x + h * velocity, t + h) for h in (STRIDE, -STRIDE))
    found = change(lambda x, t, s: average(x, t), x, t, torch.ones_like(t), velocity)
    assert_close(f"{what}: the change of the average velocity", found, (after - before) / (2 * STRIDE), TOLERANCE)


def rows_of(case: Case, rounds: int, device: torch.device) -> list[dict]:
    """A row per mixer and share: milliseconds of a step, and how many times a flow step of the same mixer that is."""
    steps = {}
    for mixer in MIXERS:
        flow, average = (case.objective(mixer, share, device) for share in (FLOW, 1.0))
        check(f"{mixer} at {case.tokens} tokens", average, case.drawn(1.0, device))
        steps[mixer, FLOW] = partial(step, flow, case.drawn(FLOW, device))
        for share in SHARES:
            steps[mixer, share] = partial(step, average, case.drawn(share, device))
    taken = timed(steps, rounds, device, f"{case.tokens} tokens")
    return [
        {
            "tokens": case.tokens, "mixer": mixer, "share": share, "batch": case.batch, "model": case.model,
            "flow_ms": 1e3 * taken[mixer, FLOW].median, "flow_iqr_ms": 1e3 * taken[mixer, FLOW].iqr,
            "ms": 1e3 * taken[mixer, share].median, "iqr_ms": 1e3 * taken[mixer, share].iqr,
            "vs_flow": taken[mixer, share].median / taken[mixer, FLOW].median,
            "vs_atconv": taken[mixer, share].median / taken["atconv", share].median,
        }
        for mixer in MIXERS for share in SHARES
    ]  # fmt: skip


def markdown(result: dict) -> str:
    head = [
        "tokens", "mixer", "samples with two times", "flow step (ms)", "MeanFlow step (ms)", "over the flow step",
        "over ATConv's",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        times = (
            f"{row[key]:.1f} ± {row[spread]:.1f}" for key, spread in (("flow_ms", "flow_iqr_ms"), ("ms", "iqr_ms"))
        )
        ratios = f"{row['vs_flow']:.2f}x", f"{row['vs_atconv']:.2f}x"
        rows.append([f"{row['tokens']:,}", row["mixer"], f"{row['share']:.0%}", *times, *ratios])
    sizes = {
        f"{row['tokens']:,} tokens: width {row['model']['hidden_size']}, depth {row['model']['depth']}, batch "
        f"{row['batch']}": None
        for row in result["rows"]
    }
    said = (
        f"{result['device']}, fp32; medians ± interquartile ranges over {result['rounds']} interleaved rounds"
        f"{caption(result)}. {'; '.join(sizes)}."
    )
    return f"{said}\n\n{markdown_table(head, rows, ['mixer'])}\n"


@command
@numerics()
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.meanflow", description=__doc__.partition(": ")[2])
    add_number(parser, "--rounds", limits.ROUNDS, 5, "interleaved rounds")
    add_device(parser)
    add_out(parser, "writes STEM.json and .md", default="runs/meanflow-step", metavar="STEM")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    files = Results(named(args.out, ".json", ".md"), args.force, "device", "rounds", "rows", "versions")
    result = {
        "device": device_name(device), "rounds": args.rounds, "memory_kept": memory_kept(device), "commit": commit(),
        "rows": [row for case in CASES for row in rows_of(case, args.rounds, device)], "versions": library_versions(),
    }  # fmt: skip
    files.write(result, markdown(result))
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
