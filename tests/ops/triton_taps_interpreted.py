"""The operator that makes ATConv's kernels, its Triton kernels on the CPU, against the oracle in fp64; and the layer.

`test_triton_kernels` runs these in a process of its own, with TRITON_INTERPRET=1 set before triton is imported.
"""

import copy
from unittest import mock

import pytest
import torch
from conftest import slowly
from ops.triton_interpreted import round_as_a_gpu_does  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize
from triton.runtime import interpreter

from sit_atconv import ATConv
from sit_atconv.ops.atconv import BACKEND_VARIABLE, reference, taps, triton_taps
from sit_atconv.ops.atconv.taps import ACTIVATIONS
from sit_atconv.ops.atconv.tiles import TapTile

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def on_triton(monkeypatch):
    """For a layer: its kernels come from the operator; pooling and convolution, which take long interpreted, do not."""
    torch._dynamo.reset()
    monkeypatch.setattr(taps, "choose_backend", lambda *_, **__: "triton")


def draw(batch, count, channels, inhibition="learned", bias=True, dtype=FP32, parameters=FP32, seed=0):
    """(p, weight, bias, control) and an upstream gradient; p a few units wide, where activations bend."""
    generator = torch.Generator().manual_seed(seed)
    p, weight, shift, control, upstream = (
        torch.randn(shape, generator=generator)
        for shape in ((batch, count, channels), (count, count), (count,), (channels,), (batch, count, channels))
    )
    inputs = [3 * p, weight, shift if bias else None, control if inhibition == "learned" else None]
    kinds = (dtype, parameters, parameters, parameters)
    return [None if each is None else each.to(k) for each, k in zip(inputs, kinds, strict=True)], upstream.to(dtype)


def exact(inputs, upstream, activation, inhibition):
    """The oracle's result and gradients in fp64."""
    leaves = [None if each is None else each.detach().double().requires_grad_() for each in inputs]
    kernels = reference.tap_kernels(*leaves, activation, inhibition)
    there = [each for each in leaves if each is not None]
    return kernels.detach(), *torch.autograd.grad(kernels, there, upstream.double(), materialize_grads=True)


def assert_exact(inputs, upstream, activation, inhibition, **tiles):
    results = (
        triton_taps.tap_kernels(*inputs, activation, inhibition, **tiles),
        *triton_taps.grads(upstream, *inputs, activation, inhibition, **tiles),
    )
    results = [each for each in results if each is not None]
    like = [inputs[0], *(each for each in inputs if each is not None)]
    for ours, true, input_ in zip(results, exact(inputs, upstream, activation, inhibition), like, strict=True):
        assert ours.dtype == input_.dtype
        assert ours.shape == true.shape
        assert ours.is_contiguous()
        # One rounding of what fp32 gives. Sums in bf16 would be 2**-9 of the largest term off.
        allowed = torch.finfo(ours.dtype).eps / 2 * true.abs() + 2e-6 * true.abs().max() + 1e-7
        assert ((ours.double() - true).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("size", "activation", "inhibition", "bias", "dtypes"),
    [
        ((2, 9, 7), "gelu_tanh", "learned", True, (FP32, FP32)),
        ((1, 9, 70), "gelu", "full", True, (FP32, FP32)),
        ((3, 9, 5), "silu", "none", True, (FP32, FP32)),
        ((1, 25, 18), "gelu_tanh", "learned", False, (BF16, FP32)),  # as under autocast
        ((3, 1, 20), "silu", "learned", True, (FP32, FP32)),
        ((2, 9, 66), "silu", "learned", True, (BF16, BF16)),
        ((2, 9, 6), "gelu", "full", True, (FP16, FP16)),
        *slowly(
            [
                ((2, 25, 3), "gelu", "none", False, (FP32, FP32)),
                ((1, 1, 1), "gelu_tanh", "full", False, (FP32, FP32)),
                ((1, 49, 4), "gelu", "learned", True, (FP32, FP32)),
                ((2, 27, 18), "gelu_tanh", "learned", True, (BF16, FP32)),  # of volumes
                ((2, 3, 20), "gelu_tanh", "learned", True, (FP32, FP32)),
                ((2, 9, 6), "gelu_tanh", "none", True, (FP16, FP32)),
            ]
        ),
    ],
)
def test_kernels_and_gradients_are_exact(size, activation, inhibition, bias, dtypes):
    assert_exact(*draw(*size, inhibition, bias, *dtypes), activation, inhibition)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_hold_far_from_zero(activation):
    (p, *parameters), upstream = draw(1, 9, 40)
    p = torch.linspace(-60, 60, p.numel()).reshape(p.shape)
    p[0, 0, :4] = torch.tensor([-1e4, 1e4, 0.0, -0.0])
    assert_exact((p, *parameters), upstream, activation, "learned")


