"""Flux.1."""

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxTransformer2DModel

from sit_atconv.swap.adapters import Grid
from sit_atconv.swap.grid import argument, raster_of_ids
from sit_atconv.swap.joint import (
    IMAGE_MAPS,
    TEXT_MAPS,
    JointGraft,
    SequenceJointATConv,
    StreamsJointATConv,
    project_sequence,
    text_length,
)
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register


class FluxDoubleGraft(JointGraft):
    """The attention of Flux's double blocks."""

    cls, processor, layer = FluxAttention, FluxAttnProcessor, StreamsJointATConv
    maps = (*IMAGE_MAPS, *TEXT_MAPS, "to_out.0", "to_add_out")


class FluxSingleGraft(JointGraft):
    """The attention of Flux's single blocks."""

    cls, processor, layer = FluxAttention, FluxAttnProcessor, SequenceJointATConv
    maps = IMAGE_MAPS

    def project(self, attention, layer, args, kwargs):
        hidden_states, tables = argument("hidden_states", args, kwargs), argument("image_rotary_emb", args, kwargs, 3)
        return project_sequence(attention, text_length(hidden_states, layer.reference), hidden_states, tables)

    def approximated(self, layer, output):
        height, width = layer.reference.get()
        return output[:, -height * width :]


def _example(
    model: FluxTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, length = model.config, text or 512  # the longest prompt, and an image of 1024 pixels
    height, width = grid or (64, 64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(length, 3, dtype=torch.long),
        "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
    }


class ATConvFluxTransformer2DModel(TakesNoImagePrompt, TakesLoRA, Swapped, FluxTransformer2DModel):
    """Flux with ATConv for its image queries."""


def _tiny() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


register(
    FluxTransformer2DModel,
    {f"{BLOCK}attn": FluxDoubleGraft(), f"single_{BLOCK}attn": FluxSingleGraft()},
    _example,
    _tiny,
    grid=raster_of_ids,
)
