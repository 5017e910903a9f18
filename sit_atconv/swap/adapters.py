"""Which attention of which model is swapped: a registry by model class, open to models of one's own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grafts import Graft, SelfAttentionGraft, SiTAttentionGraft
from sit_atconv.swap.grid import Reader, above, latent_grid, raster_of_ids
from sit_atconv.swap.joint import FluxDoubleGraft, FluxSingleGraft, SD3JointGraft
from sit_atconv.swap.marking import check_sit, check_thin, mark_nothing, mark_sit, mark_thin
from sit_atconv.swap.prefix import PrefixGraft, check_vit, patch_grid

Example = Callable[[nn.Module, torch.Generator], dict]


@dataclass(frozen=True)
class SwapAdapter:
    """How the attention of a class of models is found and replaced.

    model: the class, and those that derive from it, where `check` lets them.
    sites: Graft by pattern, which the whole name of an attention matches.
    grid: reads the grid (H, W) from the arguments of `owner`: the class of the nearest module above the attention that
        sees it, or the name of such a module; None where the attention is called with its grid.
    example: keyword arguments of one forward pass on random inputs of the model's own size, for calibration where none
        is given; None if there is no telling.
    mark: brings class and configuration of the model in line with its layers, after a swap or a revert; see `models`.
    check: given the model and the settings of a swap to come, raises InputError where they do not go together.
    sides: of the grid that the tokens fill: 2 (H, W), or 3 (T, H, W).
    """

    model: type[nn.Module]
    sites: Mapping[str, Graft]
    owner: type[nn.Module] | str | None = None
    grid: Reader | None = None
    example: Example | None = None
    mark: Callable[[nn.Module], None] = mark_nothing
    check: Callable[[nn.Module, dict], None] = lambda model, config: None
    sides: int = 2

    def find(self, model: nn.Module) -> dict[str, Graft]:
        """Name -> Graft of all attentions that the patterns match, in the model's order."""
        found = {}
        for name, _ in model.named_modules():
            graft = next((graft for pattern, graft in self.sites.items() if re.fullmatch(pattern, name)), None)
            if graft is not None:
                found[name] = graft
        return found

    def owner_of(self, model: nn.Module, name: str) -> nn.Module | None:
        """The module whose input tells the grid of the attention `name`. Raises InputError where there is none."""
        if self.owner is None:
            return None
        if isinstance(self.owner, str):
            return model.get_submodule(self.owner)
        owner = next((module for module in above(model, name) if isinstance(module, self.owner)), None)
        if owner is None:
            raise InputError(f"{name} has no {self.owner.__name__} above it, which would tell its grid")
        return owner


_ADAPTERS: list[SwapAdapter] = []


def register_adapter(adapter: SwapAdapter) -> None:
    """Make `swap_attention` know a class of models; the adapter registered last for a class is the one used."""
    _ADAPTERS.insert(0, adapter)


def adapter_of(model: nn.Module) -> SwapAdapter:
    """The adapter of the model's class, or of the nearest class it derives from. Raises InputError for an unknown."""
    for cls in type(model).__mro__:
        for adapter in _ADAPTERS:
            if adapter.model is cls:
                return adapter
    known = ", ".join(sorted({adapter.model.__name__ for adapter in _ADAPTERS}))
    raise InputError(
        f"no adapter for {type(model).__name__}; known are {known}; for another class call "
        "sit_atconv.swap.register_adapter(SwapAdapter(...))"
    )


def _latents(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    size = model.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, model.config.in_channels, height, width, generator=generator)


def _sit_example(model: SiTTransformer2DModel, generator: torch.Generator) -> dict:
    return {
        "hidden_states": _latents(model, generator),
        "timestep": torch.rand(2, generator=generator),
        "class_labels": torch.randint(model.config.num_classes, (2,), generator=generator),
    }


