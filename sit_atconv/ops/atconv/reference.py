"""The readable oracle: every function as its equation (arXiv 2510.20092), in the dtype of its input, fp64 included.

Names: B batch, N = H * W tokens in raster order, C channels, k kernel size, K = k * k taps.
"""

import math

import torch
import torch.nn.functional as F


def pool_tokens(x: torch.Tensor, grid: tuple[int, int], kernel_size: int, pool: str) -> torch.Tensor:
    """x (B, N, C) -> (B, K, C), means over K bins.

    raster: bin i holds the tokens [floor(i N / K), ceil((i + 1) N / K)) of the flattened grid.
    grid: bin (i, j) holds the rows [floor(i H / k), ceil((i + 1) H / k)) and the columns likewise.
    """

    def means(x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
        edges = [(i * x.shape[dim] // count, -(-(i + 1) * x.shape[dim] // count)) for i in range(count)]
        return torch.stack([x.narrow(dim, start, stop - start).mean(dim) for start, stop in edges], dim)

    if pool == "raster":
        return means(x, 1, kernel_size**2)
    return means(means(x.unflatten(1, grid), 1, kernel_size), 2, kernel_size).flatten(1, 2)


def inhibit(kernels: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Lateral inhibition: K2 = K1 - factor * mean over the taps of K1; kernels (B, K, C), factor (C,) or a number."""
    return kernels - factor * kernels.mean(1, keepdim=True)


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c], zero padding.

    v (B, N, C), kernels (B, K, C) -> y (B, N, C).
    """
    y = torch.zeros_like(v.unflatten(1, grid))
    for tap, shifted in enumerate(shifts(v, grid, math.isqrt(kernels.shape[1]))):
        y = y + kernels[:, tap, None, None, :] * shifted
    return y.flatten(1, 2)


def shifts(v: torch.Tensor, grid: tuple[int, int], k: int) -> list[torch.Tensor]:
    """What each tap sees: v[b, h + i - k // 2, w + j - k // 2, c], zero outside; k * k of (B, H, W, C)."""
    height, width = grid
    padded = F.pad(v.unflatten(1, grid), (0, 0, k // 2, k // 2, k // 2, k // 2))
    return [padded[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
