"""Swaps that were made before: the layers that a stored configuration names, for the weights stored with it."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from sit_atconv.layers.atconv import VOLUMES
from sit_atconv.runtime.errors import InputError, check_choice, told
from sit_atconv.runtime.reading import POSITIVE, fault_of
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
from sit_atconv.swap.building import build, sweep
from sit_atconv.swap.calibration import Site
from sit_atconv.swap.handle import PREFIXES, SCHEMA, AttentionSwap, put_in
from sit_atconv.swap.identity import teacher_of
from sit_atconv.swap.marking import SwapRecord
from sit_atconv.swap.wrapping import check_bare, model_of

STORED_FORM = {
    "layers": [str], "kernel_size": POSITIVE, "pool": str, "prefix": PREFIXES, "volume?": VOLUMES,
    "teacher": {"class": str, "name": (str, None), "revision": (str, None), "fingerprint": str},
}  # fmt: skip
DAMAGED = "it is not as swap_attention wrote it"


def install(model: nn.Module, model_class: type[nn.Module], config: dict) -> None:
    """Put freshly started layers where `config` says, for weights to be loaded into; for constructors.

    model_class: the class that the model derives from. Raises InputError for a schema of another version, or layers
    that the model does not have.
    """
    for site in _build_as_stored(model, adapter_of(model), config):
        model.set_submodule(site.name, site.layer)
    model._swap_record = SwapRecord(model, config)
    model._swap_record.model_class = model_class


def swap_as_stored(
    model_or_pipeline, config: dict, state: Mapping[str, torch.Tensor], check: Callable[[dict], None]
) -> AttentionSwap:
    """Swap the layers that `config` names in an unswapped model, and give them the weights `state`.

    check: is given what identifies the model (`teacher_of`), and raises where it is another than wanted.
    Raises InputError, the model untouched, for a schema of another version, layers that the model does not have or that
    cannot be swapped, and tensors that are missing, surplus or misshapen.
    """
    pipeline, model = model_of(model_or_pipeline)
    check_bare(model)
    if hasattr(model, "_swap_record"):
        raise InputError(f"{type(model).__name__} has swapped layers already; revert them, or take the original model")
    adapter = adapter_of(model)
    _check_of(adapter, config)
    check(teacher_of(model))
    adapter.check(model, config)
    try:
        sites = _build_as_stored(model, adapter, config)
        wanted = {f"{site.name}.{name}": each for site in sites for name, each in site.layer.state_dict().items()}
        wrong = [name for name in (*wanted, *state) if name not in state or name not in wanted]
        wrong += [name for name in wanted if not wrong and state[name].shape != wanted[name].shape]
        if wrong:
            raise InputError(f"{wrong[0]} is missing, surplus or misshapen in the weights ({len(wrong)} such in all)")
        for site in sites:
            reason = site.graft.refusal(site.attention)
            if reason is not None:
                raise InputError(f"{site.name} {reason}")
            site.layer.load_state_dict({name: state[f"{site.name}.{name}"] for name in site.layer.state_dict()})
        swap = AttentionSwap(model, adapter, sites, config, pipeline)
        put_in(swap, None)
    finally:
        sweep(model)
    return swap


def check_stored(config: dict) -> None:
    """Raise InputError where a stored configuration is of another version, or not as `swap_attention` wrote it."""
    found = config.get("schema") if isinstance(config, dict) else config
    if found != SCHEMA:
        raise InputError(f"atconv schema {found!r}: this version reads {SCHEMA}; use the one that wrote it")
    if fault := fault_of(config, STORED_FORM):
        raise InputError(f"atconv: {fault}; {DAMAGED}")


def _check_of(adapter: SwapAdapter, config: dict) -> None:
    """As `check_stored`, and for what the class of the model cannot have."""
    check_stored(config)
    with told("atconv", InputError, remedy=DAMAGED):
        adapter.volume(config.get("volume"))


def _build_as_stored(model: nn.Module, adapter: SwapAdapter, config: dict) -> list[Site]:
    _check_of(adapter, config)
    grafts = adapter.find(model)
    for name in config["layers"]:
        check_choice("atconv layer", name, grafts)
    return build(model, adapter, {name: grafts[name] for name in config["layers"]}, config)
