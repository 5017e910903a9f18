"""PixArt-alpha and PixArt-Sigma."""

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from sit_atconv.swap.adapters import latents
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, register


def _example(model: PixArtTransformer2DModel, generator: torch.Generator) -> dict | None:
    config, extra = model.config, {"resolution": None, "aspect_ratio": None}
    if config.caption_channels is None:
        return None  # what it takes for captions, its configuration does not tell
    if model.use_additional_conditions:
        extra = {"resolution": torch.full((2, 2), 8.0 * config.sample_size), "aspect_ratio": torch.ones(2, 1)}
    return {
        "hidden_states": latents(model, generator),
        "encoder_hidden_states": torch.randn(2, 120, config.caption_channels, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "added_cond_kwargs": extra,
    }


class ATConvPixArtTransformer2DModel(Swapped, PixArtTransformer2DModel):
    """PixArt with ATConv in place of the self-attention."""


register(PixArtTransformer2DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _example)
