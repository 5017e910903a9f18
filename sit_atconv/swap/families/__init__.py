"""The families of models that `swap_attention` knows, a module each: what is swapped, and how it is stored."""

from sit_atconv.swap.families import beit, eva, sit, vision, vit  # noqa: F401  (registers their adapters)
from sit_atconv.swap.families.dit import ATConvDiTTransformer2DModel
from sit_atconv.swap.families.flux import ATConvFluxTransformer2DModel
from sit_atconv.swap.families.hunyuan_dit import ATConvHunyuanDiT2DModel
from sit_atconv.swap.families.kandinsky3 import ATConvKandinsky3UNet
from sit_atconv.swap.families.latte import ATConvLatteTransformer3DModel
from sit_atconv.swap.families.pixart import ATConvPixArtTransformer2DModel
from sit_atconv.swap.families.sd3 import ATConvSD3Transformer2DModel
from sit_atconv.swap.families.unet import ATConvUNet2DConditionModel
from sit_atconv.swap.families.unet_2d import ATConvUNet2DModel
from sit_atconv.swap.families.unet_video import (
    ATConvI2VGenXLUNet,
    ATConvUNet3DConditionModel,
    ATConvUNetMotionModel,
    ATConvUNetSpatioTemporalConditionModel,
)
from sit_atconv.swap.families.uvit import ATConvUVit2DModel

__all__ = [
    "ATConvDiTTransformer2DModel",
    "ATConvFluxTransformer2DModel",
    "ATConvHunyuanDiT2DModel",
    "ATConvI2VGenXLUNet",
    "ATConvKandinsky3UNet",
    "ATConvLatteTransformer3DModel",
    "ATConvPixArtTransformer2DModel",
    "ATConvSD3Transformer2DModel",
    "ATConvUNet2DConditionModel",
    "ATConvUNet2DModel",
    "ATConvUNet3DConditionModel",
    "ATConvUNetMotionModel",
    "ATConvUNetSpatioTemporalConditionModel",
    "ATConvUVit2DModel",
]
