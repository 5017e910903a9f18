"""EasyAnimate."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_easyanimate import (
    EasyAnimateAttnProcessor2_0,
    EasyAnimateTransformer3DModel,
)

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, register


class EasyAnimateGraft(JointGraft):
    """Its `attn1`, where text and video have maps of their own; positions are the video's."""

    cls, processors = Attention, (EasyAnimateAttnProcessor2_0,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        refuse(attention_mask=attention_mask)
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb)


def _example(
    model: EasyAnimateTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 49 frames at 512 x 512."""
    config, latents = model.config, clip(model, generator, grid or (13, 32, 32))
    latents, more = latents.split([config.out_channels, config.in_channels - config.out_channels], 1)
    return {
        "hidden_states": latents,
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_hidden_states": torch.randn(1, text or 256, config.text_embed_dim, generator=generator),
    } | ({"inpaint_latents": more} if more.shape[1] else {})


class ATConvEasyAnimateTransformer3DModel(Swapped, EasyAnimateTransformer3DModel):
    """EasyAnimate with ATConv for its video queries."""


def _tiny() -> EasyAnimateTransformer3DModel:
    return randomised(EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=2, time_embed_dim=8, text_embed_dim=10,
    ))  # fmt: skip


register(EasyAnimateTransformer3DModel, {f"{BLOCK}attn1": EasyAnimateGraft()}, _example, _tiny, sides=3)