@pytest.mark.parametrize("programs", [1, 2, 4, 100])
def test_programs_share_out_samples_and_their_sums_add_up(programs):
    """A line of channels of 5 samples by one program, by two of 3 and 2, by one program each."""
    inputs, upstream = draw(5, 9, 20)
    assert_exact(inputs, upstream, "gelu_tanh", "learned", tile=TapTile(16, 1, 1, programs))


def test_partial_sums_pass_the_rows_that_are_summed_at_once(monkeypatch):
    monkeypatch.setattr(triton_taps, "SUM_ROWS", 2)
    inputs, upstream = draw(5, 9, 3)
    assert_exact(inputs, upstream, "silu", "learned")


def test_views_are_taken():
    (p, weight, bias, control), upstream = draw(2, 9, 6)
    p, weight = p.mT.contiguous().mT, weight.T
    bias, control = torch.stack([bias, -bias], 1)[:, 0], control[:1].expand(6)
    upstream = upstream[:1, :1].expand(2, 9, 6)
    inputs = (p, weight, bias, control)
    assert not any(each.is_contiguous() for each in (*inputs, upstream))
    assert_exact(inputs, upstream, "gelu_tanh", "learned")


def test_every_value_is_read_and_nothing_beside_them(monkeypatch):
    inputs, _ = draw(2, 9, 17)
    load, read = interpreter.InterpreterBuilder.create_masked_load, set()

    def recorded(builder, pointers, mask, *options):
        read.update(pointers.data[mask.data.astype(bool)].flatten().tolist())
        return load(builder, pointers, mask, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recorded)
    triton_taps.tap_kernels(*inputs, "gelu_tanh", "learned")
    assert read == {each.data_ptr() + 4 * i for each in inputs for i in range(each.numel())}


