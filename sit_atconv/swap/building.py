"""Layers for attentions, not yet in their place, and the hooks that tell them their grids."""

from torch import nn

from sit_atconv.runtime.compat.torch import forward_pre_hooks
from sit_atconv.swap.adapters import SwapAdapter
from sit_atconv.swap.calibration import Site
from sit_atconv.swap.grafts import Graft
from sit_atconv.swap.grid import BlockScope, GridHook, GridReference, PassScope, above, remove_hooks
from sit_atconv.swap.layers import LayerOptions, SwappedLayer
from sit_atconv.swap.start import TapFit


def build(model, adapter: SwapAdapter, grafts: dict[str, Graft], config: dict) -> list[Site]:
    """Layers for the attentions, not yet in their place, and the hooks that tell them their grids, in place."""
    volume = adapter.volume(config.get("volume"))
    options = LayerOptions(config["kernel_size"], config["pool"], adapter.prefix_tokens(model), volume)
    sites = []
    for name, graft in grafts.items():
        attention, owner = model.get_submodule(name), adapter.owner_of(model, name)
        reference = None if owner is None else _reference_on(owner, model, adapter)
        layer = graft.build(attention, reference, options)
        if isinstance(layer, SwappedLayer):
            layer.expect_as(attention)
        if reference is not None:
            _keep_grid(layer, reference, owner, model, name)
        fit = TapFit(graft.heads(attention), options.kernel_size, adapter.sides)
        sites.append(Site(name, attention, graft, layer, fit, reference))
    return sites


def _reference_on(owner: nn.Module, model: nn.Module, adapter: SwapAdapter) -> GridReference:
    """The reference that a hook on `owner` sets; the hook is registered if it is the first."""
    for hook in forward_pre_hooks(owner):
        if isinstance(hook, GridHook):
            return hook.reference
    others = (each for module in model.modules() for each in forward_pre_hooks(module))
    beside = next((each.reference for each in others if isinstance(each, GridHook)), None)
    hook = GridHook(GridReference(beside), adapter.grid)
    owner.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    return hook.reference


def _keep_grid(layer: nn.Module, reference: GridReference, owner: nn.Module, model: nn.Module, name: str) -> None:
    """The hooks that keep a grid to its pass: on the layer, the blocks around it, and the owner (or model) above."""
    BlockScope(reference).put_on(layer)
    for module in above(model, name):
        if module is owner or module is model:
            PassScope(reference).put_on(module)
            return
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            BlockScope(reference).put_on(module)


def sweep(model: nn.Module) -> None:
    """Remove the hooks that tell a grid to nobody."""
    used = {id(module.reference) for module in model.modules() if hasattr(module, "reference")}
    for module in model.modules():
        remove_hooks(module, used)
