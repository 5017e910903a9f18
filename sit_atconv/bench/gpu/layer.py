"""One layer of SiT-XL/2: its linears, ATConv, the parts of it, and attention by every backend; forward, and with
gradients."""

from functools import partial

import torch

from sit_atconv.bench.forms import (
    ATCONV,
    ATTENTION,
    COMPILED,
    HEAD,
    LINEARS,
    TOLERANCE,
    Form,
    assert_close,
    best_attention,
    check,
    layer_forms,
    make_call,
)
from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.bench.timing import Timing
from sit_atconv.layers.atconv import ATConv
from sit_atconv.ops.atconv import pool_tokens

# (B, H, W), the ones that say most first: 75 million values with 1152 channels, which no L2 cache holds, of images of
# 256, 1024 and 512 px; and one guided image of 1024 px.
SHAPES = ((256, 16, 16), (16, 64, 64), (64, 32, 32), (2, 64, 64))
CHANNELS = 1152
TINY, TINY_CHANNELS = ((1, 3, 4),), HEAD
TINY_FUSED = ("flash", "cudnn")  # in a rehearsal: a CPU has the first, and lacks the second
DTYPE = "bf16"


def run(bench: Bench) -> None:
    shapes, channels = (TINY, TINY_CHANNELS) if bench.rehearsal else (SHAPES, CHANNELS)
    for shape in shapes:
        for step in ("backward",) if bench.rehearsal else ("forward", "backward"):
            needs = 60 * 2 * shape[0] * shape[1] * shape[2] * channels  # the tensors of all forms, kept for gradients
            name = f"{step} at {'x'.join(map(str, (*shape, channels)))}"
            bench.attempt(name, lambda shape=shape, step=step: measure(bench, (*shape, channels), step), needs)


def measure(bench: Bench, shape: tuple[int, int, int, int], step: str) -> None:
    """Eager forms, then the compiled ones: what takes long to compile costs nothing that is known already."""
    generator = torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=bench.device, dtype=torch.bfloat16)
    every = {form.name: form for form in layer_forms(x, bench.compiled, TINY_FUSED if bench.rehearsal else None)}
    eager = {name: form for name, form in every.items() if not name.endswith(COMPILED)} | parts(x)
    found = tell(bench, step, shape, x, eager, {})
    fastest = best_attention(ATTENTION, {name: Timing(facts["ms"], 0) for name, facts in found.items()})
    compiled = {name + COMPILED for name in (ATCONV, fastest) if name} & every.keys()
    tell(bench, step, shape, x, {name: every[name] for name in sorted(compiled)}, found)


def parts(x: torch.Tensor) -> dict[str, Form]:
    """What ATConv does beside its linears and its convolution: the pooling, and all that makes kernels of it."""
    torch.manual_seed(0)
    layer, leaf = ATConv(x.shape[3]).to(x.device, x.dtype), x.clone().requires_grad_()
    generator = [p for name, p in layer.named_parameters() if not name.startswith(("x_proj", "proj"))]
    return {
        "pooling": Form("pooling", lambda: pool_tokens(leaf, 3), (leaf,), None),
        "pooling and kernels": Form("pooling and kernels", lambda: layer.kernels(leaf), (leaf, *generator), None),
    }


def tell(bench: Bench, step: str, shape: tuple, x: torch.Tensor, forms: dict[str, Form], found: dict) -> dict:
    """Check and time the forms that run; their rows, as multiples of the linears, those of `found` among them."""
    size, calls = "x".join(map(str, shape)), {}
    for name, form in forms.items():

        def ready(form=form) -> None:
            if form.oracle and step == "backward":
                check(form, size, x, DTYPE)
            with torch.no_grad():
                y = form.call()
                if form.oracle:
                    assert_close(form.name, y, form.oracle(), TOLERANCE[DTYPE])
            call = make_call(form, step, torch.randn_like(y))
            call()
            calls[form.name] = call

        here = partial(bench.supported, name, ready) if name.startswith(ATTENTION) else ready
        bench.attempt(f"{name}, {step} at {size}", here)
    taken = bench.times(calls) if calls else {}
    linears = (found or taken).get(LINEARS)
    for name, facts in taken.items():
        ratios = {"over_linears": facts["ms"] / linears["ms"]} if linears else {}
        if linears and facts["graph_ms"] and linears["graph_ms"]:
            ratios["over_linears_graph"] = facts["graph_ms"] / linears["graph_ms"]
        bench.row("layer", what=name, shape=size, step=step, dtype=DTYPE, **ratios, **facts)
    return taken
