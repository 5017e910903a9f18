"""What is chosen for CUDA, and the torch operator of the pooling, without a GPU.

Fake tensors on cuda:0 have no values, but a device. Where values are needed, torch's pooling stands in for the kernels.
"""

import warnings

import pytest
import torch
from conftest import slowly
from tangents import assert_tangent, differences
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from sit_atconv import ATConv
from sit_atconv.layers.atconv import check_backend
from sit_atconv.ops.atconv import (
    BACKEND_VARIABLE,
    choose_backend,
    dynamic_depthwise_conv,
    operator,
    pool_tokens,
    pooling,
    reference,
)
from sit_atconv.runtime.errors import InputError

pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")
from sit_atconv.ops.atconv import triton_pooling


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    torch._dynamo.reset()
    operator._say_slow.cache_clear()
    yield
    operator._say_slow.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """The pooling takes the way of CUDA; its operators compute by torch."""
    monkeypatch.setattr(pooling, "choose_backend", lambda *_, **__: "triton")
    monkeypatch.setattr(triton_pooling, "pool_tokens", pooling._pool)
    monkeypatch.setattr(triton_pooling, "spread_tokens", lambda g, h, w, *rest: pooling._unpool(g, (h, w), *rest))


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.own = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sit_atconv":
            self.own.append((function.name(), args[-1]))
        return function(*args, **(kwargs or {}))


def both(v, kernels, k=3):
    return dynamic_depthwise_conv(v, kernels), pool_tokens(v, k)


def on_cuda(dtype):
    return [torch.empty(2, *rows, 8, device="cuda:0", dtype=dtype) for rows in ((4, 5), (9,))]


def graph_of(function, *inputs) -> str:
    graphs = []

    def keep(module, _):
        graphs.append(str(module.graph))
        return module

    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slowly([torch.float16, torch.float32])])
def test_a_compiled_graph_holds_the_operators_as_eager_calls_them(dtype):
    with FakeTensorMode():
        v, kernels = on_cuda(dtype)
        assert choose_backend(v) == "triton"
        graph = graph_of(both, v, kernels)
        assert "sit_atconv.dynamic_depthwise_conv.default](args = (%l_v_, %l_kernels_, False, triton)" in graph
        assert "sit_atconv.pool_tokens.default](args = (%l_v_, (3, 3), raster)" in graph
        for ours, like in zip(both(v, kernels), (v, kernels), strict=True):
            assert (ours.shape, ours.dtype, ours.device) == (like.shape, like.dtype, like.device)


