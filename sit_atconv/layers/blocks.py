"""The adaLN-Zero transformer block around any token mixer, and the output layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.layers.linear import linear
from sit_atconv.layers.norm import norm


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (B, H, W, C) * (1 + scale) + shift, with shift and scale (B, 1, 1, C); one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def gated_residual(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x + gate * branch, with x and branch (B, H, W, C) and gate (B, 1, 1, C); one pass."""
    return torch.addcmul(x, gate, branch)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh z) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3).

    Under torch.compile written as x sigmoid(2 z), the same function: the vectorised tanh of a CPU takes three times as
    long and rounds alike.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(wide * (1 + 0.044715 * wide * wide) * math.sqrt(8 / math.pi))).to(x.dtype)


class Mlp(nn.Module):
    """x (..., dim) -> (..., dim) through one hidden layer with tanh GELU."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self.fc2, gelu_tanh(linear(self.fc1, x)))


class SiTBlock(nn.Module):
    """x + gate * mixer(modulate(norm(x))), then the same with the MLP; six vectors of modulation from c (B, C).

    hidden_states x (B, H, W, C) -> (B, H, W, C). The grid is the shape of x and no argument, so torch.compile can leave
    it open. diffusers' caches look for the argument `hidden_states` by name.
    `mixer` is any module (B, H, W, C) -> (B, H, W, C); it keeps the public name `attn`.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, hidden_states: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None, None].chunk(6, -1)
        x = gated_residual(x, gate1, self.attn(modulate(norm(self.norm1, x), shift1, scale1)))
        return gated_residual(x, gate2, self.mlp(modulate(norm(self.norm2, x), shift2, scale2)))


class SiTATConvBlock(SiTBlock):
    """The block around ATConv: a function of its own, since torch.compile counts and limits graphs by function."""

    def forward(self, hidden_states: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states, c)


class FinalLayer(nn.Module):
    """x (B, H, W, C) -> (B, H, W, patch * patch * out_channels), modulated by c (B, C)."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None, None].chunk(2, -1)
        return self.linear(modulate(norm(self.norm_final, x), shift, scale))
