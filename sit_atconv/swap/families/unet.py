"""Stable Diffusion's U-Net."""

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sit_atconv.swap.adapters import Grid, latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


def _example(
    model: UNet2DConditionModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict | None:
    config = model.config
    if config.addition_embed_type or model.class_embedding is not None or model.encoder_hid_proj is not None:
        return None  # conditions of the model's own making
    if not isinstance(config.cross_attention_dim, int) or config.sample_size is None:
        return None
    return {
        "sample": latents(model, generator, grid),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, text or 77, config.cross_attention_dim, generator=generator),
    }


class ATConvUNet2DConditionModel(TakesLoRA, Swapped, UNet2DConditionModel):
    """Stable Diffusion's U-Net with ATConv in place of the self-attention of its transformers."""


def _tiny() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


register(
    UNet2DConditionModel,
    {rf"(.+\.)?attentions\.\d+\.{BLOCK}attn1": SelfAttentionGraft()},
    _example,
    _tiny,
    owner=Transformer2DModel,
)
