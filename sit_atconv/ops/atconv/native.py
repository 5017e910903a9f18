"""The operator in token layout with plain torch calls: no transpose, each block of rows finished while it is in cache.

Shapes as in `reference`. In eager every tap is one in-place multiply-add over a whole block; sums are in fp32 at least.
Under torch.compile `inlined` takes its place.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch

# Measured at C = 1152, fp32, on 2 EPYC cores, ms a pass with 2, 5 and 12 MiB: at 64x64 4.7, 4.2, 5.6 forward and 29,
# 8.8, 15 for the gradient of the kernels; at 32x32, which 5 MiB hold whole, 1.0, 0.7, 0.8 and 7.6, 2.0, 2.0.
BLOCK_BYTES = 5 * 2**20


def _blocks(tokens: torch.Tensor, grid: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N, C) into (samples, rows) of about BLOCK_BYTES in the dtype that is summed in; uncut off a CPU."""
    if tokens.device.type != "cpu":
        yield slice(0, tokens.shape[0]), slice(0, grid[0])
        return
    row_bytes = grid[1] * tokens.shape[2] * sum_dtype(tokens).itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    samples = max(1, rows // grid[0])
    for b in range(0, tokens.shape[0], samples):
        for h in range(0, grid[0], rows):
            yield slice(b, min(b + samples, tokens.shape[0])), slice(h, min(h + rows, grid[0]))


def sum_dtype(tokens: torch.Tensor) -> torch.dtype:
    """What sums over the taps are kept in: fp32, fp64 for fp64."""
    return torch.promote_types(tokens.dtype, torch.float32)


@lru_cache(maxsize=1024)
def _taps(start: int, stop: int, grid: tuple[int, int], k: int) -> tuple[tuple[int, tuple, tuple], ...]:
    """(tap, index into the output rows, index into the source rows): where it meets the grid; the middle tap first.

    For the rows [start, stop) of the output, which count from `start`; rows of the source count from the first row of
    the halo. Cached: working the slices out took a third of the time of a small convolution.
    """
    height, width = grid
    first, taps = max(0, start - k // 2), []
    for tap in sorted(range(k * k), key=lambda tap: tap != k * k // 2):
        i, j = tap // k - k // 2, tap % k - k // 2
        top, bottom = max(start, -i), min(stop, height - i)
        left, right = max(0, -j), min(width, width - j)
        if top < bottom and left < right:
            out = (slice(None), slice(top - start, bottom - start), slice(left, right))
            source = (slice(None), slice(top + i - first, bottom + i - first), slice(left + j, right + j))
            taps.append((tap, out, source))
    return tuple(taps)


def _halo(rows: slice, grid: tuple[int, int], k: int) -> slice:
    return slice(max(0, rows.start - k // 2), min(grid[0], rows.stop + k // 2))


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """v (B, N, C), kernels (B, K, C) -> (B, N, C), contiguous."""
    return _convolve(v, kernels, grid, flip=False)


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, N, C), kernels (B, K, C) -> (B, N, C), contiguous."""
    return _convolve(grad_y, kernels, grid, flip=True)


def _convolve(v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int], flip: bool) -> torch.Tensor:
    k, dtype = math.isqrt(kernels.shape[1]), sum_dtype(v)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    source, target = v.unflatten(1, grid), y.unflatten(1, grid)
    kernels = (kernels.flip(1) if flip else kernels).to(dtype).contiguous()[:, :, None, None]
    for samples, rows in _blocks(v, grid):
        block = source[samples, _halo(rows, grid, k)].to(dtype)
        out = target[samples, rows]
        total = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=v.device)
        weights = kernels[samples].unbind(1)
        for tap, here, there in _taps(rows.start, rows.stop, grid, k):
            if tap == len(weights) // 2:
                torch.mul(block[there], weights[tap], out=total)
            else:
                total[here].addcmul_(block[there], weights[tap])
        if total is not out:
            out.copy_(total)
    return y


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, grid: tuple[int, int], kernel_size: int) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    dtype = sum_dtype(v)
    total = torch.zeros(v.shape[0], kernel_size**2, v.shape[2], dtype=dtype, device=v.device)
    source, upstream = v.unflatten(1, grid), grad_y.unflatten(1, grid)
    scratch = None
    for samples, rows in _blocks(v, grid):
        block = source[samples, _halo(rows, grid, kernel_size)].to(dtype)
        above = upstream[samples, rows].to(dtype)
        if scratch is None:
            scratch = torch.empty(above.numel(), dtype=dtype, device=v.device)
        for tap, here, there in _taps(rows.start, rows.stop, grid, kernel_size):
            factor = above[here]
            product = torch.mul(factor, block[there], out=scratch[: factor.numel()].view(factor.shape))
            total[samples, tap] += product.sum((1, 2))
    return total.to(v.dtype)
