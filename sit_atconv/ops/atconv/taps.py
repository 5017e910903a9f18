"""The kernels of ATConv out of the pooled tokens as one torch operator for CUDA: activation, product over the taps,
bias and inhibition in one launch, its gradient in two.

`reference.tap_kernels` is the oracle, and what gradients of gradients are taken of. Elsewhere, and for whatever this
operator has no rule for, a layer makes its kernels by plain torch calls: `takes` tells.
"""

import os

import torch

from sit_atconv.ops.atconv import reference
from sit_atconv.ops.atconv.operator import TRITON_KERNEL, choose_backend
from sit_atconv.ops.atconv.reference import ACTIVATIONS, INHIBITIONS
from sit_atconv.ops.forward_mode import forward_mode, levels
from sit_atconv.ops.operators import define
from sit_atconv.runtime.compat.torch import is_exporting
from sit_atconv.runtime.errors import check_choice


def _forward(
    p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, control: torch.Tensor | None,
    activation: str, inhibition: str,
) -> torch.Tensor:  # fmt: skip
    from sit_atconv.ops.atconv import triton_taps  # here, since triton exists on few platforms

    return triton_taps.tap_kernels(p, weight, bias, control, activation, inhibition)


def _backward(
    upstream: torch.Tensor, p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    control: torch.Tensor | None, activation: str, inhibition: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of p, weight, bias and control; without values where bias or control is missing."""
    from sit_atconv.ops.atconv import triton_taps

    return tuple(
        p.new_empty(0) if grad is None else grad
        for grad in triton_taps.grads(upstream, p, weight, bias, control, activation, inhibition)
    )


def _fake_forward(p, *_):
    return p.new_empty(p.shape)


def _fake_backward(upstream, p, weight, bias, control, *_):
    return tuple(p.new_empty(0) if each is None else each.new_empty(each.shape) for each in (p, weight, bias, control))


def _forward_flops(p_shape, *_, **__) -> int:
    batch, taps, channels = p_shape
    return 2 * batch * taps * taps * channels


def _backward_flops(upstream_shape, *_, **__) -> int:
    return 2 * _forward_flops(upstream_shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.activation, ctx.inhibition = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, upstream):
    tensors, settings = ctx.saved_tensors, (ctx.activation, ctx.inhibition)
    if torch.is_grad_enabled():  # a gradient may be asked of this one
        grads = _differentiable(upstream, tensors, *settings)
    else:
        grads = backward(upstream, *tensors, *settings)
    return *(None if each is None else grad for each, grad in zip(tensors, grads, strict=True)), None, None


def _differentiable(upstream, tensors, activation: str, inhibition: str) -> list[torch.Tensor | None]:
    """The gradients of those tensors that need one, by plain torch calls in fp32, which are differentiable in turn."""
    with torch.autocast(upstream.device.type, enabled=False):
        # Views: a tensor may be made of another one, whose gradient is not to come through it.
        inputs = [None if each is None else each.view_as(each) for each in tensors]
        kernels = reference.tap_kernels(
            *(None if each is None else each.float() for each in inputs), activation, inhibition
        )
        needed = [each for each in inputs if each is not None and each.requires_grad]
        grads = iter(torch.autograd.grad(kernels, needed, upstream.float(), create_graph=True))
    return [next(grads) if each is not None and each.requires_grad else None for each in inputs]


def _derivatives(library: torch.library.Library, name: str, operator) -> None:
    torch.library.register_autograd(operator, _differentiate, setup_context=_keep, lib=library)


forward = define("tap_kernels", _forward, _fake_forward, _derivatives, _forward_flops)
backward = define("tap_kernels_backward", _backward, _fake_backward, flops=_backward_flops)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(p: torch.Tensor) -> bool:
    """Whether `tap_kernels` runs on p (B, K, C) here: where the convolution runs on Triton, for as many taps as the
    largest square has that it takes, and without transforms of torch.func, tangents and traces, for which plain torch
    calls have rules.
    """
    return (
        (p.is_cuda or _interpreted())
        and not (forward_mode() or levels() or torch.jit.is_tracing() or is_exporting())
        and p.shape[1] <= TRITON_KERNEL**2
        and choose_backend(p) == "triton"
    )


def tap_kernels(
    p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, control: torch.Tensor | None,
    activation: str, inhibition: str,
) -> torch.Tensor:  # fmt: skip
    """The kernels of ATConv: K1[s] = sum_t weight[s, t] act(p[t]) + bias[s], K2 = K1 - factor * mean over taps of K1.

    p (B, K, C), weight (K, K), bias (K) or None, control (C) where inhibition is "learned" -> (B, K, C) in the dtype
    of p, computed in fp32 and rounded once; each tensor in fp32, bf16 or fp16, as autocast mixes them. activation:
    gelu_tanh, gelu or silu. inhibition: the factor is sigmoid(control) ("learned"), 1 ("full") or 0 ("none").
    Differentiable any number of times in reverse mode; `takes` says where it runs at all.
    Raises InputError for an unknown choice, and ValueError for "learned" without a control.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("inhibition", inhibition, INHIBITIONS)
    if (control is not None) != (inhibition == "learned"):
        raise ValueError(f"inhibition={inhibition!r}: give a control (C) for 'learned', and for no other")
    return forward(p, weight, bias, control, activation, inhibition)
