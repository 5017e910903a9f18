"""The layer against golden vectors, against the paper's order of operations, and its options."""

import pytest
import torch
from conftest import slowly
from golden_vectors import assert_golden, golden

from sit_atconv import ATConv
from sit_atconv.layers.atconv import TapLinear
from sit_atconv.ops.atconv import reference


@pytest.mark.parametrize("name", ["op_sit", "op_repa", "op_attnet_k3", "op_attnet_k5"])
def test_golden_outputs_and_gradients(name):
    info, state, tensors = golden(name)
    layer = ATConv(info["dim"], kernel_size=info.get("kernel_size", 3), activation=info["activation"])
    layer.load_state_dict(state, strict=True)

    def tokens(image):
        return image.flatten(2).transpose(1, 2) if image.ndim == 4 else image

    x = tokens(tensors["x"]).clone().requires_grad_()
    y = layer(x, grid=tuple(info["grid"]))
    assert_golden(y, tokens(tensors["y"]))
    y.backward(tokens(tensors["grad_y"]))
    assert_golden(x.grad, tokens(tensors["grad_x"]), factor=10)
    for key, parameter in layer.named_parameters():
        assert_golden(parameter.grad.flatten(), tensors[f"grad.{key}"].flatten(), factor=10)


@pytest.mark.parametrize("pool", ["raster", "grid"])
@pytest.mark.parametrize("inhibition", ["learned", "full", "none"])
def test_equals_the_papers_order_in_fp64(pool, inhibition):
    torch.manual_seed(0)
    layer = ATConv(6, pool=pool, inhibition=inhibition).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    pooled = reference.pool_tokens(layer.kernel_proj(x), 3, pool)
    kernels = layer.kernel_gen(layer.activation(pooled).transpose(1, 2)).transpose(1, 2)
    factor = {"learned": lambda: layer.difference_control.sigmoid(), "full": lambda: 1.0, "none": lambda: 0.0}
    kernels = reference.inhibit(kernels, factor[inhibition]())
    expected = layer.proj(reference.dynamic_depthwise_conv(layer.x_proj(x), kernels))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


FORMS = [{}, {"pool": "grid", "kernel_size": 5}, {"routing": "static"}]


@pytest.mark.parametrize(
    ("options", "compiled"),
    [*((form, False) for form in FORMS), *slowly((form, True) for form in FORMS)],
    ids=str,
)
def test_tokens_with_their_grid_are_the_grid_to_the_bit(options, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x, upstream = ATConv(8, **options), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    expected = y, *torch.autograd.grad(y, (leaf, *layer.parameters()), upstream)
    leaf = x.flatten(1, 2).requires_grad_()
    y = function(leaf, grid=(3, 4))
    assert y.shape == leaf.shape
    actual = y, *torch.autograd.grad(y, (leaf, *layer.parameters()), upstream.flatten(1, 2))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.reshape(ours.shape))


