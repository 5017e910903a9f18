"""Adaptive average pooling of tokens in one pass forward and one pass backward; shapes as in `reference`.

torch's own adaptive pooling reads token layout well and has a slow gradient; a mean over slices is the reverse. The
pooling is linear, so its gradient is its transpose, written out here, and the gradient of that is the pooling.
"""

import torch
import torch.nn.functional as F

from sit_atconv.ops.atconv import reference
from sit_atconv.ops.forward_mode import forward_mode


def _pool(x: torch.Tensor, grid: tuple[int, int], k: int, pool: str) -> torch.Tensor:
    image = x.transpose(1, 2)  # a channels-last view, which the pooling reads as it lies
    if pool == "raster":
        return F.adaptive_avg_pool2d(image.unsqueeze(2), (1, k * k)).flatten(2).transpose(1, 2).contiguous()
    return F.adaptive_avg_pool2d(image.unflatten(2, grid), k).flatten(2).transpose(1, 2).contiguous()


def _spread(g: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """The transpose of pooling `size` positions into the bins of `dim`: a position sums g / length over its bins."""
    count = g.shape[dim]
    bins, positions = torch.arange(count + 1, device=g.device), torch.arange(size, device=g.device)
    starts = bins * size // count
    lengths = -(-bins[1:] * size // count) - starts[:-1]
    share = g / lengths.reshape([-1 if d == dim else 1 for d in range(g.ndim)])
    spread = share.index_select(dim, ((positions + 1) * count - 1) // size)  # the last bin that holds the position
    # Neighbouring bins share the position that an uneven cut falls into.
    uneven = (bins[1:-1] * size % count != 0).reshape([-1 if d == dim else 1 for d in range(g.ndim)])
    return spread.index_add(dim, starts[1:-1], share.narrow(dim, 0, count - 1) * uneven)


def _unpool(g: torch.Tensor, grid: tuple[int, int], k: int, pool: str) -> torch.Tensor:
    if pool == "raster":
        return _spread(g, 1, grid[0] * grid[1])
    return _spread(_spread(g.unflatten(1, (k, k)), 1, grid[0]), 2, grid[1]).flatten(1, 2)


class _Pool(torch.autograd.Function):
    """The pooling, or with `transposed` its transpose: each is the gradient of the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid, k, pool, transposed):
        return (_unpool if transposed else _pool)(x, grid, k, pool)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.settings, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, upstream):
        return _differentiable(upstream, *ctx.settings, not ctx.transposed), None, None, None, None


def _differentiable(x: torch.Tensor, grid: tuple[int, int], k: int, pool: str, transposed: bool) -> torch.Tensor:
    """The pooling or its transpose; by plain torch calls where the function is of no use: without a gradient, in
    forward mode, which they have, and for torch.jit.trace, which cannot save a function of Python's."""
    if forward_mode() or torch.jit.is_tracing() or not (x.requires_grad and torch.is_grad_enabled()):
        return (_unpool if transposed else _pool)(x, grid, k, pool)
    return _Pool.apply(x, grid, k, pool, transposed)


def pool_tokens(x: torch.Tensor, grid: tuple[int, int], kernel_size: int, pool: str) -> torch.Tensor:
    """x (B, N, C) -> (B, K, C), contiguous. Under torch.compile the means of the oracle, which Inductor fuses."""
    if torch.compiler.is_compiling():
        return reference.pool_tokens(x, grid, kernel_size, pool)
    return _differentiable(x, grid, kernel_size, pool, False)
