"""The families of models that `swap_attention` knows, a module each: what is swapped, and how it is stored."""

from sit_atconv.swap.families import sit, vit  # noqa: F401  (registers their adapters)
from sit_atconv.swap.families.auraflow import ATConvAuraFlowTransformer2DModel
from sit_atconv.swap.families.chroma import ATConvChromaTransformer2DModel
from sit_atconv.swap.families.dit import ATConvDiTTransformer2DModel
from sit_atconv.swap.families.flux import ATConvFluxTransformer2DModel
from sit_atconv.swap.families.flux2 import ATConvFlux2Transformer2DModel
from sit_atconv.swap.families.lumina2 import ATConvLumina2Transformer2DModel
from sit_atconv.swap.families.pixart import ATConvPixArtTransformer2DModel
from sit_atconv.swap.families.qwen_image import ATConvQwenImageTransformer2DModel
from sit_atconv.swap.families.sd3 import ATConvSD3Transformer2DModel
from sit_atconv.swap.families.unet import ATConvUNet2DConditionModel
from sit_atconv.swap.families.z_image import ATConvZImageTransformer2DModel

__all__ = [
    "ATConvAuraFlowTransformer2DModel",
    "ATConvChromaTransformer2DModel",
    "ATConvDiTTransformer2DModel",
    "ATConvFlux2Transformer2DModel",
    "ATConvFluxTransformer2DModel",
    "ATConvLumina2Transformer2DModel",
    "ATConvPixArtTransformer2DModel",
    "ATConvQwenImageTransformer2DModel",
    "ATConvSD3Transformer2DModel",
    "ATConvUNet2DConditionModel",
    "ATConvZImageTransformer2DModel",
]
