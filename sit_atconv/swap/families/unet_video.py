"""diffusers' U-Nets over videos: what attends within a frame is swapped, what attends over time stays."""

from functools import partial

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import argument
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register

FRAMES = 16  # of a video where the model does not tell


def _shape(model: nn.Module, grid: Grid, frames: int = FRAMES) -> tuple[int, int, int] | None:
    """(frames, height, width) of the latents: the grid given, or the model's own; None where it tells none."""
    size = model.config.sample_size
    if grid is not None or size is None:
        return None if grid is None else tuple(grid)
    return (frames, size, size) if isinstance(size, int) else (frames, *size)


def _noise(model: nn.Module, generator: torch.Generator, shape: tuple) -> torch.Tensor:
    return torch.randn(2, model.config.in_channels, *shape, generator=generator)


def _example(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict | None:
    """Of the three with a text: UNet3DConditionModel, UNetMotionModel, I2VGenXLUNet."""
    shape, width = _shape(model, grid), model.config.cross_attention_dim
    if shape is None or not isinstance(width, int) or getattr(model.config, "addition_embed_type", None):
        return None
    found = {
        "sample": _noise(model, generator, shape),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, text or 77, width, generator=generator),
    }
    if isinstance(model, UNetMotionModel):  # it wants the text of every frame
        found["encoder_hidden_states"] = found["encoder_hidden_states"].repeat_interleave(shape[0], 0)
    if isinstance(model, I2VGenXLUNet):
        found |= {
            "fps": torch.full((2,), 16),
            "image_latents": _noise(model, generator, shape),
            "image_embeddings": torch.randn(2, width, generator=generator),
        }
    return found


def _example_of_image(
    model: UNetSpatioTemporalConditionModel, generator: torch.Generator, grid: Grid = None, text: None = None
) -> dict | None:
    config, shape = model.config, _shape(model, grid, model.config.num_frames)
    if shape is None or not isinstance(config.cross_attention_dim, int):
        return None
    return {
        "sample": _noise(model, generator, shape).transpose(1, 2),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, 1, config.cross_attention_dim, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * 2),  # frames a second, motion, noise
    }


def map_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a module called with the maps of all frames, `hidden_states` (B F, C, H, W)."""
    return tuple(argument("hidden_states", args, kwargs).shape[-2:])


class ATConvUNet3DConditionModel(Swapped, UNet3DConditionModel):
    """ModelScope's U-Net with ATConv within frames; its convolutions and attention over time stay."""


class ATConvUNetMotionModel(TakesLoRA, Swapped, UNetMotionModel):
    """AnimateDiff's U-Net with ATConv within frames; its motion modules stay."""


class ATConvI2VGenXLUNet(Swapped, I2VGenXLUNet):
    """I2VGen-XL's U-Net with ATConv within frames; its convolutions and attention over time stay."""


class ATConvUNetSpatioTemporalConditionModel(Swapped, UNetSpatioTemporalConditionModel):
    """Stable Video Diffusion's U-Net with ATConv within frames; its blocks over time stay."""


TINY = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 12,
}  # fmt: skip


def _tiny_of(model: type[nn.Module]) -> nn.Module:
    """Of UNet3DConditionModel and I2VGenXLUNet."""
    blocks = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
              "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}  # fmt: skip
    return randomised(model(**TINY, **blocks, attention_head_dim=4))


def _tiny_motion() -> UNetMotionModel:
    blocks = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
              "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")}  # fmt: skip
    return randomised(UNetMotionModel(**TINY, **blocks, num_attention_heads=2, motion_num_attention_heads=2))


def _tiny_spatio_temporal() -> UNetSpatioTemporalConditionModel:
    return randomised(UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ))  # fmt: skip


SITES = {rf"(.+\.)?attentions\.\d+\.{BLOCK}attn1": SelfAttentionGraft()}
for _model, _make in (
    (UNet3DConditionModel, partial(_tiny_of, UNet3DConditionModel)),
    (UNetMotionModel, _tiny_motion),
    (I2VGenXLUNet, partial(_tiny_of, I2VGenXLUNet)),
):
    register(_model, SITES, _example, _make, owner=Transformer2DModel, grid=map_grid)
register(
    UNetSpatioTemporalConditionModel,
    SITES,
    _example_of_image,
    _tiny_spatio_temporal,
    owner=TransformerSpatioTemporalModel,
    grid=map_grid,
)
