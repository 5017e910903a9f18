"""Z-Image."""

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel, ZSingleStreamAttnProcessor

from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import Grid, randomised
from sit_atconv.swap.grid import given
from sit_atconv.swap.joint import Sequence, SingleStreamGraft, rotated
from sit_atconv.swap.models import Swapped, TakesLoRA, register
from sit_atconv.swap.refiners import RefinerGraft


class ZImageGraft(SingleStreamGraft):
    """The attention of Z-Image's layers: image, its padding, text and its padding; only the first is on the grid."""

    cls, processors = Attention, (ZSingleStreamAttnProcessor,)
    image_first = True

    def inputs(self, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None) -> Sequence:
        return Sequence(hidden_states, freqs_cis, attention_mask)

    def rotate(self, x, rope):
        return rotated(x, rope)


def _grid(module: ZImageTransformer2DModel, args: tuple, kwargs: dict) -> tuple[int, int]:
    """From the images `x`, a list of (C, 1, H, W), all of one size."""
    images, patch, frames = (given(name, module, args, kwargs) for name in ("x", "patch_size", "f_patch_size"))
    if any(isinstance(each, list) for each in images):
        raise InputError(
            "x is a list of lists: several images in one sequence make no single grid; a swapped model takes one image "
            "a sample"
        )
    sizes = {tuple(each.shape[1:]) for each in images}
    if len(sizes) > 1 or next(iter(sizes))[0] != frames:
        raise InputError(
            f"x holds images of (frames, height, width) {sorted(sizes)}: a swapped model takes one size in a batch, "
            "of one frame; call it once for each size"
        )
    _, height, width = next(iter(sizes))
    return height // patch, width // patch


def _example(
    model: ZImageTransformer2DModel, generator: torch.Generator, grid: Grid = None, text: int | None = None
) -> dict:
    config, patch = model.config, model.config.all_patch_size[0]
    height, width = (side * patch for side in grid or (128 // patch, 128 // patch))  # an image of 1024 pixels
    frames = config.all_f_patch_size[0]
    return {
        "x": [torch.randn(config.in_channels, frames, height, width, generator=generator)],
        "t": torch.rand(1, generator=generator),
        "cap_feats": [torch.randn(text or 512, config.cap_feat_dim, generator=generator)],
        "patch_size": patch,
        "f_patch_size": frames,
    }


class ATConvZImageTransformer2DModel(TakesLoRA, Swapped, ZImageTransformer2DModel):
    """Z-Image with ATConv in place of the attention over the image alone (`noise_refiner`), and for the image queries
    of its layers ("split"); of one image a sample."""


def _tiny() -> ZImageTransformer2DModel:
    return randomised(ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 2, 2], axes_lens=[1024, 64, 64],
    ))  # fmt: skip


register(
    ZImageTransformer2DModel,
    {
        r"noise_refiner\.\d+\.attention": RefinerGraft(Attention, ZSingleStreamAttnProcessor),
        r"layers\.\d+\.attention": ZImageGraft(),
    },
    _example,
    _tiny,
    grid=_grid,
)
