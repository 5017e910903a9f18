"""The operator through torch's own adaptive pooling and grouped convolution; shapes as in `reference`."""

import math

import torch
import torch.nn.functional as F


def pool_tokens(x: torch.Tensor, grid: tuple[int, int], kernel_size: int, pool: str) -> torch.Tensor:
    """x (B, N, C) -> (B, K, C)."""
    channels_first = x.transpose(1, 2)
    if pool == "raster":
        pooled = F.adaptive_avg_pool1d(channels_first, kernel_size**2)
    else:
        pooled = F.adaptive_avg_pool2d(channels_first.unflatten(2, grid), kernel_size).flatten(2)
    return pooled.transpose(1, 2)


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """v (B, N, C), kernels (B, K, C) -> (B, N, C), as one convolution with B * C groups."""
    (batch, _, channels), k = v.shape, math.isqrt(kernels.shape[1])
    image = v.transpose(1, 2).reshape(1, batch * channels, *grid)
    weight = kernels.transpose(1, 2).reshape(batch * channels, 1, k, k)
    y = F.conv2d(image, weight, padding=k // 2, groups=batch * channels)
    return y.reshape(batch, channels, -1).transpose(1, 2)
