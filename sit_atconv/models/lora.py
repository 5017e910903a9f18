"""LoRA of a SiT, without peft: files of adapters in diffusers' form, and their sum with the weights.

An adapter of a linear layer W is alpha / rank * B A, with A (rank, in) and B (out, rank), after "LoRA: Low-Rank
Adaptation of Large Language Models" (arXiv 2106.09685).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sit_atconv.runtime.adapters import ADAPTERS
from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.runtime.reading import parse_json, read_tensors

METADATA = "lora_adapter_metadata"  # diffusers' key in the file's header
PREFIX = "transformer."  # by which a pipeline knows whose adapters they are
A, B, BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer"
# What diffusers may say of adapters that is more than a rank and an alpha.
FORM = {
    "r": int, "lora_alpha": (int, float), "alpha_pattern?": {re.compile("(?!)"): object}, "use_dora?": False,
    "use_rslora?": False, "lora_bias?": False,
}  # fmt: skip
PARTS = ("attn", "mlp")  # of a block: its linear layers get adapters where nothing else is said


@dataclass(frozen=True)
class Lora:
    """Adapters by the names of their layers: A (rank, in), B (out, rank). scale: alpha / rank, of all of them."""

    where: str
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float


def linears(model: nn.Module) -> list[str]:
    """The names of the model's linear layers, whether they have adapters or not."""
    return [
        name.removesuffix(BASE)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]


def targets(model: nn.Module, stated: Iterable[str] | None) -> list[str]:
    """The linear layers that `stated` names, by their names or the ends of these; None: all of mixers and MLPs.

    Raises InputError for one that there is not, suggesting the nearest.
    """
    names = linears(model)
    if stated is None:
        return [name for name in names if name.startswith("blocks.") and name.split(".")[2] in PARTS]
    ends = {".".join(name.split(".")[count:]) for name in names for count in range(name.count(".") + 1)}
    of_any_block = {re.sub(r"^blocks\.\d+\.", "", name) for name in names}
    for each in stated:
        if each not in ends:
            check_choice("lora.targets", each, names if each.startswith("blocks.") else of_any_block)
    return [name for name in names if any(f".{name}".endswith(f".{each}") for each in stated)]


def bare_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model that may have adapters, without these, by the names that they have in one without."""
    tensors = model.state_dict().items()
    return {name.replace(f"{BASE}.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


def write_lora(folder: Path, tensors: Mapping[str, torch.Tensor], rank: int, alpha: float) -> None:
    """Write adapters, by peft's names with that of the adapter, "blocks.0.mlp.fc1.lora_A.default.weight", for
    `pipe.load_lora_weights` and `model.load_lora_adapter`."""
    plain = {f"{PREFIX}{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in tensors.items()}
    layers = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in plain})
    said = {"r": rank, "lora_alpha": alpha, "target_modules": layers}
    said = {f"{PREFIX}{key}": value for key, value in said.items()}
    save_file(plain, folder / ADAPTERS, {METADATA: json.dumps(said, sort_keys=True)})


def read_lora(path: Path) -> Lora:
    """Adapters from a safetensors file, or the one of diffusers' name in a folder.

    Without metadata alpha is the rank, as diffusers has it. Raises InputError for a file that is damaged or holds more
    than pairs of A and B.
    """
    file = path / ADAPTERS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"LoRA {str(path)!r}: no such file, or folder with {ADAPTERS}")
    tensors, header = read_tensors(file, "LoRA")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    layers = list(dict.fromkeys(name.removesuffix(A) for name in tensors if name.endswith(A)))
    if strays := [name for name in tensors if name not in {f"{layer}{end}" for layer in layers for end in (A, B)}]:
        raise InputError(f"LoRA {str(file)!r}: {strays[0]} is no adapter of a linear layer; use pipe.load_lora_weights")
    pairs = {}
    for layer in layers:
        pair = a, b = tensors[layer + A], tensors.get(layer + B)
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"LoRA {str(file)!r}: A and B of {layer} do not go together")
        pairs[layer] = pair
    if not pairs:
        raise InputError(f"LoRA {str(file)!r} holds no adapters")
    ranks = {a.shape[0] for a, _ in pairs.values()}
    said = _metadata(file, header)
    if said is None:
        return Lora(str(path), pairs, 1.0)
    if ranks != {said["r"]}:
        raise InputError(f"LoRA {str(file)!r}: its layers have the ranks {sorted(ranks)}; use pipe.load_lora_weights")
    return Lora(str(path), pairs, said["lora_alpha"] / said["r"])


def _metadata(file: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    if METADATA not in header:
        return None
    said = parse_json(header[METADATA], METADATA)
    said = {key.removeprefix(PREFIX): value for key, value in said.items()}
    try:
        return parse_json(json.dumps(said), METADATA, FORM)
    except InputError as error:
        raise InputError(f"LoRA {str(file)!r}: {error}; use pipe.load_lora_weights") from None


@torch.no_grad()
def fuse(model: nn.Module, lora: Lora) -> None:
    """Add the adapters to the weights of a model without any: W + scale * B A, summed in fp32 at least.

    Raises InputError for a layer that the model has not, or of another shape.
    """
    there = linears(model)
    for name, (a, b) in lora.pairs.items():
        check_choice(f"LoRA {lora.where!r}: layer", name, there)
        weight = model.get_submodule(name).weight
        if weight.shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"LoRA {lora.where!r}: {name} is of {b.shape[0]} x {a.shape[1]}, the model's of "
                f"{' x '.join(map(str, weight.shape))}; give the model that it was trained on"
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + lora.scale * (b.to(weight.device, wide) @ a.to(weight.device, wide)))
