"""Flux.1."""

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxTransformer2DModel

from sit_atconv.swap.adapters import Grid
from sit_atconv.swap.grid import ids_grid
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register


class FluxDoubleGraft(JointGraft):
    """The attention of Flux's double blocks."""

    cls, processors = FluxAttention, (FluxAttnProcessor,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **extra):
        refuse(attention_mask=attention_mask, ip_hidden_states=extra.get("ip_hidden_states"))
        return super().inputs(hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)


class FluxSingleGraft(SingleStreamGraft):
    """The attention of Flux's single blocks, whose output map is that of the block."""

    cls, processors, out = FluxAttention, (FluxAttnProcessor,), None

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        refuse(attention_mask=attention_mask)
        return super().inputs(hidden_states, image_rotary_emb=image_rotary_emb)


def packed(
    model: torch.nn.Module,
    generator: torch.Generator,
    grid: Grid = None,
    text: int | None = None,
    of_text: tuple[int, ...] = (),
) -> dict:
    """Tokens and ids of a model of Flux's kind: by default the longest prompt, and an image of 1024 pixels.

    of_text: the shape of a token of the text; by default as the configuration says.
    """
    length, (height, width) = text or 512, grid or (64, 64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    of_text = of_text or (model.config.joint_attention_dim,)
    return {
        "hidden_states": torch.randn(1, height * width, model.config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, *of_text, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(length, 3, dtype=torch.long),
    }


def _example(
    model: FluxTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    return packed(model, generator, grid, text) | {
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "guidance": torch.full((1,), 3.5) if model.config.guidance_embeds else None,
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
    grid=ids_grid,
)
