"""timm's VisionTransformer."""

import torch
from timm.models.vision_transformer import VisionTransformer

from sit_atconv.swap.adapters import SwapAdapter, register_adapter
from sit_atconv.swap.prefix import PrefixGraft, check_vit, patch_grid


def _example(model: VisionTransformer, generator: torch.Generator) -> dict | None:
    size = model.patch_embed.img_size
    return None if size is None else {"x": torch.randn(2, model.in_chans, *size, generator=generator)}


register_adapter(
    SwapAdapter(
        VisionTransformer,
        {r"blocks\.\d+\.(attns\.\d+\.)?attn": PrefixGraft()},
        "patch_embed",
        patch_grid,
        _example,
        check=check_vit,
    )
)
