"""Mochi."""

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class MochiGraft(JointGraft):
    """Its `attn1`; every head has positions of its own. Text that does not count attends to what does, and is zero in
    the original: nothing reads it in either."""

    cls, processors = MochiAttention, (MochiAttnProcessor2_0,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        """attention_mask: (B, T), over the text."""
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb, None, attention_mask)

    def rotate(self, x, rope):
        """rope: cosine and sine (N, heads, head_dim / 2)."""
        (even, odd), (cosine, sine) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rope
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).type_as(x)


def _example(
    model: MochiTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 163 frames at 480 x 848."""
    config = model.config
    length = text or config.max_sequence_length
    return {
        "hidden_states": clip(model, generator, grid or (28, 30, 53)),
        "encoder_hidden_states": torch.randn(1, length, config.text_embed_dim, generator=generator),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_attention_mask": torch.ones(1, length, dtype=torch.bool),
    }


class ATConvMochiTransformer3DModel(TakesLoRA, Swapped, MochiTransformer3DModel):
    """Mochi with ATConv for its video queries."""


def _tiny() -> MochiTransformer3DModel:
    return randomised(MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=8, time_embed_dim=4,
    ))  # fmt: skip


register(MochiTransformer3DModel, {f"{BLOCK}attn1": MochiGraft()}, _example, _tiny, sides=3)
