"""The operator against its oracle in fp64, for odd shapes, both pools and two kernel sizes."""

import pytest
import torch

from sit_atconv.ops.atconv import dynamic_depthwise_conv, pool_tokens, reference

SHAPES = [(1, 2, 4, 5), (2, 3, 7, 9), (2, 5, 1, 6), (1, 4, 2, 2), (3, 2, 6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_convolution_equals_the_oracle_with_gradients(shape, k):
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(batch, height * width, channels, dtype=torch.float64, generator=generator)
    kernels = torch.randn(batch, k * k, channels, dtype=torch.float64, generator=generator)
    upstream = torch.randn(v.shape, dtype=torch.float64, generator=generator)
    results = []
    for form in (reference.dynamic_depthwise_conv, dynamic_depthwise_conv):
        leaves = [v.clone().requires_grad_(), kernels.clone().requires_grad_()]
        y = form(*leaves, (height, width))
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_equals_the_oracle(shape, k, pool):
    batch, channels, height, width = shape
    x = torch.randn(batch, height * width, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference.pool_tokens(x, (height, width), k, pool)
    torch.testing.assert_close(pool_tokens(x, (height, width), k, pool), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_the_oracle_in_that_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 63, 6, generator=generator).to(dtype)
    kernels = torch.randn(2, 9, 6, generator=generator).to(dtype)
    exact = reference.dynamic_depthwise_conv(v.double(), kernels.double(), (7, 9))
    own = (reference.dynamic_depthwise_conv(v, kernels, (7, 9)).double() - exact).abs().max()
    fast = (dynamic_depthwise_conv(v, kernels, (7, 9)).double() - exact).abs().max()
    assert fast <= 2 * own + 1e-6


def test_it_is_a_cross_correlation_not_a_flipped_convolution():
    v = torch.zeros(1, 9, 1)
    v[0, 4] = 1
    kernels = torch.arange(9.0).reshape(1, 9, 1)
    y = dynamic_depthwise_conv(v, kernels, (3, 3))
    assert y.flatten().tolist() == list(range(8, -1, -1))


@pytest.mark.parametrize(
    ("v", "kernels", "grid", "says"),
    [
        ((1, 12, 2), (1, 9, 2), (3, 5), "grid of 3 x 5"),
        ((1, 12, 2), (1, 4, 2), (3, 4), "square of an odd size"),
        ((1, 12, 2), (1, 8, 2), (3, 4), "square of an odd size"),
        ((2, 12, 2), (1, 9, 2), (3, 4), "do not fit tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_named(v, kernels, grid, says):
    with pytest.raises(ValueError, match=says):
        dynamic_depthwise_conv(torch.zeros(v), torch.zeros(kernels), grid)
