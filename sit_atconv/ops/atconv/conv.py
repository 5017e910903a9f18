"""The operator as torch's grouped convolution, a call for each sample, since kernels differ; shapes as in `reference`.

(H, W, C) is a channels-last image as it lies, so nothing is transposed, and oneDNN has loops for that layout.
"""

import math

import torch
import torch.nn.functional as F


def _images(v: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C) -> the channels-last view (B, C, H, W)."""
    return v.permute(0, 3, 1, 2)


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """v (B, H, W, C), kernels (B, K, C) -> (B, H, W, C), contiguous."""
    (batch, _, _, channels), k = v.shape, math.isqrt(kernels.shape[1])
    images, weights = _images(v), kernels.transpose(1, 2).reshape(batch, channels, 1, k, k)
    with torch.autocast(v.device.type, enabled=False):  # the result has the dtype of v there too
        samples = [F.conv2d(images[b : b + 1], weights[b], padding=k // 2, groups=channels) for b in range(batch)]
    if batch == 1:
        return samples[0].permute(0, 2, 3, 1).contiguous()
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for target, sample in zip(_images(y), samples, strict=True):
        target.copy_(sample[0])
    return y


def grad_v(grad_y: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The same with tap K - 1 - t in the place of t: grad_y (B, H, W, C), kernels (B, K, C) -> (B, H, W, C)."""
    return dynamic_depthwise_conv(grad_y, kernels.flip(1))


def grad_kernels(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c]: (B, K, C)."""
    (batch, _, _, channels), k = v.shape, kernel_size
    images, upstream = _images(v), _images(grad_y)
    gradient = torch.empty((batch, k * k, channels), dtype=v.dtype, device=v.device)
    for b in range(batch):
        one = torch.nn.grad.conv2d_weight(
            images[b : b + 1], (channels, 1, k, k), upstream[b : b + 1], padding=k // 2, groups=channels
        )
        gradient[b] = one.flatten(1).t()
    return gradient
