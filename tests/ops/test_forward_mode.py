"""Forward-mode derivatives of operator and pooling: alone, nested, mapped, compiled; and torch's functions mended."""

import gc
import sys
import types
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import slowly
from tangents import assert_tangent, differences
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

import sit_atconv.ops.operators
from sit_atconv.ops.atconv import dynamic_depthwise_conv, operator, pool_tokens
from sit_atconv.ops.forward_mode import _PlainForms, exact_derivatives

BACKENDS = ["reference", "conv", "native", "auto"]
FAST = ["conv", "native"]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def problem(k=3):
    """(v, kernels), (dv, dkernels)."""
    v, kernels, dv, dkernels = draw(*[(2, 4, 5, 3), (2, k * k, 3)] * 2)
    return (v, kernels), (dv, dkernels)


def on(backend):
    return lambda v, kernels: dynamic_depthwise_conv(v, kernels, backend=backend)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [False, True])
def test_jvp_equals_differences(backend, k, trained):
    x, dx = problem(k)
    f = on(backend)
    assert_tangent(f, [each.requires_grad_(trained) for each in x], dx)
    x = [each.detach() for each in x]
    for alone in (0, 1):
        assert_tangent(lambda one: f(*(one if i == alone else x[i] for i in (0, 1))), (x[alone],), (dx[alone],))  # noqa: B023
    with torch.no_grad():
        assert_tangent(f, x, dx)


def dual(f, x, dx, trained=False):
    (v, kernels), dv = x, dx[0]
    kernels = kernels.clone().requires_grad_(trained)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(v, dv), kernels)).tangent
    return torch.autograd.grad(tangent.square().sum(), kernels)[0] if trained else tangent


def gradient_by_a_captured_tensor(f, x, dx):
    kernels = x[1].clone().requires_grad_()
    y, tangent = jvp(lambda v: f(v, kernels), (x[0],), (dx[0],))
    return torch.autograd.grad(tangent.square().sum() + y.sum(), kernels)[0]


