"""The operator, the pooling, the kernels and the layer against fp64, in every way that a program meets them."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch

from sit_atconv.bench.gpu.worker import ABSENT, REHEARSAL, Bench, status_within
from sit_atconv.bench.timing import captured
from sit_atconv.layers.atconv import ATConv
from sit_atconv.ops.atconv import dynamic_depthwise_conv, operator, pool_tokens, pooling, reference, taps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SUMS = 2e-6  # what a sum in fp32 may be off by, over the largest value
LAYER = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # over the norm: several roundings follow
SANITIZER_SECONDS = 60


@dataclass(frozen=True)
class Sizes:
    """Shapes (B, H, W, C). Triton compiles a kernel for every C, dtype and k, and for H and W none anew."""

    odd: tuple[tuple[int, int, int, int], ...]
    plain: tuple[tuple[int, int, int, int], ...]
    large: tuple[int, int, int, int]  # of over 2**31 values


ODD = ((2, 5, 7, 70), (2, 1, 17, 70), (1, 33, 1, 70), (2, 2, 2, 70))
REAL = Sizes(ODD, ((3, 16, 16, 1152), (1, 64, 64, 1152)), (9, 512, 512, 1152))
TINY = Sizes(((1, 3, 2, 5),), ((1, 3, 2, 5),), (2, 1, 2, 5))


def run(bench: Bench) -> None:
    sizes, large = (TINY if bench.rehearsal else REAL), torch.bfloat16
    dtypes = DTYPES[:2] if bench.rehearsal else DTYPES  # the third is for Triton's interpreter as the second
    first = sizes.plain[0]
    for dtype in (large, torch.float32):
        Convolution(bench, first, 3, dtype, "triton").checked()
        pooled(bench, first, 3, dtype, "raster")
        made(bench, first, dtype)
        layer(bench, first, dtype)
    beyond(bench, sizes.large)
    streams(bench, first)
    captures(bench, first)
    compilations(bench, sizes)
    registrations(bench, sizes.odd[0])
    other_device(bench, sizes.odd[0])
    for dtype in dtypes[2:]:
        made(bench, first, dtype)
        layer(bench, first, dtype)
    for shape in dict.fromkeys((*sizes.plain, *sizes.odd)):
        again = () if shape != first else (large, torch.float32)
        for dtype, k in product(dtypes, (3, 5)):
            if (k == 3 and dtype not in again) or (k == 5 and dtype == large):
                Convolution(bench, shape, k, dtype, "triton").checked()
        for dtype, pool in product(dtypes, ("raster", "grid")):
            if (pool == "raster" and dtype not in again) or (pool == "grid" and dtype == large):
                pooled(bench, shape, 3, dtype, pool)
    for backend, dtype in product(("native", "conv"), DTYPES):
        Convolution(bench, sizes.odd[0], 3, dtype, backend).checked()
    for layout in LAYOUTS:
        Convolution(bench, sizes.odd[0], 3, large, "triton", layout).checked()
    sanitized(bench)


def draw(bench: Bench, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(bench.device).manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, device=bench.device, dtype=dtype) for shape in shapes]


def beyond_a_rounding(bench: Bench, got: torch.Tensor, true: torch.Tensor, spent: torch.Tensor | None = None) -> float:
    """By how much values are further from the true ones than a rounding takes them, over the largest of these.

    spent: what else may be lost by rounding, as a size for each value.
    """
    interpreted = bench.rehearsal and got.dtype == torch.bfloat16  # Triton's interpreter cuts digits off
    size = true.abs() if spent is None else true.abs() + spent
    allowed = torch.finfo(got.dtype).eps * (1 if interpreted else 0.5) * size
    if not got.isfinite().all():
        return float("nan")
    return (((got.double() - true).abs() - allowed).max() / true.abs().max()).clamp(min=0).item()


def over_norm(got: torch.Tensor, true: torch.Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element behind an aligned address."""
    room = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return room.copy_(tensor)


# How operands may lie: what is made of v, of the kernels and of the gradient that comes from above.
LAYOUTS: dict[str, tuple[Callable, Callable, Callable]] = {
    "misaligned": (apart, apart, apart),
    "kernels and gradient of stride 0": (
        lambda v: v,
        lambda kernels: kernels[:1, :, :1].expand_as(kernels),
        lambda above: above[:1, :1, :1].expand_as(above),
    ),
    "channels first": (
        lambda v: v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda kernels: torch.stack([kernels, -kernels], -1)[..., 0],
        lambda above: above.transpose(1, 2).contiguous().transpose(1, 2),
    ),
}


