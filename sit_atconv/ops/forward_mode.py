"""Forward-mode derivatives (`torch.func.jvp` and what is made of it, dual tensors): whether they are being taken, and
plain forms of torch's functions that lack them or have wrong ones.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from sit_atconv.runtime.compat.torch import in_dual_level, in_transform


@torch.compiler.assume_constant_result  # torch.compile guards the level itself
def forward_mode() -> bool:
    """Whether tensors may carry tangents here; true for every thread while it is so for one."""
    return in_dual_level()


@torch.compiler.assume_constant_result
def levels() -> bool:
    """Whether a transform of torch.func is at work here: `grad`, `vjp`, `jvp` or `vmap`."""
    return in_transform()


def exact_derivatives() -> AbstractContextManager:
    """A context in which, in forward mode, modules run on plain torch calls where torch's own functions fail.

    Its fused attention has no forward mode. Its layer norm, and its batch norm in training, have one that takes the
    statistics for constants when the tangents are differentiated again. Outside forward mode nothing changes.
    """
    return _PlainForms() if forward_mode() else nullcontext()


class _PlainForms(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _PLAIN.get(function, function)(*args, **(kwargs or {}))


def _standardise(x: torch.Tensor, dims: list[int], eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) over the dimensions, in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


# The arguments have torch's names and defaults.
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    y = _standardise(input, list(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return y
    # That was for the running statistics.
    scale, shift = (each if each is None else each.reshape(-1, *[1] * (input.ndim - 2)) for each in (weight, bias))
    plain = _standardise(input, [dim for dim in range(input.ndim) if dim != 1], eps)
    plain = plain if scale is None else plain * scale
    return (plain if shift is None else plain + shift).to(y.dtype)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (each.to(wide) for each in (query, key, value))
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    # Not torch's softmax: of dual tensors it overwrites what the gradient of its tangent needs.
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = F.dropout(weights / weights.sum(-1, keepdim=True), dropout_p)
    return (weights @ v).to(query.dtype)


_PLAIN = {F.layer_norm: _layer_norm, F.batch_norm: _batch_norm, F.scaled_dot_product_attention: _attention}


def checkpointed(run: Callable, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """run(module, *inputs), where `run` is what torch.utils.checkpoint makes: tangents are inputs and outputs too.

    The recomputation comes when the level of the tangents is gone, so it opens one of its own.
    """
    if not forward_mode():
        return run(module, *inputs)
    primals, tangents = zip(*(forward_ad.unpack_dual(each) for each in inputs), strict=True)
    if all(each is None for each in tangents):
        return run(module, *inputs)
    tangents = [torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
    transform = levels()

    def pushed_forward(*arguments):
        arguments = arguments[: len(inputs)], arguments[len(inputs) :]
        if transform:
            return torch.func.jvp(module, *arguments)
        with nullcontext() if forward_mode() else forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(module(*map(forward_ad.make_dual, *arguments))))

    return forward_ad.make_dual(*run(pushed_forward, *primals, *tangents))
