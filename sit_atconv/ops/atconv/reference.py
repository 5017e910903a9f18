"""The readable oracle: every function as its equation (arXiv 2510.20092), in the dtype of its input, fp64 included.

Names: B batch, H, W or T, H, W the grid, C channels, k kernel size, K = k * k or k * k * k taps.

A kernel size is an odd number, that of the square or the cube, or a tuple with an odd number for each dimension of the
grid: (1, 3, 3) lies in space, (3, 1, 1) in time. Taps are numbered in raster order, the last dimension fastest.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": F.gelu, "silu": F.silu}
INHIBITIONS = ("learned", "full", "none")


def sides(kernel_size: int | Sequence[int] | None, dims: int, taps: int = 0) -> tuple[int, ...]:
    """The kernel's size in each of `dims` dimensions; of None, that of the square or the cube of so many taps."""
    if kernel_size is None:
        kernel_size = math.isqrt(taps) if dims == 2 else round(int(taps) ** (1 / dims))
    return (kernel_size,) * dims if isinstance(kernel_size, int) else tuple(kernel_size)


def pool_tokens(x: torch.Tensor, kernel_size: int | Sequence[int], pool: str) -> torch.Tensor:
    """x (B, H, W, C) or (B, T, H, W, C) -> (B, K, C), means over K bins.

    raster: bin i holds the tokens [floor(i N / K), ceil((i + 1) N / K)) of the N = H W of the flattened grid. In a
    volume the dimensions where the kernel has size 1 are averaged over before, and the others flattened.
    grid: bin (i, j) holds the rows [floor(i H / k), ceil((i + 1) H / k)) and the columns likewise; so for frames.
    """
    sizes = sides(kernel_size, x.ndim - 2)

    def means(x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
        edges = [(i * x.shape[dim] // count, -(-(i + 1) * x.shape[dim] // count)) for i in range(count)]
        return torch.stack([x.narrow(dim, start, stop - start).mean(dim) for start, stop in edges], dim)

    if pool == "raster":
        if len(sizes) == 3 and 1 in sizes:
            x = x.mean([dim for dim, size in enumerate(sizes, 1) if size == 1], keepdim=True)
        return means(x.flatten(1, -2), 1, math.prod(sizes))
    for dim, size in enumerate(sizes, 1):
        x = means(x, dim, size)
    return x.flatten(1, -2)


def inhibit(kernels: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Lateral inhibition: K2 = K1 - factor * mean over the taps of K1; kernels (B, K, C), factor (C,) or a number."""
    return kernels - factor * kernels.mean(1, keepdim=True)


def tap_kernels(
    p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, control: torch.Tensor | None,
    activation: str, inhibition: str,
) -> torch.Tensor:  # fmt: skip
    """Kernels out of tokens that are pooled and projected: K1[s] = sum_t weight[s, t] act(p[t]) + bias[s], inhibited.

    p (B, K, C), weight (K, K), bias (K), control (C) -> (B, K, C). activation: a key of ACTIVATIONS. inhibition:
    "learned" subtracts sigmoid(control) of the mean over the taps, "full" the whole of it, "none" nothing.
    """
    kernels = weight @ ACTIVATIONS[activation](p)
    if bias is not None:
        kernels = kernels + bias[:, None]
    return {
        "learned": lambda: inhibit(kernels, control.sigmoid()),
        "full": lambda: inhibit(kernels, 1.0),
        "none": lambda: kernels,
    }[inhibition]()


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, kernel_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c], zero padding.

    v (B, H, W, C), kernels (B, K, C) -> y (B, H, W, C); of a volume v (B, T, H, W, C), with frames likewise.
    kernel_size: of None, the square or the cube that K is.
    """
    y, spread = torch.zeros_like(v), (None,) * (v.ndim - 2)
    for tap, shifted in enumerate(shifts(v, sides(kernel_size, v.ndim - 2, kernels.shape[1]))):
        y = y + kernels[:, tap, *spread] * shifted
    return y


def shifts(v: torch.Tensor, kernel_size: int | Sequence[int]) -> list[torch.Tensor]:
    """What each tap sees: v[b, h + i - k // 2, w + j - k // 2, c], zero outside; K of the shape of v."""
    grid = v.shape[1:-1]
    sizes = sides(kernel_size, len(grid))
    padded = F.pad(v, (0, 0, *(k // 2 for k in reversed(sizes) for _ in range(2))))
    starts = itertools.product(*map(range, sizes))
    return [padded[:, *(slice(i, i + n) for i, n in zip(start, grid, strict=True))] for start in starts]
