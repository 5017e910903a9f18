"""Guided samples a second: 50 Euler steps, each with and without the class, of the model and its attention twin."""

from dataclasses import asdict

import torch

from sit_atconv.bench.baselines import attention_twin
from sit_atconv.bench.gpu.model import NAME, drawn, inputs_of
from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.bench.speed import attend_by_the_fastest, usual_batch
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling

SIZES, TINY = (256, 512), (32,)
STEPS, FEW_STEPS, SCALE = 50, 2, 4.0
SAME, ALIKE = 1e-3, 0.2  # over the norm: with graphs or without; compiled or eager, after a few steps in bf16
ROUNDS = 3


def run(bench: Bench) -> None:
    for size in TINY if bench.rehearsal else SIZES:
        # Guidance doubles the batch of an evaluation.
        for batch in dict.fromkeys((max(1, usual_batch(size, bench.device) // 2), 1)):
            for name in (NAME, attention_twin(NAME)):
                what = f"{name}, {size} px, batch {batch}"
                needs = 0 if bench.rehearsal else 6e9
                bench.attempt(what, lambda n=name, s=size, b=batch: measure(bench, n, s, b), needs)


def measure(bench: Bench, name: str, size: int, batch: int) -> None:
    model = drawn(bench, name, size)
    settings = Sampling("euler", FEW_STEPS if bench.rehearsal else STEPS, SCALE)
    labels = torch.arange(batch, device=bench.device) % model.config.num_classes
    inputs = inputs_of(bench, size, 2 * batch)
    attention = attend_by_the_fastest(model, torch.no_grad()(lambda: model(*inputs)), bench.device)

    kept = Graphs()  # one model's, for all calls

    def draw(graphs: Graphs | None) -> torch.Tensor:
        return sample_latents(model, range(batch), labels, settings, graphs=graphs)[0]

    def shortly() -> torch.Tensor:
        """A few steps that guidance does not make larger errors of, at the batch of the network that it has."""
        few = Sampling("euler", FEW_STEPS, 1.0)
        return sample_latents(model, range(2 * batch), labels.repeat(2), few, graphs=None)[0]

    of, eager = f"{name}, {size} px, batch {batch}", shortly()
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=bench.compiler)
            kept = Graphs()
            bench.check(f"{of}, compiled as eager", over_norm(shortly(), eager), ALIKE)
        bench.check(f"{of}, {mode}: CUDA graphs as none", over_norm(draw(kept), draw(None)), SAME)
        calls = {mode: lambda: draw(None), f"{mode}, CUDA graphs": lambda: draw(kept)}  # noqa: B023
        for how, facts in bench.times(calls, graphs=(), rounds=ROUNDS).items():
            rate = 1e3 * batch / facts["ms"]
            row = {"model": name, "px": size, "batch": batch, "mode": how, "images_per_s": rate, "attention": attention}
            bench.row("sampling", **row, ms=facts["ms"], iqr_ms=facts["iqr_ms"], **_short(asdict(settings)))


def over_norm(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def _short(settings: dict) -> dict:
    return {key: settings[key] for key in ("sampler", "steps", "guidance_scale")}
