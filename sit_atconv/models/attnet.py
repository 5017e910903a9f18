"""AttNet: a CNN family whose spatial mixing is ATConv (arXiv 2510.20092), registered with timm.

`import sit_atconv.models.attnet`, then `timm.create_model("attnet_t2")` and all that timm does with a model.
"""

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import nn

from sit_atconv.layers.atconv import flatten_pointwise_weights
from sit_atconv.layers.atconv2d import ATConv2d
from sit_atconv.layers.embedders import sincos_position_embedding
from sit_atconv.ops.forward_mode import exact_derivatives
from sit_atconv.runtime.compat.timm import feature_take_indices
from sit_atconv.runtime.errors import InputError

__all__ = ["AttNet"]


register_notrace_module(ATConv2d)


class GatedMLP(nn.Module):
    """Gated linear unit whose gate sees its neighbours: fc2(norm(gelu(dwconv(fc1_g(x))) * fc1_x(x))).

    The published form has one fc1 for both, whose half the depthwise convolution would copy before it begins.
    """

    def __init__(self, dim: int, hidden: int, norm: bool, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1_g = nn.Linear(dim, hidden, **factory)  # 1x1 convolutions in the published form
        self.fc1_x = nn.Linear(dim, hidden, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.norm_layer = RMSNorm(hidden, **factory) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **factory)
        self.register_load_state_dict_pre_hook(split_fc1)
        self.register_load_state_dict_pre_hook(flatten_pointwise_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.permute(0, 2, 3, 1)
        gate = self.dwconv(self.fc1_g(tokens).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.norm_layer(F.gelu(gate) * self.fc1_x(tokens))).permute(0, 3, 1, 2)


def split_fc1(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Hook before a GatedMLP loads its state dict: a published fc1 becomes fc1_g, its first half, and fc1_x."""
    for kind in ("weight", "bias"):
        if (both := state_dict.pop(f"{prefix}fc1.{kind}", None)) is not None:
            state_dict[f"{prefix}fc1_g.{kind}"], state_dict[f"{prefix}fc1_x.{kind}"] = both.chunk(2)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, in the dtype of its input."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)  # under autocast they differ, and torch then has no fused norm
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class AttNetBlock(nn.Module):
    """x + ATConv(norm(x)), then x + GatedMLP(norm(x)), with drop path and, if asked for, layer scale."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        glu_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **factory)

        self.norm_1 = LayerNorm2d(dim, **factory)
        self.token_mixer = ATConv2d(dim, dim, **options, **factory)
        self.layer_scale_1 = scale()
        self.norm_2 = LayerNorm2d(dim, **factory)
        self.channel_mixer = GatedMLP(dim, int(2 / 3 * int(dim * mlp_ratio)), glu_norm, **factory)
        self.layer_scale_2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.layer_scale_1(self.token_mixer(self.norm_1(x))))
        return x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))


