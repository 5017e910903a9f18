"""Krea 2."""

from functools import partial

import torch
from diffusers.models.transformers.transformer_krea2 import Krea2Attention, Krea2AttnProcessor, Krea2Transformer2DModel

from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.families.flux import packed
from sit_atconv.swap.grid import ids_grid
from sit_atconv.swap.joint import SingleStreamGraft
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class Krea2Graft(SingleStreamGraft):
    """The attention of Krea 2's blocks: heads share keys and values, and a gate of the tokens stays as it is."""

    cls, processors = Krea2Attention, (Krea2AttnProcessor,)
    more, norm_weight = ("to_gate",), 0.0  # its norms scale by 1 + weight

    def kv_heads(self, attention):
        return attention.num_kv_heads

    def whole(self, module, found):
        heads, _ = super().whole(module, found)
        return heads, module.to_gate(found.tokens).sigmoid()

    def output(self, module, call, text, image):
        return module.to_out[0](call.layout.join(text, image) * call.rest)


def _example(
    model: Krea2Transformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, length = model.config, text or 512
    inputs = packed(model, generator, grid, length, of_text=(config.num_text_layers, config.text_hidden_dim))
    return inputs | {
        "timestep": torch.rand(1, generator=generator),
        "position_ids": torch.cat([inputs.pop("txt_ids"), inputs.pop("img_ids")]),
        "encoder_attention_mask": torch.ones(1, length, dtype=torch.bool),
    }


class ATConvKrea2Transformer2DModel(TakesLoRA, Swapped, Krea2Transformer2DModel):
    """Krea 2 with ATConv for its image queries; the attention of its text fusion stays."""


def _tiny() -> Krea2Transformer2DModel:
    return randomised(Krea2Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=12, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=8, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ))  # fmt: skip


register(
    Krea2Transformer2DModel,
    {f"{BLOCK}attn": Krea2Graft()},
    _example,
    _tiny,
    grid=partial(ids_grid, name="position_ids", image="hidden_states"),
)
