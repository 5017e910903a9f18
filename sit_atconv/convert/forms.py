"""Other layouts of the same model <-> the public SiT layout, which is ours: REPA, and diffusers' DiT."""

import inspect
import math
import re
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from sit_atconv.convert.layout import check_values
from sit_atconv.layers.embedders import sincos_position_embedding
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.reading import fault_of

POINTWISE = re.compile(r"blocks\.\d+\.attn\.(kernel_proj|x_proj|proj)\.weight")
TIME_WEIGHT = "t_embedder.mlp.0.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
REPA_FOLDED = [f"t -> 1 - t into {TIME_WEIGHT}", f"v -> -v into {' and '.join(OUTPUT)}"]

# What decides the function of a DiTTransformer2DModel, and the values that a SiT block computes.
DIT_CONFIG = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6, 1e-5),
}
DIT_SIZES = range(1, limits.PIXELS.most + 1)  # of heads, patches and latents
DIT_NAMES = [
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
]


def is_repa(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors have REPA's form: projectors, or 1x1 convolutions (C, C, 1, 1) in an ATConv layer."""
    return any(
        name.startswith("projectors.") or (POINTWISE.fullmatch(name) and tensor.ndim == 4)
        for name, tensor in tensors.items()
    )


def from_repa(source: str, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(model, projectors) of a REPA checkpoint, the model with t = 0 noise and v = data - noise.

    REPA has t = 1 noise and v = noise - data. The layer that absorbs time is in fp32 at least.
    Raises InputError when it is not there, or what is folded is not made of finite floats.
    """
    for name in (TIME_WEIGHT, *OUTPUT):
        if name in tensors:
            check_values(source, name, tensors[name])
    projectors = {name: tensor for name, tensor in tensors.items() if name.startswith("projectors.")}
    model = {
        name: tensor.flatten(1) if POINTWISE.fullmatch(name) and tensor.shape[2:] == (1, 1) else tensor
        for name, tensor in tensors.items()
        if name not in projectors
    }
    return _reverse_time(model), projectors


def to_repa(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model that `from_repa` took apart, with its time direction and its 1x1 convolutions in the ATConv layers."""
    atconv = {name.rpartition(".attn.")[0] for name in model if name.endswith(".attn.x_proj.weight")}
    return {
        name: tensor[:, :, None, None]
        if POINTWISE.fullmatch(name) and name.rpartition(".attn.")[0] in atconv
        else tensor
        for name, tensor in _reverse_time(model).items()
    }


def _reverse_time(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of -f(x, 1 - t) from those of f(x, t), and back: the map is its own inverse.

    The embedding is [cos(t w), sin(t w)], and with (A, B) the two halves of the first linear of the time MLP
        A cos((1 - t) w) + B sin((1 - t) w) = (A cos w + B sin w) cos(t w) + (A sin w - B cos w) sin(t w)
    in float64, with the frequencies w as `TimestepEmbedder` rounds them.
    """
    if TIME_WEIGHT not in tensors or tensors[TIME_WEIGHT].ndim != 2 or tensors[TIME_WEIGHT].shape[1] % 2:
        raise InputError(f"not of the SiT architecture: no {TIME_WEIGHT} of two dimensions to absorb REPA's time")
    weight = tensors[TIME_WEIGHT]
    half = weight.shape[1] // 2
    frequencies = (-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).exp().double()
    cos, sin = frequencies.cos(), frequencies.sin()
    a, b = weight.double().split(half, 1)
    folded = torch.cat([a * cos + b * sin, a * sin - b * cos], 1).to(torch.promote_types(weight.dtype, torch.float32))
    negated = {name: -tensors[name] for name in OUTPUT if name in tensors}
    return {**tensors, TIME_WEIGHT: folded, **negated}


def from_diffusers(
    source: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, int], list[str]]:
    """The public layout of a DiTTransformer2DModel, with its heads and sample size, and how the two functions differ.

    q, k and v become one linear; the embedder of time and class, of which every block has a copy, one for all.
    Raises InputError for a configuration that a SiT block does not compute, or copies that differ.
    """
    name = config.get("_class_name")
    if name != "DiTTransformer2DModel":
        raise InputError(f"checkpoint {source!r} is a {name}; of diffusers' models DiTTransformer2DModel can be read")
    defaults = {key: value.default for key, value in inspect.signature(DiTTransformer2DModel).parameters.items()}
    config = {**defaults, **config}
    for key, allowed in DIT_CONFIG.items():
        if config[key] not in allowed:
            raise InputError(f"checkpoint {source!r}: {key}={config[key]!r} has no counterpart; needed: {allowed[0]!r}")
    for key in ("num_attention_heads", "attention_head_dim", "patch_size", "sample_size"):
        if fault := fault_of({key: config[key]}, {key: DIT_SIZES}):
            raise InputError(f"checkpoint {source!r}: config.json: {fault}")
    _check_one_embedder(source, tensors)
    renamed = {}
    for original, tensor in tensors.items():
        if not re.match(r"transformer_blocks\.(?!0\.)\d+\.norm1\.emb\.", original):
            renamed[_public_name(original)] = tensor
    for key in [key for key in renamed if ".attn1.to_q." in key]:
        three = [key.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
        # Of other shapes they are left, to be named as what they are.
        if all(part in renamed and renamed[part].shape == renamed[key].shape for part in three) and renamed[key].ndim:
            joined = torch.cat([renamed.pop(part) for part in three])
            renamed[key.replace("transformer_blocks.", "blocks.").replace(".attn1.to_q.", ".attn.qkv.")] = joined
    heads, size = config["num_attention_heads"], config["sample_size"]
    width = heads * config["attention_head_dim"]
    if "pos_embed" not in renamed:  # a buffer that diffusers does not store
        grid = (size // config["patch_size"],) * 2
        renamed["pos_embed"] = sincos_position_embedding(grid, width)
    notes = [
        "diffusers computes the time embedding with the frequencies 10000 ** (-i / 127), DiT and this model with "
        "10000 ** (-i / 128), for which the published DiT weights were trained: outputs differ from diffusers' where "
        "t > 0"
    ]
    if config["norm_eps"] != 1e-6:
        notes.append(f"norm_eps={config['norm_eps']:g} of the norms before the MLPs becomes 1e-06, as in DiT")
    return renamed, {"num_heads": heads, "sample_size": size}, notes


def _public_name(name: str) -> str:
    for pattern, replacement in DIT_NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _check_one_embedder(source: str, tensors: dict[str, torch.Tensor]) -> None:
    first = "transformer_blocks.0."
    for name, tensor in tensors.items():
        match = re.match(r"transformer_blocks\.\d+\.(?=norm1\.emb\.)", name)
        if match:
            shared = tensors.get(first + name[match.end() :])
            if shared is None or shared.dtype != tensor.dtype or not torch.equal(shared, tensor):
                raise InputError(
                    f"checkpoint {source!r}: {name} differs from the one of block 0; this model has one embedder of "
                    "time and class for all blocks, and the published DiT weights have equal copies"
                )
