"""Cosmos."""

import torch
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0, CosmosTransformer3DModel

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class CosmosGraft(SelfAttentionGraft):
    """Its `attn1`: queries and keys, their norms and rotary positions go, values and output map stay."""

    processors = (CosmosAttnProcessor2_0,)


def _example(
    model: CosmosTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 121 frames at 704 x 1280."""
    config, latents = model.config, clip(model, generator, grid or (16, 44, 80))
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    context = torch.randn(1, text or 512, width, generator=generator)
    if config.img_context_dim_in:
        image = 1, config.img_context_num_tokens, config.img_context_dim_in
        context = context, torch.randn(image, generator=generator)
    return {
        "hidden_states": latents,
        "timestep": torch.rand(1, generator=generator),
        "encoder_hidden_states": context,
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, *latents.shape[-2:]),
    }


class ATConvCosmosTransformer3DModel(TakesLoRA, Swapped, CosmosTransformer3DModel):
    """Cosmos with ATConv in place of its self-attention; the attention to text and image stays."""


def _tiny() -> CosmosTransformer3DModel:
    return randomised(CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=10, adaln_lora_dim=4, max_size=(8, 32, 32),
    ))  # fmt: skip


register(CosmosTransformer3DModel, {f"{BLOCK}attn1": CosmosGraft()}, _example, _tiny, sides=3)
