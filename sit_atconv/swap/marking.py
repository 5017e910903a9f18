"""Class and configuration of a swapped model, so that it is saved as what it is."""

import copy

from diffusers.configuration_utils import FrozenDict
from torch import nn

from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.blocks import SiTATConvBlock, SiTBlock
from sit_atconv.runtime.compat.diffusers import config_of, drop_left_forward, set_config
from sit_atconv.runtime.errors import InputError

THIN: dict[type[nn.Module], type[nn.Module]] = {}  # model class -> its ATConv subclass


class SwapRecord:
    """On a swapped model: what it was, and `config`, what has been swapped (see `swap_attention`)."""

    def __init__(self, model: nn.Module, config: dict):
        self.model_class, self.config_before = type(model), config_of(model)
        self.config = copy.deepcopy(config)
        self.kinds = kinds_of(model)

    def replace(self, name: str, module: nn.Module) -> None:
        """Take note that `module` stands at `name` from now on."""
        self.kinds = {each: kind for each, kind in self.kinds.items() if not each.startswith(f"{name}.")}
        self.kinds |= {f"{name}.{each}": kind for each, kind in kinds_of(module).items()}

    def change(self, model: nn.Module) -> str | None:
        """What others have put on the model since, or taken off it, by the first of its tensors; None: nothing."""
        now = kinds_of(model)
        for name in {**now, **self.kinds}:
            if name not in now:
                return f"{name} is gone since the swap"
            if name not in self.kinds:
                return f"{name} is new since the swap"
            if now[name] != self.kinds[name]:
                return f"{name} is a {now[name]} since the swap"
        return None


def kinds_of(module: nn.Module) -> dict[str, str]:
    """The class of every entry of the state dict: adapters bring entries, quantisation and sharding classes; or the
    dtype where it is one of 8 bits, in which weights are stored and not computed with."""
    return {
        name: str(value.dtype) if str(getattr(value, "dtype", "")).startswith("torch.float8") else type(value).__name__
        for name, value in module.state_dict().items()
    }


_SAVING = (
    "would load what it saves here without the swapped layers; store these by sit_atconv.swap.save_delta(model, path) "
    "and load them onto the original by load_delta, or revert the swap"
)
REFUSED_METHODS = {  # of a model whose class knows nothing of its swapped layers, and why, in words after its name
    "save_pretrained": _SAVING,
    "push_to_hub": _SAVING,
    "enable_parallelism": "has no context or tensor parallelism: swapped layers need all tokens",
}


class Refusal:
    """In the place of a method of a swapped model: raises InputError, which says why."""

    def __init__(self, why: str):
        self.why = why

    def __call__(self, *_, **__):
        raise InputError(self.why)


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
    """For a model whose class and configuration say nothing of its attention: it is not saved as what it is not, nor
    split over devices."""
    record = model._swap_record
    if record.config["layers"]:
        for name, why in REFUSED_METHODS.items():
            if hasattr(record.model_class, name):
                setattr(model, name, Refusal(f"{record.model_class.__name__} {why}"))
    else:
        for name in REFUSED_METHODS:
            vars(model).pop(name, None)
        del model._swap_record


def configure(model: nn.Module, without: str | None = None, **entries) -> None:
    """`register_to_config`, which keeps what others set as attributes of the configuration, as IP-Adapter does."""
    before = config_of(model)
    after = FrozenDict({name: value for name, value in {**before, **entries}.items() if name != without})
    for name, value in vars(before).items():
        if name in after and name not in entries and before[name] is not value:
            setattr(after, name, value)
    set_config(model, after)


def mark_thin(model: nn.Module) -> None:
    """A diffusers model becomes its ATConv subclass, with the entry `atconv`; without swapped layers, what it was."""
    record = model._swap_record
    drop_left_forward(model)
    if record.config["layers"]:
        model.__class__ = THIN[record.model_class]
        configure(model, atconv=copy.deepcopy(record.config))
    else:
        model.__class__ = record.model_class
        configure(model, without="atconv")
        del model._swap_record


def mark_sit(model: nn.Module) -> None:
    """A SiT has `token_mixer` name the mixer of every block, and blocks of the class that goes with it."""
    record = model._swap_record
    mixers = _mixers(model)
    for block, mixer in zip(model.blocks, mixers, strict=True):
        drop_left_forward(block)
        block.__class__ = SiTATConvBlock if mixer == "atconv" else SiTBlock
    if record.config["layers"]:
        options = {name: record.config[name] for name in ("pool", "kernel_size")}
        options["qk_norm"] = record.config_before["qk_norm"] and "attention" in mixers
        configure(model, token_mixer=mixers, pos_embed=model.pos_embed is not None, **options)
    else:
        changed = ("token_mixer", "pos_embed", "qk_norm", "pool", "kernel_size")
        configure(model, **{name: record.config_before[name] for name in changed})
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
