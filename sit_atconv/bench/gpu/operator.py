"""The operator alone in its backends, and a sweep of the tiles of its Triton kernels: which is the fastest for which
kernel, dtype and shape. The sweep decides nothing by itself; what it finds is written into the kernels by hand."""

from collections.abc import Callable
from itertools import product

import torch

from sit_atconv.bench.forms import TOLERANCE, assert_close, make_call, operator_forms
from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.ops.atconv import pool_tokens, triton_kernels, triton_pooling
from sit_atconv.ops.atconv.tiles import Tile

# (B, H, W): 75 million values with 1152 channels, and a small batch.
SHAPES = ((64, 32, 32), (256, 16, 16), (16, 64, 64), (2, 64, 64))
CHANNELS, TINY, TINY_CHANNELS = 1152, ((1, 2, 3),), 72
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNEL = 3
# All of these are swept, with as many warps as give every thread one access of 16 bytes of a tile's row, or two.
ROWS, COLS, LINE_BYTES, ACCESSES, MOST_WARPS = (2, 4, 8), (8, 16, 32), (128, 256), (1, 2), 8
SHORTLIST = 1.5  # tiles that take more than so many times the fastest of a first round are not measured again


def run(bench: Bench) -> None:
    shapes, channels = (TINY, TINY_CHANNELS) if bench.rehearsal else (SHAPES, CHANNELS)
    sizes = [(*shape, channels) for shape in shapes]
    for dtype, shape, step in product(("bf16",), sizes, ("backward",) if bench.rehearsal else ("forward", "backward")):
        needs = 60 * 2 * shape[0] * shape[1] * shape[2] * channels
        name = f"backends, {step} at {shape}"
        bench.attempt(name, lambda s=shape, d=dtype, t=step: backends(bench, s, d, t), needs)
    for dtype, shape in product(("bf16",) if bench.rehearsal else DTYPES, sizes):
        needs = 8 * DTYPES[dtype].itemsize * shape[0] * shape[1] * shape[2] * channels
        bench.attempt(f"tiles at {shape} in {dtype}", lambda s=shape, d=dtype: sweep(bench, s, d), needs)


def bandwidth(shape: tuple, dtype: str, ms: float) -> float:
    """GB/s of reading one tensor of that shape and writing one, which is what each of these must do at least."""
    b, h, w, c = shape
    return 2 * DTYPES[dtype].itemsize * b * h * w * c / ms / 1e6


def backends(bench: Bench, shape: tuple[int, int, int, int], dtype: str, step: str) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=bench.device).to(DTYPES[dtype])
    calls = {}
    for form in operator_forms(x, bench.compiled):

        def ready(form=form) -> None:
            call = make_call(form, step, x)
            with torch.no_grad():
                assert_close(form.name, form.call(), form.oracle(), TOLERANCE[dtype])
            call()
            calls[form.name] = call

        bench.attempt(f"{form.name}, {step} at {shape}", ready)
    leaf = x.clone().requires_grad_()
    if step == "forward":
        calls["pooling"] = torch.no_grad()(lambda: pool_tokens(leaf, KERNEL))
    for name, facts in bench.times(calls).items():
        speed = {"gb_per_s": bandwidth(shape, dtype, facts["ms"])} if step == "forward" else {}
        size = "x".join(map(str, shape))
        bench.row("operator", what=name, shape=size, step=step, dtype=dtype, **speed, **facts)


def tiles(bench: Bench) -> list[Tile]:
    if bench.rehearsal:
        return [Tile(2, 8, 128, 4)]
    return [
        Tile(rows, cols, line, warps)
        for rows, cols, line, accesses in product(ROWS, COLS, LINE_BYTES, ACCESSES)
        if 1 <= (warps := cols * line // 16 // 32 // accesses) <= MOST_WARPS
    ]


def sweep(bench: Bench, shape: tuple[int, int, int, int], dtype: str) -> None:
    """All tiles of every kernel: a first short round, then those that came near the fastest, in turn.

    The gradient of v is the convolution again.
    """
    b, h, w, c = shape
    generator = torch.Generator(bench.device).manual_seed(0)
    v, kernels, above = (
        torch.randn(size, generator=generator, device=bench.device).to(DTYPES[dtype])
        for size in (shape, (b, KERNEL**2, c), shape)
    )
    swept: dict[str, tuple[Callable[[Tile], torch.Tensor], Tile]] = {
        "convolution": (
            lambda tile: triton_kernels.dynamic_depthwise_conv(v, kernels, tile=tile), triton_kernels.CONVOLUTION_TILE,
        ),
        "gradient of the kernels": (
            lambda tile: triton_kernels.grad_kernels(v, above, KERNEL, tile=tile), triton_kernels.GRAD_TILE,
        ),
        "pooling": (
            lambda tile: triton_pooling.pool_tokens(v, KERNEL, "raster", tile=tile),
            triton_pooling.POOL_TILE,
        ),
        "gradient of the pooling": (
            lambda tile: triton_pooling.spread_tokens(kernels, h, w, KERNEL, "raster", tile=tile),
            triton_pooling.SPREAD_TILE,
        ),
    }  # fmt: skip
    for name, (kernel, usual) in swept.items():
        expected = kernel(usual)
        calls = {}
        for tile in dict.fromkeys([usual, *tiles(bench)]):

            def ready(tile=tile, kernel=kernel, expected=expected) -> None:
                assert_close(f"{tile}", kernel(tile), expected, TOLERANCE[dtype])
                calls[tile] = lambda: kernel(tile)  # noqa: B023

            bench.attempt(f"{name}, {tile}, {shape}, {dtype}", ready)
        first = bench.times(calls, graphs=(), rounds=1)
        near = SHORTLIST * min(facts["ms"] for facts in first.values())
        chosen = {tile: call for tile, call in calls.items() if tile == usual or first[tile]["ms"] <= near}
        taken = bench.times(chosen, graphs=())
        of = {"kernel": name, "shape": "x".join(map(str, shape)), "dtype": dtype}
        for tile, facts in taken.items():
            bench.row("sweep", **of, **vars(tile), ms=facts["ms"], iqr_ms=facts["iqr_ms"], usual=tile == usual)
        best = min(taken, key=lambda tile: taken[tile]["ms"])
        gain = taken[usual]["ms"] / taken[best]["ms"]
        rate = bandwidth(shape, dtype, taken[best]["ms"])
        bench.row("best tiles", **of, **vars(best), ms=taken[best]["ms"], usual_over_best=gain, gb_per_s=rate)
        slow = {str(tile): facts["ms"] for tile, facts in first.items() if tile not in taken}
        bench.row("slower tiles, ms in one round", **of, **slow)