@pytest.mark.parametrize("options", [{}, {"routing": "static"}], ids=str)
def test_tokens_that_do_not_fill_the_grid_are_refused(options):
    layer = ATConv(4, **options)
    for shape, grid, says in [
        ((2, 20, 4), (3, 7), r"\(2, 20, 4\) do not fill a grid of 3 x 7"),
        ((2, 4, 5, 4), (4, 5), r"\(2, 4, 5, 4\) do not fill a grid of 4 x 5"),
        ((20, 4), (4, 5), "do not fill a grid of 4 x 5"),
        ((2, 20, 4), None, r"\(2, 20, 4\): give \(B, H, W, C\), or \(B, N, C\) with grid=\(H, W\)"),
        ((4, 5, 4), None, r"give \(B, H, W, C\)"),
        ((1, 2, 4, 5, 4), None, r"give \(B, H, W, C\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            layer(torch.zeros(shape), grid)


@pytest.mark.parametrize("options", [{}, {"routing": "static"}], ids=str)
def test_tokens_of_another_width_are_refused(options):
    layer = ATConv(6, **options)
    for shape, grid, says in [
        ((2, 6, 4, 5), None, r"\(2, 6, 4, 5\) for an ATConv of dim=6: give \(B, H, W, 6\).*x\.permute\(0, 2, 3, 1\)"),
        ((2, 6, 20), (4, 5), r"\(2, 6, 20\) for an ATConv of dim=6: .* or \(B, N, 6\) .*x\.transpose\(1, 2\)"),
        ((2, 4, 5, 8), None, r"\(2, 4, 5, 8\) for an ATConv of dim=6: .*; make the layer as wide as the tokens"),
        ((2, 20, 8), (4, 5), r"\(2, 20, 8\) for an ATConv of dim=6: .*; make the layer as wide as the tokens"),
    ]:
        with pytest.raises(ValueError, match=says) as info:
            layer(torch.zeros(shape), grid)
        assert "\n" not in str(info.value)
    assert layer(torch.zeros(2, 6, 4, 5).permute(0, 2, 3, 1)).shape == (2, 4, 5, 6)


def test_full_inhibition_leaves_kernels_without_a_mean():
    layer = ATConv(4, inhibition="full")
    kernels = layer.kernels(torch.randn(2, 4, 5, 4))
    assert kernels.mean(1).abs().max() < 1e-6
    assert kernels.abs().max() > 1e-4


def test_static_kernels_ignore_the_input_and_adaptive_ones_do_not():
    x = torch.randn(2, 4, 5, 4)
    static, adaptive = ATConv(4, routing="static"), ATConv(4)
    assert torch.equal(static.kernels(x)[0], static.kernels(-x)[1])
    assert not torch.allclose(adaptive.kernels(x)[0], adaptive.kernels(x)[1])
    assert {name for name, _ in static.named_parameters()} == {
        "static_kernel", "difference_control", "x_proj.weight", "x_proj.bias", "proj.weight", "proj.bias",
    }  # fmt: skip


def test_starts_with_half_of_the_mean_subtracted_and_zero_biases():
    layer = ATConv(8, bias=True)
    assert layer.difference_control.sigmoid().unique().tolist() == [0.5]
    assert not layer.kernel_gen.bias.any()
    assert not any("bias" in name for name, _ in ATConv(8, bias=False).named_parameters())


@pytest.mark.parametrize("k", [3, 5])
def test_static_kernels_start_as_torchs_depthwise_convolution_does(k):
    torch.manual_seed(0)
    ours = ATConv(256, kernel_size=k, routing="static").static_kernel
    theirs = torch.nn.Conv2d(256, 256, k, groups=256).weight
    for start in (ours, theirs):  # uniform in [-1 / k, 1 / k]
        assert 0.98 / k < start.abs().max() <= 1 / k
        assert start.std().item() == pytest.approx(1 / k / 3**0.5, rel=0.05)


def test_lora_style_wrappers_around_the_linears_take_effect():
    layer, x = ATConv(4), torch.randn(1, 3, 3, 4)
    plain = layer(x)
    for name in ("x_proj", "proj", "kernel_proj", "kernel_gen"):
        handle = getattr(layer, name).register_forward_hook(lambda _module, _inputs, output: output + 1)
        assert not torch.allclose(layer(x), plain), name
        handle.remove()


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 4}, {"activation": "relu"}, {"pool": "max"}, {"routing": "dynamic"}, {"inhibition": "half"}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        ATConv(4, **options)


def test_the_layer_saves_one_tensor_of_tokens_more_than_its_two_linears():
    layer = ATConv(64)
    x = torch.randn(1, 48, 48, 64, generator=torch.Generator().manual_seed(0))
    weights = {parameter.data_ptr() for parameter in layer.parameters()}

    def saved_bytes(form) -> int:
        sizes = {}

        def keep(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            form(x)
        return sum(sizes.values())

    linears = saved_bytes(lambda x: layer.proj(layer.x_proj(x)))
    assert linears == 2 * x.numel() * x.element_size()
    assert saved_bytes(layer) <= 1.55 * linears


@pytest.mark.parametrize("shape", [(2, 9, 6), (9, 6), (3, 2, 9, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_linear_over_the_taps_equals_its_product(shape, bias, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = TapLinear(9, 9, bias=bias, dtype=torch.float64)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves, graphs = (rows, *linear.parameters()), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    def with_gradients(function):
        y = function(rows.mT)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    actual = with_gradients(torch.compile(linear, backend=backend, fullgraph=True) if compiled else linear)
    expected = with_gradients(lambda x: torch.nn.functional.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[0].mT.is_contiguous()
    if compiled:
        (code,) = graphs
        assert ".sum(" in code
        assert not any(product in code for product in ("linear(", "matmul", "@", "einsum", "bmm"))


def test_a_traced_layer_takes_another_batch():
    torch.manual_seed(0)
    layer = ATConv(8).requires_grad_(False)
    traced = torch.jit.trace(layer, torch.randn(2, 3, 4, 8))
    x = torch.randn(3, 3, 4, 8)
    torch.testing.assert_close(traced(x), layer(x))
    with_grid = torch.jit.trace(lambda x: layer(x, (3, 4)), torch.randn(2, 12, 8))
    torch.testing.assert_close(with_grid(x.flatten(1, 2)), layer(x).flatten(1, 2))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_linear_over_the_taps_is_a_product(strict):
    exported = torch.export.export(TapLinear(9, 9), (torch.randn(2, 6, 9),), strict=strict)
    assert {node.target for node in exported.graph.nodes if node.op == "call_function"} == {
        torch.ops.aten.linear.default
    }


@pytest.mark.slow
def test_a_layer_compiled_under_autocast_equals_the_eager_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = ATConv(16), torch.randn(2, 4, 5, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = layer(x), compiled(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y - expected).float().norm() < 0.02 * expected.float().norm()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_weight_of_another_kind_gets_the_product_of_a_linear(compiled):
    class Quantised(torch.Tensor):
        """Knows no product but that of a linear, as quantised weights do."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            unknown = ("mul", "__mul__", "__getitem__", "expand", "matmul", "__matmul__", "__rmatmul__")
            if function in (torch.mul, torch.matmul, *(getattr(torch.Tensor, name) for name in unknown)):
                raise NotImplementedError(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    torch._dynamo.reset()
    linear, x = TapLinear(9, 9), torch.randn(2, 6, 9)
    expected = linear(x)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert type(linear.weight) is not torch.nn.Parameter
    function = torch.compile(linear, backend="eager", fullgraph=True) if compiled else linear
    torch.testing.assert_close(function(x).as_subclass(torch.Tensor), expected)


# ---- volumes


def drawn(**options) -> ATConv:
    torch.manual_seed(0)
    layer = ATConv(6, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def passed(layer, x, v, sizes):
    """One pass by the paper's order: x makes the kernels of a part of a layer, v is convolved."""
    pooled = reference.pool_tokens(layer.kernel_proj(x), sizes, layer.pool)
    kernels = layer.kernel_gen(layer.activation(pooled).transpose(1, 2)).transpose(1, 2)
    kernels = reference.inhibit(kernels, layer.difference_control.sigmoid())
    return reference.dynamic_depthwise_conv(v, kernels, sizes)


@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_a_volume_is_convolved_in_one_pass_or_in_two(pool):
    x = torch.randn(2, 4, 5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full, factored = drawn(pool=pool, volume="full"), drawn(pool=pool, volume="factored")
    expected = full.proj(passed(full, x, full.x_proj(x), (3, 3, 3)))
    torch.testing.assert_close(full(x), expected, rtol=1e-12, atol=1e-12)
    in_space = passed(factored, x, factored.x_proj(x), (1, 3, 3))
    expected = factored.proj(passed(factored.time, x, in_space, (3, 1, 1)))
    torch.testing.assert_close(factored(x), expected, rtol=1e-12, atol=1e-12)
    tokens = factored(x.flatten(1, 3), grid=(4, 5, 3))
    torch.testing.assert_close(tokens, expected.flatten(1, 3), rtol=1e-12, atol=1e-12)


def test_the_names_of_a_grids_layer_are_those_of_the_space_of_a_volumes():
    grid, full, factored = (ATConv(4, volume=volume).state_dict() for volume in (None, "full", "factored"))
    assert list(full) == list(grid)
    time = {name for name in factored if name.startswith("time.")}
    assert list(grid) == [name for name in factored if name not in time]
    assert time == {f"time.{name}" for name in grid if not name.startswith(("x_proj", "proj"))}
    assert all(factored[name].shape == value.shape for name, value in grid.items())
    assert full["kernel_gen.weight"].shape == (27, 27)
    assert factored["time.kernel_gen.weight"].shape == (3, 3)
    assert factored["time.difference_control"].eq(0).all()
    assert factored["time.kernel_gen.bias"].eq(0).all()


@pytest.mark.parametrize("volume", ["full", *slowly(["factored"])])
def test_a_layer_of_volumes_compiles_traces_and_keeps_static_kernels(volume):
    torch._dynamo.reset()
    layer, x = ATConv(4, kernel_size=3, volume=volume, routing="static", pool="grid"), torch.randn(2, 2, 3, 4, 4)
    y = layer(x)
    assert y.shape == x.shape
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x))
    if volume == "factored":
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)


def test_what_is_no_volume_is_refused():
    layer = ATConv(4, volume="full")
    for shape, grid, says in [
        ((2, 4, 5, 4), None, r"give \(B, T, H, W, C\), or \(B, N, C\) with grid=\(T, H, W\)"),
        ((2, 20, 4), (4, 5), r"give \(B, T, H, W, C\)"),
        ((2, 4, 2, 3, 5), None, r"give \(B, T, H, W, 4\).*x\.permute\(0, 2, 3, 4, 1\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            layer(torch.zeros(shape), grid)
    for options, says in [({"volume": "ful"}, "did you mean 'full'"), ({"volume": "full", "kernel_size": 4}, "an odd")]:
        with pytest.raises(ValueError, match=says):
            ATConv(4, **options)
