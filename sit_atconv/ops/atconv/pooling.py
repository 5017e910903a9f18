"""Adaptive average pooling of tokens in one pass forward and one pass backward; shapes as in `reference`.

A volume is pooled as grids are: all of it as one raster, or its frames, and then what is left of each along time.

The pooling is linear, so its gradient is its transpose, and the gradient of that is the pooling. Where the convolution
runs on Triton, both are torch operators with Triton kernels. Elsewhere they are torch calls: torch's own adaptive
pooling reads channels-last layout well on a CPU and has a slow gradient; a mean over slices is the reverse.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sit_atconv.ops.atconv import reference
from sit_atconv.ops.atconv.operator import choose_backend
from sit_atconv.ops.forward_mode import forward_mode
from sit_atconv.ops.operators import define, multilinear, sees_tangents


def _pool(x: torch.Tensor, size: tuple[int, int], pool: str) -> torch.Tensor:
    if pool == "raster":  # one row; flattened before it is an image: of a batch of one, an image loses its layout
        x, size = x.flatten(1, 2).unsqueeze(1), (1, math.prod(size))
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


def _unpool(g: torch.Tensor, grid: tuple[int, int], size: tuple[int, int], pool: str) -> torch.Tensor:
    """(B, K, C) -> (B, H, W, C)."""
    if pool == "raster":
        return _spread(g, 1, grid[0] * grid[1]).unflatten(1, grid)
    return _spread(_spread(g.unflatten(1, size), 1, grid[0]), 2, grid[1])


def _apply(x: torch.Tensor, size: tuple[int, int], pool: str, grid: tuple[int, int] | None) -> torch.Tensor:
    """The pooling, or with the grid to spread over, its transpose."""
    return _pool(x, size, pool) if grid is None else _unpool(x, grid, size, pool)


class _Pool(torch.autograd.Function):
    """`_apply`: pooling and transpose are the gradient of one another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, size, pool, grid):
        return _apply(x, size, pool, grid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.settings, grid = inputs
        ctx.spread_over = tuple(x.shape[1:3]) if grid is None else None

    @staticmethod
    def backward(ctx, upstream):
        return _differentiable(upstream, *ctx.settings, ctx.spread_over), None, None, None


def _differentiable(
    x: torch.Tensor, size: tuple[int, int], pool: str, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """`_apply`; by plain torch calls where the function is of no use: without a gradient, in forward mode, which they
    have, and for torch.jit.trace, which cannot save a function of Python's."""
    if forward_mode() or torch.jit.is_tracing() or not (x.requires_grad and torch.is_grad_enabled()):
        return _apply(x, size, pool, grid)
    return _Pool.apply(x, size, pool, grid)


def _pool_on_triton(x: torch.Tensor, kernel_size: Sequence[int], pool: str) -> torch.Tensor:
    from sit_atconv.ops.atconv import triton_pooling  # here, since triton exists on few platforms

    return triton_pooling.pool_tokens(x, kernel_size, pool)


def _spread_on_triton(g: torch.Tensor, height: int, width: int, kernel_size: Sequence[int], pool: str) -> torch.Tensor:
    from sit_atconv.ops.atconv import triton_pooling

    return triton_pooling.spread_tokens(g, height, width, kernel_size, pool)


def _fake_pool(x, kernel_size, pool):
    return torch.empty((x.shape[0], math.prod(kernel_size), x.shape[-1]), dtype=x.dtype, device=x.device)


def _fake_spread(g, height, width, kernel_size, pool):
    return torch.empty((g.shape[0], height, width, g.shape[-1]), dtype=g.dtype, device=g.device)


def _gradient_of_pool(upstream, needed, tensors, shapes, settings):
    return (spread_operator(upstream, *shapes[0][1:3], *settings),)


def _gradient_of_spread(upstream, needed, tensors, shapes, settings):
    return (pool_operator(upstream, *settings[2:]),)


pool_operator = define("pool_tokens", _pool_on_triton, _fake_pool, multilinear(1, _gradient_of_pool))
spread_operator = define("spread_tokens", _spread_on_triton, _fake_spread, multilinear(1, _gradient_of_spread))


def pool_tokens(x: torch.Tensor, sizes: tuple[int, ...], pool: str) -> torch.Tensor:
    """x (B, *grid, C) -> (B, K, C), contiguous: on Triton where `choose_backend` says so, else by torch.

    Torch's form under torch.compile is the means of the oracle, which Inductor fuses.
    """
    if choose_backend(x, kernel_size=max(sizes)) == "triton" and sees_tangents() and not torch.jit.is_tracing():
        pool_grid = pool_operator
    elif torch.compiler.is_compiling():
        return reference.pool_tokens(x, sizes, pool)
    else:
        pool_grid = _differentiable
    if len(sizes) == 2:
        return pool_grid(x, sizes, pool)
    depth, across = sizes[0], sizes[1] * sizes[2]
    if pool == "raster":
        if 1 in sizes:
            x = x.mean([dim for dim, size in enumerate(sizes, 1) if size == 1], keepdim=True)
        return pool_grid(x.flatten(1, 2), (depth, across), pool)
    frames = pool_grid(x.flatten(0, 1), sizes[1:], pool)
    return pool_grid(frames.unflatten(0, x.shape[:2]), (depth, across), pool)
