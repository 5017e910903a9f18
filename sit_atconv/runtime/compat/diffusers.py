"""Private parts of diffusers."""

from collections.abc import Callable, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from sit_atconv.runtime.lazy import once_loaded


# diffusers 0.42: first-block caches and layer skips read this register of blocks; nothing public writes to it.
def register_block(block_class: type[nn.Module]) -> None:
    """Tell diffusers that blocks of the class return their hidden states alone, as soon as its hooks are loaded.

    They load peft where it is installed; and the register's own method loads all transformers of diffusers.
    """

    def register(helpers: Any) -> None:
        metadata = helpers.TransformerBlockMetadata(return_hidden_states_index=0)
        metadata._cls = block_class
        helpers.TransformerBlockRegistry._registry[block_class] = metadata

    once_loaded("diffusers.hooks._helpers", register)


class _OfPeft:
    """An attribute of diffusers' PeftAdapterMixin, which is loaded when it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        from diffusers.loaders import PeftAdapterMixin

        return getattr_static(PeftAdapterMixin, self.name).__get__(model, owner)


# diffusers 0.42: all that PeftAdapterMixin has beside `_hf_peft_config_loaded` and `_prepare_lora_hotswap_kwargs`. Its
# methods call one another by private names.
Adapters = type(
    "Adapters",
    (),
    {
        "__doc__": """diffusers' PeftAdapterMixin, LoRA and other adapters: loaded when one of its methods is asked for.

        With peft and transformers, which it loads, it takes longer than all else that a model needs.
        """,
        "_hf_peft_config_loaded": False,
        "_prepare_lora_hotswap_kwargs": None,
        **{
            name: _OfPeft(name)
            for name in [
                "_fuse_lora_apply",
                "_optionally_disable_offloading",
                "_unfuse_lora_apply",
                "active_adapters",
                "add_adapter",
                "delete_adapters",
                "disable_adapters",
                "disable_lora",
                "enable_adapters",
                "enable_lora",
                "enable_lora_hotswap",
                "fuse_lora",
                "load_lora_adapter",
                "save_lora_adapter",
                "set_adapter",
                "set_adapters",
                "unfuse_lora",
                "unload_lora",
            ]
        },
    },
)


# diffusers 0.42: reads a LoRA from a file, the Hub or a dictionary, as `load_lora_adapter` does.
def fetch_lora(source, **options) -> tuple[dict, Any]:
    """(tensors by name, metadata); options: where the file is, as `load_lora_adapter` takes them."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    return _fetch_state_dict(source, **options)


# diffusers 0.42: HookRegistry is public, but its only way to a module's registry puts one on it.
def diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    """By name, the hooks that diffusers has put on the module: offloading, caches, casting, ..."""
    registry = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else registry.hooks


# diffusers 0.42: a hook that is taken off leaves the class's own forward on the module, as if it were someone else's.
def drop_left_forward(module: nn.Module) -> None:
    """Take off a module the forward of its own class, which would stay if the module got another class."""
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward


# diffusers 0.42: pipelines forget the states of caches as they end, and nothing public does.
def reset_cache(model: nn.Module) -> None:
    """Have the cache of a model of diffusers begin anew."""
    model._reset_stateful_cache()


# diffusers 0.42: `config` is read-only, and `register_to_config` takes nothing away.
def config_of(model: nn.Module) -> Any:
    """The configuration of a model of diffusers, None for one of another library."""
    return getattr(model, "_internal_dict", None)


# diffusers 0.42: the same.
def set_config(model: nn.Module, config: Any) -> None:
    """Give the model of diffusers that configuration, a FrozenDict."""
    model._internal_dict = config


# diffusers 0.42: `enable_gradient_checkpointing` leaves the function that checkpoints in an attribute of the modules.
def checkpoint_function(module: nn.Module) -> Callable | None:
    """checkpoint(function, *args) of a module that checkpoints; None for one that does not, or cannot."""
    return getattr(module, "_gradient_checkpointing_func", None)


# diffusers 0.42: the same.
def set_checkpoint_function(module: nn.Module, function: Callable) -> None:
    """Have the module checkpoint by another function."""
    module._gradient_checkpointing_func = function


# diffusers 0.42: `set_attention_backend` leaves its choice in an attribute of the processors.
def attention_backend(processor: Any) -> Any:
    """The AttentionBackendName that the processor was told; None where it was told none."""
    return getattr(processor, "_attention_backend", None)


# diffusers 0.42: `enable_parallelism` leaves its choice in an attribute of the model.
def is_parallel(model: nn.Module) -> bool:
    """Whether the model runs under context or tensor parallelism."""
    return getattr(model, "_parallel_config", None) is not None


# diffusers 0.42: where an offloaded pipeline computes is told to its subclasses alone; `device` is where it lies.
def execution_device(pipeline: Any) -> torch.device:
    """The device that the pipeline computes on."""
    return pipeline._execution_device
