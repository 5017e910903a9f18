"""Class and configuration of a swapped model, so that it is saved as what it is."""

import copy

from torch import nn

from sit_atconv.errors import InputError
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.blocks import SiTATConvBlock, SiTBlock

THIN: dict[type[nn.Module], type[nn.Module]] = {}  # model class -> its ATConv subclass


class SwapRecord:
    """On a swapped model: what it was, and `config`, what has been swapped (see `swap_attention`)."""

    def __init__(self, model: nn.Module, config: dict):
        self.model_class, self.config_before = type(model), getattr(model, "_internal_dict", None)
        self.config = copy.deepcopy(config)


def check_nothing(model: nn.Module, config: dict) -> None:
    """For a model that takes layers of any setting."""


def check_thin(model: nn.Module, config: dict) -> None:
    """Raises InputError for a class that derives from a model of diffusers, and has no ATConv subclass of its own."""
    record = getattr(model, "_swap_record", None)
    cls = type(model) if record is None else record.model_class
    if cls not in THIN:
        known = next((each.__name__ for each in cls.__mro__ if each in THIN), "a model of diffusers")
        raise InputError(
            f"{cls.__name__} derives from {known}, and no class of ATConv would load what it adds; swap the "
            f"{known}, or register an adapter for {cls.__name__} (sit_atconv.swap.register_adapter)"
        )


def mark_nothing(model: nn.Module) -> None:
    """For a model whose class and configuration say nothing of its attention."""
    if not model._swap_record.config["layers"]:
        del model._swap_record


def mark_thin(model: nn.Module) -> None:
    """A diffusers model becomes its ATConv subclass, with the entry `atconv`; without swapped layers, what it was."""
    record = model._swap_record
    if record.config["layers"]:
        model.__class__ = THIN[record.model_class]
        model.register_to_config(atconv=copy.deepcopy(record.config))
    else:
        model.__class__, model._internal_dict = record.model_class, record.config_before
        del model._swap_record


def mark_sit(model: nn.Module) -> None:
    """A SiT has `token_mixer` name the mixer of every block, and blocks of the class that goes with it."""
    record = model._swap_record
    mixers = _mixers(model)
    for block, mixer in zip(model.blocks, mixers, strict=True):
        block.__class__ = SiTATConvBlock if mixer == "atconv" else SiTBlock
    if record.config["layers"]:
        model.register_to_config(
            token_mixer=mixers,
            pos_embed=model.pos_embed is not None,
            qk_norm=record.config_before["qk_norm"] and "attention" in mixers,
            pool=record.config["pool"],
            kernel_size=record.config["kernel_size"],
        )
    else:
        model._internal_dict = record.config_before
        del model._swap_record


def check_sit(model: nn.Module, config: dict) -> None:
    """A SiT has one setting for all its ATConv blocks. Raises InputError where those that are there have another."""
    if "atconv" in _mixers(model):
        ours = {"routing": "adaptive", "inhibition": "learned", "activation": "gelu_tanh"}
        for name, value in (ours | {name: config[name] for name in ("pool", "kernel_size")}).items():
            if model.config[name] != value:
                raise InputError(
                    f"{name}: this SiT has ATConv blocks with {model.config[name]!r}, and swapped ones would have "
                    f"{value!r}; a SiT has one setting for all"
                )


def _mixers(model: nn.Module) -> list[str]:
    return ["atconv" if isinstance(block.attn, ATConv) else "attention" for block in model.blocks]
