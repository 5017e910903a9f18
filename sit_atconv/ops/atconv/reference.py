"""The readable oracle: every function as its equation (arXiv 2510.20092), in the dtype of its input, fp64 included.

Names: B batch, H, W the grid, C channels, k kernel size, K = k * k taps.
"""

import math

import torch
import torch.nn.functional as F


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": F.gelu, "silu": F.silu}
INHIBITIONS = ("learned", "full", "none")


def pool_tokens(x: torch.Tensor, kernel_size: int, pool: str) -> torch.Tensor:
    """x (B, H, W, C) -> (B, K, C), means over K bins.

    raster: bin i holds the tokens [floor(i N / K), ceil((i + 1) N / K)) of the N = H W of the flattened grid.
    grid: bin (i, j) holds the rows [floor(i H / k), ceil((i + 1) H / k)) and the columns likewise.
    """

    def means(x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
        edges = [(i * x.shape[dim] // count, -(-(i + 1) * x.shape[dim] // count)) for i in range(count)]
        return torch.stack([x.narrow(dim, start, stop - start).mean(dim) for start, stop in edges], dim)

    if pool == "raster":
        return means(x.flatten(1, 2), 1, kernel_size**2)
    return means(means(x, 1, kernel_size), 2, kernel_size).flatten(1, 2)


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


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c], zero padding.

    v (B, H, W, C), kernels (B, K, C) -> y (B, H, W, C).
    """
    y = torch.zeros_like(v)
    for tap, shifted in enumerate(shifts(v, math.isqrt(kernels.shape[1]))):
        y = y + kernels[:, tap, None, None, :] * shifted
    return y


def shifts(v: torch.Tensor, k: int) -> list[torch.Tensor]:
    """What each tap sees: v[b, h + i - k // 2, w + j - k // 2, c], zero outside; k * k of (B, H, W, C)."""
    height, width = v.shape[1:3]
    padded = F.pad(v, (0, 0, k // 2, k // 2, k // 2, k // 2))
    return [padded[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
