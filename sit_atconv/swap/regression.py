"""Blockwise regression: swapped layers learn, on the inputs of the attentions they replace, to give their outputs."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from sit_atconv.runtime.compat.torch import tree_map
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import is_main
from sit_atconv.swap.calibration import Site, run_over
from sit_atconv.swap.grafts import foreign_maps, kind_of
from sit_atconv.swap.handle import AttentionSwap, place
from sit_atconv.swap.inputs import calibration_inputs, checked_inputs, told_of
from sit_atconv.swap.wrapping import check_unhooked


def regress(swap: AttentionSwap, inputs: Iterable | None = None, steps: int = 500, lr: float = 1e-3) -> list[float]:
    """Train the layers of a swap, all in one pass of the unswapped model a step.

    Returns a number per step: the mean over the layers of their squared relative error on the input of the step.
    inputs: one a step, each a batch, as a dict of keyword arguments or a tuple of arguments of the model. The first
    `steps` are taken; fewer are gone through again. None: synthetic ones, new for every step. They should cover the
    times of the diffusion evenly. The rest of the model is not trained; of layers with an adapter on them, what the
    adapter left trainable.
    AdamW at `lr`, falling to 0 by a cosine: 1e-3 is for widths of hundreds of channels up, tens take 1e-2. Layers in
    half precision are trained in fp32 and then rounded.
    A step is on the layers that the model calls on its input. Raises InputError for what is no swap or was reverted,
    inputs that are none, do not fit the model or reach no layer, frozen layers, an offloaded model, and where the model
    has no synthetic inputs; and for an error that is not finite, with the weights of the step before it.
    """
    if not isinstance(swap, AttentionSwap):
        raise InputError(
            f"regress was given a {type(swap).__name__}; give it the swap: swap = swap_attention(model), regress(swap)"
        )
    swap.check_active()
    if steps < 1 or not lr > 0:
        raise InputError(f"steps={steps}, lr={lr}: both must be greater than 0")
    if inputs is not None:
        source = itertools.cycle(checked_inputs(swap.model, "inputs", inputs, steps))
    else:
        drawn = partial(calibration_inputs, swap.model, swap.adapter, None, needed=True)
        source = itertools.chain.from_iterable(drawn(seed=seed) for seed in itertools.count())
    check_unhooked(swap.model, allowed=())
    swap.follow()
    model, layers, attentions = swap.model, swap.layers, swap.attentions
    for name, layer in layers.items():
        for each, module in foreign_maps(layer).items():
            weight = getattr(module, "weight", None)
            learns = type(weight) in (torch.Tensor, nn.Parameter) and weight.requires_grad
            if not learns and module is layer.get_submodule(each):  # and not below an adapter, which learns
                raise InputError(
                    f"{name} has {each} quantised ({kind_of(module)}), which does not learn; regress before"
                )
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the swapped layers are frozen: for layer in swap.layers.values(): layer.requires_grad_()")
    halves = {p: p.dtype for layer in layers.values() for p in layer.parameters() if p.dtype.itemsize < 4}
    for parameter in halves:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history, seen = [], {}

    def keep(site: Site, args: tuple, kwargs: dict, output) -> None:
        seen[site.name] = site.graft.grid(site.layer, args, kwargs), args, kwargs, output

    try:
        for _ in Progress(range(steps), "regression", disable=not is_main()):
            place(model, attentions)
            seen.clear()
            with told_of(model, "inputs", each := [next(source)], given=inputs is not None):
                run_over(model, swap.sites, each, keep, "")
            place(model, layers)
            reached = [site for site in swap.sites if site.name in seen]
            if not reached:
                raise InputError(
                    f"step {len(history) + 1} of the regression: the model calls none of the swapped layers on its "
                    "input; give inputs that reach them"
                )
            with torch.enable_grad(), _native_attention(layers.values() if halves else ()):
                loss = torch.stack([_error(site, *seen[site.name]) for site in reached]).mean()
            if not loss.isfinite():
                raise InputError(
                    f"the error is {loss.item()} in step {len(history) + 1} of the regression: the model's "
                    "attentions or the inputs are not finite, or lr is too large; the layers are as the step "
                    "before left them"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(loss.item())
    finally:
        place(model, layers)
        optimizer.zero_grad()
        for parameter, dtype in halves.items():
            parameter.data = parameter.data.to(dtype)
    return history


@contextmanager
def _native_attention(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The softmax of `layers` by torch's own attention: backends that a model in half precision has may refuse fp32."""
    kept = {layer: layer.backend for layer in layers if hasattr(layer, "backend")}
    try:
        for layer in kept:
            layer.backend = AttentionBackendName.NATIVE
        yield
    finally:
        for layer, backend in kept.items():
            layer.backend = backend


def _at_least_fp32(value):
    half = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if half else value


def _error(site: Site, grid: tuple[int, ...], args: tuple, kwargs: dict, output) -> torch.Tensor:
    """Squared error of a layer relative to the attention's output, where ATConv has a part in it."""
    if site.reference is not None:
        site.reference.set(grid, next(site.layer.parameters()).device)
    args, kwargs = tree_map(_at_least_fp32, (args, kwargs))
    outputs = site.layer(*args, **kwargs), output
    ours, theirs = (site.graft.approximated(site.layer, each, args, kwargs) for each in outputs)
    return (ours.float() - theirs.float()).square().sum() / theirs.float().square().sum().clamp_min(1e-12)
