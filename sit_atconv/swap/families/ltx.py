"""LTX-Video and LTX-2."""

import math

import torch
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    LTX2VideoTransformer3DModel,
)
from torch import nn

from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft, linear_refusal
from sit_atconv.swap.grid import argument, coords_grid, given
from sit_atconv.swap.layers import SelfATConv, refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class LTXGraft(SelfAttentionGraft):
    """Its `attn1`: queries and keys, their norms and rotary positions go, values and output map stay."""

    cls, processors = LTXAttention, (LTXVideoAttnProcessor,)


class LTX2ATConv(SelfATConv):
    """to_out(g (K2 * v)), v = to_v(x), g = 2 sigmoid(to_gate_logits(x)) per head, as the attention has it; without the
    gate where that has none.

    perturbation_mask (B, 1, 1): 0 where a sample gets v itself in the place of K2 * v. all_perturbed: all of them.
    """

    def __init__(self, attention: LTX2Attention, out: nn.Linear, *others):
        super().__init__(attention.to_v, out, *others)
        gate, self.heads, self.to_gate_logits = attention.to_gate_logits, attention.heads, None
        if gate is not None:
            self.to_gate_logits = nn.Linear(gate.in_features, gate.out_features, bias=gate.bias is not None)
            self.to(out.weight.device, out.weight.dtype)
            self.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
        **others,
    ) -> torch.Tensor:
        refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        self.warn_of(others)
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and not perturbation_mask.any()
        grid = self.reference.get()
        x = on_grid(hidden_states, grid)
        v = self.to_v(x)
        mixed = v.flatten(1, -2) if all_perturbed else self.convolve(x, v).flatten(1, -2)
        if perturbation_mask is not None and not all_perturbed:
            mixed = torch.lerp(v.flatten(1, -2), mixed, perturbation_mask.to(mixed.dtype))
        if self.to_gate_logits is not None:
            mixed = mixed.unflatten(-1, (self.heads, -1)) * gates(self, hidden_states)
            mixed = mixed.flatten(-2)
        return self.to_out[1](self.to_out[0](mixed))


def gates(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(B, N, heads, 1), by which an attention of LTX-2, or the layer for it, multiplies its heads."""
    return 2 * module.to_gate_logits(x).sigmoid()[..., None]


class LTX2Graft(SelfAttentionGraft):
    """Its `attn1`, the attention of the video alone: as LTX's, and the gate stays."""

    cls, processors = LTX2Attention, (LTX2AudioVideoAttnProcessor, LTX2PerturbedAttnProcessor)

    def refusal(self, attention):
        gate = () if getattr(attention, "to_gate_logits", None) is None else ("to_gate_logits",)
        return super().refusal(attention) or linear_refusal(attention, *gate)

    def build(self, attention, reference, options) -> LTX2ATConv:
        out, dropout = attention.to_out
        return LTX2ATConv(attention, out, reference, options, dropout.p)

    def copy(self, attention, layer: LTX2ATConv) -> None:
        """Of a gated attention the maps as they are: the gate is between the bias of its values and the output map."""
        if layer.to_gate_logits is None:
            return super().copy(attention, layer)
        for name in ("to_v", "to_out.0", "to_gate_logits"):
            ours, theirs = layer.get_submodule(name), attention.get_submodule(name)
            for key, parameter in ours.named_parameters():
                source = getattr(theirs, key)
                parameter.data.zero_() if source is None else parameter.data.copy_(source)
        return None

    def observe(self, attention, layer, args, kwargs):
        values, mixed = super().observe(attention, layer, args, kwargs)
        if layer.to_gate_logits is None:
            return values, mixed
        x, bias = argument("hidden_states", args, kwargs), attention.to_v.bias
        bias = 0 if bias is None else bias.to(values.dtype)
        mixed = (mixed + bias).unflatten(-1, (layer.heads, -1)) / gates(attention, x)
        return values + bias, mixed.flatten(-2)


def _grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int, int]:
    """From `video_coords` (B, 3, N) or (B, 3, N, 2), where they are given, else from num_frames, height and width."""
    coords = given("video_coords", module, args, kwargs)
    if coords is not None:
        return coords_grid(coords[..., 0] if coords.ndim == 4 else coords)
    sides = tuple(given(name, module, args, kwargs) for name in ("num_frames", "height", "width"))
    count = argument("hidden_states", args, kwargs).shape[1]
    if None in sides or math.prod(sides) != count:
        raise InputError(
            f"num_frames, height, width = {sides}: these are no volume of {count} tokens; give the sides of the latents"
        )
    return sides


def _example(
    model: LTXVideoTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 161 frames at 512 x 704."""
    config, sides = model.config, tuple(grid or (21, 16, 22))
    return {
        "hidden_states": torch.randn(1, math.prod(sides), config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, text or 128, config.caption_channels, generator=generator),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_attention_mask": torch.ones(1, text or 128),
    } | dict(zip(("num_frames", "height", "width"), sides, strict=True))


def _example_of_sound(
    model: LTX2VideoTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 121 frames at 512 x 768, and their sound."""
    config, sides = model.config, tuple(grid or (16, 16, 24))
    sounds, length = 8 * sides[0], text or 1024
    widths = config.cross_attention_dim, config.audio_cross_attention_dim
    if config.use_prompt_embeddings:
        widths = config.caption_channels, config.caption_channels
    time = 1000 * torch.rand(1, generator=generator)
    return {
        "hidden_states": torch.randn(1, math.prod(sides), config.in_channels, generator=generator),
        "audio_hidden_states": torch.randn(1, sounds, config.audio_in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, widths[0], generator=generator),
        "audio_encoder_hidden_states": torch.randn(1, length, widths[1], generator=generator),
        "timestep": time,
        "sigma": time,
        "audio_num_frames": sounds,
    } | dict(zip(("num_frames", "height", "width"), sides, strict=True))


class ATConvLTXVideoTransformer3DModel(TakesLoRA, Swapped, LTXVideoTransformer3DModel):
    """LTX-Video with ATConv in place of its self-attention; not with keyframes beside the video."""


class ATConvLTX2VideoTransformer3DModel(TakesLoRA, Swapped, LTX2VideoTransformer3DModel):
    """LTX-2 with ATConv in place of the self-attention of the video; that of the sound, and all between both, stays."""


def _tiny() -> LTXVideoTransformer3DModel:
    return randomised(LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=10,
    ))  # fmt: skip


def _tiny_of_sound() -> LTX2VideoTransformer3DModel:
    return randomised(LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        gated_attn=True, perturbed_attn=True, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=10,
    ))  # fmt: skip


register(LTXVideoTransformer3DModel, {f"{BLOCK}attn1": LTXGraft()}, _example, _tiny, grid=_grid, sides=3)
register(
    LTX2VideoTransformer3DModel, {f"{BLOCK}attn1": LTX2Graft()}, _example_of_sound, _tiny_of_sound, grid=_grid, sides=3
)
