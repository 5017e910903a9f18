"""Qwen-Image."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformer2DModel,
)

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grid import check_count, given
from sit_atconv.swap.joint import JointGraft, Streams, rotated, with_text
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


class QwenImageGraft(JointGraft):
    """The joint attention of Qwen-Image's blocks."""

    cls, processors = Attention, (QwenDoubleStreamAttnProcessor2_0,)

    def inputs(
        self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_mask=None,
        image_rotary_emb=None, **_,
    ) -> Streams:  # fmt: skip
        refuse(attention_mask=attention_mask)
        ropes = (None, None) if image_rotary_emb is None else image_rotary_emb
        return Streams(hidden_states, with_text(encoder_hidden_states), *ropes, encoder_hidden_states_mask)

    def rotate(self, x, rope):
        return rotated(x, rope)


def _grid(module: QwenImageTransformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From `img_shapes`, (1, H, W) or a list of such ones, for a sample each: one image of one size."""
    shapes = given("img_shapes", module, args, kwargs)
    if not shapes:
        raise InputError("img_shapes: none were given, and they tell the grid of the image tokens; give [[(1, H, W)]]")
    samples = [
        each if isinstance(each, list) else [each] for each in (shapes if isinstance(shapes, list) else [shapes])
    ]
    found = {tuple(map(int, shape)) for sample in samples for shape in sample}
    if len(found) > 1 or any(len(sample) > 1 for sample in samples) or next(iter(found))[0] != 1:
        raise InputError(
            f"img_shapes={shapes}: a swapped model takes one image a sample, of one frame and of one size in a batch; "
            "edit, and draw layers, with the unswapped model"
        )
    grid = next(iter(found))[1:]
    check_count(grid, f"img_shapes={shapes}", given("hidden_states", module, args, kwargs))
    return grid


def _example(
    model: QwenImageTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, (height, width) = model.config, grid or (64, 64)  # an image of 1024 pixels
    extra = {"additional_t_cond": torch.zeros(1, dtype=torch.long)} if config.use_additional_t_cond else {}
    return {
        "hidden_states": torch.randn(1, height * width, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, text or 512, config.joint_attention_dim, generator=generator),
        "encoder_hidden_states_mask": None,
        "timestep": torch.rand(1, generator=generator),
        "img_shapes": [[(1, height, width)]],
    } | extra


class ATConvQwenImageTransformer2DModel(TakesLoRA, Swapped, QwenImageTransformer2DModel):
    """Qwen-Image with ATConv for its image queries; of one image, without references and layers."""


def _tiny() -> QwenImageTransformer2DModel:
    return randomised(QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 2, 2),
    ))  # fmt: skip


register(QwenImageTransformer2DModel, {f"{BLOCK}attn": QwenImageGraft()}, _example, _tiny, grid=_grid)
