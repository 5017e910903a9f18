"""timm's VisionTransformer."""

import torch
from timm.models.vision_transformer import VisionTransformer

from sit_atconv.swap.adapters import Grid, SwapAdapter, register_adapter
from sit_atconv.swap.prefix import PrefixGraft, check_vit, patch_grid


def _example(model: VisionTransformer, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict | None:
    embed = model.patch_embed
    size = (
        embed.img_size if grid is None else [side * patch for side, patch in zip(grid, embed.patch_size, strict=True)]
    )
    return None if size is None else {"x": torch.randn(2, model.in_chans, *size, generator=generator)}


def _tiny() -> VisionTransformer:
    return VisionTransformer(  # without a head, which reads either the class token or the patches of the last block
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0, global_pool="",
        dynamic_img_size=True,
    )  # fmt: skip


register_adapter(
    SwapAdapter(
        VisionTransformer,
        {r"blocks\.\d+\.(attns\.\d+\.)?attn": PrefixGraft()},
        "patch_embed",
        patch_grid,
        _example,
        check=check_vit,
        tiny=_tiny,
    )
)