def test_what_triton_does_not_take_is_inlined(monkeypatch):
    """float64, a backend that was asked for, and what torch.export makes."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("error", "ATConv")
        assert "sit_atconv" not in graph_of(both, *on_cuda(torch.float64))
        torch._dynamo.reset()
        monkeypatch.setenv(BACKEND_VARIABLE, "native")
        assert "sit_atconv" not in graph_of(both, *on_cuda(torch.bfloat16))
        monkeypatch.delenv(BACKEND_VARIABLE)

        class Both(torch.nn.Module):
            def forward(self, v, kernels):
                return both(v, kernels)

        exported = torch.export.export(Both(), tuple(on_cuda(torch.bfloat16)))
        assert "sit_atconv" not in str(exported.graph)


def test_kernels_that_the_registers_do_not_hold_are_left_to_torch():
    """From 9 x 9: by `auto` with one warning; by `triton`, and at the start of a run, with an error."""
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        v, kernels = torch.empty(2, 4, 5, 8, device="cuda:0"), torch.empty(2, 81, 8, device="cuda:0")
        assert choose_backend(v, kernel_size=7) == "triton"
        for _ in range(2):
            assert choose_backend(v, kernel_size=9) == "native"
            with Recorded() as recorded:
                both(v, kernels, 9)
            assert recorded.own == [("sit_atconv::dynamic_depthwise_conv", "native")]
        with pytest.raises(RuntimeError, match=r"larger than 7 x 7 .* registers; choose 'auto', 'native' or 'conv'"):
            dynamic_depthwise_conv(v, kernels, backend="triton")
    (said,) = [str(each.message) for each in caught if "ATConv" in str(each.message)]
    assert "slow" in said
    assert "kernels larger than 7 x 7" in said


def test_a_run_is_refused_at_its_start_where_its_largest_kernels_cannot_run(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with FakeTensorMode():
        check_backend(torch.nn.Sequential(ATConv(4), ATConv(4, kernel_size=7)), torch.device("cuda:0"))
        with pytest.raises(InputError, match="larger than 7 x 7"):
            check_backend(torch.nn.Sequential(ATConv(4, kernel_size=9), ATConv(4)), torch.device("cuda:0"))


def test_tangents_within_a_graph_are_of_plain_calls():
    def tangents(v, kernels, dv):
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(each).tangent for each in both(forward_ad.make_dual(v, dv), kernels)]

    with FakeTensorMode():
        v, kernels = on_cuda(torch.float32)
        assert "sit_atconv" not in graph_of(tangents, v, kernels, v)


@pytest.mark.parametrize(
    ("lacking", "says", "compiled"),
    [
        ("_triton_is_installed", "the package triton is not installed", True),
        ("_is_old", "compute capability below 8.0", False),
    ],
)
def test_cuda_without_triton_says_once_that_it_is_slow(monkeypatch, lacking, says, compiled):
    monkeypatch.setattr(operator, lacking, lambda *_: lacking == "_is_old")
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        v, kernels = on_cuda(torch.bfloat16)
        for _ in range(2):
            if compiled:
                torch._dynamo.reset()
                assert "sit_atconv" not in graph_of(both, v, kernels)
            else:
                assert choose_backend(v) == "native"
                both(v, kernels)
    (said,) = [str(each.message) for each in caught if "ATConv" in str(each.message)]
    assert says in said
    assert "slow" in said


@pytest.mark.parametrize(
    ("pool", "transpose"), [("raster", False), ("grid", True), *slowly([("raster", True), ("grid", False)])]
)
def test_derivatives_of_the_pooling_operators(stand_in, pool, transpose):
    generator = torch.Generator().manual_seed(0)
    rows = (9,) if transpose else (4, 5)
    x, dx = (torch.randn(2, *rows, 2, dtype=torch.float64, generator=generator) for _ in range(2))

    def f(x):
        return pooling.spread_operator(x, 4, 5, (3, 3), pool) if transpose else pooling.pool_operator(x, (3, 3), pool)

    torch.library.opcheck(
        pooling.spread_operator if transpose else pooling.pool_operator,
        (x.requires_grad_(), *((4, 5) if transpose else ()), (3, 3), pool),
    )
    assert gradcheck(f, x, check_forward_ad=True)
    assert gradgradcheck(lambda x: f(x).square(), x, check_fwd_over_rev=True)
    x = x.detach()
    torch.testing.assert_close(jvp(f, (x,), (dx,))[1], f(dx))
    second = jvp(lambda x: jvp(lambda x: f(x**3), (x,), (dx,))[1], (x,), (dx,))[1]
    torch.testing.assert_close(second, f(6 * x * dx * dx))
    mapped = torch.vmap(f, 1, 1)(torch.stack([x, dx], 1))
    torch.testing.assert_close(mapped[:, 1], f(dx))


@pytest.mark.parametrize("pool", ["raster", *slowly(["grid"])])
def test_pooling_by_operators_equals_the_oracle(stand_in, pool):
    """Through the front, eager and compiled, with gradients and with tangents of them."""
    generator = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_()
    results = []
    for form in (reference.pool_tokens, pool_tokens, torch.compile(pool_tokens, backend="aot_eager", fullgraph=True)):
        pooled = form(x, 3, pool)
        results.append((pooled, *torch.autograd.grad(pooled.pow(3).sum(), x)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-12)

    def slope(x):
        return grad(lambda x: pool_tokens(x, 3, pool).pow(3).sum())(x)

    x = x.detach()
    assert_tangent(lambda x: pool_tokens(x, 3, pool).pow(2), (x,), (dx,))
    torch.testing.assert_close(jvp(slope, (x,), (dx,))[1], differences(slope, (x,), (dx,)), rtol=1e-6, atol=1e-6)


def test_the_pooling_keeps_nothing_for_its_gradient(stand_in):
    x, saved = torch.randn(2, 4, 5, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pool_tokens(x)
    assert not saved
