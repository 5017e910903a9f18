"""diffusers' U-Net of Kandinsky 3."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_kandinsky3 import Kandinsky3AttentionBlock, Kandinsky3UNet

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SelfATConv
from sit_atconv.swap.models import Swapped, register


class OwnContextATConv(SelfATConv):
    """`SelfATConv` in a block that gives its tokens a second time, as the context that they attend to."""

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().forward(hidden_states, attention_mask=attention_mask)


class OwnContextGraft(SelfAttentionGraft):
    """diffusers' `Attention` whose context are its own tokens."""

    def traits(self, attention: Attention) -> dict[str, bool]:
        return {**super().traits(attention), "attends to a context": attention.norm_cross is not None}

    def tokens(self, hidden_states, context=None, attention_mask=None):
        return super().tokens(hidden_states, attention_mask=attention_mask)

    def build(self, attention: Attention, reference: GridReference, options: LayerOptions) -> OwnContextATConv:
        out, dropout = attention.to_out
        return OwnContextATConv(attention.to_v, out, reference, options, dropout.p)


def _map_grid(module: Kandinsky3AttentionBlock, args: tuple, kwargs: dict) -> tuple[int, int]:
    return tuple(argument("x", args, kwargs).shape[-2:])


def _example(model: Kandinsky3UNet, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    config, tokens = model.config, text or 128
    sides = (128, 128) if grid is None else grid  # of the pipeline's 1,024 pixels: the configuration does not tell
    return {
        "sample": torch.randn(2, config.in_channels, *sides, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, tokens, config.encoder_hid_dim, generator=generator),
        "encoder_attention_mask": torch.ones(2, tokens),
    }


class ATConvKandinsky3UNet(Swapped, Kandinsky3UNet):
    """Kandinsky 3's U-Net with ATConv in place of its self-attention; the attention to the text stays."""


def _tiny() -> Kandinsky3UNet:
    return randomised(Kandinsky3UNet(
        time_embedding_dim=16, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(8, 16),
        cross_attention_dim=8, encoder_hid_dim=12,
    ), std=0.1)  # fmt: skip


register(
    Kandinsky3UNet,
    {r"(down|up)_blocks\.\d+\.attentions\.0\.attention": OwnContextGraft()},
    _example,
    _tiny,
    owner=Kandinsky3AttentionBlock,
    grid=_map_grid,
)
