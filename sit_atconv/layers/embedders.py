"""Patches, positions, time and classes as vectors."""

import math

import torch
from torch import nn

from sit_atconv.runtime.errors import InputError


def sincos_position_embedding(
    grid: tuple[int, int], dim: int, device: torch.device | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Fixed 2-D sine-cosine embedding of a token grid: (1, H * W, dim) in fp32, a function of the position alone.

    Half of the channels code the column, half the row; each half is [sin(p w), cos(p w)], w_i = 10000 ** (-4 i / dim),
    computed in `dtype` (float64 reproduces the public tensors; pass float32 on the hot path).
    Raises ValueError when `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise InputError(f"hidden_size={dim}: the position embedding needs a multiple of 4")
    height, width = grid
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=dtype, device=device) / (dim // 4))
    rows = torch.outer(torch.arange(height, dtype=dtype, device=device), frequencies)
    columns = torch.outer(torch.arange(width, dtype=dtype, device=device), frequencies)
    rows, columns = torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1)
    embedding = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, 0)], 1)
    return embedding.float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) -> (B, H / patch, W / patch, dim), one linear map per patch."""

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class TimestepEmbedder(nn.Module):
    """Time t (B,) in [0, 1] -> (B, dim): [cos(t w), sin(t w)] with w_i = 10000 ** (-i / 128), then a two-layer MLP."""

    def __init__(self, dim: int, frequency_dim: int = 256):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.frequency_dim // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * exponents.exp()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))


class LabelEmbedder(nn.Module):
    """Class label (B,) -> (B, dim); with a null class its row is the last one, at index `num_classes`."""

    def __init__(self, num_classes: int, dim: int, null_class: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)
