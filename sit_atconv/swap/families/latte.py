"""diffusers' Latte, a transformer over videos."""

import torch
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, register


def _example(
    model: LatteTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config = model.config
    sides = [config.sample_size] * 2 if grid is None else [side * config.patch_size for side in grid[-2:]]
    shape = 2, config.in_channels, config.video_length, *sides  # no other length: the model has positions for it alone
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, text or 120, config.caption_channels, generator=generator),
    }


class ATConvLatteTransformer3DModel(Swapped, LatteTransformer3DModel):
    """Latte with ATConv in the blocks over the tokens of a frame.

    The blocks over time keep their attention: few tokens each, with no neighbours in space.
    """


def _tiny() -> LatteTransformer3DModel:
    return randomised(LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        sample_size=12, cross_attention_dim=16, caption_channels=10, video_length=3, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", attention_bias=True, norm_elementwise_affine=False,
    ))  # fmt: skip


register(LatteTransformer3DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _example, _tiny)
