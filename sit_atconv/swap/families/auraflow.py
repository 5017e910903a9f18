"""AuraFlow."""

import torch
from diffusers.models.attention_processor import Attention, AuraFlowAttnProcessor2_0
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowTransformer2DModel

from sit_atconv.swap.adapters import Grid, latents, randomised
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class AuraFlowJointGraft(JointGraft):
    """The attention of AuraFlow's joint blocks, whose text begins with the model's registers."""

    cls, processors = Attention, (AuraFlowAttnProcessor2_0,)


class AuraFlowSingleGraft(SingleStreamGraft):
    """The attention of AuraFlow's single blocks."""

    cls, processors = Attention, (AuraFlowAttnProcessor2_0,)


def _example(
    model: AuraFlowTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    side = min(64, int(model.config.pos_embed_max_size**0.5))  # an image of 1024 pixels
    return {
        "hidden_states": latents(model, generator, grid or (side, side)),
        "encoder_hidden_states": torch.randn(2, text or 256, model.config.joint_attention_dim, generator=generator),
        "timestep": torch.rand(2, generator=generator),
    }


class ATConvAuraFlowTransformer2DModel(TakesLoRA, Swapped, AuraFlowTransformer2DModel):
    """AuraFlow with ATConv for its image queries."""


def _tiny() -> AuraFlowTransformer2DModel:
    return randomised(AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=144,
    ))  # fmt: skip


register(
    AuraFlowTransformer2DModel,
    {f"joint_{BLOCK}attn": AuraFlowJointGraft(), f"single_{BLOCK}attn": AuraFlowSingleGraft()},
    _example,
    _tiny,
)
