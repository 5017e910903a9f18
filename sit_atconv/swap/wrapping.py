"""What others have put around a model, and between its modules, that a swap would not go with."""

from collections.abc import Collection

from torch import nn

from sit_atconv.runtime.compat.accelerate import is_dispatched
from sit_atconv.runtime.compat.diffusers import diffusers_hooks, is_parallel
from sit_atconv.runtime.compat.torch import OptimizedModule, has_compiled_call
from sit_atconv.runtime.errors import InputError

CASTING = {"layerwise_casting", "peft_autocast_disable"}  # hooks of diffusers that leave what a module does
PARTS = ("transformer", "unet")  # of a pipeline, what is swapped


def model_of(model_or_pipeline) -> tuple:
    """(pipeline or None, model)."""
    if isinstance(model_or_pipeline, nn.Module):
        return None, model_or_pipeline
    for name in PARTS:
        model = getattr(model_or_pipeline, name, None)
        if isinstance(model, nn.Module):
            return model_or_pipeline, model
    raise InputError(f"{type(model_or_pipeline).__name__}: give a model, or a pipeline with a `transformer` or `unet`")


def check_unhooked(model: nn.Module, allowed: Collection[str] = CASTING) -> None:
    """Raises InputError where diffusers' hooks offload the model by groups, cache or skip what its modules give."""
    for name, module in model.named_modules():
        hooks = sorted(set(diffusers_hooks(module)) - set(allowed))
        if hooks:
            raise InputError(
                f"{name or 'the model'} runs diffusers' hook {hooks[0]!r}; swap, report, regress and revert without "
                "such hooks, and put them on after (disable_cache() takes caches off; an offloaded model, load anew)"
            )


def check_unwrapped(model: nn.Module) -> None:
    """Raises InputError where torch.compile has renamed parts of the model."""
    name = next((name for name, module in model.named_modules() if isinstance(module, OptimizedModule)), None)
    if name is not None:
        raise InputError(
            f"{name} is wrapped by torch.compile; put the module itself back, and use its compile() method"
        )


def check_bare(model: nn.Module) -> None:
    """Raises InputError where a model is compiled, parallel, sharded, offloaded or without data, or runs hooks."""
    check_unhooked(model)
    if isinstance(model, OptimizedModule) or any(has_compiled_call(module) for module in model.modules()):
        raise InputError("the model is compiled, or blocks of it; swap first and compile after")
    if is_parallel(model):
        raise InputError("the model runs under context or tensor parallelism, which swapped layers do not; swap before")
    for name, module in model.named_modules():
        if is_dispatched(module):
            raise InputError(
                f"{name or 'the model'} is offloaded or dispatched by hooks; swap first and offload after, or end it "
                "(a pipeline's reset_device_map or remove_all_hooks, accelerate.hooks.remove_hook_from_submodules)"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} has no data here (offloaded, or a meta tensor); swap first and offload after")
        if type(parameter).__name__ == "DTensor":
            raise InputError(f"{name} is sharded over devices; swap before sharding")
