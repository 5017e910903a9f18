"""The operator as torch's grouped convolution, in (1, B * C, H, W); shapes as in `reference`."""

import math

import torch
import torch.nn.functional as F


def _image(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, C) -> (1, B * C, H, W)."""
    return tokens.transpose(1, 2).reshape(1, -1, *grid)


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """v (B, N, C), kernels (B, K, C) -> (B, N, C), contiguous."""
    (batch, _, channels), k = v.shape, math.isqrt(kernels.shape[1])
    weight = kernels.transpose(1, 2).reshape(batch * channels, 1, k, k)
    with torch.autocast(v.device.type, enabled=False):  # the result has the dtype of v there too
        y = F.conv2d(_image(v, grid), weight, padding=k // 2, groups=batch * channels)
    return y.reshape(batch, channels, -1).transpose(1, 2).contiguous()


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, N, C), kernels (B, K, C) -> (B, N, C), contiguous."""
    return dynamic_depthwise_conv(grad_y, kernels.flip(1), grid)


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, grid: tuple[int, int], kernel_size: int) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    batch, _, channels = v.shape
    gradient = torch.nn.grad.conv2d_weight(
        _image(v, grid),
        (batch * channels, 1, kernel_size, kernel_size),
        _image(grad_y, grid),
        padding=kernel_size // 2,
        groups=batch * channels,
    )
    return gradient.reshape(batch, channels, -1).transpose(1, 2).contiguous()
