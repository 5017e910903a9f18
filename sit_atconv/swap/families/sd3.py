"""Stable Diffusion 3."""

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from sit_atconv.swap.adapters import Grid, latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.joint import JointGraft
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register


class SD3JointGraft(JointGraft):
    """The joint attention of SD3's blocks, which takes a mask and does not look at it."""

    cls, processors = Attention, (JointAttnProcessor2_0,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **extra):
        refuse(ip_hidden_states=extra.get("ip_hidden_states"))
        return super().inputs(hidden_states, encoder_hidden_states)


def _example(
    model: SD3Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config = model.config
    return {
        "hidden_states": latents(model, generator, grid),
        "encoder_hidden_states": torch.randn(2, text or 154, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
    }


class ATConvSD3Transformer2DModel(TakesNoImagePrompt, TakesLoRA, Swapped, SD3Transformer2DModel):
    """SD3 with ATConv in place of the second attention of its dual blocks, or of all image queries ("split")."""


def _tiny() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


register(
    SD3Transformer2DModel,
    {f"{BLOCK}attn": SD3JointGraft(), f"{BLOCK}attn2": SelfAttentionGraft()},
    _example,
    _tiny,
)
