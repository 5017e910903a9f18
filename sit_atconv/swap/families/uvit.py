"""diffusers' UViT of aMUSEd, over the tokens of a codebook."""

import torch
from diffusers.models.unets.uvit_2d import UVit2DModel

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import argument
from sit_atconv.swap.models import Swapped, TakesLoRA, register


def id_grid(module: UVit2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a UViT called with `input_ids` (B, H, W), whose first block halves both sides or not."""
    height, width = argument("input_ids", args, kwargs).shape[-2:]
    return (height // 2, width // 2) if module.config.downsample else (height, width)


def _example(model: UVit2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    config = model.config
    sides = [config.sample_size] * 2 if grid is None else [side * (1 + config.downsample) for side in grid]
    micro = config.micro_cond_embed_dim // config.micro_cond_encode_dim
    return {
        "input_ids": torch.randint(config.codebook_size, (2, *sides), generator=generator),
        "encoder_hidden_states": torch.randn(2, text or 77, config.encoder_hidden_size, generator=generator),
        "pooled_text_emb": torch.randn(2, config.cond_embed_dim, generator=generator),
        "micro_conds": torch.rand(2, micro, generator=generator),
    }


class ATConvUVit2DModel(TakesLoRA, Swapped, UVit2DModel):
    """aMUSEd's UViT with ATConv in place of the self-attention of its transformer layers."""


def _tiny() -> UVit2DModel:
    return randomised(UVit2DModel(
        hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=12,
        vocab_size=20, codebook_size=16, in_channels=8, block_out_channels=8, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, sample_size=8, downsample=True, upsample=True,
    ))  # fmt: skip


register(UVit2DModel, {r"transformer_layers\.\d+\.attn1": SelfAttentionGraft()}, _example, _tiny, grid=id_grid)
