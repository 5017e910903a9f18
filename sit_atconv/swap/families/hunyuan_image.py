"""HunyuanImage 2.1."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuanimage import (
    HunyuanImageAttnProcessor,
    HunyuanImageTransformer2DModel,
)

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grid import given
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class HunyuanImageGraft(JointGraft):
    """The attention of its double blocks, whose mask is over the image and then the text."""

    cls, processors = Attention, (HunyuanImageAttnProcessor,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ) -> Streams:
        if attention_mask is not None:  # (B, 1, 1, N + T)
            attention_mask = attention_mask[:, 0, 0, hidden_states.shape[1] :]
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb, mask=attention_mask)


class HunyuanImageSingleGraft(HunyuanImageGraft):
    """The attention of its single blocks: text and image share maps, and the output map is that of the block."""

    text = HunyuanImageGraft.image
    norms = ("norm_q", "norm_k", "norm_q", "norm_k")
    out = text_out = None


def _grid(module: HunyuanImageTransformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From the latent `hidden_states` (B, C, H, W). Raises InputError for one with frames."""
    latent = given("hidden_states", module, args, kwargs)
    if latent.ndim != 4:
        raise InputError(
            f"hidden_states of shape {tuple(latent.shape)}: a swapped model takes images (B, C, H, W), without frames"
        )
    return tuple(side // patch for side, patch in zip(latent.shape[2:], module.config.patch_size, strict=True))


def _example(
    model: HunyuanImageTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, length = model.config, text or 1000
    height, width = (side * patch for side, patch in zip(grid or (64, 64), config.patch_size, strict=True))
    extra = {}
    if config.text_embed_2_dim is not None:
        extra = {
            "encoder_hidden_states_2": torch.randn(1, 128, config.text_embed_2_dim, generator=generator),
            "encoder_attention_mask_2": torch.ones(1, 128, dtype=torch.bool),
        }
    return extra | {
        "hidden_states": torch.randn(1, config.in_channels, height, width, generator=generator),
        "timestep": 1000 * torch.rand(1, generator=generator),
        "timestep_r": 1000 * torch.rand(1, generator=generator) if config.use_meanflow else None,
        "encoder_hidden_states": torch.randn(1, length, config.text_embed_dim, generator=generator),
        "encoder_attention_mask": torch.ones(1, length, dtype=torch.bool),
        "guidance": torch.full((1,), 3500.0) if config.guidance_embeds else None,
    }


class ATConvHunyuanImageTransformer2DModel(TakesLoRA, Swapped, HunyuanImageTransformer2DModel):
    """HunyuanImage with ATConv for its image queries; the attention of its text refiner stays."""


def _tiny() -> HunyuanImageTransformer2DModel:
    return randomised(HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=12, rope_axes_dim=(4, 4),
    ))  # fmt: skip


register(
    HunyuanImageTransformer2DModel,
    {f"{BLOCK}attn": HunyuanImageGraft(), f"single_{BLOCK}attn": HunyuanImageSingleGraft()},
    _example,
    _tiny,
    grid=_grid,
)
