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


class MotifVideoDoubleGraft(HunyuanVideoDoubleGraft):
    """The attention of its double blocks."""

    cls, processors = MotifVideoAttention, (MotifVideoAttnProcessor2_0,)


class MotifVideoSingleGraft(HunyuanVideoSingleGraft):
    """The attention of its single blocks. In those of the decoder, the tokens before them stand for the text: their
    attention is exact, and so no cheaper."""

    cls, processors = MotifVideoAttention, (MotifVideoAttnProcessor2_0,)


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


class ATConvMotifVideoTransformer3DModel(TakesLoRA, Swapped, MotifVideoTransformer3DModel):
    """Motif-Video with ATConv for its video queries; the attention to the text beside it stays."""


def _tiny() -> MotifVideoTransformer3DModel:
    return randomised(MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=2,
        num_decoder_layers=1, patch_size=1, text_embed_dim=10, rope_axes_dim=(2, 2, 4),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    ))  # fmt: skip


register(
    MotifVideoTransformer3DModel,
    {f"{BLOCK}attn": MotifVideoDoubleGraft(), f"single_{BLOCK}attn": MotifVideoSingleGraft()},
    _example,
    _tiny,
    sides=3,
)
