"""diffusers' Hunyuan-DiT."""

import torch
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel

from sit_atconv.swap.adapters import Grid, latents, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import Swapped, register


class HunyuanGraft(SelfAttentionGraft):
    """Its `attn1`: queries and keys, their norms and rotary positions go, values and output map stay."""

    processors = (HunyuanAttnProcessor2_0,)


def _example(model: HunyuanDiT2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    config = model.config
    image = latents(model, generator, grid)
    height, width = (side // config.patch_size for side in image.shape[-2:])
    crop = (0, 0), (height, width)
    found = {
        "hidden_states": image,
        "timestep": torch.randint(1000, (2,), generator=generator).float(),
        "encoder_hidden_states": torch.randn(2, config.text_len, config.cross_attention_dim, generator=generator),
        "text_embedding_mask": torch.arange(config.text_len).expand(2, -1) < (text or config.text_len),
        "encoder_hidden_states_t5": torch.randn(
            2, config.text_len_t5, config.cross_attention_dim_t5, generator=generator
        ),
        "text_embedding_mask_t5": torch.arange(config.text_len_t5).expand(2, -1) < (text or config.text_len_t5),
        "image_rotary_emb": get_2d_rotary_pos_embed(config.attention_head_dim, crop, (height, width), output_type="pt"),
    }
    if config.use_style_cond_and_image_meta_size:
        side = 8.0 * image.shape[-1]  # original, target and crop sizes of the image, in pixels
        found |= {"image_meta_size": torch.tensor([[side] * 4 + [0.0] * 2] * 2), "style": torch.zeros(2).long()}
    return found


class ATConvHunyuanDiT2DModel(Swapped, HunyuanDiT2DModel):
    """Hunyuan-DiT with ATConv in place of its self-attention; the attention to the text and the skips stay."""


def _tiny() -> HunyuanDiT2DModel:
    return randomised(HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=12, hidden_size=16,
        num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5,
        text_len_t5=6,
    ))  # fmt: skip


register(HunyuanDiT2DModel, {r"blocks\.\d+\.attn1": HunyuanGraft()}, _example, _tiny)
