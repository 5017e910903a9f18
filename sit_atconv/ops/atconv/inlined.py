"""The operator in plain torch calls for torch.compile, which makes loops of its own of them; shapes as in `reference`.

Inductor sees nothing of a custom operator, and fuses these: one loop for the output and one for each gradient; within a
loop it keeps bf16 and fp16 values in fp32. As with all that is compiled, there are no gradients of gradients.
"""

from collections.abc import Sequence

import torch

from sit_atconv.ops.atconv import reference
from sit_atconv.ops.atconv.native import sum_dtype
from sit_atconv.ops.forward_mode import forward_mode


def _store(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, which Inductor now stores: a view by strides needs memory. Else each use works them out anew."""
    tensor = tensor.contiguous()
    return tensor.as_strided(tensor.shape, tensor.stride())


def _convolve(v: torch.Tensor, kernels: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The oracle, summed in fp32 at least: v (B, *grid, C), kernels (B, K, C) -> (B, *grid, C).

    Each tap is cast: of the oracle on tokens that are cast before, Inductor's loop took 4.1 ms where this takes 2.5
    (bf16, 64x64, C = 1152, 2 Xeon cores).
    """
    dtype, spread = sum_dtype(v), (None,) * len(sizes)
    shifts = reference.shifts(v, sizes)
    y = sum(kernels[:, tap, *spread].to(dtype) * shifted.to(dtype) for tap, shifted in enumerate(shifts))
    return y.to(v.dtype)


class _Convolution(torch.autograd.Function):
    """Left to itself, autograd differentiates padding and slices one by one, and Inductor keeps them apart.

    Measured on 2 EPYC cores, C = 1152, backward in ms, this way / that way: 0.8 / 3.0 at 16x16 batch 4 and 7.4 / 10.7
    at 64x64 in fp32, 3.9 / 9.5 at 64x64 in bf16. Every token reads all kernels, so the forward stores them in fp32:
    0.75, 0.90 and 3.0 ms in bf16 at 16x16 batch 4, 32x32 and 64x64 on 2 Xeon cores became 0.60, 0.77 and 2.6. The
    backward reads them as they were saved: storing them anew took a fifth longer at 32x32 and 64x64. The tokens are
    stored lest a bias that is still to be added is added for every tap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v, kernels, sizes):
        return _convolve(_store(v), _store(kernels.to(sum_dtype(v))), sizes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.sizes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, upstream):
        v, kernels = ctx.saved_tensors
        return _convolve(upstream, kernels.flip(1), ctx.sizes), _grad_kernels(v, upstream, ctx.sizes), None


def _grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C).

    Summed over rows first: one running sum over all tokens is less exact (fp32, 64x64: 5e-4 instead of 8e-5).
    """
    dtype = sum_dtype(v)
    upstream = grad_y.to(dtype)
    rows = [(upstream * shifted.to(dtype)).sum(-2) for shifted in reference.shifts(v, sizes)]
    return torch.stack(rows, 1).flatten(2, -2).sum(2).to(v.dtype)


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """v (B, *grid, C), kernels (B, K, C) -> (B, *grid, C)."""
    sizes = reference.sides(kernel_size, v.ndim - 2, kernels.shape[1])
    if forward_mode():  # torch.compile takes no autograd.Function that has a forward rule; plain calls have their own
        return _Convolution.forward(v, kernels, sizes)
    return _Convolution.apply(v, kernels, sizes)
