"""Models of timm with their trained weights, from safetensors alone."""

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from sit_atconv import limits
from sit_atconv.errors import InputError, check_choice, said
from sit_atconv.reading import fault_of, read_json

LOCAL, CONFIG, WEIGHTS = "local-dir:", "config.json", "model.safetensors"
PIXELS = range(1, limits.PIXELS.most + 1)
# What timm's config.json says of a model and of its images, see `reading.parse_json`.
MADE_FORM = {
    "architecture?": (str, None), "tag?": (str, None), "num_classes?": range(limits.CLASSES.most + 1),
    "input_size?": [range(1, 65_537), PIXELS, PIXELS], "mean?": [float], "std?": [float], "crop_pct?": (float, None),
    "crop_mode?": str, "interpolation?": str,
}  # fmt: skip


def load_vit(name: str, where: str, option: str) -> tuple[nn.Module, Path]:
    """A model of timm for images of any size, with the classifier of its weights; and the file of the weights.

    name: of timm, with a tag or without, downloaded to the Hugging Face cache where it is not there yet; or
    "local-dir:FOLDER", a folder with the config.json and model.safetensors of timm's `save_for_hf`.
    where: begins an error, "repa.encoder='x'". option: what takes such a name, "repa.encoder=".
    The global random stream stays where it is. Raises InputError when the model is not there, or does not load.
    """
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        return load_local(folder, where, dynamic_img_size=True), folder / WEIGHTS
    file = _fetch(name, where, option)
    return _create(name, where, pretrained_cfg_overlay={"file": str(file), "custom_load": False},
                   dynamic_img_size=True), file  # fmt: skip


def load_local(folder: Path, where: str, **options: Any) -> nn.Module:
    """The model in a folder with the config.json and model.safetensors of timm's `save_for_hf`.

    where, and the global random stream, as in `load_vit`. options: of the model, over those in config.json.
    Raises InputError when it is not there, or does not load.
    """
    for part in (CONFIG, WEIGHTS):  # which timm prefers; without it, it would go on to pickles
        if not (folder / part).is_file():
            raise InputError(
                f"{where}: {str(folder)!r} holds no {part}; give a folder with the {CONFIG} and {WEIGHTS} of a timm "
                "model"
            )
    try:
        config = read_json(folder / CONFIG, {"model_args?": dict, "pretrained_cfg?": dict})
    except OSError as error:
        raise InputError(f"{where}: {CONFIG} cannot be read: {error.strerror or error}; make it readable") from None
    except InputError as error:
        raise InputError(f"{where} cannot be loaded: {error}; give the one that timm wrote") from None
    made, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    if fault := fault_of(config, MADE_FORM) or fault_of(made, MADE_FORM):
        raise InputError(f"{where} cannot be loaded: {CONFIG}: {fault}; give the one that timm wrote")
    limits.OPTION.check(f"{where} cannot be loaded: {CONFIG}: model_args=", arguments)
    for name in ("depth", "depths"):
        limits.BLOCKS.check(f"{where} cannot be loaded: {CONFIG}: {name}=", arguments.get(name))
    return _create(f"{LOCAL}{folder.absolute()}", where, **options)


def _create(name: str, where: str, **options: Any) -> nn.Module:
    try:
        # With the classifier that the weights have, timm loads them strictly; with none, it would pass over gaps.
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # options of any kind: timm refuses them in every way there is
        raise InputError(f"{where} cannot be loaded as a model of timm: {said(error)}") from None


def is_rgb(model: nn.Module) -> bool:
    """Whether a ViT is of RGB images, and says so."""
    made = model.pretrained_cfg
    return model.patch_embed.proj.weight.shape[1] == len(made["mean"]) == len(made["std"]) == 3


def _fetch(name: str, where: str, option: str) -> Path:
    """The safetensors file of a model that timm knows by name, from the Hugging Face cache or the hub."""
    architecture, _ = split_model_name_tag(name)
    check_choice(f"{option}NAME (or {option}{LOCAL}FOLDER)", architecture, timm.list_models())
    try:
        source = get_pretrained_cfg(name).hf_hub_id
    except RuntimeError as error:
        raise InputError(f"{where}: {error}") from None
    if not source:
        raise InputError(f"{where}: timm has no weights of it on the Hugging Face hub; choose another")
    try:
        return Path(hf_hub_download(source, WEIGHTS))
    except (OSError, EntryNotFoundError) as error:
        raise InputError(
            f"{where}: {WEIGHTS} of it is not in the Hugging Face cache and cannot be had ({type(error).__name__}); "
            f"download {CONFIG} and {WEIGHTS} from https://huggingface.co/{source} into a folder, and give "
            f"{option}{LOCAL}FOLDER"
        ) from None
