"""Tiny models of joint attention, with random weights, and inputs for them."""

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

HEADS, HEAD_DIM, TEXT, PATCH = 2, 8, 5, 2


def sd3(**changed):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        **{
            "sample_size": 8, "patch_size": PATCH, "in_channels": 4, "out_channels": 4, "num_layers": 3,
            "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "joint_attention_dim": 12,
            "caption_projection_dim": HEADS * HEAD_DIM, "pooled_projection_dim": 10, "pos_embed_max_size": 12,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm", **changed,
        }
    )  # fmt: skip
    return random_weights(model)


def flux(**changed):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        **{
            "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS, "joint_attention_dim": 12, "pooled_projection_dim": 10,
            "axes_dims_rope": (2, 2, 4), **changed,
        }
    )  # fmt: skip
    return random_weights(model)


def random_weights(model):
    """Norms and biases too, and maps large enough for attention that is not flat."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def sd3_inputs(grid, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, PATCH * grid[0], PATCH * grid[1], generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.full((batch,), 300),
    }


def raster(grid):
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()


def flux_inputs(grid, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.full((batch,), 0.3),
        "img_ids": raster(grid),
        "txt_ids": torch.arange(3.0 * TEXT).view(TEXT, 3),  # not zeros, which would rotate nothing
    }
