"""HunyuanVideo and HunyuanVideo 1.5."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15Transformer3DModel,
)

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.joint import JointGraft, Streams, with_text
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class HunyuanVideoDoubleGraft(JointGraft):
    """The attention of HunyuanVideo's double blocks; positions are the video's."""

    cls, processors = Attention, (HunyuanVideoAttnProcessor2_0,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        """attention_mask: (B, 1, 1, N + T), over the video and the text after it."""
        text = with_text(encoder_hidden_states)
        if attention_mask is not None:
            attention_mask = attention_mask.roll(text.shape[1], -1)
        return Streams(hidden_states, text, image_rotary_emb, None, attention_mask)


class HunyuanVideoSingleGraft(HunyuanVideoDoubleGraft):
    """The attention of its single blocks: text and video have their maps in common; the output map is the block's."""

    text = JointGraft.image
    norms = ("norm_q", "norm_k") * 2
    out = text_out = None


class HunyuanVideo15Graft(JointGraft):
    """The attention of HunyuanVideo 1.5; positions are the video's. Text that does not count attends to what does,
    and to nothing in the original: nothing reads it in either."""

    cls, processors = Attention, (HunyuanVideo15AttnProcessor2_0,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        """attention_mask: (B, T), over the text."""
        return Streams(hidden_states, with_text(encoder_hidden_states), image_rotary_emb, None, attention_mask)


def _example(
    model: HunyuanVideoTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 129 frames at 720 x 1280."""
    config = model.config
    return {
        "hidden_states": clip(model, generator, grid or (33, 45, 80)),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_hidden_states": torch.randn(1, text or 256, config.text_embed_dim, generator=generator),
        "encoder_attention_mask": torch.ones(1, text or 256, dtype=torch.long),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "guidance": torch.full((1,), 6000.0) if config.guidance_embeds else None,
    }


def _example_of_15(
    model: HunyuanVideo15Transformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 121 frames at 480 x 848, or for a model of larger ones at 720 x 1280; as many tokens of text as it takes
    in all, of which the last ones are of the second encoder. The image is none where it makes videos of text alone."""
    config = model.config
    image = torch.randn if config.task_type == "i2v" else torch.zeros
    second = 256 if text is None else text
    return {
        "hidden_states": clip(model, generator, grid or ((31, 45, 80) if config.target_size > 640 else (31, 30, 53))),
        "timestep": 1000 * torch.rand(1, generator=generator),
        "timestep_r": torch.zeros(1) if config.use_meanflow else None,
        "encoder_hidden_states": torch.randn(1, text or 1000, config.text_embed_dim, generator=generator),
        "encoder_attention_mask": torch.ones(1, text or 1000, dtype=torch.long),
        "encoder_hidden_states_2": torch.randn(1, second, config.text_embed_2_dim, generator=generator),
        "encoder_attention_mask_2": torch.ones(1, second, dtype=torch.long),
        "image_embeds": image(1, 729, config.image_embed_dim),
    }


class ATConvHunyuanVideoTransformer3DModel(TakesLoRA, Swapped, HunyuanVideoTransformer3DModel):
    """HunyuanVideo with ATConv for its video queries."""


class ATConvHunyuanVideo15Transformer3DModel(TakesLoRA, Swapped, HunyuanVideo15Transformer3DModel):
    """HunyuanVideo 1.5 with ATConv for its video queries."""


TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 10, "rope_axes_dim": (2, 2, 4), "patch_size": 1,
}  # fmt: skip


def _tiny() -> HunyuanVideoTransformer3DModel:
    return randomised(HunyuanVideoTransformer3DModel(**TINY, num_single_layers=2, pooled_projection_dim=6))


def _tiny_of_15() -> HunyuanVideo15Transformer3DModel:
    return randomised(HunyuanVideo15Transformer3DModel(**TINY, text_embed_2_dim=6, image_embed_dim=8, task_type="t2v"))


register(
    HunyuanVideoTransformer3DModel,
    {f"{BLOCK}attn": HunyuanVideoDoubleGraft(), f"single_{BLOCK}attn": HunyuanVideoSingleGraft()},
    _example,
    _tiny,
    sides=3,
)
register(
    HunyuanVideo15Transformer3DModel, {f"{BLOCK}attn": HunyuanVideo15Graft()}, _example_of_15, _tiny_of_15, sides=3
)
