"""Wan, and the models that have its blocks."""

from functools import partial

import torch
from diffusers.models.transformers import transformer_anyflow as anyflow
from diffusers.models.transformers import transformer_chronoedit as chronoedit
from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from diffusers.models.transformers import transformer_wan as wan
from diffusers.models.transformers import transformer_wan_animate as animate
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import nn

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.grafts import SelfAttentionGraft
from sit_atconv.swap.grid import frames_grid, volume_grid
from sit_atconv.swap.models import Swapped, TakesLoRA, register


class WanGraft(SelfAttentionGraft):
    """Its `attn1`, and the copies of it in other modules: queries and keys, their norms and rotary positions go, values
    and output map stay."""

    cls, processors = wan.WanAttention, (wan.WanAttnProcessor,)

    def tokens(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().tokens(hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)


def _example(
    model: nn.Module,
    generator: torch.Generator,
    grid: Grid = None,
    text: int | None = None,
    own: tuple[int, int, int] = (21, 30, 52),
) -> dict:
    """own: the grid of 81 frames at 480 x 832, or of what the model is for."""
    config = model.config
    length = (
        512 if getattr(config, "added_kv_proj_dim", None) else text or 512
    )  # with an image, the attention counts on this length
    found = {
        "hidden_states": clip(model, generator, grid or own),
        "timestep": torch.randint(1000, (1,), generator=generator),
        "encoder_hidden_states": torch.randn(1, length, config.text_dim, generator=generator),
    }
    if config.image_dim:
        images = 2 if getattr(config, "pos_embed_seq_len", None) else 1  # the first frame, or this and the last one
        found["encoder_hidden_states_image"] = torch.randn(images, 257, config.image_dim, generator=generator)
    return found


def _example_of_control(model: WanVACETransformer3DModel, generator: torch.Generator, grid: Grid = None, text=None):
    found = _example(model, generator, grid, text)
    shape = 1, model.config.vace_in_channels, *found["hidden_states"].shape[2:]
    return found | {"control_hidden_states": torch.randn(shape, generator=generator)}


def _example_of_animation(
    model: animate.WanAnimateTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Of a video whose first frame is the character: poses of the others, and a face for each of their pixels' frames.

    Its own: 77 frames at 720 x 1280.
    """
    config, found = model.config, _example(model, generator, grid, text, (21, 45, 80))
    frames, height, width = found["hidden_states"].shape[2:]
    face = 1, 3, 4 * (frames - 2) + 1, config.motion_encoder_size, config.motion_encoder_size
    return found | {
        "pose_hidden_states": torch.randn(1, config.latent_channels, frames - 1, height, width, generator=generator),
        "face_pixel_values": torch.randn(face, generator=generator),
    }


def _example_of_skyreels(
    model: skyreels.SkyReelsV2Transformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    """Its own: 97 frames at 544 x 960."""
    found = _example(model, generator, grid, text, (25, 34, 60))
    return found | ({"fps": [0]} if model.config.inject_sample_info else {})


def _example_of_flow(
    model: anyflow.AnyFlowTransformer3DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    found = _example(model, generator, grid, text)
    frames = found["hidden_states"].transpose(1, 2)
    times = 1000 * torch.rand(2, 1, frames.shape[1], generator=generator)
    return found | {"hidden_states": frames, "timestep": times.amax(0), "r_timestep": times.amin(0)}


def _grid_of_skyreels(module: skyreels.SkyReelsV2Transformer3DModel, args: tuple, kwargs: dict) -> tuple[int, ...]:
    """Raises InputError for a model whose blocks of frames see none that come later."""
    if module.config.num_frame_per_block > 1:
        raise InputError(
            f"num_frame_per_block={module.config.num_frame_per_block}: a swapped layer sees all frames, and this model "
            "attends from blocks of frames to no later ones; set it to 1, or use the unswapped model"
        )
    return volume_grid(module, args, kwargs)


class ATConvWanTransformer3DModel(TakesLoRA, Swapped, wan.WanTransformer3DModel):
    """Wan with ATConv in place of its self-attention; the attention to text and image stays."""


class ATConvWanVACETransformer3DModel(TakesLoRA, Swapped, WanVACETransformer3DModel):
    """Wan-VACE with ATConv in place of its self-attention, in the blocks of the control too."""


class ATConvWanAnimateTransformer3DModel(TakesLoRA, Swapped, animate.WanAnimateTransformer3DModel):
    """Wan-Animate with ATConv in place of its self-attention; the attention to faces stays."""


class ATConvChronoEditTransformer3DModel(TakesLoRA, Swapped, chronoedit.ChronoEditTransformer3DModel):
    """ChronoEdit with ATConv in place of its self-attention."""


class ATConvSkyReelsV2Transformer3DModel(TakesLoRA, Swapped, skyreels.SkyReelsV2Transformer3DModel):
    """SkyReels-V2 with ATConv in place of its self-attention; not with blocks of frames that see no later ones."""


class ATConvAnyFlowTransformer3DModel(TakesLoRA, Swapped, anyflow.AnyFlowTransformer3DModel):
    """AnyFlow with ATConv in place of its self-attention."""


def _tiny_of(model: type[nn.Module], **more) -> nn.Module:
    return randomised(model(**{
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    } | more))  # fmt: skip


FACES = {
    "in_channels": 12, "latent_channels": 4, "image_dim": 8, "motion_encoder_size": 16, "motion_style_dim": 8,
    "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
}  # fmt: skip
_ANIMATE, _CHRONO = ((module.WanAttention, module.WanAttnProcessor) for module in (animate, chronoedit))
_FLOW = anyflow.AnyFlowAttention, anyflow.AnyFlowAttnProcessor
_SKYREELS = skyreels.SkyReelsV2Attention, skyreels.SkyReelsV2AttnProcessor
for _model, _own, _inputs, _more, _read in (
    (wan.WanTransformer3DModel, (), _example, {}, None),
    (WanVACETransformer3DModel, (), _example_of_control, {"vace_layers": [0], "vace_in_channels": 6}, None),
    (animate.WanAnimateTransformer3DModel, _ANIMATE, _example_of_animation, FACES, None),
    (chronoedit.ChronoEditTransformer3DModel, _CHRONO, _example, {}, None),
    (anyflow.AnyFlowTransformer3DModel, _FLOW, _example_of_flow, {}, frames_grid),
    (skyreels.SkyReelsV2Transformer3DModel, _SKYREELS, _example_of_skyreels, {}, _grid_of_skyreels),
):
    register(
        _model,
        {r"(vace_)?blocks\.\d+\.attn1": WanGraft(*_own)},
        _inputs,
        partial(_tiny_of, _model, **_more),
        grid=_read,
        sides=3,
    )
