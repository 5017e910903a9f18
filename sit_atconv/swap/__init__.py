"""ATConv in the place of other people's attention: `swap_attention`, and what extends, saves and loads it."""

from sit_atconv.swap import families  # noqa: F401  (makes the models known)
from sit_atconv.swap.adapters import SwapAdapter, register_adapter
from sit_atconv.swap.delta import load_delta, save_delta
from sit_atconv.swap.grafts import Graft, SelfAttentionGraft
from sit_atconv.swap.grid import ids_grid, latent_grid, volume_grid
from sit_atconv.swap.handle import AttentionSwap
from sit_atconv.swap.joint import JointGraft, Sequence, SingleStreamGraft, Streams
from sit_atconv.swap.layers import LayerOptions
from sit_atconv.swap.regression import regress
from sit_atconv.swap.swapping import swap_attention

__all__ = [
    "AttentionSwap",
    "Graft",
    "JointGraft",
    "LayerOptions",
    "SelfAttentionGraft",
    "Sequence",
    "SingleStreamGraft",
    "Streams",
    "SwapAdapter",
    "ids_grid",
    "latent_grid",
    "load_delta",
    "register_adapter",
    "regress",
    "save_delta",
    "swap_attention",
    "volume_grid",
]
