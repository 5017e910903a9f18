"""Allegro."""

import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.models import BLOCK, Swapped, register


class AllegroGraft(SelfAttentionGraft):
    """Its `attn1`: queries and keys, and their rotary positions go, values and output map stay."""

    processors = (AllegroAttnProcessor2_0,)


def _example(
    model: AllegroTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config = model.config
    frames, height, width = grid or (
        config.sample_frames // config.patch_size_t,
        config.sample_height // config.patch_size,
        config.sample_width // config.patch_size,
    )
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim, ((0, 0), (height, width)), (height, width), frames
    )
    places = torch.cartesian_prod(*(axis.long() for axis in (t, h, w))).T[:, None]
    return {
        "hidden_states": clip(model, generator, (frames, height, width)),
        "encoder_hidden_states": torch.randn(1, text or 512, config.caption_channels, generator=generator),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_attention_mask": torch.ones(1, text or 512),
        "image_rotary_emb": (tuple(tables), tuple(places)),
    }


class ATConvAllegroTransformer3DModel(Swapped, AllegroTransformer3DModel):
    """Allegro with ATConv in place of its self-attention."""


def _tiny() -> AllegroTransformer3DModel:
    return randomised(AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_height=8, sample_width=8, sample_frames=4, caption_channels=10,
    ))  # fmt: skip


register(AllegroTransformer3DModel, {f"{BLOCK}attn1": AllegroGraft()}, _example, _tiny, sides=3)
