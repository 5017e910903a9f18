"""Flux.2."""

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SwiGLU,
    Flux2Transformer2DModel,
)

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.families.flux import packed
from sit_atconv.swap.grid import ids_grid
from sit_atconv.swap.joint import JointGraft, SingleStreamGraft
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, TakesNoImagePrompt, register

_activation = Flux2SwiGLU()  # it has no weights


class Flux2DoubleGraft(JointGraft):
    """The attention of Flux.2's double blocks."""

    cls, processors = Flux2Attention, (Flux2AttnProcessor,)

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **extra):
        refuse(attention_mask=attention_mask, kv_cache_mode=extra.get("kv_cache_mode"))
        return super().inputs(hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)


class Flux2SingleGraft(SingleStreamGraft):
    """The attention of Flux.2's single blocks. Its input map is that of the MLP too, and so is its output map: the MLP
    stays as it is."""

    cls, processors = Flux2ParallelSelfAttention, (Flux2ParallelSelfAttnProcessor,)
    image = ("to_qkv_mlp_proj",)

    def inputs(self, hidden_states, attention_mask=None, image_rotary_emb=None, **extra):
        refuse(attention_mask=attention_mask, kv_cache_mode=extra.get("kv_cache_mode"))
        return super().inputs(hidden_states, image_rotary_emb=image_rotary_emb)

    def sizes(self, attention):
        return attention.query_dim, attention.inner_dim

    def whole(self, module, found):
        made = module.to_qkv_mlp_proj(found.tokens)
        channels = (
            made.shape[-1] - 2 * module.to_out.in_features
        )  # it gives 3 of them and 2 of the MLP, that takes 1 + 1
        *heads, mlp = made.split([channels, channels, channels, made.shape[-1] - 3 * channels], -1)
        return self.headed(module, self.norms, heads, found.rope), mlp

    def output(self, module, call, text, image):
        return module.to_out(torch.cat([call.layout.join(text, image), _activation(call.rest)], -1))


def with_text_column(
    model: torch.nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """`packed`, with ids of four columns, of which the last numbers the text."""
    inputs = packed(model, generator, grid, text)
    length = len(inputs["txt_ids"])
    inputs["img_ids"] = F.pad(inputs["img_ids"], (0, 1))
    inputs["txt_ids"] = torch.cat([inputs["txt_ids"], torch.arange(length)[:, None]], 1)
    return inputs


def _example(
    model: Flux2Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    return with_text_column(model, generator, grid, text) | {
        "timestep": torch.rand(1, generator=generator),
        "guidance": torch.full((1,), 4.0) if model.config.guidance_embeds else None,
    }


class ATConvFlux2Transformer2DModel(TakesNoImagePrompt, TakesLoRA, Swapped, Flux2Transformer2DModel):
    """Flux.2 with ATConv for its image queries; of one image, without references and their cache."""


def _tiny() -> Flux2Transformer2DModel:
    return randomised(Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    ))  # fmt: skip


register(
    Flux2Transformer2DModel,
    {f"{BLOCK}attn": Flux2DoubleGraft(), f"single_{BLOCK}attn": Flux2SingleGraft()},
    _example,
    _tiny,
    grid=ids_grid,
)
