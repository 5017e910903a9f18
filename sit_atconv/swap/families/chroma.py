"""Chroma."""

import math

import torch
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.families.flux import packed
from sit_atconv.swap.grid import check_whole, given, ids_grid
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register


class ChromaDoubleGraft(JointGraft):
    """The attention of Chroma's double blocks: Flux's, with a mask."""

    cls, processors = FluxAttention, (FluxAttnProcessor,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
        ip_hidden_states=None, **_,
    ):  # fmt: skip
        refuse(ip_hidden_states=ip_hidden_states)
        return super().inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class ChromaSingleGraft(SingleStreamGraft):
    """The attention of Chroma's single blocks, whose output map is that of the block."""

    cls, processors, out = FluxAttention, (FluxAttnProcessor,), None


def _grid(module: ChromaTransformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From `img_ids`. Raises InputError where `attention_mask` (B, T + N) leaves out image tokens."""
    grid = ids_grid(module, args, kwargs)
    check_whole(given("attention_mask", module, args, kwargs), math.prod(grid))
    return grid


def _example(
    model: ChromaTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    inputs = packed(model, generator, grid, text)
    length = sum(inputs[name].shape[0] for name in ("txt_ids", "img_ids"))
    return inputs | {
        "timestep": torch.rand(1, generator=generator),
        "attention_mask": torch.ones(1, length, dtype=torch.bool),
    }


class ATConvChromaTransformer2DModel(TakesNoImagePrompt, TakesLoRA, Swapped, ChromaTransformer2DModel):
    """Chroma with ATConv for its image queries. diffusers' gradient checkpointing loses the mask in single blocks."""


def _tiny() -> ChromaTransformer2DModel:
    return randomised(ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    ))  # fmt: skip


register(
    ChromaTransformer2DModel,
    {f"{BLOCK}attn": ChromaDoubleGraft(), f"single_{BLOCK}attn": ChromaSingleGraft()},
    _example,
    _tiny,
    grid=_grid,
)
