"""transformers' vision models, whose adapters are registered when one arrives: nothing here imports the library.

Their classes and configurations say nothing of a swap: `save_delta` and `load_delta` store it, and `save_pretrained`
refuses. Attentions that are asked for (output_attentions) leave out those of swapped layers, which have none.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from sit_atconv.swap.adapters import Grid, SwapAdapter, await_adapters, randomised, register_adapter
from sit_atconv.swap.grid import argument
from sit_atconv.swap.layers import refuse
from sit_atconv.swap.prefix import Maps, PrefixATConv, PrefixGraft, check_prefix


def rotated(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys (B, heads, N, d) at their rotary positions, cos and sin (N, d) of which have equal halves."""
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


class VisionATConv(PrefixATConv):
    """`PrefixATConv`, called as transformers calls an attention: gives what it mixed, and None for the softmax."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_,
    ) -> tuple[torch.Tensor, None]:
        refuse(attention_mask=attention_mask)
        positions = position_embeddings
        rotate = None if positions is None else partial(rotated, cos=positions[0], sin=positions[1])
        return self.mix(hidden_states, rotate), None


class VisionGraft(PrefixGraft):
    """An attention of transformers with maps q_proj, k_proj, v_proj and one for the output, of the class `wanted`."""

    layer = VisionATConv
    of = "transformers' "

    def __init__(self, attention: type[nn.Module]):
        self.wanted = (attention,)

    def refusal(self, attention: nn.Module) -> str | None:
        if type(attention) in self.wanted and not hasattr(attention, "q_proj"):
            return "has no map q_proj, as those of transformers before 5; upgrade it: pip install 'transformers>=5.24'"
        return super().refusal(attention)

    def linears(self, attention: nn.Module) -> tuple[str, ...]:
        return "q_proj", "k_proj", "v_proj", "o_proj" if hasattr(attention, "o_proj") else "out_proj"

    def maps(self, attention: nn.Module) -> Maps:
        heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
        dropout = attention.dropout if hasattr(attention, "dropout") else attention.attention_dropout
        return Maps(*(attention.get_submodule(name) for name in self.linears(attention)), heads, dropout=dropout)

    def tokens(self, attention, args, kwargs) -> torch.Tensor:
        return argument("hidden_states", args, kwargs)

    def approximated(self, layer, output, args, kwargs):
        return output[0][:, layer.prefix :]


def image_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a vision model of transformers, called with `pixel_values` (B, C, H, W)."""
    height, width = argument("pixel_values", args, kwargs).shape[-2:]
    down, right = _patch(module.config)
    return height // down, width // right


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _patch(config) -> tuple[int, int]:
    return _pair(config.patch_size)


def _one(config) -> int:
    return 1


def _with_registers(config) -> int:
    return 1 + config.num_register_tokens


SITES = r"(.+\.)?layers?\.\d+\.(attention|self_attn)"


@dataclass(frozen=True)
class Family:
    """The models of one module of transformers, `name` and "Attention" being their class of attention.

    owners: the classes that are called with images; the first gives all tokens, and has a tiny model. others: those
    that hold one of them. prefix: how many tokens come before the patches, given the configuration.
    """

    module: str
    name: str
    owners: tuple[str, ...]
    others: tuple[str, ...]
    prefix: Callable[[object], int]

    def register(self) -> None:
        """Register the adapters of all classes; imports their module."""
        library = importlib.import_module(self.module)
        graft = VisionGraft(getattr(library, f"{self.name}Attention"))
        owners = tuple(getattr(library, name) for name in self.owners)

        def prefix_tokens(model: nn.Module) -> int:
            return self.prefix(_owner(model, owners).config)

        def check(model: nn.Module, config: dict) -> None:
            check_prefix(model, config, prefix_tokens(model))

        for name in (*self.owners, *self.others):
            model = getattr(library, name)
            register_adapter(
                SwapAdapter(
                    model,
                    {SITES: graft},
                    owners,
                    image_grid,
                    partial(_example, owners),
                    check=check,
                    tiny=partial(_tiny, model) if name == self.owners[0] else None,
                    prefix_tokens=prefix_tokens,
                )
            )


def _owner(model: nn.Module, owners: tuple[type[nn.Module], ...]) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, owners))


def _example(owners: tuple, model: nn.Module, generator: torch.Generator, grid: Grid = None, text: None = None) -> dict:
    """Images; of another size than the model's own, with the word for it that some models ask for."""
    owner = _owner(model, owners)
    config, size = owner.config, owner.config.image_size
    sides = [side * patch for side, patch in zip(grid, _patch(config), strict=True)] if grid else _pair(size)
    found = {"pixel_values": torch.randn(2, config.num_channels, *sides, generator=generator)}
    if grid and "interpolate_pos_encoding" in inspect.signature(owner.forward).parameters:
        found["interpolate_pos_encoding"] = True
    return found


def _tiny(model: type[nn.Module]) -> nn.Module:
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    both = "vision_config" in model.config_class.sub_configs
    return randomised(model(model.config_class(**({"vision_config": shape} if both else shape))))


FAMILIES = [
    Family(f"transformers.models.{module}.modeling_{module}", name, owners, others, prefix)
    for module, name, owners, others, prefix in (
        ("vit", "ViT", ("ViTModel",), ("ViTForImageClassification",), _one),
        ("vit_msn", "ViTMSN", ("ViTMSNModel",), ("ViTMSNForImageClassification",), _one),
        ("ijepa", "IJepa", ("IJepaModel",), ("IJepaForImageClassification",), lambda config: 0),
        (
            "deit",
            "DeiT",
            ("DeiTModel",),
            ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
            lambda config: 2,
        ),
        ("dinov2", "Dinov2", ("Dinov2Model", "Dinov2Backbone"), ("Dinov2ForImageClassification",), _one),
        (
            "dinov2_with_registers",
            "Dinov2WithRegisters",
            ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
            ("Dinov2WithRegistersForImageClassification",),
            _with_registers,
        ),
        ("dinov3_vit", "DINOv3ViT", ("DINOv3ViTModel", "DINOv3ViTBackbone"), (), _with_registers),
        (
            "clip",
            "CLIP",
            ("CLIPVisionModel",),
            ("CLIPVisionModelWithProjection", "CLIPForImageClassification"),
            _one,
        ),
        (
            "metaclip_2",
            "MetaClip2",
            ("MetaClip2VisionModel",),
            ("MetaClip2VisionModelWithProjection", "MetaClip2ForImageClassification"),
            _one,
        ),
        ("altclip", "AltCLIP", ("AltCLIPVisionModel",), (), _one),
        ("chinese_clip", "ChineseCLIPVision", ("ChineseCLIPVisionModel",), (), _one),
        ("clipseg", "CLIPSeg", ("CLIPSegVisionModel",), (), _one),
        ("owlvit", "OwlViT", ("OwlViTVisionModel",), (), _one),
        ("owlv2", "Owlv2", ("Owlv2VisionModel",), (), _one),
        ("git", "GitVision", ("GitVisionModel",), (), _one),
        ("siglip", "Siglip", ("SiglipVisionModel",), ("SiglipForImageClassification",), lambda config: 0),
    )
]
for _family in FAMILIES if importlib.util.find_spec("transformers") is not None else ():
    await_adapters(_family.module, (*_family.owners, *_family.others), _family.register)
