"""PixArt-alpha and PixArt-Sigma."""

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from sit_atconv.swap.adapters import Grid, latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, register


def _example(
    model: PixArtTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict | None:
    config, extra = model.config, {"resolution": None, "aspect_ratio": None}
    if config.caption_channels is None:
        return None  # what it takes for captions, its configuration does not tell
    if model.use_additional_conditions:
        extra = {"resolution": torch.full((2, 2), 8.0 * config.sample_size), "aspect_ratio": torch.ones(2, 1)}
    return {
        "hidden_states": latents(model, generator, grid),
        "encoder_hidden_states": torch.randn(2, text or 120, config.caption_channels, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "added_cond_kwargs": extra,
    }


class ATConvPixArtTransformer2DModel(Swapped, PixArtTransformer2DModel):
    """PixArt with ATConv in place of the self-attention."""


def _tiny() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip


register(PixArtTransformer2DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _example, _tiny)
