"""ViTs of timm with their trained weights, from safetensors alone."""

from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from sit_atconv.errors import InputError, check_choice

LOCAL, CONFIG, WEIGHTS = "local-dir:", "config.json", "model.safetensors"


def load_vit(name: str, where: str, option: str) -> tuple[nn.Module, Path]:
    """A model of timm for images of any size, with the classifier of its weights; and the file of the weights.

    name: of timm, with a tag or without, downloaded to the Hugging Face cache where it is not there yet; or
    "local-dir:FOLDER", a folder with the config.json and model.safetensors of timm's `save_for_hf`.
    where: begins an error, "repa.encoder='x'". option: what takes such a name, "repa.encoder=".
    The global random stream stays where it is. Raises InputError when the model is not there, or does not load.
    """
    options = {}
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        for part in (CONFIG, WEIGHTS):  # which timm prefers; without it, it would go on to pickles
            if not (folder / part).is_file():
                raise InputError(
                    f"{where}: {str(folder)!r} holds no {part}; give a folder with the {CONFIG} and {WEIGHTS} of a "
                    "timm model"
                )
        file = folder / WEIGHTS
    else:
        file = _fetch(name, where, option)
        options["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
    try:
        # With the classifier that the weights have, timm loads them strictly; with none, it would pass over gaps.
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=True, dynamic_img_size=True, **options), file
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{where} cannot be loaded as a ViT of timm: {said}") from None


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
