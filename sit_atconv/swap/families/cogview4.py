"""CogView4."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor, CogView4Transformer2DModel

from sit_atconv.swap.adapters import Grid, latents, randomised
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class CogView4Graft(JointGraft):
    """The attention of CogView4's blocks: text and image share maps. A mask (B, T) adds 1 to the logits of the pairs
    that it lets count, which is what diffusers makes of it."""

    cls, processors = Attention, (CogView4AttnProcessor,)
    text = JointGraft.image
    norms = ("norm_q", "norm_k", "norm_q", "norm_k")
    text_out = "to_out"

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ) -> Streams:
        if attention_mask is not None:
            counts = F.pad(attention_mask > 0, (0, hidden_states.shape[1]), value=True)
            attention_mask = (counts[:, None, :, None] & counts[:, None, None]).to(hidden_states.dtype)
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb, mask=attention_mask)

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, use_real_unbind_dim=-2, sequence_dim=1)


def _example(
    model: CogView4Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    image = latents(model, generator, grid)
    pixels = torch.tensor([[8.0 * side for side in image.shape[2:]]] * 2)
    return {
        "hidden_states": image,
        "encoder_hidden_states": torch.randn(2, text or 1024, model.config.text_embed_dim, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "original_size": pixels,
        "target_size": pixels,
        "crop_coords": torch.zeros(2, 2),
    }


class ATConvCogView4Transformer2DModel(TakesLoRA, Swapped, CogView4Transformer2DModel):
    """CogView4 with ATConv for its image queries."""


def _tiny() -> CogView4Transformer2DModel:
    return randomised(CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=12, time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
    ))  # fmt: skip


register(CogView4Transformer2DModel, {f"{BLOCK}attn1": CogView4Graft()}, _example, _tiny)
