"""A model without weights, of the name of its class or of a folder that says what it is."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

from sit_atconv.runtime import vit
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.reading import read_config, read_json
from sit_atconv.runtime.vit import CONFIG
from sit_atconv.swap.adapters import known_adapters
from sit_atconv.swap.models import CONFIG_FORM
from sit_atconv.swap.refused import REFUSED
from sit_atconv.swap.wrapping import PARTS

PIPELINE_INDEX = "model_index.json"
TOLD_BY = {"_class_name?": str, "architecture?": str, "architectures?": ([str], None), "model_type?": str}


def blank(name_or_folder: str) -> nn.Module:
    """A model on the meta device: of a class of that name, or of the configuration in that folder, of diffusers, timm
    or transformers, or of the transformer or U-Net in the folder of a pipeline.

    Raises InputError for a name that no adapter knows, and a folder without a configuration of a known class.
    """
    folder = Path(name_or_folder)
    if (folder / PIPELINE_INDEX).is_file():
        part = next((each for each in PARTS if (folder / each / CONFIG).is_file()), None)
        if part is None:
            raise InputError(
                f"{name_or_folder}: this pipeline has no {' or '.join(PARTS)} with a {CONFIG}; give the folder of a "
                "model to swap"
            )
        folder = folder / part
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, CONFIG_FORM | TOLD_BY)
        make = next((make for key, make in LIBRARIES.items() if key in config), None)
        if make is None:
            raise InputError(f"{folder}: its {CONFIG} has no {', '.join(LIBRARIES)}, which would tell the class")
    else:
        classes = _classes()
        _check_known(
            name_or_folder, classes, f"{name_or_folder!r} is neither a class with an adapter nor a folder of one"
        )
        make, config = _by_default, classes[name_or_folder]
    with torch.device("meta"):
        return make(folder, config)


def _classes() -> dict[str, type[nn.Module]]:
    return {adapter.model.__name__: adapter.model for adapter in known_adapters()}


def _check_known(name: str | None, classes: dict[str, type[nn.Module]], unknown: str) -> None:
    """Raises InputError for a name that is none of the classes: for a refused one with its reason, else `unknown`."""
    if name in classes:
        return
    reason = next((reasons[name] for reasons in REFUSED.values() if name in reasons), None)
    if reason is not None:
        raise InputError(f"{name} {reason}: it cannot be swapped as it is")
    raise InputError(f"{unknown}; known are {', '.join(sorted(_classes()))}")


def _by_default(name: Path, cls: type[nn.Module]) -> nn.Module:
    with told(f"{name}: no {cls.__name__} can be made", Exception):
        return cls(cls.config_class()) if hasattr(cls, "config_class") else cls()


def _of_diffusers(folder: Path, config: dict) -> nn.Module:
    name, classes = config["_class_name"], {key: cls for key, cls in _classes().items() if hasattr(cls, "from_config")}
    _check_known(name, classes, f"{folder}: its {CONFIG} is of a {name}, which no adapter reads")
    with told(f"{folder}: no {name} can be made", Exception):
        return classes[name].from_config(config)


def _of_timm(folder: Path, config: dict) -> nn.Module:
    with told(f"{folder}: timm makes no {config['architecture']} of it", Exception):
        read_config(folder / CONFIG, vit.CONFIG_FORM)
        return timm.create_model(f"{vit.LOCAL}{folder}")


def _of_transformers(folder: Path, config: dict) -> nn.Module:
    """By its first architecture; where it names none, by the plain class whose configuration is of its model type."""
    classes = {name: cls for name, cls in _classes().items() if hasattr(cls, "config_class")}
    kind, (name, *_) = config.get("model_type"), config.get("architectures") or [None]
    if name is None:
        of_kind = [each for each, cls in classes.items() if cls.config_class.model_type == kind]
        name = of_kind[-1] if of_kind else None  # the first that was registered, the others of which hold it
    _check_known(name, classes, f"{folder}: its {CONFIG} is of a {name or kind}, which no adapter reads")
    with told(f"{folder}: no {name} can be made", Exception):
        return classes[name](classes[name].config_class.from_dict(config))


# What a config.json has that tells the library, and what makes a model of it.
LIBRARIES: dict[str, Callable[[Path, dict], nn.Module]] = {
    "_class_name": _of_diffusers,
    "architecture": _of_timm,
    "architectures": _of_transformers,
    "model_type": _of_transformers,
}
