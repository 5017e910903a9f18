"""Flux.3."""

import torch
from diffusers.models.transformers.transformer_flux3 import Flux3Attention, Flux3AttnProcessor, Flux3Transformer2DModel

from sit_atconv.layers.norm import norm
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.families.flux2 import with_text_column
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import given, ids_grid
from sit_atconv.swap.joint import SingleStreamGraft
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class Flux3ImageGraft(SelfAttentionGraft):
    """The attention of Flux.3's blocks over the image alone."""

    cls, processors = Flux3Attention, (Flux3AttnProcessor,)


class Flux3SingleGraft(SingleStreamGraft):
    """The attention of Flux.3's single blocks, which normalises in fp32."""

    cls, processors = Flux3Attention, (Flux3AttnProcessor,)

    def normalise(self, part, x):
        return norm(part, x.float() if x.dtype.itemsize < 4 else x)


def _grid(module: Flux3Transformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From `img_ids`. Raises InputError for reference images, which are in the same sequence."""
    refuse(image_cond_hidden_states=given("image_cond_hidden_states", module, args, kwargs))
    return ids_grid(module, args, kwargs)


def _example(
    model: Flux3Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    times = {"timestep": torch.rand(1, generator=generator)}
    if model.config.flow_map:
        times["target_timestep"] = torch.zeros(1)
    return with_text_column(model, generator, grid, text) | times


class ATConvFlux3Transformer2DModel(TakesLoRA, Swapped, Flux3Transformer2DModel):
    """Flux.3 with ATConv in place of the attention over the image alone (`mode_blocks.image`), and for the image
    queries of its single blocks ("split"); of one image, without references."""


def _tiny() -> Flux3Transformer2DModel:
    return randomised(Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, timestep_channels=8, axes_dims_rope=(2, 2, 2, 2),
    ))  # fmt: skip


register(
    Flux3Transformer2DModel,
    {r"mode_blocks\.image\.\d+\.attn": Flux3ImageGraft(), f"single_{BLOCK}attn": Flux3SingleGraft()},
    _example,
    _tiny,
    grid=_grid,
)