class AttNetStage(nn.Module):
    """A downsampling, none in the first stage, and blocks of one width."""

    def __init__(self, downsample: nn.Module, blocks: list[AttNetBlock]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._run(x)
        with exact_derivatives():
            return self._run(x)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        # Again: timm's feature extractors call stem and stages one by one, without what comes before them.
        x = self.downsample(x.contiguous(memory_format=torch.channels_last))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


@register_notrace_module
class PositionEmbedding2d(nn.Module):
    """Adds the fixed sine-cosine embedding of the position, of any grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, channels, height, width = x.shape
        embedding = sincos_position_embedding((height, width), channels, x.device, torch.float32)
        return x + embedding.to(x.dtype).transpose(1, 2).unflatten(2, (height, width))


class AttNet(nn.Module):
    """A CNN of four stages of ATConv and gated MLPs: images (B, in_chans, H, W) of any size -> logits.

    depths, dims, mlp_ratios: blocks, channels and MLP ratio of the stages; the hidden width is int(2/3 int(dim ratio)).
    glu_norm: RMSNorm before the output of the MLP. layer_scale: its start, None for none.
    stem_strides: of the stem's two convolutions; (1, 1) for images of a few pixels.
    pos_embed: add a fixed sine-cosine embedding after the stem, for ablations; the published models have none.
    pool, routing, inhibition, kernel_size: see `ATConv`. The rest is as everywhere in timm.
    The memory format inside is channels-last whatever comes in.
    Raises InputError (a ValueError) where lists do not have one positive entry per stage, or for an unknown option.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 16, 3),
        dims: Sequence[int] = (64, 128, 288, 512),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        glu_norm: bool = True,
        layer_scale: float | None = 1e-6,
        stem_strides: Sequence[int] = (2, 2),
        pos_embed: bool = False,
        kernel_size: int = 3,
        pool: str = "raster",
        routing: str = "adaptive",
        inhibition: str = "learned",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, values, wanted in (("dims", dims, len(depths)), ("mlp_ratios", mlp_ratios, len(depths))):
            if len(values) != wanted:
                raise InputError(f"{name}={list(values)} has {len(values)} entries and depths {wanted}; one per stage")
        for name, values in (("depths", depths), ("dims", dims), ("mlp_ratios", mlp_ratios)):
            if not values or min(values) <= 0:
                raise InputError(f"{name}={list(values)}: give a positive number per stage")
        if len(stem_strides) != 2 or min(stem_strides) < 1:
            raise InputError(f"stem_strides={list(stem_strides)}: give the two strides of the stem, each at least 1")
        if dims[0] < 2:
            raise InputError(f"dims[0]={dims[0]}: the stem begins with half of that; give at least 2")
        if pos_embed and dims[0] % 4:
            raise InputError(f"dims[0]={dims[0]}: the position embedding needs a multiple of 4; or set pos_embed=False")
        factory = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.feature_info = []

        def downsample(channels_in: int, channels_out: int, stride: int = 2, act=None) -> ConvNormAct:
            return ConvNormAct(channels_in, channels_out, 3, stride, padding=1, act_layer=act, **factory)

        self.stem = nn.Sequential(
            downsample(in_chans, dims[0] // 2, stem_strides[0], nn.GELU),
            downsample(dims[0] // 2, dims[0], stem_strides[1]),
        )
        self.pos_embed = PositionEmbedding2d() if pos_embed else nn.Identity()
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        options = {"kernel_size": kernel_size, "pool": pool, "routing": routing, "inhibition": inhibition}
        stages, reduction = [], stem_strides[0] * stem_strides[1]
        for index, (dim, ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            between = downsample(dims[index - 1], dim) if index else nn.Identity()
            blocks = [
                AttNetBlock(dim, ratio, glu_norm, layer_scale, rate, **options, **factory) for rate in rates[index]
            ]
            stages.append(AttNetStage(between, blocks))
            reduction *= 2 if index else 1
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = NormMlpClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=1e-5),
            **factory,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw the starting weights: truncated normal of std 0.02 for linears and convolutions, biases 0."""
        if next(self.parameters()).is_meta:
            return  # nothing to draw into, and torch takes seconds to do so
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns of parameter names by layer, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Patterns of the parameters without weight decay, beside those that timm spares anyway."""
        there = any(name.endswith("difference_control") for name, _ in self.named_parameters())
        return {"*.difference_control"} if there else set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training runs the blocks again in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier of `num_classes`, 0 for none; with `reset_other` the norm before it goes."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            **get_device_dtype(self),
        )

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Feature maps after the stages: a list, or (final features, list). `norm` is of the head and not for maps.

        indices: the last n if a number, all if None, else those listed. stop_early: run no stage after the last wanted.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        taken, last = feature_take_indices(len(self.stages), indices)
        x = self._embed(x)
        intermediates = []
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and the head if asked or no longer fitting; the kept indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        prune_end = last < len(self.stages) - 1
        del self.stages[last + 1 :]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "", reset_other=True)
        return taken

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.jit.is_scripting():
            return self.pos_embed(self.stem(x))
        with exact_derivatives():
            return self.pos_embed(self.stem(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) -> the last stage's feature map."""
        return self.stages(self._embed(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map -> pooled, normed features (`pre_logits`), or logits."""
        if torch.jit.is_scripting():
            return self.head(x, pre_logits=pre_logits)
        with exact_derivatives():
            return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_PUBLIC_NAMES = (
    (r"^downsample_layers\.0\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.0\.1\.", "stem.0.bn."),
    (r"^downsample_layers\.0\.2\.0\.", "stem.1.conv."),
    (r"^downsample_layers\.0\.2\.1\.", "stem.1.bn."),
    (r"^downsample_layers\.([1-9])\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.([1-9])\.1\.", r"stages.\1.downsample.bn."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module | None = None) -> dict:
    """The names of a public AttNet checkpoint turned into ours; our own pass as they are."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    if "stem.0.conv.weight" in state_dict:
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, ours in _PUBLIC_NAMES:
            name, found = re.subn(pattern, ours, name)
            if found:
                break
        renamed[name] = tensor
    return renamed


_PRESETS = {
    "attnet_xxs": {"depths": (2, 2, 4, 2), "dims": (32, 64, 128, 240), "glu_norm": False, "layer_scale": None},
    "attnet_xs": {"depths": (2, 2, 7, 2), "dims": (40, 80, 160, 320), "glu_norm": False},
    "attnet_s": {"depths": (2, 3, 10, 3), "dims": (40, 80, 160, 320), "glu_norm": False, "layer_scale": None},
    "attnet_t1": {"depths": (2, 3, 12, 3), "dims": (48, 96, 224, 384)},
    "attnet_t2": {"depths": (3, 3, 16, 3), "dims": (64, 128, 288, 512)},
    "attnet_t3": {"depths": (4, 4, 26, 4), "dims": (72, 144, 320, 576)},
    "attnet_t4": {"depths": (5, 5, 28, 5), "dims": (96, 192, 384, 768)},
}
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.0.conv",
    "classifier": "head.fc",
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _PRESETS})


def options_of(name: str) -> dict[str, Any]:
    """The options of the AttNet of that name, but for images, classes and placement; of another model none."""
    if name not in _PRESETS:
        return {}
    _, *parameters = inspect.signature(AttNet.__init__).parameters.values()
    others = ("in_chans", "num_classes", "device", "dtype")
    return {each.name: each.default for each in parameters if each.name not in others} | _PRESETS[name]


def _create(name: str, pretrained: bool, **kwargs) -> AttNet:
    return build_model_with_cfg(
        AttNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**_PRESETS[name], **kwargs},
    )