@dataclass
class Convolution:
    """The convolution of one shape: its output and both gradients."""

    bench: Bench
    shape: tuple[int, int, int, int]
    k: int
    dtype: torch.dtype
    backend: str
    layout: str | None = None

    def checked(self) -> None:
        size = "x".join(map(str, self.shape))
        of = f"{self.backend}, {size}, k = {self.k}, {NAMES[self.dtype]}" + (f", {self.layout}" if self.layout else "")
        self.bench.attempt(of, lambda: self._check(of))

    def _check(self, of: str) -> None:
        b, h, w, c = self.shape
        operands = draw(self.bench, self.dtype, self.shape, (b, self.k**2, c), (b, h, w, c))
        if self.layout is not None:
            operands = [lay(each) for lay, each in zip(LAYOUTS[self.layout], operands, strict=True)]
        got = results(lambda v, each: dynamic_depthwise_conv(v, each, backend=self.backend), *operands)
        true = results(reference.dynamic_depthwise_conv, *(each.double() for each in operands))
        for name, one, other in zip(("output", "gradient of v", "gradient of the kernels"), got, true, strict=True):
            if self.backend == "triton":
                self.bench.check(f"convolution, {of}: {name}", beyond_a_rounding(self.bench, one, other), SUMS)
            else:
                eps = torch.finfo(self.dtype).eps
                self.bench.check(f"convolution, {of}: {name}", over_norm(one, other), max(eps, 5e-6))