def test_nothing_is_written_beside_the_results(monkeypatch):
    inputs, upstream = draw(2, 9, 17)
    store, written = interpreter.InterpreterBuilder.create_masked_store, set()

    def recorded(builder, pointers, value, mask, *options):
        written.update(pointers.data[mask.data.astype(bool)].flatten().tolist())
        return store(builder, pointers, value, mask, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", recorded)
    results = [
        triton_taps.tap_kernels(*inputs, "gelu_tanh", "learned"),
        *triton_taps.grads(upstream, *inputs, "gelu_tanh", "learned"),
    ]
    values = {each.data_ptr() + 4 * i for each in results for i in range(each.numel())}
    assert values <= written
    assert len(written - values) == 2 * (9 * 10 + 17)  # the partial sums of two programs


def test_an_empty_batch_is_taken():
    inputs, upstream = draw(0, 9, 5)
    assert triton_taps.tap_kernels(*inputs, "silu", "learned").shape == (0, 9, 5)
    grad_p, *others = triton_taps.grads(upstream, *inputs, "silu", "learned")
    assert grad_p.shape == (0, 9, 5)
    assert all(not each.any() for each in others)


def test_other_dtypes_are_refused():
    inputs, upstream = draw(1, 9, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64: the Triton kernels take torch\.float32"):
        triton_taps.tap_kernels(*inputs, "silu", "learned")
    with pytest.raises(ValueError, match="float64"):
        triton_taps.grads(upstream.float(), inputs[0].float(), inputs[1].double(), None, None, "silu", "none")


# ---- the operator


def leaves(inputs):
    return [None if each is None else each.detach().requires_grad_() for each in inputs]


@pytest.mark.parametrize(
    ("activation", "inhibition", "bias"),
    [("gelu_tanh", "learned", True), ("gelu", "full", False), ("silu", "none", True)],
)
def test_gradients_of_gradients(activation, inhibition, bias):
    """With tensors that were made of one another: a gradient must not go twice through what made them."""
    inputs, upstream = draw(2, 9, 5, inhibition, bias)
    results = []
    for function, kind in ((taps.tap_kernels, FP32), (reference.tap_kernels, torch.float64)):
        p, weight, *others = (
            None if each is None else each.detach().to(kind).requires_grad_() for each in (*inputs, upstream)
        )
        above = others.pop()
        there = [each for each in (p, weight, *others) if each is not None]
        kernels = function(p * (1 + weight.mean()), weight, *others, activation, inhibition)
        first = torch.autograd.grad(kernels, there, above, create_graph=True)
        total = sum(each.pow(3).sum() for each in first)
        second = torch.autograd.grad(total, [*there, above], create_graph=True, materialize_grads=True)
        third = torch.autograd.grad(second[0].square().sum(), p)
        results.append([each.detach().double() for each in (kernels, *first, *second, *third)])
    for ours, true in zip(*results, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))


def test_gradients_of_some_inputs_and_of_many_upstream_tensors():
    inputs, upstream = draw(2, 9, 5)
    p, weight, bias, control = inputs
    _, to_p, to_weight, _, to_control = exact(inputs, upstream, "silu", "learned")
    weight.requires_grad_()
    (alone,) = torch.autograd.grad(taps.tap_kernels(p, weight, bias, control, "silu", "learned"), weight, upstream)
    torch.testing.assert_close(alone.double(), to_weight, rtol=1e-5, atol=1e-5)
    p.requires_grad_(), control.requires_grad_()
    kernels = taps.tap_kernels(p, weight, bias, control, "silu", "learned")
    mapped = torch.autograd.grad(
        kernels, (p, control), torch.stack([upstream, 2 * upstream]), is_grads_batched=True, retain_graph=True
    )
    for ours, true in zip(mapped, (to_p, to_control), strict=True):
        torch.testing.assert_close(ours.double(), torch.stack([true, 2 * true]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tests", ["test_schema test_autograd_registration test_faketensor", *slowly([""])])
def test_the_operator_is_one_to_torch(tests):
    chosen = {"test_utils": tests.split()} if tests else {}
    for inhibition in ("learned", "full"):
        inputs, upstream = draw(2, 9, 5, inhibition, bias=inhibition != "full")
        torch.library.opcheck(taps.forward, (*leaves(inputs), "gelu", inhibition), **chosen)
        torch.library.opcheck(taps.backward, (upstream, *inputs, "gelu", inhibition), **chosen)


def test_wrong_choices_are_refused():
    (p, weight, bias, control), _ = draw(1, 9, 5)
    with pytest.raises(ValueError, match="activation"):
        taps.tap_kernels(p, weight, bias, control, "relu", "learned")
    with pytest.raises(ValueError, match="inhibition"):
        taps.tap_kernels(p, weight, bias, control, "silu", "half")
    for given, inhibition in ((None, "learned"), (control, "full")):
        with pytest.raises(ValueError, match="control"):
            taps.tap_kernels(p, weight, bias, given, "silu", inhibition)


# ---- the layer


def layer_and_tokens(dtype=FP32, **options):
    torch.manual_seed(0)
    layer = ATConv(6, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype), torch.randn(2, *(2, 2, 3)[-len(layer.sizes) :], 6).to(dtype)


def calls():
    """A context that counts calls of the operator."""
    return mock.patch.object(taps, "forward", mock.Mock(wraps=taps.forward))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, FP32),
        *slowly(
            [
                ({"activation": "silu", "inhibition": "full"}, BF16),
                ({"activation": "gelu", "inhibition": "none", "bias": False, "kernel_size": 5, "pool": "grid"}, FP32),
                ({}, BF16),
                ({"volume": "full"}, FP32),
                ({"volume": "factored"}, FP32),
            ]
        ),
    ],
    ids=str,
)
def test_the_whole_layer(monkeypatch, options, dtype):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    layer, x = layer_and_tokens(dtype, **options)
    upstream = torch.randn(x.shape).to(dtype)

    def with_gradients(layer, x, upstream):
        y = layer(x.requires_grad_())
        return y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), upstream)

    with calls() as counted:
        ours = with_gradients(layer, x.clone(), upstream)
    assert counted.call_count == 1 + (layer.time is not None)
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    with calls() as counted:
        true = with_gradients(copy.deepcopy(layer).double(), x.double(), upstream.double())
        eager = with_gradients(layer, x.clone(), upstream)
    assert counted.call_count == 0
    for fast, own, exact_ in zip(ours, eager, true, strict=True):
        assert fast.dtype == own.dtype == dtype
        error, allowed = (fast - exact_).abs().max(), (own - exact_).abs().max()
        assert error <= 2 * allowed + (torch.finfo(dtype).eps + 1e-5) * exact_.abs().max()