@register_model
def attnet_xxs(pretrained=False, **kwargs) -> AttNet:
    """AttNet-XXS: 2.85 M parameters."""
    return _create("attnet_xxs", pretrained, **kwargs)


@register_model
def attnet_xs(pretrained=False, **kwargs) -> AttNet:
    """AttNet-XS: 5.55 M parameters."""
    return _create("attnet_xs", pretrained, **kwargs)


@register_model
def attnet_s(pretrained=False, **kwargs) -> AttNet:
    """AttNet-S: 7.68 M parameters."""
    return _create("attnet_s", pretrained, **kwargs)


@register_model
def attnet_t1(pretrained=False, **kwargs) -> AttNet:
    """AttNet-T1: 13.71 M parameters."""
    return _create("attnet_t1", pretrained, **kwargs)


@register_model
def attnet_t2(pretrained=False, **kwargs) -> AttNet:
    """AttNet-T2: 27.01 M parameters, 84.4% ImageNet-1k top-1 as published."""
    return _create("attnet_t2", pretrained, **kwargs)


@register_model
def attnet_t3(pretrained=False, **kwargs) -> AttNet:
    """AttNet-T3: 49.18 M parameters."""
    return _create("attnet_t3", pretrained, **kwargs)


@register_model
def attnet_t4(pretrained=False, **kwargs) -> AttNet:
    """AttNet-T4: 87.32 M parameters."""
    return _create("attnet_t4", pretrained, **kwargs)
