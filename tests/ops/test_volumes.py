"""The operator and the pooling on volumes (B, T, H, W, C): oracle against torch's conv3d, backends against the oracle,
and the identities that tie volumes to grids."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import slowly
from tangents import assert_tangent
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.ops.atconv import dynamic_depthwise_conv, native, on_grid, operator, pool_tokens, reference

FULL, SPACE, TIME = (3, 3, 3), (1, 3, 3), (3, 1, 1)
SIZES = [FULL, SPACE, TIME, (5, 3, 1)]
GRIDS = [(2, 3, 5), (7, 2, 1), (1, 5, 2), (5, 1, 7), (1, 1, 1), (2, 2, 2)]
FAST = ["conv", "native"]


def problem(grid, sizes, dtype=torch.float64, batch=2, channels=3):
    """(v, kernels, upstream gradient)."""
    generator = torch.Generator().manual_seed(sum(grid))
    shapes = ((batch, *grid, channels), (batch, math.prod(sizes), channels), (batch, *grid, channels))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(form, v, kernels, upstream):
    leaves = [v.detach().clone().requires_grad_(), kernels.detach().clone().requires_grad_()]
    y = form(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, upstream))


def on(backend, sizes):
    return lambda v, kernels: dynamic_depthwise_conv(v, kernels, backend=backend, kernel_size=sizes)


def by_torch(sizes):
    """One conv3d with a group for each sample and channel."""

    def form(v, kernels):
        images, groups = v.movedim(-1, 1).flatten(0, 1)[None], v.shape[0] * v.shape[-1]
        weights = kernels.transpose(1, 2).reshape(groups, 1, *sizes)
        y = F.conv3d(images, weights, padding=[size // 2 for size in sizes], groups=groups)
        return y[0].unflatten(0, (v.shape[0], -1)).movedim(1, -1)

    return form


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_backend_equals_torchs_conv3d_with_gradients(grid, sizes):
    expected = with_gradients(by_torch(sizes), *problem(grid, sizes))
    for backend in ("reference", *FAST):
        actual = with_gradients(on(backend, sizes), *problem(grid, sizes))
        for ours, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
            assert ours.is_contiguous() or backend == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_error_is_at_most_twice_that_of_the_oracle_in_the_same_dtype(dtype, sizes):
    """Output and gradients of v, of the kernels, and of tokens that are pooled into them."""

    def through_the_pool(conv, pool):
        def form(x, kernels):
            return conv(x, kernels + pool(x, sizes, "raster") + pool(x, sizes, "grid"))

        return form

    for grid in ((5, 2, 7), (2, 7, 1), (1, 5, 2)):
        tensors = problem(grid, sizes, dtype)
        own_form = through_the_pool(on("reference", sizes), reference.pool_tokens)
        exact = with_gradients(own_form, *(each.double() for each in tensors))
        own = with_gradients(own_form, *tensors)
        for backend in FAST:
            fast = with_gradients(through_the_pool(on(backend, sizes), pool_tokens), *tensors)
            for value, plain, truth in zip(fast, own, exact, strict=True):
                assert value.dtype == dtype
                assert (value.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("block", [1, 100, 300, 700])
def test_native_does_not_depend_on_where_its_blocks_end(monkeypatch, block):
    tensors = problem((5, 4, 3), FULL, batch=3)
    whole = with_gradients(on("native", FULL), *tensors)
    monkeypatch.setattr(native, "BLOCK_BYTES", block)
    torch.testing.assert_close(with_gradients(on("native", FULL), *tensors), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", [FULL, TIME])
def test_gradients_of_both_orders_and_tangents(backend, sizes):
    v, kernels, dv = problem((2, 1, 3), sizes, batch=1, channels=2)
    leaves = v.requires_grad_(), kernels.requires_grad_()
    assert gradcheck(on(backend, sizes), leaves)
    assert gradgradcheck(on(backend, sizes), leaves)
    v, kernels = v.detach(), kernels.detach()
    assert_tangent(on(backend, sizes), (v, kernels), (dv, kernels.flip(1)))
    assert_tangent(
        lambda v: torch.func.grad(lambda v: on(backend, sizes)(v, kernels).pow(3).sum())(v), (v,), (dv,)
    )  # fmt: skip
    torch.library.opcheck(operator.convolution, (*leaves, False, backend, sizes))
    torch.library.opcheck(operator.grad_kernels, (leaves[0], dv, sizes, backend))


@pytest.mark.parametrize(("sizes", "pool"), [(TIME, "raster"), *slowly([(FULL, "grid"), (SPACE, "raster")])])
def test_compiled_form_equals_the_oracle_with_gradients(sizes, pool):
    torch._dynamo.reset()

    def form(v, kernels):
        return dynamic_depthwise_conv(v, kernels + pool_tokens(v, sizes, pool), kernel_size=sizes)

    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    for grid in ((2, 3, 5), (5, 2, 4)):
        tensors = problem(grid, sizes)
        expected = with_gradients(
            lambda v, k: by_torch(sizes)(v, k + reference.pool_tokens(v, sizes, pool)), *tensors
        )  # fmt: skip
        torch.testing.assert_close(with_gradients(compiled, *tensors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_rounds_no_worse_than_the_oracle(dtype):
    torch._dynamo.reset()
    tensors = problem((5, 6, 7), FULL, dtype, channels=24)
    exact = with_gradients(on("reference", FULL), *(each.double() for each in tensors))
    own = with_gradients(on("reference", FULL), *tensors)
    ours = with_gradients(torch.compile(dynamic_depthwise_conv, fullgraph=True), *tensors)
    for actual, eager, truth in zip(ours, own, exact, strict=True):
        assert (actual - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-6


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_one_frame_is_a_grid_with_the_middle_taps(backend):
    v, kernels, upstream = problem((1, 4, 5), FULL)
    grids = v[:, 0], kernels[:, 9:18], upstream[:, 0]
    expected = with_gradients(lambda v, k: dynamic_depthwise_conv(v, k, backend=backend), *grids)
    y, to_v, to_kernels = with_gradients(on(backend, None), v, kernels, upstream)
    actual = y[:, 0], to_v[:, 0], to_kernels[:, 9:18]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not to_kernels[:, :9].any()
    assert not to_kernels[:, 18:].any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_kernel_that_is_a_product_is_its_two_passes(backend):
    """Everywhere: what lies outside in time is zero before the pass in space and after it."""
    v, space, _ = problem((4, 3, 5), SPACE)
    _, time, _ = problem((4, 3, 5), TIME)
    product = (time[:, :, None] * space[:, None]).flatten(1, 2)
    passes = on(backend, TIME)(on(backend, SPACE)(v, space), time)
    torch.testing.assert_close(on(backend, FULL)(v, product), passes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_sides_that_change_places_in_volume_and_kernel_do_so_in_the_result(backend):
    v, kernels, _ = problem((4, 3, 5), (3, 5, 1))
    turned = kernels.unflatten(1, (3, 5, 1)).transpose(1, 2).flatten(1, 3)
    expected = on(backend, (3, 5, 1))(v, kernels).transpose(1, 2)
    torch.testing.assert_close(on(backend, (5, 3, 1))(v.transpose(1, 2), turned), expected, rtol=1e-12, atol=1e-12)


def test_the_first_taps_read_the_frame_before():
    v = torch.zeros(1, 3, 3, 3, 1)
    v[0, 1, 1, 1] = 1
    for backend in ("reference", *FAST):
        y = dynamic_depthwise_conv(v, torch.arange(27.0).reshape(1, 27, 1), backend=backend)
        assert y.flatten().tolist() == list(range(26, -1, -1))


@pytest.mark.parametrize("backend", FAST)
def test_layouts_vmap_tokens_traces_and_costs(backend):
    v, kernels, upstream = problem((2, 3, 4), FULL)
    expected = on("reference", FULL)(v, kernels)
    channels_first = v.movedim(-1, 1).contiguous().movedim(1, -1)
    frames_inside = v.transpose(1, 2).contiguous().transpose(1, 2)
    for each in (channels_first, frames_inside, F.pad(v, (1, 1, 1, 1, 1, 1), value=math.nan)[:, :, 1:-1, 1:-1, 1:-1]):
        assert not each.is_contiguous()
        torch.testing.assert_close(on(backend, FULL)(each, kernels), expected, rtol=1e-12, atol=1e-12)
    mapped = torch.vmap(on(backend, FULL), (None, 2))(v, torch.stack([kernels, -kernels], 2))
    torch.testing.assert_close(mapped, torch.stack([expected, -expected]), rtol=1e-12, atol=1e-12)
    tokens = dynamic_depthwise_conv(v.flatten(1, 3), kernels, (2, 3, 4), backend)
    torch.testing.assert_close(tokens, expected.flatten(1, 3), rtol=1e-12, atol=1e-12)
    traced = torch.jit.trace(on(backend, FULL), (v, kernels))
    torch.testing.assert_close(traced(2 * v, kernels), 2 * expected, rtol=1e-12, atol=1e-12)
    with FlopCounterMode(display=False) as counter:
        with_gradients(on(backend, SPACE), v, kernels[:, :9], upstream)
    assert counter.get_total_flops() == 3 * 2 * v.numel() * 9


@pytest.mark.slow
def test_an_exported_volume_takes_other_sizes():
    class Operator(torch.nn.Module):
        def forward(self, v, kernels):
            return dynamic_depthwise_conv(v, kernels) + pool_tokens(v).mean(1)[:, None, None, None]

    sides = {1: torch.export.Dim("time", min=2, max=64), 2: torch.export.Dim("height", min=2, max=64)}
    v, kernels, _ = problem((3, 4, 5), FULL)
    exported = torch.export.export(Operator(), (v, kernels), dynamic_shapes=(sides, None)).module()
    v, kernels, _ = problem((5, 7, 5), FULL)
    torch.testing.assert_close(exported(v, kernels), Operator()(v, kernels), rtol=1e-12, atol=1e-12)


# ---- pooling


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_equals_the_oracle_with_gradients(grid, sizes, pool):
    x, upstream, _ = problem(grid, sizes)
    results = []
    for form in (reference.pool_tokens, pool_tokens):
        leaf = x.clone().requires_grad_()
        pooled = form(leaf, sizes, pool)
        results.append((pooled, *torch.autograd.grad(pooled, leaf, upstream)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert results[1][0].is_contiguous()


def test_the_bins_of_a_volume_by_their_definition():
    x = torch.arange(4 * 3 * 6.0).reshape(1, 4, 3, 6, 1)
    raster = reference.pool_tokens(x.flatten(1, 3)[:, None], (1, 27), "raster")  # that of a grid of one row
    assert torch.equal(pool_tokens(x, 3, "raster"), raster)
    torch.testing.assert_close(pool_tokens(x, SPACE, "raster"), reference.pool_tokens(x.mean(1), 3, "raster"))
    torch.testing.assert_close(pool_tokens(x, SPACE, "grid"), reference.pool_tokens(x.mean(1), 3, "grid"))
    in_time = [x[:, first:last].mean((1, 2, 3)) for first, last in ((0, 2), (1, 3), (2, 4))]
    for pool in ("raster", "grid"):
        torch.testing.assert_close(pool_tokens(x, TIME, pool), torch.stack(in_time, 1))
    cell = x[:, 1:3, 2:3, 2:4].mean((1, 2, 3))  # the middle one in time, last of the rows, middle of the columns
    torch.testing.assert_close(pool_tokens(x, 3, "grid")[:, 9 + 6 + 1], cell)


@pytest.mark.parametrize("pool", ["raster", "grid"])
@pytest.mark.parametrize("sizes", [FULL, SPACE])
def test_pooling_has_gradients_of_both_orders_tangents_and_a_vmap(pool, sizes):
    x, dx = (each[:1, ..., :1] for each in problem((2, 3, 4), sizes)[::2])
    x.requires_grad_()
    assert gradcheck(lambda x: pool_tokens(x, sizes, pool), x)
    assert gradgradcheck(lambda x: pool_tokens(x, sizes, pool).square(), x)
    x = x.detach()
    assert_tangent(lambda x: pool_tokens(x, sizes, pool).pow(2), (x,), (dx,))
    mapped = torch.vmap(lambda x: pool_tokens(x, sizes, pool))(torch.stack([x, dx]))
    torch.testing.assert_close(mapped[1], reference.pool_tokens(dx, sizes, pool))


# ---- errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v, k: dynamic_depthwise_conv(v, k[:, :9]), "K the cube of an odd size"),
        (lambda v, k: dynamic_depthwise_conv(v, k, kernel_size=(1, 3, 3)), r"product of the odd sizes .*\(1, 3, 3\)"),
        (lambda v, k: dynamic_depthwise_conv(v, k[:, :2], kernel_size=(2, 1, 1)), "odd sizes"),
        (lambda v, k: dynamic_depthwise_conv(v, k, kernel_size=(9, 3)), r"\(1, 2, 3, 4, 2\): give \(B, H, W, C\)"),
        (lambda v, k: dynamic_depthwise_conv(v[0], k, kernel_size=FULL), r"give \(B, T, H, W, C\), or .*\(T, H, W\)"),
        (lambda v, k: dynamic_depthwise_conv(v, k, kernel_size=(27,)), "a size for each side of"),
        (lambda v, k: pool_tokens(v, (3, 3)), r"give \(B, H, W, C\)"),
        (lambda v, k: on_grid(v.flatten(1, 3), (2, 3, 5)), r"grid of 2 x 3 x 5; give \(B, 30, C\).*grid=\(T, H, W\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.zeros(1, 2, 3, 4, 2), torch.zeros(1, 27, 2))
