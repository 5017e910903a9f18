"""The operator with plain torch calls: no transpose, each block of rows finished while it is in cache.

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


def _blocks(v: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut (B, H, W, C) into (samples, rows) of about BLOCK_BYTES in the dtype that is summed in; uncut off a CPU."""
    batch, height, width, channels = v.shape
    if v.device.type != "cpu":
        yield slice(0, batch), slice(0, height)
        return
    row_bytes = width * channels * sum_dtype(v).itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    samples = max(1, rows // height)
    for b in range(0, batch, samples):
        for h in range(0, height, rows):
            yield slice(b, min(b + samples, batch)), slice(h, min(h + rows, height))


def sum_dtype(v: torch.Tensor) -> torch.dtype:
    """What sums over the taps are kept in: fp32, fp64 for fp64."""
    return torch.promote_types(v.dtype, torch.float32)


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


def _halo(rows: slice, height: int, k: int) -> slice:
    return slice(max(0, rows.start - k // 2), min(height, rows.stop + k // 2))


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """v (B, H, W, C), kernels (B, K, C) -> (B, H, W, C), contiguous."""
    return _convolve(v, kernels, flip=False)


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, H, W, C), kernels (B, K, C) -> (B, H, W, C)."""
    return _convolve(grad_y, kernels, flip=True)


def _convolve(v: torch.Tensor, kernels: torch.Tensor, flip: bool) -> torch.Tensor:
    k, dtype, grid = math.isqrt(kernels.shape[1]), sum_dtype(v), tuple(v.shape[1:3])
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kernels = (kernels.flip(1) if flip else kernels).to(dtype).contiguous()[:, :, None, None]
    for samples, rows in _blocks(v):
        block = v[samples, _halo(rows, grid[0], k)].to(dtype)
        out = y[samples, rows]
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


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    dtype, grid = sum_dtype(v), tuple(v.shape[1:3])
    total = torch.zeros(v.shape[0], kernel_size**2, v.shape[3], dtype=dtype, device=v.device)
    scratch = None
    for samples, rows in _blocks(v):
        block = v[samples, _halo(rows, grid[0], kernel_size)].to(dtype)
        above = grad_y[samples, rows].to(dtype)
        if scratch is None:
            scratch = torch.empty(above.numel(), dtype=dtype, device=v.device)
        for tap, here, there in _taps(rows.start, rows.stop, grid, kernel_size):
            factor = above[here]
            product = torch.mul(factor, block[there], out=scratch[: factor.numel()].view(factor.shape))
            total[samples, tap] += product.sum((1, 2))
    return total.to(v.dtype)