def _dit_example(model: DiTTransformer2DModel, generator: torch.Generator) -> dict:
    return {
        "hidden_states": _latents(model, generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "class_labels": torch.randint(model.config.num_embeds_ada_norm, (2,), generator=generator),
    }


def _pixart_example(model: PixArtTransformer2DModel, generator: torch.Generator) -> dict | None:
    config, extra = model.config, {"resolution": None, "aspect_ratio": None}
    if config.caption_channels is None:
        return None  # what it takes for captions, its configuration does not tell
    if model.use_additional_conditions:
        extra = {"resolution": torch.full((2, 2), 8.0 * config.sample_size), "aspect_ratio": torch.ones(2, 1)}
    return {
        "hidden_states": _latents(model, generator),
        "encoder_hidden_states": torch.randn(2, 120, config.caption_channels, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "added_cond_kwargs": extra,
    }


def _unet_example(model: UNet2DConditionModel, generator: torch.Generator) -> dict | None:
    config = model.config
    if config.addition_embed_type or model.class_embedding is not None or model.encoder_hid_proj is not None:
        return None  # conditions of the model's own making
    if not isinstance(config.cross_attention_dim, int) or config.sample_size is None:
        return None
    return {
        "sample": _latents(model, generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim, generator=generator),
    }


def _sd3_example(model: SD3Transformer2DModel, generator: torch.Generator) -> dict:
    config = model.config
    return {
        "hidden_states": _latents(model, generator),
        "encoder_hidden_states": torch.randn(2, 154, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.randint(1000, (2,), generator=generator),
    }


def _flux_example(model: FluxTransformer2DModel, generator: torch.Generator) -> dict:
    config, side, length = model.config, 64, 512  # an image of 1024 pixels, and the longest prompt
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return {
        "hidden_states": torch.randn(1, side**2, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(length, 3, dtype=torch.long),
        "guidance": torch.full((1,), 3.5) if config.guidance_embeds else None,
    }


def _vit_example(model: VisionTransformer, generator: torch.Generator) -> dict | None:
    size = model.patch_embed.img_size
    return None if size is None else {"x": torch.randn(2, model.in_chans, *size, generator=generator)}


def _of_diffusers(
    model: type[nn.Module],
    sites: Mapping[str, Graft],
    example: Example,
    owner: type[nn.Module] | None = None,
    grid: Reader = latent_grid,
) -> SwapAdapter:
    """For a model of diffusers that has an ATConv subclass. owner: by default the model itself."""
    return SwapAdapter(model, sites, owner or model, grid, example, mark_thin, check_thin)


BLOCK = r"transformer_blocks\.\d+\."
for each in (
    SwapAdapter(
        SiTTransformer2DModel,
        {r"blocks\.\d+\.attn": SiTAttentionGraft()},
        example=_sit_example,
        mark=mark_sit,
        check=check_sit,
    ),
    _of_diffusers(DiTTransformer2DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _dit_example),
    _of_diffusers(PixArtTransformer2DModel, {f"{BLOCK}attn1": SelfAttentionGraft()}, _pixart_example),
    _of_diffusers(
        UNet2DConditionModel,
        {rf"(.+\.)?attentions\.\d+\.{BLOCK}attn1": SelfAttentionGraft()},
        _unet_example,
        owner=Transformer2DModel,
    ),
    _of_diffusers(
        SD3Transformer2DModel,
        {f"{BLOCK}attn": SD3JointGraft(), f"{BLOCK}attn2": SelfAttentionGraft()},
        _sd3_example,
    ),
    _of_diffusers(
        FluxTransformer2DModel,
        {f"{BLOCK}attn": FluxDoubleGraft(), f"single_{BLOCK}attn": FluxSingleGraft()},
        _flux_example,
        grid=raster_of_ids,
    ),
    SwapAdapter(
        VisionTransformer,
        {r"blocks\.\d+\.(attns\.\d+\.)?attn": PrefixGraft()},
        "patch_embed",
        patch_grid,
        _vit_example,
        check=check_vit,
    ),
):
    register_adapter(each)
