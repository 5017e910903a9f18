"""The Triton kernels on the CPU, against the oracle in fp64.

`test_triton_kernels` runs these in a process of its own, with TRITON_INTERPRET=1 set before triton is imported.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from conftest import slowly
from triton.runtime import interpreter

from sit_atconv.ops import atconv as front
from sit_atconv.ops.atconv import reference, triton_kernels, triton_launch, triton_pooling
from sit_atconv.ops.atconv.tiles import Tile

# (B, H, W, C), the kernel size and the dtype.
CASES = [
    *(((2, 4, 5, 7), k, torch.float32) for k in (1, 3, 5)),
    *((shape, 3, torch.float32) for shape in [(3, 1, 6, 9), (2, 7, 1, 3), (1, 3, 2, 1)]),
    ((2, 4, 5, 7), 3, torch.bfloat16),
    *slowly([((2, 5, 4, 16), 3, torch.bfloat16), *(((2, n, 9 - n, 7), 3, torch.float16) for n in (4, 5))]),
]


@pytest.fixture(autouse=True)
def round_as_a_gpu_does(monkeypatch):
    """Triton's interpreter truncates fp32 to bf16, where hardware rounds to the nearest."""
    truncating = interpreter._convert_float

    def convert(values, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return truncating(values, source, target, rounding_mode)
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def _reference(v, kernels, upstream, kernel_size):
    leaves = [v.detach().requires_grad_(), kernels.detach().requires_grad_()]
    y = reference.dynamic_depthwise_conv(*leaves, kernel_size)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def assert_as_exact_as_fp32_sums_allow(v, kernels, upstream, kernel_size=None):
    """All three functions: within twice the oracle's own error in that dtype, and one rounding from fp64."""
    sizes = reference.sides(kernel_size, v.ndim - 2, kernels.shape[1])
    fast = (
        triton_kernels.dynamic_depthwise_conv(v, kernels, kernel_size),
        triton_kernels.grad_v(upstream, kernels, kernel_size),
        triton_kernels.grad_kernels(v, upstream, sizes),
    )
    eager = _reference(v, kernels, upstream, kernel_size)
    exact = _reference(v.double(), kernels.double(), upstream.double(), kernel_size)
    for name, ours, own, true in zip(("y", "grad_v", "grad_kernels"), fast, eager, exact, strict=True):
        assert ours.dtype == v.dtype, name
        assert ours.shape == true.shape, name
        assert ours.is_contiguous(), name
        error = (ours.double() - true).abs()
        assert error.max() <= 2 * (own.double() - true).abs().max() + 1e-6, name
        # The oracle sums in its own dtype: only this bound tells sums in fp32 from sums in bf16.
        assert (error <= torch.finfo(v.dtype).eps / 2 * true.abs() + 1e-6 * true.abs().max()).all(), name


def _draw(shape, k, dtype):
    batch, *grid, channels = shape
    generator = torch.Generator().manual_seed(k if isinstance(k, int) else sum(k))
    sizes = (grid, (math.prod(reference.sides(k, len(grid))),), grid)
    return [torch.randn(batch, *size, channels, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize(("shape", "k", "dtype"), CASES)
def test_kernels_are_exact(shape, k, dtype):
    assert_as_exact_as_fp32_sums_allow(*_draw(shape, k, dtype))


VOLUMES = [
    ((1, 2, 1, 4, 9), (3, 3, 3), torch.bfloat16),  # fewer frames and rows than the kernel
    ((2, 3, 2, 3, 5), (1, 3, 3), torch.float32),
    *slowly([
        ((2, 3, 2, 3, 5), (3, 3, 3), torch.float32),
        ((1, 5, 1, 3, 2), (3, 1, 1), torch.float16),
        ((1, 3, 5, 18, 35), (3, 3, 3), torch.float32),  # seams of tiles
        ((2, 1, 3, 4, 7), (3, 3, 3), torch.float32),
        ((1, 4, 3, 2, 3), (5, 3, 1), torch.float32),
        ((1, 3, 4, 5, 3), (3, 5, 5), torch.bfloat16),  # columns of the kernel apart
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "sizes", "dtype"), VOLUMES)
def test_kernels_of_volumes_are_exact(shape, sizes, dtype):
    assert_as_exact_as_fp32_sums_allow(*_draw(shape, sizes, dtype), sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "dtype", "channels"),
    [(1, torch.bfloat16, 70), (2, torch.bfloat16, 70), (2, torch.float32, 40)],
)
def test_tiles_meet_without_a_seam(batch, dtype, channels):
    """A grid that ends inside the second tile of rows, of columns and of channels."""
    assert_as_exact_as_fp32_sums_allow(*_draw((batch, 5, 18, channels), 3, dtype))


@pytest.mark.parametrize(
    ("shape", "k", "dtype", "constants", "splits"),
    [
        ((2, 15, 4, 3), 3, torch.float32, {"PROGRAMS": 10, "MIN_TILES": 1}, (5, 2)),  # the last split is empty
        *slowly([
            ((1, 3, 4, 4, 3), (3, 3, 3), torch.float32, {"PROGRAMS": 10, "MIN_TILES": 1}, (4, 2)),  # ends in a frame
            ((1, 13, 19, 3), 3, torch.bfloat16, {}, (3, 5)),  # the last split is short
            ((1, 15, 4, 3), 5, torch.float32, {}, (2, 4)),  # columns of the kernel apart
        ]),
    ],
)  # fmt: skip
def test_splits_of_the_positions_add_up(monkeypatch, shape, k, dtype, constants, splits):
    for name, value in constants.items():
        monkeypatch.setattr(triton_launch, name, value)
    chosen = []
    rule = triton_kernels.splits_of
    monkeypatch.setattr(triton_kernels, "splits_of", lambda *sizes: chosen.append(rule(*sizes)) or chosen[-1])
    assert_as_exact_as_fp32_sums_allow(*_draw(shape, k, dtype))
    assert chosen == [splits]


def test_views_are_taken():
    v, kernels, upstream = _draw((2, 5, 6, 8), 3, torch.float32)
    v = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    kernels = torch.stack([kernels, -kernels], -1)[..., 0]
    upstream = upstream[:1, :1, :1].expand(2, 5, 6, 8)
    assert not any(tensor.is_contiguous() for tensor in (v, kernels, upstream))
    assert_as_exact_as_fp32_sums_allow(v, kernels, upstream)


@pytest.mark.parametrize(("shape", "k"), [((2, 3, 5, 9), 3), *slowly([((2, 3, 2, 3, 9), (3, 3, 3))])])
def test_every_value_is_read_and_nothing_beside_them(monkeypatch, shape, k):
    """A lane past the channels is never stored, so only its address shows that it reads another's memory."""
    tensors = v, kernels, upstream = _draw(shape, k, torch.float32)
    load, read = interpreter.InterpreterBuilder.create_masked_load, set()

    def recorded(builder, pointers, mask, *options):
        read.update(pointers.data[mask.data.astype(bool)].flatten().tolist())
        return load(builder, pointers, mask, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recorded)
    values = {tensor.data_ptr() + 4 * i for tensor in tensors for i in range(tensor.numel())}
    assert_as_exact_as_fp32_sums_allow(v, kernels, upstream)
    assert read == values


def test_an_empty_batch_is_taken():
    v, kernels = torch.zeros(0, 3, 4, 5), torch.zeros(0, 9, 5)
    assert triton_kernels.dynamic_depthwise_conv(v, kernels).shape == v.shape
    assert triton_kernels.grad_v(v, kernels).shape == v.shape
    assert triton_kernels.grad_kernels(v, v, 3).shape == kernels.shape


def assert_pools_as_exactly_as_fp32_sums_allow(x, k, pool, upstream, **tile):
    """Both functions, each by its own tile or by the one given, against fp64: one rounding, and what fp32 sums lose."""
    leaf = x.detach().double().requires_grad_()
    exact = reference.pool_tokens(leaf, k, pool)
    (spread,) = torch.autograd.grad(exact, leaf, upstream.double())
    results = (
        (triton_pooling.pool_tokens(x, k, pool, **tile), exact.detach()),
        (triton_pooling.spread_tokens(upstream, *x.shape[1:3], k, pool, **tile), spread),
    )
    for ours, true in results:
        assert ours.dtype == x.dtype
        assert ours.shape == true.shape
        assert ours.is_contiguous()
        rounding = torch.finfo(x.dtype).eps / 2 * true.abs()
        assert ((ours.double() - true).abs() <= rounding + 1e-6 * true.abs().max()).all()


def _pooled_draw(shape, k, dtype):
    x, upstream, _ = _draw(shape, k, dtype)
    return x + 1, upstream  # a mean of zero would hide a factor


@pytest.mark.parametrize("pool", front.POOLS)
@pytest.mark.parametrize(
    ("shape", "k", "dtype"),
    [
        ((1, 5, 7, 3), 3, torch.bfloat16),  # uneven bins
        ((1, 2, 2, 3), 3, torch.float32),  # fewer tokens than bins
        *slowly([
            ((2, 7, 13, 5), 3, torch.float32),  # two tiles of positions
            ((2, 6, 6, 5), 3, torch.float32),  # even bins
            ((2, 1, 11, 3), 3, torch.float32),
            ((1, 7, 1, 3), 3, torch.bfloat16),
            ((1, 2, 3, 3), 5, torch.bfloat16),
            ((1, 1, 1, 2), 3, torch.float32),
            ((2, 3, 4, 3), 1, torch.float32),
            ((1, 6, 7, 70), 5, torch.bfloat16),  # a block of channels, and a few more
            ((1, 5, 14, 33), 3, torch.float16),
        ]),
    ],
)  # fmt: skip
def test_pooling_and_its_transpose_are_exact(shape, k, dtype, pool):
    x, upstream = _pooled_draw(shape, k, dtype)
    assert_pools_as_exactly_as_fp32_sums_allow(x, k, pool, upstream)


@pytest.mark.parametrize("pool", front.POOLS)
@pytest.mark.parametrize("channels", [9, *slowly([8])])
def test_tiles_of_the_pooling_meet_without_a_seam(channels, pool):
    """Positions that end inside the last of several tiles, and channels; as many channels as bins, and fewer."""
    x, upstream = _pooled_draw((1, 3, 5, channels), 3, torch.float32)
    tile = Tile(rows=1, cols=8, line_bytes=32, warps=1)
    assert_pools_as_exactly_as_fp32_sums_allow(x, 3, pool, upstream, tile=tile)


@triton.jit
def first_bins(positions, found, size, BINS: tl.constexpr, CHANNELS: tl.constexpr):
    place = tl.arange(0, 4)
    tl.store(found + place, triton_pooling._first(tl.load(positions + place), size, BINS, CHANNELS))


@pytest.mark.parametrize("channels", [9, 10, 1])
def test_bins_of_the_last_positions_of_the_largest_samples(channels):
    size = (2**31 - 1) // channels
    positions = torch.tensor([0, size // 9, size // 2, size - 1], dtype=torch.int32)
    found = torch.empty_like(positions)
    first_bins[(1,)](positions, found, size, BINS=9, CHANNELS=channels)
    assert found.tolist() == [position * 9 // size for position in positions.tolist()]


@pytest.mark.parametrize(
    ("pool", "dtype"),
    [("raster", torch.bfloat16), *slowly([("raster", torch.float32), ("grid", torch.bfloat16)])],
)
@pytest.mark.parametrize(
    ("constants", "splits"),
    [
        ({"MIN_TILES": 1}, (4, 1)),
        ({"MIN_TILES": 1, "PROGRAMS": 10}, (3, 2)),  # the last part is empty
        *slowly([({"MIN_TILES": 2}, (2, 2)), ({}, (1, 4))]),
    ],
)
def test_splits_of_the_bins_add_up(monkeypatch, dtype, pool, constants, splits):
    for name, value in constants.items():
        monkeypatch.setattr(triton_launch, name, value)
    chosen = []
    rule = triton_pooling.splits_of
    monkeypatch.setattr(triton_pooling, "splits_of", lambda *sizes: chosen.append(rule(*sizes)) or chosen[-1])
    x, upstream = _pooled_draw((1, 1, 23, 3) if pool == "raster" else (1, 4, 5, 3), 2, dtype)
    tile = Tile(rows=1, cols=2, line_bytes=4 * dtype.itemsize, warps=1)
    assert_pools_as_exactly_as_fp32_sums_allow(x, 2, pool, upstream, tile=tile)
    assert chosen == [splits] if pool == "raster" else chosen[0][0] > 1 or not constants


def test_pooling_takes_views():
    x, upstream = _pooled_draw((2, 5, 6, 8), 3, torch.float32)
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    upstream = upstream[:1, :1].expand(2, 9, 8)
    assert not any(tensor.is_contiguous() for tensor in (x, upstream))
    assert_pools_as_exactly_as_fp32_sums_allow(x, 3, "raster", upstream)


def test_pooling_of_an_empty_batch():
    assert triton_pooling.pool_tokens(torch.zeros(0, 3, 4, 5), 3, "grid").shape == (0, 9, 5)
    assert triton_pooling.spread_tokens(torch.zeros(0, 9, 5), 3, 4, 3, "grid").shape == (0, 3, 4, 5)


@pytest.mark.parametrize(
    ("grid", "kernel_size"),
    [((3, 4), None), *slowly([((3, 1, 2), (3, 1, 1)), ((2, 3, 2), None), ((2, 3, 2), (1, 3, 3))])],
)
def test_the_operator_runs_on_triton_through_the_front(grid, kernel_size):
    """Forward, both gradients and a second order, by the names that users call."""
    v, kernels, _ = _draw((2, *grid, 5), kernel_size or 3, torch.float32)
    v.requires_grad_(), kernels.requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        y = front.dynamic_depthwise_conv(v, kernels, backend=backend, kernel_size=kernel_size)
        first = torch.autograd.grad(y.square().sum(), (v, kernels), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (v, kernels))
        results.append((y, *first, *second))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_forward_mode_through_the_front():
    """A tangent, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    v, kernels, dv, dkernels = (torch.randn(2, *rows, 5, generator=generator) for rows in ((3, 4), (9,)) * 2)
    kernels.requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        y, tangent = torch.func.jvp(
            lambda v, taps: front.dynamic_depthwise_conv(v * v, taps * kernels, backend=backend),  # noqa: B023
            (v, kernels.detach()),
            (dv, dkernels),
        )
        results.append((y, tangent, *torch.autograd.grad(tangent.square().sum(), kernels)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("grid", "size", "pool"),
    [((2, 3), 2, "raster"),
     *slowly([((2, 1, 2), (1, 1, 2), "grid"), ((3, 2), (1, 2), "grid"), ((5, 2, 2), (3, 1, 1), "grid"),
              *(((2, 3, 2), size, pool) for size in ((2, 2, 2), (1, 2, 2)) for pool in ("grid", "raster"))])],
)  # fmt: skip
def test_pooling_through_the_front(monkeypatch, grid, size, pool):
    """Forward, a gradient, one of the gradient, and a tangent, where the environment asks for Triton."""
    monkeypatch.setenv(front.BACKEND_VARIABLE, "triton")
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(1, *grid, 4, generator=generator) for _ in range(2))
    x.requires_grad_()
    results = []
    for form in (front.pool_tokens, reference.pool_tokens):
        y = form(x, size, pool)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        tangent = torch.func.jvp(lambda x: form(x * x, size, pool), (x.detach(),), (dx,))[1]  # noqa: B023
        results.append((y, first, second, tangent))
    assert "Multilinear" in type(front.pool_tokens(x, 2, "raster").grad_fn).__name__
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
