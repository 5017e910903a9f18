"""ATConv on maps: against the layer on tokens, with strides and other channels."""

import pytest
import torch

import sit_atconv
from sit_atconv import ATConv, ATConv2d


def drawn(*sizes, **options) -> ATConv2d:
    torch.manual_seed(0)
    layer = ATConv2d(*sizes, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "activation": "silu", "pool": "grid"}], ids=str)
def test_it_is_the_layer_on_tokens(options):
    layer = drawn(6, 6, **options)
    tokens = ATConv(6, **{"activation": "gelu"} | options).double()
    tokens.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("size", [(5, 7), (6, 4), (1, 2)])
def test_a_stride_keeps_every_so_many_positions_with_gradients(stride, size):
    layer, plain = drawn(4, 6, stride=stride), drawn(4, 6)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (layer(x), plain(x)[..., ::stride, ::stride]):
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert results[0][0].shape == torch.nn.Conv2d(4, 6, 3, stride, padding=1, dtype=torch.float64)(x).shape
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "activation": "gelu_tanh", "bias": False}], ids=str)
def test_a_script_and_pointwise_weights_give_the_same(options):
    layer, x = drawn(4, 6, **options), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    pointwise = {
        name: each[:, :, None, None] if "proj.weight" in name else each for name, each in layer.state_dict().items()
    }
    other = ATConv2d(4, 6, **options).double()
    other.load_state_dict(pointwise)
    assert torch.equal(other(x), layer(x))


def test_its_maps_have_the_sizes_that_it_was_given():
    layer = ATConv2d(4, 6, kernel_size=5, bias=False)
    assert {name: tuple(each.shape) for name, each in layer.state_dict().items()} == {
        "difference_control": (4,), "kernel_proj.weight": (4, 4), "kernel_gen.weight": (25, 25),
        "x_proj.weight": (4, 4), "proj.weight": (6, 4),
    }  # fmt: skip
    torch.manual_seed(0)
    ours = ATConv2d(6, 6).state_dict()
    torch.manual_seed(0)
    torch.testing.assert_close(ours, ATConv(6).state_dict(), rtol=0, atol=0)
    assert "ATConv2d" in sit_atconv.__all__


def test_what_does_not_fit_is_named():
    for stride in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=f"stride={stride!r}: give a whole number"):
            ATConv2d(4, 4, stride=stride)
    for shape in ((2, 5, 6, 4), (4, 5, 6)):
        with pytest.raises(ValueError, match=r"an ATConv2d of in_channels=4: give \(B, 4, H, W\)"):
            ATConv2d(4, 4)(torch.zeros(shape))
