"""Lumina Image 2."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0, Lumina2Transformer2DModel

from sit_atconv.swap.adapters import Grid, latents, randomised
from sit_atconv.swap.joint import Layout, Sequence, SingleStreamGraft, rotated
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import Swapped, TakesLoRA, register
from sit_atconv.swap.refiners import RefinerGraft


class Lumina2Graft(SingleStreamGraft):
    """The attention of Lumina's layers: text, image and padding, so that the image begins where its sample's text ends.

    Heads share keys and values.
    """

    cls, processors = Attention, (Lumina2AttnProcessor2_0,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
        base_sequence_length=None,
    ) -> Sequence:  # fmt: skip
        refuse(base_sequence_length=base_sequence_length)
        return Sequence(hidden_states, image_rotary_emb, attention_mask)

    def rotate(self, x, rope):
        return rotated(x, rope)

    def kv_heads(self, attention):
        return attention.inner_kv_dim * attention.heads // attention.inner_dim

    def layout(self, found, count):
        if found.mask is None:
            return super().layout(found, count)
        start, length = found.mask.sum(1, keepdim=True) - count, found.tokens.shape[1] - count
        rest = torch.arange(length, device=start.device)
        return Layout(length, places=(rest + count * (rest >= start), start + torch.arange(count, device=start.device)))


def _example(
    model: Lumina2Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    return {
        "hidden_states": latents(model, generator, grid),
        "timestep": torch.rand(2, generator=generator),
        "encoder_hidden_states": torch.randn(2, text or 256, model.config.cap_feat_dim, generator=generator),
        "encoder_attention_mask": torch.ones(2, text or 256, dtype=torch.bool),
    }


class ATConvLumina2Transformer2DModel(TakesLoRA, Swapped, Lumina2Transformer2DModel):
    """Lumina Image 2 with ATConv in place of the attention over the image alone (`noise_refiner`), and for the image
    queries of its layers ("split")."""


def _tiny() -> Lumina2Transformer2DModel:
    return randomised(Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64),
        cap_feat_dim=12,
    ))  # fmt: skip


register(
    Lumina2Transformer2DModel,
    {
        r"noise_refiner\.\d+\.attn": RefinerGraft(Attention, Lumina2AttnProcessor2_0),
        r"layers\.\d+\.attn": Lumina2Graft(),
    },
    _example,
    _tiny,
)
