"""CogVideoX, and ConsisID, which has its blocks."""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.consisid_transformer_3d import ConsisIDTransformer3DModel
from torch import nn

from sit_atconv.swap.adapters import Grid, clip, randomised
from sit_atconv.swap.families.cogview import CogGraft
from sit_atconv.swap.grid import frames_grid, patch_sizes
from sit_atconv.swap.models import BLOCK, Swapped, TakesLoRA, register


def _example(model: nn.Module, generator: torch.Generator, grid: Grid = None, text: int | None = None) -> dict:
    config, (frames, patch, _) = model.config, patch_sizes(model.config)
    if grid is None:
        latents = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        grid = -(-latents // frames), config.sample_height // patch, config.sample_width // patch
    # Without rotary positions, the model adds its own to this many tokens of text.
    length = text if text and config.use_rotary_positional_embeddings else config.max_text_seq_length
    found = {
        "hidden_states": clip(model, generator, grid).transpose(1, 2),
        "encoder_hidden_states": torch.randn(1, length, config.text_embed_dim, generator=generator),
        "timestep": torch.randint(1000, (1,), generator=generator),
    }
    if config.use_rotary_positional_embeddings:
        crop = (0, 0), tuple(grid[1:])
        found["image_rotary_emb"] = get_3d_rotary_pos_embed(config.attention_head_dim, crop, crop[1], grid[0])
    if getattr(config, "ofs_embed_dim", None):
        found["ofs"] = torch.full((1,), 2.0)
    if getattr(config, "is_train_face", False):
        seen = [torch.randn(1, 577, config.LFE_vit_dim, generator=generator) for _ in range(config.LFE_num_scale)]
        found |= {"id_cond": torch.randn(1, config.LFE_id_dim, generator=generator), "id_vit_hidden": seen}
    return found


class ATConvCogVideoXTransformer3DModel(TakesLoRA, Swapped, CogVideoXTransformer3DModel):
    """CogVideoX with ATConv for its video queries."""


class ATConvConsisIDTransformer3DModel(TakesLoRA, Swapped, ConsisIDTransformer3DModel):
    """ConsisID with ATConv for its video queries; the attention to the face stays."""


TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 10, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 6, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def _tiny() -> CogVideoXTransformer3DModel:
    return randomised(CogVideoXTransformer3DModel(**TINY, patch_size_t=2, ofs_embed_dim=8))


def _tiny_of_face() -> ConsisIDTransformer3DModel:
    return randomised(ConsisIDTransformer3DModel(**TINY))


for _model, _make in ((CogVideoXTransformer3DModel, _tiny), (ConsisIDTransformer3DModel, _tiny_of_face)):
    register(_model, {f"{BLOCK}attn1": CogGraft()}, _example, _make, grid=frames_grid, sides=3)
