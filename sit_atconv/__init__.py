"""Diffusion transformers with 3x3 Attentive Convolution (ATConv) in place of self-attention."""

import importlib
from typing import TYPE_CHECKING

from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers looks for it beside what it loads)

from sit_atconv.layers.atconv import ATConv
from sit_atconv.models.sit import SiTTransformer2DModel, create_model, list_models
from sit_atconv.version import __version__

if TYPE_CHECKING:
    from sit_atconv.pipelines.pipeline_sit import SiTPipeline
    from sit_atconv.swap import swap_attention

__all__ = [
    "ATConv",
    "SiTPipeline",
    "SiTTransformer2DModel",
    "__version__",
    "create_model",
    "list_models",
    "swap_attention",
]

# Slow to import, and most uses do without. The classes of swapped models have this module for their own, so diffusers
# finds them here when it loads a pipeline.
_LAZY = {
    "SiTPipeline": "sit_atconv.pipelines.pipeline_sit",
    "swap_attention": "sit_atconv.swap",
    "ATConvDiTTransformer2DModel": "sit_atconv.swap.models",
    "ATConvFluxTransformer2DModel": "sit_atconv.swap.models",
    "ATConvPixArtTransformer2DModel": "sit_atconv.swap.models",
    "ATConvSD3Transformer2DModel": "sit_atconv.swap.models",
    "ATConvUNet2DConditionModel": "sit_atconv.swap.models",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
