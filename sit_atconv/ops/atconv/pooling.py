"""Adaptive average pooling of tokens in one pass forward and one pass backward; shapes as in `reference`.

torch's own adaptive pooling reads channels-last layout well and has a slow gradient; a mean over slices is the
reverse. The pooling is linear, so its gradient is its transpose, written out here, and the gradient of that is the
pooling.
"""

import torch
import torch.nn.functional as F

from sit_atconv.ops.atconv import reference
from sit_atconv.ops.forward_mode import forward_mode


def _pool(x: torch.Tensor, k: int, pool: str) -> torch.Tensor:
    if pool == "raster":  # one row; flattened before it is an image: of a batch of one, an image loses its layout
        x, size = x.flatten(1, 2).unsqueeze(1), (1, k * k)
    else:
        size = (k, k)
    image = x.permute(0, 3, 1, 2)  # a channels-last view, which the pooling reads as it lies
    pooled = F.adaptive_avg_pool2d(image, size)
    return pooled.flatten(2).transpose(1, 2).contiguous()


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
    """(B, K, C) -> (B, H, W, C)."""
    if pool == "raster":
        return _spread(g, 1, grid[0] * grid[1]).unflatten(1, grid)
    return _spread(_spread(g.unflatten(1, (k, k)), 1, grid[0]), 2, grid[1])


def _apply(x: torch.Tensor, grid: tuple[int, int] | None, k: int, pool: str) -> torch.Tensor:
    """The pooling, or with the grid to spread over, its transpose."""
    return _pool(x, k, pool) if grid is None else _unpool(x, grid, k, pool)


class _Pool(torch.autograd.Function):
    """`_apply`: pooling and transpose are the gradient of one another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid, k, pool):
        return _apply(x, grid, k, pool)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, grid, *ctx.settings = inputs
        ctx.spread_over = tuple(x.shape[1:3]) if grid is None else None

    @staticmethod
    def backward(ctx, upstream):
        return _differentiable(upstream, ctx.spread_over, *ctx.settings), None, None, None


def _differentiable(x: torch.Tensor, grid: tuple[int, int] | None, k: int, pool: str) -> torch.Tensor:
    """`_apply`; by plain torch calls where the function is of no use: without a gradient, in forward mode, which they
    have, and for torch.jit.trace, which cannot save a function of Python's."""
    if forward_mode() or torch.jit.is_tracing() or not (x.requires_grad and torch.is_grad_enabled()):
        return _apply(x, grid, k, pool)
    return _Pool.apply(x, grid, k, pool)


def pool_tokens(x: torch.Tensor, kernel_size: int, pool: str) -> torch.Tensor:
    """x (B, H, W, C) -> (B, K, C), contiguous. Under torch.compile the means of the oracle, which Inductor fuses."""
    if torch.compiler.is_compiling():
        return reference.pool_tokens(x, kernel_size, pool)
    return _differentiable(x, None, kernel_size, pool)