def results(function: Callable, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output of a function of all operands but the last one, and its gradients for that one from above."""
    *leaves, above = operands
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, above)


def pooled(bench: Bench, shape: tuple[int, int, int, int], k: int, dtype: torch.dtype, pool: str) -> None:
    of = f"{pool} pooling, {'x'.join(map(str, shape))}, {NAMES[dtype]}"

    def check() -> None:
        x, above = draw(bench, dtype, shape, (shape[0], k * k, shape[3]))
        with bench.kernels():
            got = results(lambda x: pool_tokens(x, k, pool), x, above)
        true = results(lambda x: reference.pool_tokens(x, k, pool), x.double(), above.double())
        bench.check(f"{of}: output", beyond_a_rounding(bench, got[0], true[0]), SUMS)
        # Neighbouring bins meet in a token: each may have been rounded before they were added.
        _, parts = results(lambda x: reference.pool_tokens(x, k, pool), x.double(), above.double().abs())
        bench.check(f"{of}: gradient", beyond_a_rounding(bench, got[1], true[1], 2 * parts), SUMS)

    bench.attempt(of, check)


def made(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """The kernels that are made of pooled tokens, with the gradients of all that they are made of."""
    of = f"kernels of pooled tokens, {NAMES[dtype]}"

    def check() -> None:
        b, _, _, c = shape
        operands = draw(bench, dtype, (b, 9, c), (9, 9), (9,), (c,), (b, 9, c))
        rule = ("gelu_tanh", "learned")
        with bench.kernels():
            got = results(lambda *each: taps.tap_kernels(*each, *rule), *operands)
        true = results(lambda *each: reference.tap_kernels(*each, *rule), *(each.double() for each in operands))
        names = ("output", "gradient of the tokens", "of the weight", "of the bias", "of the control")
        for name, one, other in zip(names, got, true, strict=True):
            bench.check(f"{of}: {name}", beyond_a_rounding(bench, one, other), 5 * SUMS)

    bench.attempt(of, check)


def layer(bench: Bench, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """The kernels that a layer generates, and its output, with the gradients of its input and of every weight."""

    def check() -> None:
        torch.manual_seed(0)
        exact = ATConv(shape[3], device=bench.device, dtype=torch.float64)
        ours = ATConv(shape[3], device=bench.device, dtype=dtype)
        ours.load_state_dict(exact.state_dict())
        exact.load_state_dict(ours.state_dict())
        x, above = draw(bench, dtype, shape, shape)
        with torch.no_grad():
            true = exact.kernels(x.double())
            with bench.kernels():
                got = ours.kernels(x)
        bench.check(f"kernels of a layer, {NAMES[dtype]}", over_norm(got, true), LAYER[dtype])
        with bench.kernels():
            found = with_gradients(ours, x, above)
        for name, true in with_gradients(exact, x.double(), above.double()).items():
            bench.check(f"layer, {NAMES[dtype]}: {name}", over_norm(found[name], true), 2 * LAYER[dtype])

    bench.attempt(f"layer in {NAMES[dtype]}", check)


def with_gradients(module: ATConv, x: torch.Tensor, above: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of x and of every weight for that one from above."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    y = module(leaves["x"])
    return {"output": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], above), strict=True))}


def beyond(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    """More than 2**31 values in one tensor: what is done with the last of them is as with few."""
    b, h, w, c = shape
    dtype, values = torch.bfloat16, b * h * w * c
    of = f"{values / 2**31:.2f} times 2**31 values"

    def check() -> None:
        v, kernels, above, spread = draw(bench, dtype, shape, (b, 9, c), shape, (b, 9, c))
        got = results(lambda v, each: dynamic_depthwise_conv(v, each, backend="triton"), v, kernels, above)
        last = [each[-1:].float() for each in (v, kernels, above)]
        true = results(lambda v, each: dynamic_depthwise_conv(v, each, backend="conv"), *last)
        for name, one, other in zip(("output", "gradient of v", "gradient of the kernels"), got, true, strict=True):
            bench.check(f"convolution, {of}: {name}", over_norm(one[-1:], other.double()), LAYER[dtype] / 5)
        del got, true
        with bench.kernels():
            got = results(lambda x: pool_tokens(x, 3), v, spread)
        true = results(lambda x: reference.pool_tokens(x, 3, "raster"), last[0], spread[-1:].float())
        for name, one, other in zip(("output", "gradient"), got, true, strict=True):
            bench.check(f"pooling, {of}: {name}", over_norm(one[-1:], other.double()), LAYER[dtype] / 5)

    # Four such tensors, and of their last samples some in fp32 and fp64.
    bench.attempt(of, check, needs=4 * 2 * values + 40 * values / b)


def work_of(bench: Bench, shape: tuple[int, int, int, int]) -> dict[str, tuple[Callable, tuple[torch.Tensor, ...]]]:
    """Functions that a program calls, each with its operands."""
    torch.manual_seed(0)
    module = ATConv(shape[3], device=bench.device, dtype=torch.bfloat16)
    b, _, _, c = shape
    v, kernels, above = draw(bench, torch.bfloat16, shape, (b, 9, c), shape)

    def convolve(v, kernels):
        return dynamic_depthwise_conv(v, kernels, backend="triton")

    def train(x, above):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(module(leaf), [leaf, *module.parameters()], above)[0]

    return {
        "convolution": (convolve, (v, kernels)),
        "pooling": (lambda x: pool_tokens(x, 3), (v,)),
        "kernels": (module.kernels, (v,)),
        "layer": (module, (v,)),
        "layer with gradients": (train, (v, above)),
    }


@contextmanager
def as_called(bench: Bench, name: str) -> Iterator[None]:
    with bench.kernels(), nullcontext() if "gradients" in name else torch.no_grad():
        yield


def streams(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    """Twice gives the same bits, and so does another stream."""
    for name, (function, operands) in work_of(bench, shape).items():

        def check(name=name, function=function, operands=operands) -> None:
            with as_called(bench, name):
                first, second = function(*operands), function(*operands)
                bench.check(f"{name}: the same bits twice", float(not torch.equal(first, second)), 0)
                aside = nullcontext()
                if bench.device.type == "cuda":
                    side = torch.cuda.Stream(bench.device)
                    side.wait_stream(torch.cuda.current_stream(bench.device))
                    aside = torch.cuda.stream(side)
                with aside:
                    third = function(*operands)
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
            bench.check(f"{name}: the same bits on another stream", float(not torch.equal(first, third)), 0)

        bench.attempt(f"{name} on another stream", check)


def captures(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    """A CUDA graph, played again with other values in its operands, gives what a call gives."""
    for name, (function, operands) in work_of(bench, shape).items():

        def check(name=name, function=function, operands=operands) -> None:
            with as_called(bench, name):
                kept = torch.empty_like(function(*operands))
                call = lambda: kept.copy_(function(*operands))  # noqa: E731
                replay, why = captured(call, bench.device)
                if bench.rehearsal:
                    replay = call
                if replay is None:
                    raise RuntimeError(f"it cannot be captured: {why}")
                operands[0].neg_()
                replay()
                expected = function(*operands)
            bench.check(f"{name}: a CUDA graph", float(not torch.equal(kept, expected)), 0)

        bench.attempt(f"{name} as a CUDA graph", check)


def compilations(bench: Bench, sizes: Sizes) -> None:
    """torch.compile, at two shapes, and once more from the start."""
    torch.manual_seed(0)
    module = ATConv(sizes.plain[0][3], device=bench.device, dtype=torch.bfloat16)
    shapes = list(dict.fromkeys(sizes.plain))
    for time, shape in product(("second",) if bench.rehearsal else ("first", "second"), shapes):

        def check(time=time, shape=shape) -> None:
            torch.compiler.reset()
            fast = bench.compiled(module)
            x, above = draw(bench, torch.bfloat16, shape, shape)
            with as_called(bench, "inference"):
                bench.check(f"{time} compilation, {shape}: inference", over_norm(fast(x), module(x).double()), 5e-2)
            with bench.kernels():
                (_, got), (_, true) = results(fast, x, above), results(module, x, above)
            bench.check(f"{time} compilation, {shape}: gradient", over_norm(got, true.double()), 5e-2)

        bench.attempt(f"{time} compilation of {shape}", check)


def registrations(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    """What torch itself checks of a custom operator."""
    b, h, w, c = shape
    weight, bias, control = (each.requires_grad_() for each in draw(bench, torch.float32, (9, 9), (9,), (c,)))
    v, kernels, above = (each.requires_grad_() for each in draw(bench, torch.float32, shape, (b, 9, c), shape))
    for name, check in {
        "convolution": lambda: torch.library.opcheck(operator.convolution, (v, kernels, False, "triton")),
        "gradient of the kernels": lambda: torch.library.opcheck(operator.grad_kernels, (v, above, (3, 3), "triton")),
        "pooling": lambda: torch.library.opcheck(pooling.pool_operator, (v, (3, 3), "raster")),
        "kernels of pooled tokens": lambda: torch.library.opcheck(
            taps.forward, (kernels, weight, bias, control, "gelu_tanh", "learned")
        ),
        "gradient of the pooling": lambda: torch.library.opcheck(
            pooling.spread_operator, (kernels, h, w, (3, 3), "raster")
        ),
    }.items():
        if bench.attempt(f"opcheck of the {name}", check) is not None:
            bench.check(f"opcheck of the {name}", 0, 0)


def other_device(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    """A device that is not the current one."""
    if bench.device.type != "cuda" or torch.cuda.device_count() < 2:
        bench.leave_out("a second device", ABSENT, "there is one device")
        return

    def check() -> None:
        v, kernels = draw(bench, torch.float32, shape, (shape[0], 9, shape[3]))
        here = dynamic_depthwise_conv(v, kernels, backend="triton")
        there = dynamic_depthwise_conv(v.to("cuda:1"), kernels.to("cuda:1"), backend="triton")
        bench.check("a second device", over_norm(there.to(here.device), here.double()), SUMS)

    bench.attempt("a second device", check)


def sanitized(bench: Bench) -> None:
    """All kernels under NVIDIA's checker of memory accesses; in a rehearsal, without it."""
    checker = shutil.which("compute-sanitizer")
    if checker is None and not bench.rehearsal:
        bench.leave_out("compute-sanitizer", ABSENT, "it is not on PATH")
        return
    seconds = min(SANITIZER_SECONDS, bench.seconds_left())
    if seconds < SANITIZER_SECONDS / 4:
        bench.leave_out("compute-sanitizer", ABSENT, "no time of the stage is left for it")
        return
    before = [] if bench.rehearsal else [checker, "--tool", "memcheck", "--error-exitcode", "9"]
    words = [*before, sys.executable, "-m", __name__, REHEARSAL if bench.rehearsal else "cuda"]
    # torch's allocator takes memory in large pieces, within which no access is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check() -> None:
        if (status := status_within(seconds, words, env=environment)) is None:
            bench.leave_out("compute-sanitizer", ABSENT, f"it takes more than {seconds:.0f} s")
            return
        bench.check("no access out of bounds, by compute-sanitizer", float(status), 0)

    bench.attempt("compute-sanitizer", check)


def main() -> None:
    """What compute-sanitizer looks at: every kernel once, at a shape whose edges lie within tiles."""
    device, shape = ("cpu", (1, 2, 3, 5)) if sys.argv[1] == REHEARSAL else ("cuda", (2, 5, 19, 70))
    module = ATConv(shape[3], device=device, dtype=torch.bfloat16)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    dynamic_depthwise_conv(x, module.kernels(x), backend="triton").sum().backward()


if __name__ == "__main__":
    main()
