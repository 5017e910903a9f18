"""CogView3-Plus and CogView4."""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cogview3plus import CogView3PlusTransformer2DModel
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor, CogView4Transformer2DModel
from torch import nn

from sit_atconv.swap.adapters import Grid, latents, randomised
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register

# Of samples packed into one sequence, with flags of which is which.
PACKED = ("latent_attn_mask", "text_attn_mask", "batch_flag")


class SharedMapsGraft(JointGraft):
    """An attention that is called with text and image apart, and has the same maps and norms for both."""

    text = JointGraft.image
    norms = ("norm_q", "norm_k", "norm_q", "norm_k")
    text_out = "to_out"


class CogGraft(SharedMapsGraft):
    """The attention of CogView3-Plus' and CogVideoX's blocks; positions are those of the image or the video."""

    processors = (CogVideoXAttnProcessor2_0,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ) -> Streams:
        refuse(attention_mask=attention_mask)
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb)


class CogView4Graft(SharedMapsGraft):
    """The attention of CogView4's blocks. A mask (B, T) adds 1 to the logits of the pairs that it lets count, which is
    what diffusers makes of it."""

    cls, processors = Attention, (CogView4AttnProcessor,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **extra
    ) -> Streams:
        refuse(**{name: extra.get(name) for name in PACKED})
        if attention_mask is not None:
            counts = F.pad(attention_mask > 0, (0, hidden_states.shape[1]), value=True)
            attention_mask = (counts[:, None, :, None] & counts[:, None, None]).to(hidden_states.dtype)
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb, mask=attention_mask)

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, use_real_unbind_dim=-2, sequence_dim=1)


def _example(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
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


class ATConvCogView3PlusTransformer2DModel(Swapped, CogView3PlusTransformer2DModel):
    """CogView3-Plus with ATConv for its image queries."""


class ATConvCogView4Transformer2DModel(TakesLoRA, Swapped, CogView4Transformer2DModel):
    """CogView4 with ATConv for its image queries."""


_TINY = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 8,
}  # fmt: skip


def _tiny_3() -> CogView3PlusTransformer2DModel:
    return randomised(CogView3PlusTransformer2DModel(**_TINY, pos_embed_max_size=16))


def _tiny_4() -> CogView4Transformer2DModel:
    return randomised(CogView4Transformer2DModel(**_TINY, rope_axes_dim=(16, 16)))


register(CogView3PlusTransformer2DModel, {f"{BLOCK}attn1": CogGraft()}, _example, _tiny_3)
register(CogView4Transformer2DModel, {f"{BLOCK}attn1": CogView4Graft()}, _example, _tiny_4)
