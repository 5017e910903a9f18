"""An oracle for swapped layers, and kernels that depend on what they are made from."""

import torch
import torch.nn.functional as F


def convolved(layer, tokens, values, grid):
    """An oracle: the layer's kernels for the tokens (B, N, dim), on the values (B, N, channels)."""
    kernels = layer.kernels(tokens.unflatten(1, grid))
    batch, taps, channels = kernels.shape
    images = values.transpose(1, 2).reshape(1, batch * channels, *grid)
    weight = kernels.transpose(1, 2).reshape(batch * channels, 1, round(taps**0.5), -1)
    mixed = F.conv2d(images, weight, padding=1, groups=batch * channels)
    return mixed.view(batch, channels, -1).transpose(1, 2)


def stir(layer):
    for name in ("kernel_proj.weight", "kernel_gen.weight", "difference_control"):
        layer.get_parameter(name).data.add_(0.3 * torch.randn_like(layer.get_parameter(name)))
