"""Models with Flux's blocks under names of their own: Bria, Bria FIBO, LongCat-Image and Ovis-Image."""

import math

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
from sit_atconv.swap.grid import check_whole, given, ids_grid
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class SingleGraft(SingleStreamGraft):
    """The attention of Bria FIBO's single blocks, whose output map is that of the block."""

    out = None


def _of_flux(attention: type[nn.Module], processor: type) -> tuple[FluxDoubleGraft, FluxSingleGraft]:
    return FluxDoubleGraft(attention, processor), FluxSingleGraft(attention, processor)


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


def _grid_of_fibo(module: BriaFiboTransformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From `img_ids`. Raises InputError where the attention's mask, of its keywords, leaves out image tokens."""
    grid = ids_grid(module, args, kwargs)
    options = given("joint_attention_kwargs", module, args, kwargs) or {}
    check_whole(options.get("attention_mask"), math.prod(grid))
    return grid


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


_fibo = JointGraft(BriaFiboAttention, BriaFiboAttnProcessor), SingleGraft(Attention, BriaFiboSingleAttnProcessor)
for _model, _grafts, _inputs, _tiny, _grid in (
    (BriaTransformer2DModel, _of_flux(BriaAttention, BriaAttnProcessor), _example_bria, _tiny_bria, ids_grid),
    (BriaFiboTransformer2DModel, _fibo, _example_fibo, _tiny_fibo, _grid_of_fibo),
    (
        LongCatImageTransformer2DModel, _of_flux(LongCatImageAttention, LongCatImageAttnProcessor), _example,
        _tiny_longcat, ids_grid,
    ),
    (OvisImageTransformer2DModel, _of_flux(OvisImageAttention, OvisImageAttnProcessor), _example, _tiny_ovis, ids_grid),
):  # fmt: skip
    _sites = dict(zip((f"{BLOCK}attn", f"single_{BLOCK}attn"), _grafts, strict=True))
    register(_model, _sites, _inputs, _tiny, grid=_grid)
