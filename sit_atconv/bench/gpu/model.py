"""SiT-ATConv-XL/2 against SiT-XL/2 with the fastest attention, in bf16: eager, compiled, and as CUDA graphs."""

from collections.abc import Callable

import torch

from sit_atconv.bench.baselines import MatrixProducts, attention_twin
from sit_atconv.bench.forms import on_backend
from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.bench.plots import LIMIT
from sit_atconv.bench.speed import PIXELS_PER_LATENT, attend_by_the_fastest, random_model, usual_batch
from sit_atconv.bench.timing import peak_bytes
from sit_atconv.models.sit import SiTTransformer2DModel

NAME = "SiT-ATConv-XL/2"
# (px, whether the batch fills the device), the ones that say most first.
SETTINGS = ((256, True), (1024, True), (256, False), (512, True), (1024, False), (512, False))
TINY, TINY_OPTIONS = ((32, True),), {"depth": 2, "hidden_size": 48, "num_heads": 2, "num_classes": 3}
TOLERANCE = 5e-2  # of bf16 outputs, over their norm


def run(bench: Bench) -> None:
    for size, full in TINY if bench.rehearsal else SETTINGS:
        batch = usual_batch(size, bench.device) if full else 1
        values = batch * (size // 16) ** 2 * 1152
        # Two models, the buffers of their products and some activations.
        needs = 0 if bench.rehearsal else 8e9 + 100 * values
        bench.attempt(f"{size} px, batch {batch}", lambda size=size, batch=batch: measure(bench, size, batch), needs)


def drawn(bench: Bench, name: str, size: int) -> SiTTransformer2DModel:
    """A model in bf16 with random weights, made on the device."""
    options = TINY_OPTIONS if bench.rehearsal else {}
    model = random_model(name, size // PIXELS_PER_LATENT, bench.device, **options)
    return torch.nn.Module.to(model, torch.bfloat16)  # nn.Module's: diffusers warns about every cast


def inputs_of(bench: Bench, size: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, times and labels."""
    latent, generator = size // PIXELS_PER_LATENT, torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(batch, 4, latent, latent, generator=generator, device=bench.device, dtype=torch.bfloat16)
    return x, torch.full((batch,), 0.5, device=bench.device), torch.zeros(batch, dtype=torch.long, device=bench.device)


def evaluation(model: SiTTransformer2DModel, inputs: tuple) -> Callable[[], torch.Tensor]:
    @torch.no_grad()
    def evaluate() -> torch.Tensor:
        return model(*inputs, return_dict=False)[0]

    return evaluate


def fastest(facts: dict) -> float:
    """Milliseconds of the call or of its graph."""
    return min(filter(None, (facts["ms"], facts["graph_ms"])))


def measure(bench: Bench, size: int, batch: int) -> None:
    inputs = inputs_of(bench, size, batch)
    models = {name: drawn(bench, name, size) for name in (attention_twin(NAME), NAME)}
    calls = {name: evaluation(model, inputs) for name, model in models.items()}
    attention = attend_by_the_fastest(models[attention_twin(NAME)], calls[attention_twin(NAME)], bench.device)
    with on_backend("reference"):
        expected = {name: call() for name, call in calls.items()}
    products = {name + LIMIT: MatrixProducts(model, *inputs) for name, model in models.items()}

    def tell(mode: str) -> None:
        for name, call in calls.items():
            error = ((call() - expected[name]).float().norm() / expected[name].float().norm()).item()
            bench.check(f"{name}, {mode}, {size} px, batch {batch}", error, TOLERANCE)
        taken = bench.times(calls | products)
        for name, model in models.items():
            facts, best, limit = taken[name], fastest(taken[name]), fastest(taken[name + LIMIT])
            rival = taken[attention_twin(NAME)]
            row = {"model": name, "px": size, "batch": batch, "mode": mode, **facts}
            row["attention"] = attention if name != NAME else None
            row["attention_over_this"] = rival["ms"] / facts["ms"]
            if facts["graph_ms"] and rival["graph_ms"]:
                row["attention_over_this_graph"] = rival["graph_ms"] / facts["graph_ms"]
            row |= {"gemm_ms": limit, "of_gemm_limit": limit / best, "images_per_s": 1e3 * batch / best}
            if mode == "eager" or bench.device.type == "cuda":  # a CPU's are counted in eager alone
                row["peak_mib"] = peak_bytes(calls[name], model, *inputs) / 2**20
            bench.row("model", **row)

    tell("eager")

    def compiled() -> None:
        for model in models.values():
            model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=bench.compiler)
        tell("compiled")

    bench.attempt(f"{size} px, batch {batch}, compiled", compiled)
