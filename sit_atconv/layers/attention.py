"""Multi-head self-attention with the parameter names of the public SiT checkpoints."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sit_atconv.errors import InputError


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all tokens: x (B, N, C) -> (B, N, C).

    Takes `grid` like every token mixer and does not use it. `qk_norm` normalises queries and keys per head.
    Raises ValueError when `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads={num_heads} does not divide hidden_size={dim}; choose a divisor")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