NESTED = {
    "grad": lambda f, x, dx: grad(lambda *x: f(*x).square().sum(), 1)(*x),
    "vjp": lambda f, x, dx: vjp(f, *x)[1](dx[0])[1],
    "jvp of jvp": lambda f, x, dx: jvp(
        lambda v: jvp(lambda kernels: f(v * v, kernels * kernels), (x[1],), (dx[1],))[1], (x[0],), (dx[0],)
    )[1],
    "forward over reverse": lambda f, x, dx: jvp(grad(lambda v: f(v, x[1]).square().sum()), (x[0],), (dx[0],))[1],
    "reverse over forward": lambda f, x, dx: grad(
        lambda kernels: jvp(lambda v: f(v * v, kernels), (x[0],), (dx[0],))[1].square().sum()
    )(x[1]),
    "reverse over forward, captured": gradient_by_a_captured_tensor,
    "hessian": lambda f, x, dx: hessian(lambda kernels: f(x[0], kernels).pow(3).sum())(x[1]),
    "jacfwd": lambda f, x, dx: jacfwd(lambda kernels: f(x[0], kernels))(x[1]),
    "jacfwd twice": lambda f, x, dx: jacfwd(jacfwd(lambda kernels: f(x[0], kernels).pow(3).sum()))(x[1]),
    "vmap of jvp": lambda f, x, dx: vmap(lambda dv: jvp(lambda v: f(v, x[1]), (x[0],), (dv,))[1])(
        torch.stack([dx[0], 2 * x[0]])
    ),
    "jvp of vmap": lambda f, x, dx: jvp(
        lambda v: vmap(lambda one: f(one[None], x[1][:1]), 1)(v.unsqueeze(1)), (x[0],), (dx[0],)
    )[1],
    "dual tensors": dual,
    "gradient of a dual's tangent": lambda f, x, dx: dual(f, x, dx, trained=True),
}


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("backend", FAST)
def test_transforms_nest_as_they_do_around_the_oracle(backend, nested):
    if nested == "jvp of vmap":
        x, dx = draw((4, 5, 3), (1, 9, 3)), draw((4, 5, 3), seed=1)
        ours, exact = (
            jvp(lambda v: vmap(lambda row: on(b)(v[None] * row, x[1]))(v[0, :2]), (x[0],), (dx[0],))[1]  # noqa: B023
            for b in (backend, "reference")
        )
    else:
        ours, exact = (NESTED[nested](on(each), *problem()) for each in (backend, "reference"))
    assert exact.abs().max() > 0
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("flip", "backend"),
    [*zip([False, True], FAST, strict=True), *slowly(zip([True, False], FAST, strict=True))],
)
def test_both_operators_have_forward_rules(backend, flip):
    (v, kernels), _ = problem()
    v, kernels = v[:1, ..., :2].clone().requires_grad_(), kernels[:1, :, :2].clone().requires_grad_()
    grad_y = (2 * v.detach()).requires_grad_()
    forms = {
        "convolution": (lambda a, b: operator.convolution(a, b, flip, backend), (v, kernels)),
        "grad_kernels": (
            lambda a, b: operator.grad_kernels(a, b, (3, 3), backend),
            (v, grad_y),
        ),
    }
    for form, leaves in forms.values():
        assert gradcheck(form, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(form, leaves, check_fwd_over_rev=True)


def test_the_source_may_be_loaded_again_and_no_kernel_takes_anothers_place(monkeypatch):
    """As the code of an export may be; and torch 2.11 refuses a second kernel for a key."""
    strict = partialmethod(torch.library.Library.impl, allow_override=False)
    monkeypatch.setattr(torch.library.Library, "impl", strict)
    operators, module = types.ModuleType("again_operators"), types.ModuleType("again")
    operators.__package__ = "again.ops"
    monkeypatch.setitem(sys.modules, operators.__name__, operators)
    definitions = Path(sit_atconv.ops.operators.__file__).read_text()
    source = Path(operator.__file__).read_text().replace("sit_atconv.ops.operators", operators.__name__)
    x, dx = problem()
    for _ in range(2):
        exec(compile(definitions, operators.__name__, "exec"), vars(operators))
        exec(compile(source, "again", "exec"), vars(module))
        assert module.convolution.name() == "again::dynamic_depthwise_conv"
        gc.collect()
        form = lambda *x: module.dynamic_depthwise_conv(*x, "native")  # noqa: E731
        assert_tangent(form, x, dx)
        assert gradcheck(form, [each.requires_grad_() for each in x])
        x = [each.detach() for each in x]


@pytest.mark.parametrize("pool", ["raster", "grid"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_pooling_is_linear(pool, k, trained):
    x, dx = draw((2, 5, 7, 3), (2, 5, 7, 3))

    def f(x):
        return pool_tokens(x, k, pool)

    _, tangent = jvp(f, (x.requires_grad_(trained),), (dx,))
    torch.testing.assert_close(tangent, f(dx), rtol=1e-12, atol=1e-12)
    assert_tangent(lambda x: f(x * x), (x,), (dx,))
    along = jvp(grad(lambda x: f(x).pow(3).sum()), (x,), (dx,))[1]
    torch.testing.assert_close(along, differences(grad(lambda x: f(x).pow(3).sum()), (x,), (dx,)), rtol=1e-6, atol=1e-6)
    x = x.detach().requires_grad_()
    (got,) = torch.autograd.grad(jvp(lambda x: f(x * x), (x,), (dx,))[1].square().sum(), x)
    leaf = x.detach().requires_grad_()
    (want,) = torch.autograd.grad(f(2 * leaf * dx).square().sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_pooling_takes_a_dual_where_its_graph_is_older():
    x, dg = draw((2, 4, 5, 3), (2, 9, 3))
    x.requires_grad_()
    y = pool_tokens(x)
    with forward_ad.dual_level():
        (to_x,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(dg), dg), retain_graph=True)
        tangent = forward_ad.unpack_dual(to_x).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(y, x, dg)[0])


@pytest.mark.parametrize("backend", ["auto", *slowly(["conv"])])
def test_compiled_with_the_jvp_inside(backend):
    (v, kernels), (dv, _) = problem()
    kernels.requires_grad_()

    def both(v, kernels, dv):
        return jvp(lambda v: on(backend)(v, kernels), (v,), (dv,))

    results = []
    for form in (torch.compile(both, backend="aot_eager", fullgraph=True), both):
        y, tangent = form(v, kernels, dv)
        results.append((y, tangent, *torch.autograd.grad(y.sum() + tangent.square().sum(), kernels)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiler", ["aot_eager", *slowly(["eager"])])
@pytest.mark.parametrize("backend", ["auto", *slowly(["conv"])])
def test_compiled_with_a_dual_level_inside(backend, compiler):
    x, dx = problem()

    def tangent(x, dx):
        with forward_ad.dual_level():
            y = on(backend)(*map(forward_ad.make_dual, x, dx))
            return forward_ad.unpack_dual(y).tangent

    compiled = torch.compile(tangent, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(x, dx), jvp(on("reference"), x, dx)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", *slowly(["conv"])])
@pytest.mark.parametrize("before", [True, *slowly([False])])
def test_jvp_of_what_is_compiled(backend, before):
    x, dx = problem()
    compiled, expected = torch.compile(on(backend), backend="aot_eager"), jvp(on("reference"), x, dx)[1]
    if before:
        compiled(*x)
    torch.testing.assert_close(jvp(compiled, x, dx)[1], expected, rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(*map(forward_ad.make_dual, x, dx))).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


def test_no_graph_is_kept_without_gradients():
    (v, kernels), _ = problem()
    kernels.requires_grad_()
    with torch.no_grad():
        assert not any(each.requires_grad for each in jvp(lambda v: on("native")(v, kernels), (v,), (v,)))


MASK = torch.arange(20).view(4, 5) % 3 != 1
ATTENTIONS = {
    "plain": {}, "boolean mask": {"attn_mask": MASK}, "mask": {"attn_mask": MASK.double() - 0.3},
    "causal": {"is_causal": True}, "scale": {"scale": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_plain_attention_is_torchs(options):
    q, k, v = draw((2, 4, 4, 6), (2, 2, 5, 6), (2, 2, 5, 6))
    with _PlainForms():
        plain = F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True, **options)
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options))


def test_plain_attention_rounds_once():
    q, k, v = (each.bfloat16() for each in draw((2, 2, 4, 6), (2, 2, 5, 6), (2, 2, 5, 6)))
    exact = F.scaled_dot_product_attention(*(each.double() for each in (q, k, v)))
    with _PlainForms():
        plain = F.scaled_dot_product_attention(q, k, v)
    assert plain.dtype == torch.bfloat16
    assert ((plain.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_norms_are_torchs(dtype):
    x, weight, bias, mean = (each.to(dtype) for each in draw((3, 4, 5), (4, 5), (4,), (4,)))
    norms = {
        "layer": lambda: F.layer_norm(x, (4, 5), weight, bias=None),
        "layer without weights": lambda: F.layer_norm(input=x, normalized_shape=[5], eps=0.1),
        "batch": lambda: F.batch_norm(x, mean.clone(), mean.abs(), bias, mean, training=True),
        "batch in use": lambda: F.batch_norm(x, mean, mean.abs(), bias, None),
    }
    for name, form in norms.items():
        expected = form()
        with _PlainForms():
            actual = form()
        assert actual.dtype == expected.dtype, name
        tolerance = 1e-12 if dtype == torch.float64 else 0.03  # the plain forms round later
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_tangents_of_norms_differentiate_again(kind):
    x, dx, direction, weight = draw((5, 3, 4), (5, 3, 4), (5, 3, 4), (4 if kind == "layer" else 3,))

    def f(x):
        with exact_derivatives():
            return F.layer_norm(x, (4,), weight) if kind == "layer" else F.batch_norm(x, None, None, weight, None, True)

    def size(x):
        return jvp(f, (x,), (dx,))[1].square().sum()

    leaf = x.clone().requires_grad_()
    along = (torch.autograd.grad(size(leaf), leaf)[0] * direction).sum()
    torch.testing.assert_close(along, differences(size, (x,), (direction,)), rtol=1e-6, atol=1e-6)
    assert_tangent(lambda x: jvp(f, (x,), (dx,))[1], (x,), (direction,))


def test_a_batch_norm_counts_its_statistics_once():
    (x,) = draw((6, 3, 4))
    norms = [torch.nn.BatchNorm1d(3).double() for _ in range(2)]
    norms[0](x)
    with forward_ad.dual_level(), exact_derivatives():
        norms[1](forward_ad.make_dual(x, x))
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())
    buffers = {name: each.clone() for name, each in norms[0].named_buffers()}
    assert functional_call(norms[0], buffers, (x,)).shape == x.shape
