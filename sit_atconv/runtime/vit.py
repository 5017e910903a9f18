"""Models of timm with their trained weights, from safetensors alone."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, check_choice, told
from sit_atconv.runtime.reading import read_config
from sit_atconv.runtime.weights import fits

LOCAL, CONFIG, WEIGHTS = "local-dir:", "config.json", "model.safetensors"
BLOCKS, PIXELS = range(1, 1001), range(1, limits.PIXELS.most + 1)
# What timm's config.json says of a model and of its images, see `reading.parse_json`.
MADE_FORM = {
    "architecture?": (str, None), "tag?": (str, None), "num_classes?": range(limits.CLASSES.most + 1),
    "input_size?": [range(1, 65_537), PIXELS, PIXELS], "mean?": [float], "std?": [float], "crop_pct?": (float, None),
    "crop_mode?": str, "interpolation?": str,
}  # fmt: skip
CONFIG_FORM = {
    **MADE_FORM, "model_args?": ({"depth?": BLOCKS, "depths?": [BLOCKS]}, None), "pretrained_cfg?": MADE_FORM,
}  # fmt: skip


def load_vit(name: str, where: str, option: str) -> tuple[nn.Module, Path]:
    """A model of timm for images of any size, with the classifier of its weights; and the file of the weights.

    name: of timm, with a tag or without, downloaded to the Hugging Face cache where it is not there yet; or
    "local-dir:FOLDER", a folder with the config.json and model.safetensors of timm's `save_for_hf`.
    where: begins an error, "repa.encoder='x'". option: what takes such a name, "repa.encoder=".
    The global random stream stays where it is. Raises InputError when the model is not there, or does not load.
    """
    if name.startswith(LOCAL):
        vit, file = load_folder(Path(name.removeprefix(LOCAL)), where, dynamic_img_size=True)
    else:
        file = _fetch(name, where, option)
        overlay = {"file": str(file), "custom_load": False}
        with _loaded(where):
            # With the classifier that the weights have, timm loads them strictly; with none, it would pass over gaps.
            vit = timm.create_model(name, pretrained=True, dynamic_img_size=True, pretrained_cfg_overlay=overlay)
    for key in ("mean", "std"):
        values = vit.pretrained_cfg[key]
        if len(values) != 3 or (key == "std" and min(values) <= 0):
            raise InputError(f"{where}: its {CONFIG} has {key} {values}; three numbers are needed, of std over 0")
    return vit, file


def load_folder(folder: Path, where: str, **options) -> tuple[nn.Module, Path]:
    """The model in a folder of timm's `save_for_hf`, with these options, and the file of its weights. See `load_vit`.

    Raises InputError for a folder without both files, or whose config.json is not that of its weights.
    """
    for part in (CONFIG, WEIGHTS):  # which timm prefers; without it, it would go on to pickles
        if not (folder / part).is_file():
            raise InputError(
                f"{where}: {str(folder)!r} holds no {part}; give a folder with the {CONFIG} and {WEIGHTS} of a "
                "timm model"
            )
    name, file = f"{LOCAL}{folder}", folder / WEIGHTS
    with _loaded(where):
        read_config(folder / CONFIG, CONFIG_FORM)
        # Once without memory: what a model draws is in memory before it is counted.
        with fits([file]), torch.device("meta"), suppress(RuntimeError):  # some cannot
            timm.create_model(name, **options)
        with fits([file]):
            return timm.create_model(name, pretrained=True, **options), file


@contextmanager
def _loaded(where: str) -> Iterator[None]:
    """Tell what timm raises, which refuses options in every way there is, and leave the random stream where it is."""
    with told(f"{where} cannot be loaded by timm", Exception, InputError), torch.random.fork_rng(devices=[]):
        yield


def is_rgb(model: nn.Module) -> bool:
    """Whether a ViT is of RGB images."""
    return model.patch_embed.proj.weight.shape[1] == 3


def _fetch(name: str, where: str, option: str) -> Path:
    """The safetensors file of a model that timm knows by name, from the Hugging Face cache or the hub."""
    architecture, _ = split_model_name_tag(name)
    check_choice(f"{option}NAME (or {option}{LOCAL}FOLDER)", architecture, timm.list_models())
    with told(where, RuntimeError, in_full=True):
        source = get_pretrained_cfg(name).hf_hub_id
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
