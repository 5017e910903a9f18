"""The operator as it was published: one convolution of all samples and channels, a group for each."""

import torch
import torch.nn.functional as F


def grouped_convolution(v: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """v (B, C, H, W), kernels (B, C, k * k) -> y (B, C, H, W); zero outside. In the dtype of v.

    Plain torch: TorchScript takes it, and baselines are measured by it.
    """
    batch, channels, height, width = v.shape
    k = int(kernels.shape[2] ** 0.5)
    weight = kernels.to(v.dtype).reshape(batch * channels, 1, k, k)
    y = F.conv2d(v.reshape(1, batch * channels, height, width), weight, padding=k // 2, groups=batch * channels)
    return y.reshape(batch, channels, height, width)
