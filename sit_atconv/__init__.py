"""Diffusion transformers with 3x3 Attentive Convolution (ATConv) in place of self-attention."""

from sit_atconv.layers.atconv import ATConv
from sit_atconv.models.sit import SiTTransformer2DModel, create_model, list_models
from sit_atconv.version import __version__

__all__ = ["ATConv", "SiTTransformer2DModel", "__version__", "create_model", "list_models"]
