"""ERNIE-Image."""

import torch
from diffusers.models.transformers.transformer_ernie_image import (
    ErnieImageAttention,
    ErnieImageSingleStreamAttnProcessor,
    ErnieImageTransformer2DModel,
)

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.joint import Sequence, SingleStreamGraft
from sit_atconv.swap.models import Swapped, TakesLoRA, register


class ErnieImageGraft(SingleStreamGraft):
    """The attention of ERNIE-Image's layers: image, text and its padding."""

    cls, processors = ErnieImageAttention, (ErnieImageSingleStreamAttnProcessor,)
    image_first = True

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        return Sequence(hidden_states, image_rotary_emb, attention_mask)

    def rotate(self, x, rope):
        """Halves of the channels turn together, by angles (B, S, 1, head_dim)."""
        first, second = x.chunk(2, -1)
        return x * rope.cos().to(x.dtype) + torch.cat([-second, first], -1) * rope.sin().to(x.dtype)


def _example(
    model: ErnieImageTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, length = model.config, text or 512
    height, width = (side * config.patch_size for side in grid or (64, 64))  # an image of 1024 pixels
    return {
        "hidden_states": torch.randn(2, config.in_channels, height, width, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "text_bth": torch.randn(2, length, config.text_in_dim, generator=generator),
        "text_lens": torch.full((2,), length),
    }


class ATConvErnieImageTransformer2DModel(TakesLoRA, Swapped, ErnieImageTransformer2DModel):
    """ERNIE-Image with ATConv for its image queries."""


def _tiny() -> ErnieImageTransformer2DModel:
    return randomised(ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=16, in_channels=4, out_channels=4,
        text_in_dim=12, rope_axes_dim=(4, 2, 2),
    ))  # fmt: skip


register(ErnieImageTransformer2DModel, {r"layers\.\d+\.self_attention": ErnieImageGraft()}, _example, _tiny)
