"""The operator against its oracle in fp64: every backend and dtype, odd shapes, gradients of both orders."""

import pytest
import torch
import torch.nn.functional as F
from conftest import slowly
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.ops.atconv import (
    BACKEND_VARIABLE,
    choose_backend,
    dynamic_depthwise_conv,
    inlined,
    native,
    on_grid,
    operator,
    pool_tokens,
    reference,
)

SHAPES = [(1, 2, 4, 5), (2, 3, 7, 9), (2, 5, 1, 6), (2, 2, 6, 1), (1, 4, 2, 2), (3, 2, 6, 6)]
FAST = ["conv", "native"]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def problem(shape, k, dtype=torch.float64):
    """(v, kernels, upstream gradient)."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(k)

    def draw(*rows):
        return torch.randn(batch, *rows, channels, generator=generator).to(dtype)

    return draw(height, width), draw(k * k), draw(height, width)


def with_gradients(form, v, kernels, upstream):
    leaves = [v.detach().clone().requires_grad_(), kernels.detach().clone().requires_grad_()]
    y = form(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, upstream))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_backend_equals_the_oracle_with_gradients(backend, shape, k):
    v, kernels, upstream = problem(shape, k)
    expected = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    actual = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        assert ours.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (1, 5, 12, 1), (2, 3, 1, 11)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_error_is_at_most_twice_that_of_the_oracle_in_the_same_dtype(backend, dtype, k, shape):
    v, kernels, upstream = problem(shape, k, dtype)
    exact = with_gradients(reference.dynamic_depthwise_conv, v.double(), kernels.double(), upstream.double())
    own = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    fast = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    for value, plain, truth in zip(fast, own, exact, strict=True):
        assert value.dtype == dtype
        assert (value.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (5, 2, 3, 4)])
@pytest.mark.parametrize("block", [1, 200, 700])
def test_native_does_not_depend_on_where_its_blocks_end(monkeypatch, shape, block):
    v, kernels, upstream = problem(shape, 5)
    whole = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend="native"), v, kernels, upstream)
    monkeypatch.setattr(native, "BLOCK_BYTES", block)
    parts = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend="native"), v, kernels, upstream)
    for expected, actual in zip(whole, parts, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("k", "shape"),
    [
        (5, (2, 1, 3, 2)), (3, (1, 2, 5, 1)),
        *slowly([(3, (1, 2, 4, 5)), (5, (1, 2, 4, 5)), (3, (2, 1, 3, 2)), (5, (1, 2, 5, 1))]),
    ],
)  # fmt: skip
def test_gradients_of_both_orders(backend, k, shape):
    v, kernels, _ = problem(shape, k)
    leaves = v.requires_grad_(), kernels.requires_grad_()

    def form(v, kernels):
        return dynamic_depthwise_conv(v, kernels, backend=backend)

    assert gradcheck(form, leaves)
    assert gradgradcheck(form, leaves)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("flip", [False, True])
def test_the_operators_are_registered_as_torch_asks(backend, flip):
    v, kernels, upstream = problem((2, 3, 4, 5), 3, torch.float32)
    forward = (v.requires_grad_(), kernels.requires_grad_(), flip, backend)
    torch.library.opcheck(operator.convolution, forward)
    backward = (v, upstream.requires_grad_(), (3, 3), backend)
    torch.library.opcheck(operator.grad_kernels, backward)
    assert gradcheck(
        lambda v, kernels: operator.convolution(v, kernels, flip, backend),
        (v.detach().double().requires_grad_(), kernels.detach().double().requires_grad_()),
    )


@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
def test_tokens_with_their_grid_are_the_grid_to_the_bit(backend):
    v, kernels, upstream = problem((2, 3, 4, 5), 3, torch.float32)
    expected = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    tokens = [each.flatten(1, 2) for each in (v, upstream)]
    actual = with_gradients(lambda *x: dynamic_depthwise_conv(*x, (4, 5), backend), tokens[0], kernels, tokens[1])
    assert actual[0].shape == actual[1].shape == (2, 20, 3)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.reshape(ours.shape))
        assert ours.is_contiguous()


def views_of(v):
    """v in other layouts: channels first, columns outside rows, and cut out of something larger."""
    channels_first = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    columns_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    cut = F.pad(v, (1, 2, 1, 1, 2, 1), value=torch.nan)[:, 2:-1, 1:-1, 1:-2]
    return channels_first, columns_first, cut


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_may_lie_in_memory_in_any_way(backend, batch):
    v, kernels, upstream = problem((batch, 4, 5, 3), 3)
    expected = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    every_other = torch.stack([kernels, torch.full_like(kernels, torch.nan)], -1).flatten(2)[..., ::2]
    spread = upstream[:, :1, :1].expand_as(upstream)
    views = views_of(v)
    assert not any(each.is_contiguous() for each in (*views, every_other, spread))
    for tokens, taps in (*((view, kernels) for view in views), (v, every_other), (views[0], every_other)):
        leaves = tokens.requires_grad_(), taps.requires_grad_()
        y = dynamic_depthwise_conv(*leaves, backend=backend)
        assert y.is_contiguous()
        for actual, exact in zip((y, *torch.autograd.grad(y, leaves, upstream)), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    exact = with_gradients(reference.dynamic_depthwise_conv, v, kernels, spread)
    actual = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, spread)
    torch.testing.assert_close(actual[1:], exact[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2)])
def test_vmap_equals_a_loop(backend, in_dims):
    v, kernels, _ = problem((2, 3, 4, 5), 3)
    stacked = [
        torch.stack([tensor, 2 * tensor + 1], dim) if dim is not None else tensor
        for tensor, dim in zip((v, kernels), in_dims, strict=True)
    ]
    mapped = torch.vmap(lambda v, kernels: dynamic_depthwise_conv(v, kernels, backend=backend), in_dims)(*stacked)
    for index in range(2):
        parts = [t.select(d, index) if d is not None else t for t, d in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(mapped[index], reference.dynamic_depthwise_conv(*parts))


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiling_inlines_plain_torch_for_any_grid(backend):
    graphs = []

    def keep(module, example_inputs):
        graphs.append(str(module.graph))
        return module

    compiled = torch.compile(
        lambda v, kernels: dynamic_depthwise_conv(v, kernels, backend=backend), backend=keep, fullgraph=True
    )
    for shape in ((2, 3, 4, 5), (2, 3, 6, 7)):
        v, kernels, _ = problem(shape, 3)
        torch.testing.assert_close(compiled(v, kernels), reference.dynamic_depthwise_conv(v, kernels))
    assert graphs
    assert not any("sit_atconv.dynamic_depthwise_conv" in graph for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "tokens"), [("grid", False), ("raster", True), ("raster", False), ("grid", True)])
def test_one_graph_serves_all_sizes_that_are_left_open(pool, tokens):
    def form(v, kernels, grid):
        if grid is not None:
            return dynamic_depthwise_conv(v, kernels, grid), pool_tokens(on_grid(v, grid), 3, pool)
        return dynamic_depthwise_conv(v, kernels), pool_tokens(v, 3, pool)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(form, backend=graphs, fullgraph=True)
    for shape in ((2, 3, 4, 5), (2, 3, 7, 6), (2, 3, 5, 9)):
        v, kernels, upstream = problem(shape, 3)
        grid = shape[2:] if tokens else None
        if tokens:
            v, upstream = v.flatten(1, 2), upstream.flatten(1, 2)
        leaves = v.requires_grad_(), kernels.requires_grad_()
        for dim in range(1, v.ndim - 1):
            torch._dynamo.maybe_mark_dynamic(v, dim)
        results = []
        for each in (compiled, form):
            y, pooled = each(*leaves, grid)
            loss = (y * upstream).sum() + pooled.pow(3).sum()
            results.append((y, pooled, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    # The integers of a grid are open from the second on.
    assert graphs.frame_count == (2 if tokens else 1)


@pytest.mark.parametrize("strict", [False, *slowly([True])])
def test_an_exported_operator_takes_other_sizes(strict):
    class Operator(torch.nn.Module):
        def forward(self, v, kernels):
            return dynamic_depthwise_conv(v, kernels) + pool_tokens(v).mean(1)[:, None, None]

    sides = {1: torch.export.Dim("height", min=2, max=64), 2: torch.export.Dim("width", min=2, max=64)}
    v, kernels, _ = problem((2, 3, 4, 5), 3)
    exported = torch.export.export(Operator(), (v, kernels), dynamic_shapes=(sides, None), strict=strict).module()
    for height, width in ((4, 5), (9, 3)):
        v, kernels, _ = problem((2, 3, height, width), 3)
        torch.testing.assert_close(exported(v, kernels), Operator()(v, kernels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        (SHAPES[1], 3),
        (SHAPES[4], 1),
        *slowly([(s, k) for k in (1, 3, 5) for s in SHAPES if (s, k) not in ((SHAPES[1], 3), (SHAPES[4], 1))]),
    ],
)
def test_compiled_form_equals_the_oracle_with_gradients(shape, k):
    v, kernels, upstream = problem(shape, k)
    compiled = torch.compile(dynamic_depthwise_conv, backend="aot_eager", fullgraph=True)
    expected = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    torch.testing.assert_close(with_gradients(compiled, v, kernels, upstream), expected, rtol=1e-12, atol=1e-12)


def test_compiled_form_has_a_vmap():
    v, kernels, _ = problem((2, 3, 4, 5), 3)
    stacked = torch.stack([kernels, 2 * kernels + 1], 2)
    form = torch.vmap(dynamic_depthwise_conv, (None, 2))
    mapped = torch.compile(form, backend="aot_eager")(v, stacked)
    for index in range(2):
        torch.testing.assert_close(mapped[index], reference.dynamic_depthwise_conv(v, stacked[:, :, index]))


def test_compiled_form_saves_tokens_and_kernels_alone():
    v, kernels, _ = problem((2, 3, 4, 5), 3)
    v.requires_grad_(), kernels.requires_grad_()
    saved = []
    compiled = torch.compile(dynamic_depthwise_conv, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        compiled(v, kernels)
    assert sorted(saved) == sorted([v.numel(), kernels.numel()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_inductor_rounds_no_worse_than_the_oracle(dtype):
    v, kernels, upstream = problem((2, 24, 12, 9), 3, dtype)
    arguments = (v, kernels, upstream)
    exact = with_gradients(reference.dynamic_depthwise_conv, *(argument.double() for argument in arguments))
    own = with_gradients(reference.dynamic_depthwise_conv, *arguments)
    ours = with_gradients(torch.compile(dynamic_depthwise_conv, fullgraph=True), *arguments)
    for actual, eager, truth in zip(ours, own, exact, strict=True):
        assert (actual - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-6
    if dtype != torch.float32:
        assert_one_rounding(ours, exact, dtype)


def assert_one_rounding(actual, exact, dtype):
    """Only this bound tells sums in fp32 from sums in bf16: the oracle sums in its own dtype."""
    for ours, truth in zip(actual, exact, strict=True):
        assert ours.dtype == dtype
        error, slack = (ours.double() - truth).abs(), 1e-6 * truth.abs().max()
        assert (error <= torch.finfo(dtype).eps / 2 * truth.abs() + slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("block", [200, native.BLOCK_BYTES])
def test_sums_are_in_fp32(backend, dtype, block, monkeypatch):
    monkeypatch.setattr(native, "BLOCK_BYTES", block)
    v, kernels, upstream = problem((2, 6, 12, 9), 3, dtype)
    exact = with_gradients(reference.dynamic_depthwise_conv, v.double(), kernels.double(), upstream.double())
    actual = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    assert_one_rounding(actual, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_inlined_sums_in_fp32_too(dtype):
    v, kernels, upstream = problem((2, 6, 12, 9), 3, dtype)
    exact = with_gradients(reference.dynamic_depthwise_conv, v.double(), kernels.double(), upstream.double())
    assert_one_rounding(with_gradients(inlined.dynamic_depthwise_conv, v, kernels, upstream), exact, dtype)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("alone", [0, 1])
def test_each_operand_can_be_trained_alone(backend, alone):
    v, kernels, upstream = problem((2, 3, 4, 5), 3)
    both = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    operands = [v, kernels]
    operands[alone].requires_grad_()
    (gradient,) = torch.autograd.grad(dynamic_depthwise_conv(*operands, backend=backend), operands[alone], upstream)
    torch.testing.assert_close(gradient, both[1 + alone])


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("backend", FAST)
def test_gradient_of_the_kernels_differentiates_by_each_operand_alone(backend, trained):
    v, _, upstream = problem((2, 3, 4, 5), 3)
    operands = [v, upstream]
    operands[trained].requires_grad_()
    assert gradcheck(lambda a, b: operator.grad_kernels(a, b, (3, 3), backend), operands)


@pytest.mark.parametrize("backend", FAST)
def test_a_backend_asked_for_is_compiled_around(backend):
    v, kernels, upstream = problem((2, 3, 4, 5), 3)
    compiled = torch.compile(
        lambda *x: dynamic_depthwise_conv(*x, backend=backend), backend="aot_eager", fullgraph=True
    )
    expected = with_gradients(reference.dynamic_depthwise_conv, v, kernels, upstream)
    torch.testing.assert_close(with_gradients(compiled, v, kernels, upstream), expected)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_change_the_dtype(backend):
    v, kernels, upstream = problem((2, 3, 4, 5), 3, torch.float32)
    plain = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend=backend), v, kernels, upstream)
    for ours, expected in zip(cast, plain, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("asked", ["triton", "reference", "conv"])
def test_on_the_meta_device_the_operator_counts_whatever_was_asked_for(monkeypatch, asked):
    monkeypatch.setenv(BACKEND_VARIABLE, asked)
    with FlopCounterMode(display=False) as counter:
        dynamic_depthwise_conv(torch.empty(2, 4, 5, 3, device="meta"), torch.empty(2, 9, 3, device="meta"))
    assert counter.get_total_flops() == 2 * 2 * 20 * 3 * 9


@pytest.mark.slow
def test_compiled_kernels_are_worked_out_once_and_not_for_every_token():
    v, raw, _ = problem((1, 3, 4, 5), 3, torch.float32)
    form = torch.compile(lambda v, raw: dynamic_depthwise_conv(v, raw.tanh()), fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(form, v, raw)
    assert 1 <= code.count(".tanh()") <= 2  # one loop, with or without vectors; fused into the taps there are nine


def test_multiply_accumulates_are_counted():
    v, kernels, upstream = problem((2, 3, 4, 5), 3)
    one = 2 * v.numel() * 9
    with FlopCounterMode(display=False) as counter:
        with_gradients(lambda *x: dynamic_depthwise_conv(*x, backend="native"), v, kernels, upstream)
    assert counter.get_total_flops() == 3 * one


def test_only_tokens_and_kernels_are_saved():
    v, kernels, _ = problem((2, 3, 4, 5), 3)
    v.requires_grad_(), kernels.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        dynamic_depthwise_conv(v, kernels)
    assert sorted(saved) == sorted([v.data_ptr(), kernels.data_ptr()])


@pytest.mark.parametrize("shape", [*SHAPES, (2, 2, 16, 16), (1, 1, 8, 24)])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_equals_the_oracle_with_gradients(shape, k, pool):
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, height, width, channels, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(batch, k * k, channels, dtype=torch.float64, generator=generator)
    expected, actual = reference.pool_tokens(x, k, pool), pool_tokens(x, k, pool)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for form in (expected, actual):
        x.grad = None
        form.backward(upstream)
        if form is expected:
            exact = x.grad
    torch.testing.assert_close(x.grad, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["raster", "grid"])
@pytest.mark.parametrize("batch", [1, 2])
def test_pooling_reads_any_layout(batch, pool):
    x, upstream, _ = problem((batch, 4, 5, 7), 3)
    expected = reference.pool_tokens(x, 3, pool)
    for view in views_of(x):
        assert not view.is_contiguous()
        pooled = pool_tokens(view.requires_grad_(), 3, pool)
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
        assert pooled.is_contiguous()
        (gradient,) = torch.autograd.grad(pooled, view, upstream)
        leaf = x.clone().requires_grad_()
        (exact,) = torch.autograd.grad(reference.pool_tokens(leaf, 3, pool), leaf, upstream)
        torch.testing.assert_close(gradient, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_a_batch_of_one_is_pooled_as_it_lies_too(pool, monkeypatch):
    """torch tells the layout of an image by its strides, and a view may give a batch of one any: 20 times the time."""
    x, _, _ = problem((3, 40, 17, 13), 3, torch.float32)
    expected = pool_tokens(x, 3, pool)[1:2]
    torch_pool, strides = F.adaptive_avg_pool2d, []
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: strides.append(x.stride()) or torch_pool(x, size))
    assert torch.equal(pool_tokens(x[1:2].clone(), 3, pool), expected)
    assert torch.equal(pool_tokens(on_grid(x[1:2].flatten(1, 2), (17, 13)), 3, pool), expected)
    (row,) = {stride[2] for stride in strides}
    assert strides == [(17 * 13 * 40, 1, row, 40)] * 2


@pytest.mark.parametrize("shape", [(2, 20, 3), (20, 3), (1, 1, 2, 4, 5, 3)])
def test_pooling_refuses_what_is_no_grid(shape):
    with pytest.raises(ValueError, match=r"tokens of shape .*: give \(B, H, W, C\)"):
        pool_tokens(torch.zeros(shape))
    with pytest.raises(ValueError, match="did you mean 'raster'"):
        pool_tokens(torch.zeros(2, 4, 5, 3), 3, "rastr")


def test_on_grid_is_a_view_and_refuses_another_number_of_tokens():
    tokens = torch.randn(2, 20, 3)[:, :12]
    x = on_grid(tokens, (3, 4))
    assert x.shape == (2, 3, 4, 3)
    assert x.data_ptr() == tokens.data_ptr()
    assert torch.equal(x[1, 2, 3], tokens[1, 11])
    for wrong in (tokens[:, :11], tokens[0], x):
        with pytest.raises(ValueError, match=r"do not fill a grid of 3 x 4; give \(B, 12, C\)"):
            on_grid(wrong, (3, 4))


@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_has_gradients_of_both_orders_and_a_vmap(pool):
    x = torch.randn(2, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert gradcheck(lambda x: pool_tokens(x, 3, pool), x)
    assert gradgradcheck(lambda x: pool_tokens(x, 3, pool).square(), x)
    many = torch.stack([x.detach(), x.detach().flip(1)])
    mapped = torch.vmap(lambda x: pool_tokens(x, 3, pool))(many)
    torch.testing.assert_close(mapped[1], reference.pool_tokens(many[1], 3, pool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_is_as_exact_as_the_oracle_in_that_precision(dtype, pool):
    x = torch.randn(2, 9, 11, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = reference.pool_tokens(x.double(), 3, pool)
    own = (reference.pool_tokens(x, 3, pool).double() - exact).abs().max()
    assert (pool_tokens(x, 3, pool).double() - exact).abs().max() <= 2 * own + 1e-6


@pytest.mark.parametrize("backend", ["auto", "reference", *FAST])
def test_an_empty_batch_has_empty_results(backend):
    v, kernels = torch.zeros(0, 16, 16, 300, requires_grad=True), torch.zeros(0, 9, 300, requires_grad=True)
    y = dynamic_depthwise_conv(v, kernels, backend=backend)
    y.sum().backward()
    assert y.shape == v.grad.shape == (0, 16, 16, 300)
    assert kernels.grad.shape == (0, 9, 300)


def test_it_is_a_cross_correlation_not_a_flipped_convolution():
    v = torch.zeros(1, 3, 3, 1)
    v[0, 1, 1] = 1
    kernels = torch.arange(9.0).reshape(1, 9, 1)
    for backend in ("reference", *FAST):
        assert dynamic_depthwise_conv(v, kernels, backend=backend).flatten().tolist() == list(range(8, -1, -1))


def test_argument_then_environment_then_rule_choose_the_backend(monkeypatch):
    small, large = torch.zeros(1, 4, 4, 4), torch.zeros(1, 16, 16, 1152)
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    # A sample has to be large for a call of its own to pay, however many there are.
    assert (choose_backend(small), choose_backend(large)) == ("native", "conv")
    assert choose_backend(torch.zeros(999, 8, 8, 64)) == "native"
    assert choose_backend(torch.zeros(1, 16, 16, 255)) == "native"
    assert choose_backend(torch.zeros(1, 16, 16, 256)) == "conv"
    assert choose_backend(large.double()) == choose_backend(large.half()) == "native"
    onednn = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert choose_backend(large.bfloat16()) == ("conv" if onednn else "native")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose_backend(large) == "native"
    monkeypatch.undo()
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert choose_backend(large) == "reference"
    assert choose_backend(large, "conv") == "conv"
    monkeypatch.setenv(BACKEND_VARIABLE, "nativ")
    with pytest.raises(ValueError, match="did you mean 'native'"):
        dynamic_depthwise_conv(small, torch.zeros(1, 9, 4))


@pytest.mark.parametrize(
    ("v", "kernels", "grid", "says"),
    [
        ((1, 12, 2), (1, 9, 2), (3, 5), "grid of 3 x 5"),
        ((1, 3, 4, 2), (1, 9, 2), (3, 4), r"\(1, 3, 4, 2\) do not fill a grid of 3 x 4; give \(B, 12, C\)"),
        ((12, 2), (1, 9, 2), (3, 4), "grid of 3 x 4"),
        ((1, 12, 2), (1, 9, 2), None, r"\(1, 12, 2\): give \(B, H, W, C\), or \(B, N, C\) with grid=\(H, W\)"),
        ((1, 1, 3, 4, 2), (1, 9, 2), None, "cube of an odd size"),
        ((1, 1, 1, 3, 4, 2), (1, 9, 2), None, r"give \(B, H, W, C\).* of a volume \(B, T, H, W, C\)"),
        ((1, 3, 4, 2), (1, 4, 2), None, "square of an odd size"),
        ((1, 3, 4, 2), (1, 8, 2), None, "square of an odd size"),
        ((1, 3, 4, 2), (9, 2), None, "square of an odd size"),
        ((2, 3, 4, 2), (1, 9, 2), None, "do not fit tokens"),
        ((1, 3, 4, 2), (1, 9, 3), None, "do not fit tokens"),
        ((2, 12, 2), (1, 9, 2), (3, 4), "do not fit tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_named(v, kernels, grid, says):
    with pytest.raises(ValueError, match=says):
        dynamic_depthwise_conv(torch.zeros(v), torch.zeros(kernels), grid)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"kernels": torch.zeros(1, 9, 2, dtype=torch.bfloat16)}, ValueError, r"bfloat16.*kernels\.to\(v\.dtype\)"),
        ({"kernels": torch.zeros(1, 9, 2, device="meta")}, ValueError, r"meta.*kernels\.to\(v\.device\)"),
        ({"v": torch.zeros(1, 3, 4, 2, dtype=torch.int64)}, ValueError, "int64"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        ({"backend": "triton"}, RuntimeError, "cpu, not on a CUDA device; choose 'auto'"),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(change, error, says):
    arguments = {"v": torch.zeros(1, 3, 4, 2), "kernels": torch.zeros(1, 9, 2)} | change
    with pytest.raises(error, match=says):
        dynamic_depthwise_conv(**arguments)
