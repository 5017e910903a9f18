"""Models with Flux's blocks under names of their own: Bria, Bria FIBO, LongCat-Image and Ovis-Image."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_bria import (
    BriaAttention,
    BriaAttnProcessor,
    BriaTransformer2DModel,
)
from diffusers.models.transformers.transformer_bria_fibo import BriaAttnProcessor as BriaFiboSingleAttnProcessor
from diffusers.models.transformers.transformer_bria_fibo import (
    BriaFiboAttention,
    BriaFiboAttnProcessor,
    BriaFiboTransformer2DModel,
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
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class BriaDoubleGraft(FluxDoubleGraft):
    """The attention of Bria's double blocks."""

    cls, processors = BriaAttention, (BriaAttnProcessor,)


class BriaSingleGraft(FluxSingleGraft):
    """The attention of Bria's single blocks."""

    cls, processors = BriaAttention, (BriaAttnProcessor,)


class BriaFiboDoubleGraft(JointGraft):
    """The attention of Bria FIBO's double blocks, which takes a mask over text and image."""

    cls, processors = BriaFiboAttention, (BriaFiboAttnProcessor,)


class BriaFiboSingleGraft(SingleStreamGraft):
    """The attention of Bria FIBO's single blocks, whose output map is that of the block."""

    cls, processors, out = Attention, (BriaFiboSingleAttnProcessor,), None


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


def _example_bria(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    return packed(model, generator, grid, text) | {"timestep": 1000 * torch.rand(1, generator=generator)}


def _example_fibo(
    model: BriaFiboTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    inputs, config = _example_bria(model, generator, grid, text), model.config
    shape = (*inputs["encoder_hidden_states"].shape[:2], config.text_encoder_dim)
    count = config.num_layers + config.num_single_layers
    return inputs | {"text_encoder_layers": [torch.randn(*shape, generator=generator) for _ in range(count)]}


class ATConvBriaTransformer2DModel(TakesLoRA, Swapped, BriaTransformer2DModel):
    """Bria with ATConv for its image queries."""


class ATConvBriaFiboTransformer2DModel(TakesLoRA, Swapped, BriaFiboTransformer2DModel):
    """Bria FIBO with ATConv for its image queries."""


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


def _tiny_fibo() -> BriaFiboTransformer2DModel:
    return randomised(BriaFiboTransformer2DModel(**_TINY, text_encoder_dim=10))


def _tiny_longcat() -> LongCatImageTransformer2DModel:
    return randomised(LongCatImageTransformer2DModel(**_TINY))


def _tiny_ovis() -> OvisImageTransformer2DModel:
    return randomised(OvisImageTransformer2DModel(**_TINY, out_channels=4))


for _model, _double, _single, _inputs, _tiny in (
    (BriaTransformer2DModel, BriaDoubleGraft, BriaSingleGraft, _example_bria, _tiny_bria),
    (BriaFiboTransformer2DModel, BriaFiboDoubleGraft, BriaFiboSingleGraft, _example_fibo, _tiny_fibo),
    (LongCatImageTransformer2DModel, LongCatImageDoubleGraft, LongCatImageSingleGraft, _example, _tiny_longcat),
    (OvisImageTransformer2DModel, OvisImageDoubleGraft, OvisImageSingleGraft, _example, _tiny_ovis),
):
    register(_model, {f"{BLOCK}attn": _double(), f"single_{BLOCK}attn": _single()}, _inputs, _tiny, grid=ids_grid)
