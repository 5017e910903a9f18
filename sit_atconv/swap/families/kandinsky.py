"""Kandinsky 5 and 6, videos without and with sound."""

import torch
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky6 import (
    Kandinsky6Attention,
    Kandinsky6AttnProcessor,
    Kandinsky6Transformer3DModel,
)
from torch import nn

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import argument, given, patch_sizes
from sit_atconv.swap.models import Swapped, TakesLoRA, register


class KandinskyGraft(SelfAttentionGraft):
    """The self-attention of its blocks of the video: queries, keys, their norms and rotary positions go."""

    value, out = "to_value", "out_layer"


def _grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """From `hidden_states` (B, T, H, W, C). Raises InputError for sparse attention, which has an order of its own."""
    if given("sparse_params", module, args, kwargs) is not None:
        raise InputError(
            "sparse_params were given: sparse attention orders the tokens in blocks of 8 x 8, and a swapped model has "
            "them frame by frame; leave it out (attention_type='regular')"
        )
    sides = argument("hidden_states", args, kwargs).shape[1:4]
    return tuple(side // patch for side, patch in zip(sides, patch_sizes(module.config), strict=True))


def _example(
    model: nn.Module,
    generator: torch.Generator,
    grid: Grid = None,
    text: int | None = None,
) -> dict:
    """Its own: 121 frames at 512 x 768."""
    config, sides = model.config, tuple(grid or (31, 32, 48))
    channels = (2 if config.visual_cond else 1) * config.in_visual_dim + bool(config.visual_cond)
    shape = [side * patch for side, patch in zip(sides, config.patch_size, strict=True)]
    length = text or 256
    return {
        "hidden_states": torch.randn(1, *shape, channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, config.in_text_dim, generator=generator),
        "timestep": 1000 * torch.rand(1, generator=generator),
        "pooled_projections": torch.randn(1, config.in_text_dim2, generator=generator),
        "visual_rope_pos": [torch.arange(side) for side in sides],
    } | ({"text_rope_pos": torch.arange(length)} if isinstance(model, Kandinsky5Transformer3DModel) else {})


def _example_of_sound(
    model: Kandinsky6Transformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """And its sound."""
    found = _example(model, generator, grid, text)
    shape = 1, 8 * found["hidden_states"].shape[1], model.config.in_audio_dim
    return found | {"audio_hidden_states": torch.randn(shape, generator=generator)}


class ATConvKandinsky5Transformer3DModel(TakesLoRA, Swapped, Kandinsky5Transformer3DModel):
    """Kandinsky 5 with ATConv in place of its self-attention over the video; not with sparse attention."""


class ATConvKandinsky6Transformer3DModel(TakesLoRA, Swapped, Kandinsky6Transformer3DModel):
    """Kandinsky 6 with ATConv in place of the self-attention of the video; that of the sound stays."""


TINY = {
    "in_text_dim": 10, "in_text_dim2": 6, "time_dim": 8, "model_dim": 16, "ff_dim": 24, "num_text_blocks": 1,
    "num_visual_blocks": 2, "axes_dims": (2, 2, 4),
}  # fmt: skip


def _tiny() -> Kandinsky5Transformer3DModel:
    return randomised(Kandinsky5Transformer3DModel(**TINY))


def _tiny_of_sound() -> Kandinsky6Transformer3DModel:
    return randomised(Kandinsky6Transformer3DModel(
        **TINY, in_visual_dim=4, out_visual_dim=4, in_audio_dim=4, out_audio_dim=4
    ))  # fmt: skip


BLOCKS = r"visual_transformer_blocks\.\d+\."
register(
    Kandinsky5Transformer3DModel,
    {f"{BLOCKS}self_attention": KandinskyGraft(Kandinsky5Attention, Kandinsky5AttnProcessor)},
    _example,
    _tiny,
    grid=_grid,
    sides=3,
)
register(
    Kandinsky6Transformer3DModel,
    {rf"{BLOCKS}video_dec_block\.self_attention": KandinskyGraft(Kandinsky6Attention, Kandinsky6AttnProcessor)},
    _example_of_sound,
    _tiny_of_sound,
    grid=_grid,
    sides=3,
)
