"""Diffusion transformers with 3x3 Attentive Convolution (ATConv) in place of self-attention."""

from typing import TYPE_CHECKING

from sit_atconv.layers.atconv import ATConv
from sit_atconv.models.sit import SiTTransformer2DModel, create_model, list_models
from sit_atconv.version import __version__

if TYPE_CHECKING:
    from sit_atconv.pipelines.pipeline_sit import SiTPipeline

__all__ = ["ATConv", "SiTPipeline", "SiTTransformer2DModel", "__version__", "create_model", "list_models"]


def __getattr__(name: str):
    if name == "SiTPipeline":  # diffusers' pipelines are slow to import, and most uses do without
        from sit_atconv.pipelines.pipeline_sit import SiTPipeline

        return SiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
