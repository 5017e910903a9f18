"""Diffusion transformers with 3x3 Attentive Convolution (ATConv) in place of self-attention.

Nothing is loaded before it is used: `import sit_atconv` does not import torch.
"""

import sys
from typing import TYPE_CHECKING

from sit_atconv.runtime.lazy import Renamed, lazily
from sit_atconv.version import __version__

if TYPE_CHECKING:
    from sit_atconv.layers.atconv import ATConv
    from sit_atconv.models.sit import SiTTransformer2DModel, create_model, list_models
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

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ATConv": "sit_atconv.layers.atconv",
        "SiTPipeline": "sit_atconv.pipelines.pipeline_sit",
        "SiTTransformer2DModel": "sit_atconv.models.sit",
        "create_model": "sit_atconv.models.sit",
        "list_models": "sit_atconv.models.sit",
        "swap_attention": "sit_atconv.swap",
        # The classes of swapped models have this module for their own, so diffusers finds them here when it loads a
        # pipeline. It looks for ModelMixin beside them.
        "ModelMixin": "diffusers.models.modeling_utils",
    },
    {"ATConv": "sit_atconv.swap.families"},
)

# Where modules lay up to version 0.1.
_ROOMS = {
    "runtime": (
        "claims", "comparison", "compat", "console", "devices", "draws", "errors", "fields", "files", "hooks",
        "limits", "markdown", "processes", "reading", "sharding", "signals", "vit", "weights",
    ),
    "training": ("checkpoint", "ema"),
}  # fmt: skip
sys.meta_path.insert(
    0,
    Renamed(
        {f"sit_atconv.{name}": f"sit_atconv.{room}.{name}" for room, names in _ROOMS.items() for name in names}
        | {"sit_atconv.images": "sit_atconv.runtime.pictures"}
    ),
)
