"""diffusers' U-Net without text, whose attention takes feature maps."""

import copy

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from sit_atconv.swap.adapters import Grid, SwapAdapter, latents, randomised, register_adapter
from sit_atconv.swap.grafts import SelfAttentionGraft, observed
from sit_atconv.swap.grid import argument
from sit_atconv.swap.layers import LayerOptions, SelfATConv
from sit_atconv.swap.marking import check_thin, mark_thin
from sit_atconv.swap.models import Swapped


class MapATConv(SelfATConv):
    """(x + to_out(K2 * to_v(group_norm(x)))) / rescale for maps x (B, C, H, W), whose grid is their own.

    attention: gives norm, residual connection and rescaling, which the layer keeps as they are.
    Raises InputError for a context or an attention mask, which ATConv has no use for.
    """

    def __init__(self, attention: Attention, options: LayerOptions):
        out, dropout = attention.to_out
        super().__init__(attention.to_v, out, None, options, dropout.p)
        self.group_norm = copy.deepcopy(attention.group_norm)
        if self.group_norm is not None:
            self.group_norm.requires_grad_()
        self.residual, self.rescale = attention.residual_connection, attention.rescale_output_factor

    def output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        mixed = self.mix(x.permute(0, 2, 3, 1)).transpose(1, 2).unflatten(2, x.shape[2:])
        return (mixed + hidden_states if self.residual else mixed) / self.rescale


class MapGraft(SelfAttentionGraft):
    """diffusers' `Attention` on maps (B, C, H, W), with a norm by group, a residual connection and a rescaled output.

    The error of a layer is relative to all of that, the residual connection too.
    """

    kept = ("normalises by group", "has a residual connection of its own", "rescales its output")

    def traits(self, attention: Attention) -> dict[str, bool]:
        return {name: has for name, has in super().traits(attention).items() if name not in self.kept}

    def build(self, attention: Attention, reference: None, options: LayerOptions) -> MapATConv:
        return MapATConv(attention, options)

    def copy(self, attention: Attention, layer: MapATConv) -> None:
        super().copy(attention, layer)
        if layer.group_norm is not None:
            layer.group_norm.load_state_dict(attention.group_norm.state_dict())

    def observe(self, attention, layer, args, kwargs):
        x = argument("hidden_states", args, kwargs)
        x = (x if layer.group_norm is None else layer.group_norm(x)).flatten(2).transpose(1, 2)
        return observed(attention, attention.to_v, attention.to_out[0], x, args, kwargs)

    def grid(self, layer, args, kwargs) -> tuple[int, int]:
        return tuple(argument("hidden_states", args, kwargs).shape[2:])


def _example(model: UNet2DModel, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict | None:
    if model.config.sample_size is None and grid is None:
        return None
    found = {
        "sample": latents(model, generator, grid),
        "timestep": torch.randint(1000, (2,), generator=generator),
    }
    if isinstance(model.class_embedding, nn.Embedding):
        found["class_labels"] = torch.randint(model.class_embedding.num_embeddings, (2,), generator=generator)
    return found if model.class_embedding is None or "class_labels" in found else None


class ATConvUNet2DModel(Swapped, UNet2DModel):
    """The U-Net without text with ATConv in place of its attention, at every resolution that has some."""


def _tiny() -> UNet2DModel:
    return randomised(UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"), mid_block_scale_factor=2.0,
    ))  # fmt: skip


register_adapter(
    SwapAdapter(
        UNet2DModel,
        {r"(.+\.)?attentions\.\d+": MapGraft()},
        example=_example,
        mark=mark_thin,
        check=check_thin,
        tiny=_tiny,
    )
)
