"""The operator with plain torch calls: no transpose, each block of the grid finished while it is in cache.

Shapes as in `reference`. In eager every tap is one in-place multiply-add over a whole block; sums are in fp32 at least.
Under torch.compile `inlined` takes its place.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from sit_atconv.ops.atconv.reference import sides

Box = tuple[tuple[int, int], ...]  # (start, stop) of a block in each dimension of the grid

# Measured at C = 1152, fp32, on 2 EPYC cores, ms a pass with 2, 5 and 12 MiB: at 64x64 4.7, 4.2, 5.6 forward and 29,
# 8.8, 15 for the gradient of the kernels; at 32x32, which 5 MiB hold whole, 1.0, 0.7, 0.8 and 7.6, 2.0, 2.0.
BLOCK_BYTES = 5 * 2**20


def _blocks(v: torch.Tensor) -> Iterator[tuple[slice, Box]]:
    """Cut (B, *grid, C) into (samples, box) of about BLOCK_BYTES in the dtype that is summed in; uncut off a CPU.

    Rows stay whole. Of a volume a block has about as many frames as rows of each, so that its halo is small.
    """
    batch, *outer, height, width, channels = v.shape
    row_bytes = width * channels * sum_dtype(v).itemsize
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    of_a_sample = math.prod(outer) * height
    if batch * of_a_sample <= rows or v.device.type != "cpu":
        yield slice(0, batch), tuple([(0, length) for length in v.shape[1:-1]])
        return
    samples = max(1, rows // of_a_sample)
    frames = [min(length, max(math.isqrt(rows), rows // height)) for length in outer]
    lengths = (*frames, max(1, rows // math.prod(frames)))
    cuts = [[(a, min(a + n, end)) for a in range(0, end, n)] for n, end in zip(lengths, (*outer, height), strict=True)]
    for b in range(0, batch, samples):
        for box in itertools.product(*cuts, [(0, width)]):
            yield slice(b, min(b + samples, batch)), box


def sum_dtype(v: torch.Tensor) -> torch.dtype:
    """What sums over the taps are kept in: fp32, fp64 for fp64."""
    return torch.promote_types(v.dtype, torch.float32)


@lru_cache(maxsize=1024)
def _plan(box: Box, grid: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple, tuple, tuple[tuple, ...]]:
    """Indices of one block: into the grid, those of the box and of its halo; then (tap, index into the box, index into
    the halo) where each tap meets the grid, the middle one first.

    Cached: working the slices out took a third of the time of a small convolution.
    """
    sides = list(zip(box, grid, sizes, strict=True))
    inside = tuple(slice(start, stop) for start, stop in box)
    halo = tuple(slice(max(0, start - k // 2), min(length, stop + k // 2)) for (start, stop), length, k in sides)
    offsets, taps = list(itertools.product(*(range(-(k // 2), k // 2 + 1) for k in sizes))), []
    for tap in sorted(range(len(offsets)), key=lambda tap: tap != len(offsets) // 2):
        meets = [
            (max(start, -offset), min(stop, length - offset))
            for ((start, stop), length, _), offset in zip(sides, offsets[tap], strict=True)
        ]
        if all(first < last for first, last in meets):
            moves = zip(meets, inside, halo, offsets[tap], strict=True)
            here, there = zip(*(
                (slice(a - box.start, b - box.start), slice(a + by - halo.start, b + by - halo.start))
                for (a, b), box, halo, by in moves
            ), strict=True)  # fmt: skip
            taps.append((tap, (slice(None), *here), (slice(None), *there)))
    return inside, halo, tuple(taps)


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """v (B, *grid, C), kernels (B, K, C) -> (B, *grid, C), contiguous."""
    return _convolve(v, kernels, kernel_size, flip=False)


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, *grid, C), kernels (B, K, C) -> (B, *grid, C)."""
    return _convolve(grad_y, kernels, kernel_size, flip=True)


def _convolve(v: torch.Tensor, kernels: torch.Tensor, kernel_size, flip: bool) -> torch.Tensor:
    dtype, grid = sum_dtype(v), tuple(v.shape[1:-1])
    sizes = sides(kernel_size, len(grid), kernels.shape[1])
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kernels = (kernels.flip(1) if flip else kernels).to(dtype).contiguous()[:, :, *(None,) * len(grid)]
    for samples, box in _blocks(v):
        inside, halo, taps = _plan(box, grid, sizes)
        block = v[samples, *halo].to(dtype)
        out = y[samples, *inside]
        total = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=v.device)
        weights = kernels[samples].unbind(1)
        for tap, here, there in taps:
            if tap == len(weights) // 2:
                torch.mul(block[there], weights[tap], out=total)
            else:
                total[here].addcmul_(block[there], weights[tap])
        if total is not out:
            out.copy_(total)
    return y


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int | Sequence[int]) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    dtype, grid = sum_dtype(v), tuple(v.shape[1:-1])
    sizes = sides(kernel_size, len(grid))
    total = torch.zeros(v.shape[0], math.prod(sizes), v.shape[-1], dtype=dtype, device=v.device)
    scratch, positions = None, tuple(range(1, v.ndim - 1))
    for samples, box in _blocks(v):
        inside, halo, taps = _plan(box, grid, sizes)
        block = v[samples, *halo].to(dtype)
        above = grad_y[samples, *inside].to(dtype)
        if scratch is None:
            scratch = torch.empty(above.numel(), dtype=dtype, device=v.device)
        for tap, here, there in taps:
            factor = above[here]
            product = torch.mul(factor, block[there], out=scratch[: factor.numel()].view(factor.shape))
            total[samples, tap] += product.sum(positions)
    return total.to(v.dtype)
