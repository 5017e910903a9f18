"""References for forward-mode derivatives."""

import torch
from torch.func import jvp

from sit_atconv.ops import forward_mode


def differences(f, x, dx, step=1e-5):
    """The derivative of f at the tensors x along dx, by central differences."""
    with torch.no_grad():
        ends = [f(*(a + sign * step * b for a, b in zip(x, dx, strict=True))) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def assert_tangent(f, x, dx, tolerance=1e-6, step=1e-5):
    """torch.func.jvp against central differences, relative to the largest value."""
    x, dx = tuple(x), tuple(dx)
    expected = differences(f, x, dx, step)
    assert expected.abs().max() > 0
    torch.testing.assert_close(jvp(f, x, dx)[1], expected, rtol=0, atol=tolerance * expected.abs().max().item())


def gradient(value, parameters):
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in gradients])


def reverse_over_forward(f, x, dx, parameters):
    """The gradient of |df(x; dx)|^2 by the parameters, from the graph of a jvp."""
    return gradient(jvp(f, (x,), (dx,))[1].square().sum(), parameters)


def double_backward(f, x, dx, parameters):
    """The same with the tangent from two reverse passes, on plain torch calls: torch's layer norm has no third."""
    with forward_mode._PlainForms():
        x = x.clone().requires_grad_()
        y = f(x)
        upstream = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, upstream, dx, create_graph=True)
        return gradient(tangent.square().sum(), parameters)


def assert_reverse_over_forward(f, x, dx, parameters, tolerance=1e-9, step=1e-5):
    """Against double backward, and along one direction against differences of the tangent."""
    actual = reverse_over_forward(f, x, dx, parameters)
    expected = double_backward(f, x, dx, parameters)
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
    generator = torch.Generator().manual_seed(0)
    steps = [step * torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in parameters]

    def moved(sign):
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.data.add_(sign * step)
        return jvp(f, (x,), (dx,))[1].square().sum().item()

    change = (moved(1) - moved(-2)) / 2
    moved(1)
    along = (actual * torch.cat([step.flatten() for step in steps])).sum().item()
    assert abs(along - change) <= 1e-3 * abs(change), (along, change)
