"""Multi-head self-attention with the parameter names of the public SiT checkpoints."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import nn

from sit_atconv.layers.linear import linear
from sit_atconv.layers.norm import norm
from sit_atconv.ops.forward_mode import exact_derivatives, forward_mode
from sit_atconv.runtime.errors import InputError


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    backend=None,
    parallel_config=None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, N, heads, d) by the backend that diffusers is set to.

    mask: of all backends that take one, as `scaled_dot_product_attention` takes it, for (B, heads, queries, keys).
    In forward mode (`torch.func.jvp`, dual tensors) on plain torch calls: fused kernels have no such derivatives.
    Raises RuntimeError for a context-parallel model there.
    """
    if not forward_mode():
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel_config)
    if parallel_config is not None:
        raise RuntimeError(
            "context-parallel attention has no forward-mode derivatives (torch.func.jvp, dual tensors); "
            "take them of a model without it"
        )
    with exact_derivatives():
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), attn_mask=mask).transpose(
            1, 2
        )


class SiTAttnProcessor:
    """softmax(q k^T / sqrt(d)) v by the attention backend that diffusers is set to, SDPA unless told otherwise."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "Attention", hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, N, C) -> (B, N, C)."""
        q, k, v = rearrange(attn.qkv(hidden_states), "b n (three h d) -> three b n h d", three=3, h=attn.num_heads)
        q, k = norm(attn.q_norm, q).to(v.dtype), norm(attn.k_norm, k).to(v.dtype)
        mixed = attend(q, k, v, self._attention_backend, self._parallel_config)
        return linear(attn.proj, mixed.flatten(2))


class Attention(nn.Module, AttentionModuleMixin):
    """softmax(q k^T / sqrt(d)) v over all tokens: x (B, *grid, C) -> (B, *grid, C), with any number of grid dimensions.

    `qk_norm` normalises queries and keys per head. Another processor, called `processor(attention, tokens)` with tokens
    (B, N, C), may take the place of SiTAttnProcessor (`set_processor`).
    Raises ValueError when `num_heads` does not divide `dim`.
    """

    _default_processor_cls = SiTAttnProcessor
    _available_processors = (SiTAttnProcessor,)
    _supports_qkv_fusion = False  # the public checkpoints hold q, k and v in one linear
    is_cross_attention = False

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads={num_heads} does not divide hidden_size={dim}; choose a divisor")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.set_processor(SiTAttnProcessor())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x.flatten(1, -2)).unflatten(1, x.shape[1:-1])
