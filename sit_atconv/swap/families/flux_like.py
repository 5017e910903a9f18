"""Models with Flux's blocks under names of their own: Bria, LongCat-Image and Ovis-Image."""

import torch
from diffusers.models.transformers.transformer_bria import (
    BriaAttention,
    BriaAttnProcessor,
    BriaTransformer2DModel,
)
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttention,
    LongCatImageAttnProcessor,
    LongCatImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_ovis_image import (
    OvisImageAttention,
    OvisImageAttnProcessor,
    OvisImageTransformer2DModel,
)
from torch import nn

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.families.flux import FluxDoubleGraft, FluxSingleGraft, packed
from sit_atconv.swap.grid import ids_grid
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class BriaDoubleGraft(FluxDoubleGraft):
    """The attention of Bria's double blocks."""

    cls, processors = BriaAttention, (BriaAttnProcessor,)


class BriaSingleGraft(FluxSingleGraft):
    """The attention of Bria's single blocks."""

    cls, processors = BriaAttention, (BriaAttnProcessor,)


class LongCatImageDoubleGraft(FluxDoubleGraft):
    """The attention of LongCat-Image's double blocks."""

    cls, processors = LongCatImageAttention, (LongCatImageAttnProcessor,)


class LongCatImageSingleGraft(FluxSingleGraft):
    """The attention of LongCat-Image's single blocks."""

    cls, processors = LongCatImageAttention, (LongCatImageAttnProcessor,)


class OvisImageDoubleGraft(FluxDoubleGraft):
    """The attention of Ovis-Image's double blocks."""

    cls, processors = OvisImageAttention, (OvisImageAttnProcessor,)


class OvisImageSingleGraft(FluxSingleGraft):
    """The attention of Ovis-Image's single blocks."""

    cls, processors = OvisImageAttention, (OvisImageAttnProcessor,)


def _example(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    return packed(model, generator, grid, text) | {"timestep": torch.rand(1, generator=generator)}


class ATConvBriaTransformer2DModel(TakesLoRA, Swapped, BriaTransformer2DModel):
    """Bria with ATConv for its image queries."""


class ATConvLongCatImageTransformer2DModel(TakesLoRA, Swapped, LongCatImageTransformer2DModel):
    """LongCat-Image with ATConv for its image queries."""


class ATConvOvisImageTransformer2DModel(TakesLoRA, Swapped, OvisImageTransformer2DModel):
    """Ovis-Image with ATConv for its image queries."""


_TINY = {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip


def _tiny_bria() -> BriaTransformer2DModel:
    return randomised(BriaTransformer2DModel(**_TINY))


def _tiny_longcat() -> LongCatImageTransformer2DModel:
    return randomised(LongCatImageTransformer2DModel(**_TINY))


def _tiny_ovis() -> OvisImageTransformer2DModel:
    return randomised(OvisImageTransformer2DModel(**_TINY, out_channels=4))


for _model, _double, _single, _tiny in (
    (BriaTransformer2DModel, BriaDoubleGraft, BriaSingleGraft, _tiny_bria),
    (LongCatImageTransformer2DModel, LongCatImageDoubleGraft, LongCatImageSingleGraft, _tiny_longcat),
    (OvisImageTransformer2DModel, OvisImageDoubleGraft, OvisImageSingleGraft, _tiny_ovis),
):
    sites = {f"{BLOCK}attn": _double(), f"single_{BLOCK}attn": _single()}
    register(_model, sites, _example, _tiny, grid=ids_grid)
