"""The SiT of this library."""

import torch

from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.swap.adapters import Grid, SwapAdapter, latents, register_adapter
from sit_atconv.swap.grafts import SiTAttentionGraft
from sit_atconv.swap.marking import check_sit, mark_sit


def _example(model: SiTTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict:
    return {
        "hidden_states": latents(model, generator, grid),
        "timestep": torch.rand(2, generator=generator),
        "class_labels": torch.randint(model.config.num_classes, (2,), generator=generator),
    }


def _tiny() -> SiTTransformer2DModel:
    return SiTTransformer2DModel(sample_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10)


register_adapter(
    SwapAdapter(
        SiTTransformer2DModel,
        {r"blocks\.\d+\.attn": SiTAttentionGraft()},
        example=_example,
        mark=mark_sit,
        check=check_sit,
        tiny=_tiny,
    )
)
