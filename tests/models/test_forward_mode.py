"""Forward-mode derivatives through whole models, and tracing them."""

import io

import pytest
import torch
from peft import LoraConfig
from tangents import assert_reverse_over_forward, assert_tangent, gradient, reverse_over_forward
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from sit_atconv import create_model
from sit_atconv.models.attnet import AttNet
from sit_atconv.ops.forward_mode import _PlainForms

mixers = pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
SHAPE = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "pos_embed": True}


def sit(mixer, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = create_model(None, 8, 5, token_mixer=mixer, **SHAPE, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def inputs(dtype=torch.float64):
    """x, t, labels, and a direction for x."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(2, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))
    return x, torch.rand(2, generator=generator), torch.arange(2), dx


def by_x(model):
    _, t, labels, _ = inputs()
    return lambda x: model(x, t, labels).sample


@mixers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sit(mixer, checkpointing):
    model, (x, _, _, dx) = sit(mixer), inputs()
    f, parameters = by_x(model), list(model.parameters())
    assert_reverse_over_forward(f, x, dx, parameters)
    expected = reverse_over_forward(f, x, dx, parameters)
    if checkpointing:
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(reverse_over_forward(f, x, dx, parameters), expected)
    assert_tangent(f, (x,), (dx,))
    model.requires_grad_(False)
    assert_tangent(f, (x,), (dx,))
    with torch.no_grad():
        assert_tangent(f, (x,), (dx,))


@mixers
def test_sit_along_its_path_in_time(mixer):
    """(v, 1) along (x, t), as MeanFlow takes it; t is fp32, too coarse for differences."""
    model, (x, t, labels, dx) = sit(mixer, torch.float32), inputs(torch.float32)
    duals = (x, t), (dx, torch.ones(2))
    y, tangent = jvp(lambda x, t: model(x, t, labels).sample, *duals)
    leaves = [each.clone().requires_grad_() for each in duals[0]]
    with _PlainForms():
        again = model(*leaves, labels).sample
        upstream = torch.zeros_like(again, requires_grad=True)
        pulled = torch.autograd.grad(again, leaves, upstream, create_graph=True)
        (expected,) = torch.autograd.grad(pulled, upstream, duals[1])
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, model(x, t, labels).sample, rtol=1e-4, atol=1e-5)


@mixers
def test_sit_under_other_transforms(mixer):
    model, (x, t, labels, dx) = sit(mixer), inputs()
    f, parameters = by_x(model), dict(model.named_parameters())
    plain, expected = jvp(f, (x,), (dx,))[1], reverse_over_forward(f, x, dx, list(parameters.values()))

    def size(parameters):
        def g(x):
            return functional_call(model, parameters, (x, t, labels)).sample

        return jvp(g, (x,), (dx,))[1].square().sum()

    by_name = grad(size)(parameters)
    torch.testing.assert_close(torch.cat([each.flatten() for each in by_name.values()]), expected)
    mapped = vmap(lambda dx: jvp(f, (x,), (dx,))[1])(torch.stack([dx, -2 * dx]))
    torch.testing.assert_close(mapped[1], -2 * plain)

    def one_by_one(x):
        return vmap(lambda *one: model(*(each[None] for each in one)).sample[0])(x, t, labels)

    torch.testing.assert_close(jvp(one_by_one, (x,), (dx,))[1], plain)
    assert_tangent(lambda x: jvp(f, (x,), (dx,))[1], (x,), (x.flip(0),))
    assert_tangent(grad(lambda x: f(x).pow(3).sum()), (x,), (dx,))


@mixers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sit_of_dual_tensors(mixer, checkpointing):
    model, (x, _, _, dx) = sit(mixer), inputs()
    f, parameters = by_x(model), list(model.parameters())
    tangent, expected = jvp(f, (x,), (dx,))[1], reverse_over_forward(f, x, dx, parameters)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent
    torch.testing.assert_close(dual, tangent)
    torch.testing.assert_close(gradient(dual.square().sum(), parameters), expected)


def test_checkpointing_runs_the_blocks_again(monkeypatch):
    model, (x, _, _, dx) = sit("hybrid"), inputs()
    model.enable_gradient_checkpointing()
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    y, _ = jvp(by_x(model), (x,), (dx,))
    assert len(calls) == 2
    y.sum().backward()
    assert len(calls) == 4


@mixers
def test_half_precision(mixer):
    x, t, labels, dx = inputs(torch.float32)
    exact = sit(mixer, torch.float32)

    def tangent(model, x, dx):
        return jvp(lambda x, t: model(x, t, labels).sample, (x, t), (dx, torch.ones(2)))

    _, expected = tangent(exact, x, dx)
    with torch.autocast("cpu", torch.bfloat16):
        cast = tangent(exact, x, dx)
        assert {each.dtype for each in cast} == {exact(x, t, labels).sample.dtype}
    half = tangent(exact.to(torch.bfloat16), x.bfloat16(), dx.bfloat16())
    assert {each.dtype for each in half} == {torch.bfloat16}
    for _, rough in (cast, half):
        assert (rough.float() - expected).norm() < 0.05 * expected.norm()


def test_sit_with_a_lora():
    model, (x, _, _, dx) = sit("hybrid"), inputs()
    model.add_adapter(LoraConfig(r=2, target_modules=["x_proj", "kernel_proj", "kernel_gen", "qkv", "proj"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    trained = [each for name, each in model.named_parameters() if "lora" in name]
    assert_tangent(by_x(model), (x,), (dx,))
    assert_reverse_over_forward(by_x(model), x, dx, trained)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "atconv"])
def test_sit_compiled_with_the_jvp_inside(mixer):
    torch._dynamo.reset()
    model, (x, _, _, dx) = sit(mixer), inputs()
    f, parameters = by_x(model), list(model.parameters())
    compiled = torch.compile(lambda x, dx: jvp(f, (x,), (dx,)), backend="aot_eager", fullgraph=True)
    y, tangent = compiled(x, dx)
    torch.testing.assert_close((y, tangent), jvp(f, (x,), (dx,)))
    expected = reverse_over_forward(f, x, dx, parameters)
    torch.testing.assert_close(gradient(tangent.square().sum(), parameters), expected)


@pytest.mark.slow
def test_jvp_of_a_compiled_sit():
    torch._dynamo.reset()
    model, (x, _, _, dx) = sit("atconv"), inputs()
    expected = jvp(by_x(model), (x,), (dx,))
    model.compile_repeated_blocks(backend="aot_eager")
    by_x(model)(x)
    torch.testing.assert_close(jvp(by_x(model), (x,), (dx,)), expected)


@pytest.mark.parametrize("options", [{}, {"glu_norm": False, "layer_scale": None, "pool": "grid", "pos_embed": True}])
def test_attnet(options):
    torch.manual_seed(0)
    model = AttNet(depths=(1, 1), dims=(8, 12), mlp_ratios=(2, 2), num_classes=5, **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, dx = (torch.randn(2, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    assert_tangent(model, (x,), (dx,))
    assert_reverse_over_forward(model, x, dx, list(model.parameters()))


@mixers
def test_a_traced_sit_is_the_model(mixer):
    model, (x, t, labels, _) = sit(mixer), inputs()
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x, t, labels), strict=False), saved)
    traced = torch.jit.load(io.BytesIO(saved.getvalue()))
    torch.testing.assert_close(traced(x, t, labels)["sample"], model(x, t, labels).sample)
    other = torch.cat([x, x[:1].flip(-1)]), torch.cat([t, t[:1] / 2]), torch.tensor([4, 3, 2])
    torch.testing.assert_close(traced(*other)["sample"], model(*other).sample)
