"""The operator alone in its backends, and a sweep of the tiles of its Triton kernels: which is the fastest for which
kernel, dtype and shape. The sweep decides nothing by itself; what it finds is written into the kernels by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from sit_atconv.bench.forms import TOLERANCE, assert_close, make_call, operator_forms
from sit_atconv.bench.gpu.worker import ABSENT, TIME, Bench
from sit_atconv.ops.atconv import pool_tokens, triton_kernels, triton_pooling, triton_taps
from sit_atconv.ops.atconv.tiles import TapTile, Tile
from sit_atconv.runtime.errors import said

# (B, H, W): 75 million values with 1152 channels, and a small batch.
SHAPES = ((64, 32, 32), (256, 16, 16), (16, 64, 64), (2, 64, 64))
CHANNELS, TINY, TINY_CHANNELS = 1152, ((1, 2, 3),), 72
SWEPT = (1, 1, 2, 8)  # in a rehearsal
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNEL = 3
# All of these are swept, with as many warps as give every thread one access of 16 bytes of a tile's row, or two.
ROWS, COLS, LINE_BYTES, ACCESSES, MOST_WARPS = (2, 4, 8), (8, 16, 32), (128, 256), (1, 2), 8
SHORTLIST = 1.5  # tiles that take more than so many times the fastest of a first round are not measured again


def run(bench: Bench) -> None:
    shapes, channels = (TINY, TINY_CHANNELS) if bench.rehearsal else (SHAPES, CHANNELS)
    for shape in [(*shape, channels) for shape in shapes]:
        for step in ("backward",) if bench.rehearsal else ("forward", "backward"):
            name, needs = f"backends, {step} at {shape}", 60 * 2 * math.prod(shape)
            bench.attempt(name, lambda s=shape, t=step: backends(bench, s, "bf16", t), needs)
        swept(bench, SWEPT if bench.rehearsal else shape, "bf16")
    for shape in () if bench.rehearsal else shapes:
        swept(bench, (*shape, channels), "fp32")


def swept(bench: Bench, shape: tuple[int, int, int, int], dtype: str) -> None:
    needs = 8 * DTYPES[dtype].itemsize * math.prod(shape)
    bench.attempt(f"tiles at {shape} in {dtype}", lambda: sweep(bench, shape, dtype), needs)


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


def tap_tiles(bench: Bench, usual: TapTile) -> list[TapTile]:
    """For the kernels of few taps; as many programs as the usual tile has."""
    if bench.rehearsal:
        return [replace(usual, warps=2)]
    return [replace(usual, channels=c, warps=w, stages=s) for c, w, s in product((32, 64, 128), (4, 8), (1, 2))]


@dataclass(frozen=True)
class Swept:
    """A kernel: what it gives with a tile, the tile that the library takes, and those that are tried beside it."""

    call: Callable[[Any], torch.Tensor | tuple[torch.Tensor, ...]]
    usual: Tile | TapTile
    others: Sequence[Tile | TapTile]


def kernels_to_sweep(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Swept]:
    """By their names, on random operands. The gradient of v is the convolution again."""
    (b, h, w, c), k = shape, KERNEL
    generator = torch.Generator(bench.device).manual_seed(0)
    sizes = (shape, (b, k * k, c), shape, (k * k, k * k), (k * k,), (c,))
    v, taps, above, weight, bias, control = (
        torch.randn(size, generator=generator, device=bench.device).to(dtype) for size in sizes
    )
    grid, rule, made = tiles(bench), ("gelu_tanh", "learned"), (taps, weight, bias, control)
    tap, tap_grad = triton_taps.tile_of(k * k), triton_taps.grad_tile_of(k * k)
    return {
        "convolution": Swept(
            lambda tile: triton_kernels.dynamic_depthwise_conv(v, taps, tile=tile),
            triton_kernels.CONVOLUTION_TILE, grid,
        ),
        "gradient of the kernels": Swept(
            lambda tile: triton_kernels.grad_kernels(v, above, k, tile=tile), triton_kernels.GRAD_TILE, grid
        ),
        "pooling": Swept(
            lambda tile: triton_pooling.pool_tokens(v, k, "raster", tile=tile), triton_pooling.POOL_TILE, grid
        ),
        "gradient of the pooling": Swept(
            lambda tile: triton_pooling.spread_tokens(taps, h, w, k, "raster", tile=tile),
            triton_pooling.SPREAD_TILE, grid,
        ),
        "kernels": Swept(
            lambda tile: triton_taps.tap_kernels(*made, *rule, tile=tile), tap, tap_tiles(bench, tap)
        ),
        "gradient of what makes kernels": Swept(
            lambda tile: triton_taps.grads(taps, *made, *rule, tile=tile), tap_grad, tap_tiles(bench, tap_grad)
        ),
    }  # fmt: skip


def sweep(bench: Bench, shape: tuple[int, int, int, int], dtype: str) -> None:
    """All tiles of every kernel: a first short round, then those that came near the fastest, in turn."""
    for name, kernel in kernels_to_sweep(bench, shape, DTYPES[dtype]).items():
        what = f"{name} at {shape} in {dtype}"
        bench.attempt(what, lambda n=name, k=kernel: best_tile(bench, n, k, shape, dtype))


def best_tile(bench: Bench, name: str, kernel: Swept, shape: tuple[int, int, int, int], dtype: str) -> None:
    usual, expected, calls = kernel.usual, together(kernel.call(kernel.usual)), {}
    for tile in dict.fromkeys([usual, *kernel.others]):
        what = f"{name}, {tile}, {shape}, {dtype}"
        if bench.seconds_left() < 0:
            bench.leave_out(what, TIME, "the time of the stage is over")
            continue
        try:
            for got, other in zip(together(kernel.call(tile)), expected, strict=True):
                assert_close(str(tile), got, other, TOLERANCE[dtype])
            calls[tile] = lambda tile=tile: kernel.call(tile)
        except OutOfResources as error:  # a device with less shared memory, or fewer registers
            bench.leave_out(what, ABSENT, said(error))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            bench.fault(what)
    first = bench.times(calls, graphs=(), rounds=1)
    near = SHORTLIST * min(facts["ms"] for facts in first.values())
    chosen = {tile: call for tile, call in calls.items() if tile == usual or first[tile]["ms"] <= near}
    taken = bench.times(chosen, graphs=())
    of = {"kernel": name, "shape": "x".join(map(str, shape)), "dtype": dtype}
    for tile, facts in (first | taken).items():
        rounds = "all rounds" if tile in taken else "one round"
        bench.row("sweep", **of, tile=str(tile), ms=facts["ms"], rounds=rounds, usual=tile == usual)
    best = min(taken, key=lambda tile: taken[tile]["ms"])
    gain = taken[usual]["ms"] / taken[best]["ms"]
    bench.row("best tiles", **of, tile=str(best), ms=taken[best]["ms"], usual_over_best=gain)


def together(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