def test_under_autocast_the_layer_gives_what_it_gave(on_triton):
    layer, x = layer_and_tokens()
    with torch.autocast("cpu", BF16), calls() as counted:
        y, kernels = layer(x), layer.kernels(x)
    assert counted.call_count == 2
    assert y.dtype == kernels.dtype == BF16
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {FP32}
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("transform", ["jvp", "dual tensors", "vmap", "grad", "jvp of grad"])
def test_transforms_and_tangents_of_the_layer(on_triton, transform):
    layer, x = layer_and_tokens()
    dx = torch.randn(x.shape)

    def dual(function, x, dx):
        with torch.autograd.forward_ad.dual_level():
            y = function(torch.autograd.forward_ad.make_dual(x, dx))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    ways = {
        "jvp": lambda f, x, dx: torch.func.jvp(f, (x,), (dx,))[1],
        "dual tensors": dual,
        "vmap": lambda f, x, dx: torch.func.vmap(f)(torch.stack([x, dx])),
        "grad": lambda f, x, dx: torch.func.grad(lambda x: f(x).square().sum())(x),
        "jvp of grad": lambda f, x, dx: torch.func.jvp(
            torch.func.grad(lambda x: f(x).square().sum()), (x,), (dx,)
        )[1],
    }  # fmt: skip
    exact_layer = copy.deepcopy(layer).double()
    ours = ways[transform](layer.kernels, x, dx)
    with mock.patch.object(taps, "takes", return_value=False):
        true = ways[transform](exact_layer.kernels, x.double(), dx.double())
    assert true.abs().max() > 0
    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, *slowly([{"inhibition": "full", "bias": False}])], ids=str)
def test_compiled_it_is_one_node_forward_and_one_backward(on_triton, options):
    layer, x = layer_and_tokens(**options)
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))
    kernels = torch.compile(layer.kernels, backend=backend, fullgraph=True)(x)
    expected = layer.kernels(x)
    torch.testing.assert_close(kernels, expected, rtol=1e-5, atol=1e-5)
    parameters = [each for name, each in layer.named_parameters() if name.split(".")[0] not in ("x_proj", "proj")]
    upstream = torch.randn(kernels.shape)
    torch.testing.assert_close(
        torch.autograd.grad(kernels, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        rtol=1e-4,
        atol=1e-5,
    )
    forward, backward = graphs
    assert forward.count(taps.forward) == 1
    assert backward.count(taps.backward) == 1


def with_a_hook(layer):
    layer.kernel_gen.register_forward_hook(lambda module, args, y: 2 * y)


def with_another_forward(layer):
    plain = layer.kernel_gen.forward
    layer.kernel_gen.forward = lambda x: 2 * plain(x)


def with_an_adapter(layer):
    class Adapted(type(layer.kernel_gen)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.kernel_gen.__class__ = Adapted


def with_another_module(layer):
    layer.kernel_gen = nn.Sequential(layer.kernel_gen, nn.SiLU())


def with_another_activation(layer):
    layer.activation = torch.relu


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def with_a_parametrised_weight(layer):
    parametrize.register_parametrization(layer.kernel_gen, "weight", Doubled())


def with_a_parametrised_control(layer):
    parametrize.register_parametrization(layer, "difference_control", Doubled())


@pytest.mark.parametrize(
    "change",
    [
        with_a_hook, with_another_forward, with_an_adapter, with_another_module, with_another_activation,
        with_a_parametrised_weight, with_a_parametrised_control,
    ],
)  # fmt: skip
def test_where_more_happens_the_modules_are_called(on_triton, change):
    layer, x = layer_and_tokens()
    before = layer.kernels(x)
    change(layer)
    with calls() as counted:
        ours = layer.kernels(x)
    assert counted.call_count == 0
    assert (ours - before).abs().max() > 0.01
    with mock.patch.object(taps, "takes", return_value=False):
        assert torch.equal(ours, layer.kernels(x))


def test_copies_keep_the_operator_and_traces_do_without(on_triton):
    layer, x = layer_and_tokens()
    with calls() as counted:
        copied = copy.deepcopy(layer).kernels(x)
    assert counted.call_count == 1
    layer.requires_grad_(False)
    with calls() as counted:
        traced = torch.jit.trace(lambda x: layer.kernels(x), x, check_trace=False)
    assert counted.call_count == 0
    torch.testing.assert_close(traced(x), copied.detach(), rtol=1e-5, atol=1e-5)
