"""Motif-Video, whose blocks attend as HunyuanVideo's do."""

import torch
from diffusers.models.transformers.transformer_motif_video import (
    MotifVideoAttention,
    MotifVideoAttnProcessor2_0,
    MotifVideoTransformer3DModel,
)

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.families.hunyuan_video import HunyuanVideoDoubleGraft, HunyuanVideoSingleGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


def _example(
    model: MotifVideoTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 121 frames at 736 x 1280."""
    length = text or 512
    return {
        "hidden_states": clip(model, generator, grid or (31, 46, 80)),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_hidden_states": torch.randn(1, length, model.config.text_embed_dim, generator=generator),
        "encoder_attention_mask": torch.ones(1, length, dtype=torch.long),
    }


def _of_the_decoder(model: MotifVideoTransformer3DModel) -> set[str]:
    """The attentions of the last single blocks, in which the video of the blocks before stands in the place of a text:
    split, they would keep three of four products between tokens."""
    config = model.config
    first = config.num_single_layers - config.num_decoder_layers
    return {f"single_transformer_blocks.{index}.attn" for index in range(first, config.num_single_layers)}


class ATConvMotifVideoTransformer3DModel(TakesLoRA, Swapped, MotifVideoTransformer3DModel):
    """Motif-Video with ATConv for its video queries; the attention to the text beside it stays."""


def _tiny() -> MotifVideoTransformer3DModel:
    return randomised(MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=2,
        num_decoder_layers=1, patch_size=1, text_embed_dim=10, rope_axes_dim=(2, 2, 4),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    ))  # fmt: skip


OWN = MotifVideoAttention, MotifVideoAttnProcessor2_0
register(
    MotifVideoTransformer3DModel,
    {f"{BLOCK}attn": HunyuanVideoDoubleGraft(*OWN), f"single_{BLOCK}attn": HunyuanVideoSingleGraft(*OWN)},
    _example,
    _tiny,
    sides=3,
    stays=_of_the_decoder,
)
