"""Self-attention over image tokens that padding follows, or whose heads share keys and values: refiner blocks."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from sit_atconv.ops.atconv import on_grid
from sit_atconv.swap.grafts import SelfAttentionGraft, observed
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SwappedLayer, refuse


class RefinerATConv(SwappedLayer):
    """to_out(K2 * to_v(x)) for the image x (B, N, dim) that begins a sequence (B, S, dim); zeros for what follows it.

    Values are as many as the attention has: each head of values stands for the heads of queries that read it.
    Raises InputError for an attention mask, which ATConv has no use for.
    """

    def __init__(self, attention: Attention, reference: GridReference, options: LayerOptions):
        value, (out, dropout) = attention.to_v, attention.to_out
        super().__init__(value.in_features, out.in_features, reference, options)
        self.heads, self.shared = attention.heads, out.in_features // value.out_features
        self.to_v = nn.Linear(value.in_features, value.out_features, bias=False)
        self.to_out = nn.ModuleList(
            [nn.Linear(out.in_features, out.out_features, bias=out.bias is not None), nn.Dropout(dropout.p)]
        )
        self.reset_parameters()
        self.to(value.weight.device, value.weight.dtype)

    def values(self, x: torch.Tensor, to_v: nn.Linear) -> torch.Tensor:
        """to_v(x), (..., dim) -> (..., channels), with the heads of values repeated."""
        v = to_v(x)
        if self.shared == 1:
            return v
        return v.unflatten(-1, (self.heads // self.shared, -1)).repeat_interleave(self.shared, -2).flatten(-2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states=None,
        attention_mask: torch.Tensor | None = None,
        **others,
    ) -> torch.Tensor:
        refuse(attention_mask=attention_mask)
        self.warn_of(others)
        grid = self.reference.get()
        count = math.prod(grid)
        x = on_grid(hidden_states[:, :count], grid)
        mixed = self.convolve(x, self.values(x, self.to_v)).flatten(1, -2)
        image = self.to_out[1](self.to_out[0](mixed))
        return F.pad(image, (0, 0, 0, hidden_states.shape[1] - count))


class RefinerGraft(SelfAttentionGraft):
    """diffusers' `Attention` in refiner blocks; queries and keys, their norms and rotary positions go."""

    def traits(self, attention: Attention) -> dict[str, bool]:
        found = super().traits(attention)
        del found["has fewer value heads"]
        return found | {"has a bias in its values": attention.to_v.bias is not None}

    def build(self, attention: Attention, reference: GridReference, options: LayerOptions) -> RefinerATConv:
        return RefinerATConv(attention, reference, options)

    def observe(self, attention, layer, args, kwargs):
        x, count = argument("hidden_states", args, kwargs), math.prod(layer.reference.get())
        out = attention.to_out[0]
        _, mixed = observed(attention, attention.to_v, out, x, args, kwargs, out.in_features)
        return layer.values(x[:, :count], attention.to_v), mixed[:, :count]

    def approximated(self, layer, output, args, kwargs):
        return output[:, : math.prod(layer.reference.get())]
