"""What of one SiT's weights another SiT can go on from: part by part, by what the parts compute.

A part is a module that is taken as a whole or not at all: an embedder, a block's mixer, its MLP, its modulation, a
layer of the output. The position embedding is none: it is computed, and taken where it has the same shape.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from sit_atconv.models.lora import bare_state
from sit_atconv.models.sit import SiTTransformer2DModel, mixer_names
from sit_atconv.runtime.errors import check_choice

PART = re.compile(r"blocks\.\d+\.\w+|final_layer\.\w+|\w+")
POSITION = "pos_embed"
INTERVAL = "r_embedder"  # of average velocities; it begins at zero, as that of a velocity is
# What decides the function of a mixer beside its weights.
MIXER_OPTIONS = {
    "attention": ("num_heads", "qk_norm"),
    "atconv": ("kernel_size", "activation", "pool", "routing", "inhibition"),
}


@dataclass(frozen=True)
class Difference:
    """Why a part of a model cannot have the weights of another, in words; of the whole model where `part` is "".

    option: of the model, with the value by which there would be no difference, where there is one.
    """

    part: str
    said: str
    option: tuple[str, Any] | None = None


def has_positions(options: Mapping[str, Any]) -> bool:
    """Whether a SiT of these options has a position embedding."""
    if options["pos_embed"] == "auto":
        return "attention" in mixer_names(options["token_mixer"], options["depth"])
    return bool(options["pos_embed"])


def _of_the_whole(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """What makes two configurations different architectures, of which nothing fits."""

    def units(options: Mapping[str, Any]) -> int:
        return int(options["hidden_size"] * options["mlp_ratio"])

    found = [
        _of_option("", name, theirs[name], ours[name])
        for name in ("hidden_size", "patch_size", "path", "prediction")
        if theirs[name] != ours[name]
    ]
    if theirs["hidden_size"] == ours["hidden_size"] and units(theirs) != units(ours):
        found.append(_of_option("", "mlp_ratio", theirs["mlp_ratio"], ours["mlp_ratio"]))
    if ours["depth"] < theirs["depth"]:
        found.append(_of_option("", "depth", theirs["depth"], ours["depth"]))
    if theirs["use_meanflow"] and not ours["use_meanflow"]:
        found.append(Difference("", "average velocities (MeanFlow) there, velocities here", ("use_meanflow", True)))
    if has_positions(theirs) != has_positions(ours):
        found.append(_of_option("", POSITION, has_positions(theirs), has_positions(ours)))
    return found


def _of_option(part: str, name: str, theirs: Any, ours: Any) -> Difference:
    return Difference(part, f"{name} {theirs} there, {ours} here", (name, theirs))


def differences(source: SiTTransformer2DModel, target: SiTTransformer2DModel) -> list[Difference]:
    """What keeps the target from going on from all of the source's weights; empty where all of them fit.

    Either those of the whole, or, of one architecture, those of parts, in the order of the target's. Either model may
    be on the meta device, and the target may have adapters.
    """
    theirs, ours = dict(source.config), dict(target.config)
    if whole := _of_the_whole(theirs, ours):
        return whole
    mixers, own_mixers = (mixer_names(each["token_mixer"], each["depth"]) for each in (theirs, ours))
    said = {
        name: f"{name} {theirs[name]} there, {ours[name]} here"
        for name in ("in_channels", "num_classes")
        if theirs[name] != ours[name]
    }
    if (source.null_label is None) != (target.null_label is None):
        said.setdefault("num_classes", "a null class on one side alone")
    found: dict[str, Difference] = {}
    shapes = {name: tensor.shape for name, tensor in source.state_dict().items()}
    for name, tensor in bare_state(target).items():
        part, index = part_of(name), _block_of(name)
        if part == POSITION or part in found or (part == INTERVAL and name not in shapes):
            continue
        if index is not None and index >= len(mixers):
            part = f"blocks.{index}"
            found[part] = Difference(part, "not there")
        elif part in ("x_embedder", "final_layer.linear") and "in_channels" in said:
            found[part] = Difference(part, said["in_channels"])
        elif part == "y_embedder" and "num_classes" in said:
            found[part] = Difference(part, said["num_classes"])
        elif part == "final_layer.linear" and theirs["learn_sigma"] != ours["learn_sigma"]:
            found[part] = _of_option(part, "learn_sigma", theirs["learn_sigma"], ours["learn_sigma"])
        elif part.endswith(".attn") and mixers[index] != own_mixers[index]:
            found[part] = Difference(part, f"{mixers[index]} there, {own_mixers[index]} here")
        elif part.endswith(".attn") and (
            option := next((key for key in MIXER_OPTIONS[mixers[index]] if theirs[key] != ours[key]), None)
        ):
            found[part] = _of_option(part, option, theirs[option], ours[option])
        elif shapes.get(name) != tensor.shape:
            found[part] = Difference(part, f"{name} {tuple(shapes.get(name, ()))} there, {tuple(tensor.shape)} here")
    return list(found.values())


def part_of(name: str) -> str:
    """The part that a tensor of a SiT belongs to, by its name."""
    return PART.match(name)[0]


def _block_of(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def is_named(name: str, by: Iterable[str]) -> bool:
    """Whether one of `by` names a part or tensor, or what it lies in: "blocks.3" names "blocks.3.attn". In a name, *
    stands for any part of it between two dots: "blocks.*.attn"."""
    parts = name.split(".")
    return any(
        len(words := each.split(".")) <= len(parts) and all(map(fnmatchcase, parts, words)) for each in by
    )  # fmt: skip


def check_names(what: str, names: Iterable[str], model: SiTTransformer2DModel) -> None:
    """Raise InputError for a name by which nothing in the model is named, suggesting the nearest one.

    what: the name of the setting.
    """
    tensors = list(model.state_dict())
    there = {".".join(name.split(".")[:count]) for name in tensors for count in range(1, name.count(".") + 2)}
    for each in names:
        if not any(is_named(tensor, [each]) for tensor in tensors):
            check_choice(what, each, sorted(there))


@torch.no_grad()
def take_weights(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], but: Iterable[str]) -> None:
    """Copy the tensors of one model into those of another, all but those that `but` names, see `is_named`.

    A position embedding of another shape stays as it was computed, and the embedding of the interval of an average
    velocity as it was drawn where they have none. Raises KeyError or RuntimeError for models of which
    `differences` names more than `but` does.
    """
    but = list(but)
    for name, tensor in own.items():
        if is_named(name, but) or (name == POSITION and given[name].shape != tensor.shape):
            continue
        if part_of(name) == INTERVAL and name not in given:
            continue
        if given[name].shape != tensor.shape:
            raise RuntimeError(f"{name} is {tuple(given[name].shape)} there, {tuple(tensor.shape)} here")
        tensor.copy_(given[name])
