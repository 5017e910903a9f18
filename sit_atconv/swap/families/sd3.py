"""Stable Diffusion 3."""

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from sit_atconv.swap.adapters import latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.joint import IMAGE_MAPS, TEXT_MAPS, JointGraft, StreamsJointATConv
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register


class SD3JointGraft(JointGraft):
    """The joint attention of SD3's blocks."""

    cls, processor, layer = Attention, JointAttnProcessor2_0, StreamsJointATConv
    maps = (*IMAGE_MAPS, *TEXT_MAPS, "to_out.0")


def _example(model: SD3Transformer2DModel, generator: torch.Generator) -> dict:
    config = model.config
    return {
        "hidden_states": latents(model, generator),
        "encoder_hidden_states": torch.randn(2, 154, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
    }


class ATConvSD3Transformer2DModel(TakesNoImagePrompt, TakesLoRA, Swapped, SD3Transformer2DModel):
    """SD3 with ATConv in place of the second attention of its dual blocks, or of all image queries ("split")."""


register(
    SD3Transformer2DModel,
    {f"{BLOCK}attn": SD3JointGraft(), f"{BLOCK}attn2": SelfAttentionGraft()},
    _example,
)
