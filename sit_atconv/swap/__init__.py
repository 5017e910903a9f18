"""ATConv in the place of other people's attention: `swap_attention`, and what extends, saves and loads it."""

from sit_atconv.swap import models  # noqa: F401  (makes the subclasses known)
from sit_atconv.swap.adapters import SwapAdapter, register_adapter
from sit_atconv.swap.grafts import Graft, LayerOptions
from sit_atconv.swap.swapping import AttentionSwap, swap_attention

__all__ = ["AttentionSwap", "Graft", "LayerOptions", "SwapAdapter", "register_adapter", "swap_attention"]
