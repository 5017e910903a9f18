"""A swap that was made: what it tells, and how it is taken back."""

import copy
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import replace

from torch import nn

from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.runtime.compat.torch import uncompiled
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.adapters import SwapAdapter
from sit_atconv.swap.building import sweep
from sit_atconv.swap.calibration import Cost, Site, SwapReport, compare_site, row_of, run_over
from sit_atconv.swap.grafts import is_fused
from sit_atconv.swap.inputs import calibration_inputs, checked_inputs, told_of
from sit_atconv.swap.marking import SwapRecord
from sit_atconv.swap.survey import Survey
from sit_atconv.swap.wrapping import PARTS, check_unhooked, check_unwrapped

SCHEMA = 1
PREFIXES = ("attend", "error")


class AttentionSwap:
    """A swap that was made, or with `dry_run` planned: `report()`, `revert()` and `config`.

    It holds the attentions that were replaced, outside the model, whose state dict and copies know nothing of them;
    drop it to free their memory. config: what `save_pretrained` and `save_delta` write, see `swap_attention`.
    sites: the chosen layers. candidates: those that the report is on, all of the model after a dry run.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: SwapAdapter,
        candidates: list[Site],
        config: dict,
        pipeline=None,
        survey: Survey | None = None,
    ):
        self.model, self.adapter, self.config, self._pipeline = model, adapter, config, pipeline
        self.candidates, self._survey = candidates, survey
        chosen = [site.name for site in candidates] if survey is None else survey.choice.names
        self.sites = [site for site in candidates if site.name in chosen]
        self.active = False

    @property
    def attentions(self) -> dict[str, nn.Module]:
        """The replaced attentions, by name."""
        return {site.name: site.attention for site in self.sites}

    @property
    def layers(self) -> dict[str, KernelGenerator]:
        """The layers in their place, by name."""
        return {site.name: site.layer for site in self.sites}

    def report(self, measure: bool = True) -> SwapReport:
        """Parameters, MACs, latency and error of every layer, before and after; errors as they were at the swap.

        After a dry run it is on all layers of the model that could be swapped, and says which are chosen; where calls
        were calibrated, the error of the model's output is measured with each of them alone, and with all chosen ones.
        MACs and latency are measured now (`measure`), on random inputs of the shapes seen in calibration, once for all
        layers of a shape; before and after alternate, and medians of rounds count, with their interquartile ranges.
        What select="auto" measured to choose by is shown as it was. Left out where there was no calibration. Raises
        InputError where the model is offloaded.
        """
        self.follow()
        costs: dict[Hashable, Cost] = {} if self._survey is None else dict(self._survey.costs)
        rows = [row_of(site, costs if measure else None) for site in self.candidates]
        return SwapReport(rows) if self._survey is None else self._survey.report(rows)

    def errors(self, inputs: Iterable | None = None) -> dict[str, float]:
        """How far the layers, as they are now, are from their attentions: the relative error in norm of each one's
        output on the inputs that it has in the unswapped model, by its name.

        inputs: each a batch, as a dict of keyword arguments or a tuple of arguments of the model, such as held-out
        ones; None: the random ones of `swap_attention`. Layers that these do not reach are left out.
        Raises InputError for a swap that was reverted or a dry run, inputs that are none or do not fit the model, and
        where `report` does.
        """
        self.check_active()
        if inputs is None:
            given = calibration_inputs(self.model, self.adapter, None, needed=True)
        else:
            given = checked_inputs(self.model, "inputs", inputs)
        self.follow()
        sites = [replace(site, call=None, squares=[0.0, 0.0]) for site in self.sites]
        try:
            place(self.model, self.attentions)
            with told_of(self.model, "inputs", given, given=inputs is not None):
                run_over(self.model, sites, given, compare_site, "measuring errors")
        finally:
            place(self.model, self.layers)
        return {site.name: site.error for site in sites if site.error is not None}

    def check_active(self) -> None:
        """Raises InputError for a swap that was reverted, and a dry run."""
        if not self.active:
            raise InputError("this swap was reverted, or was a dry run; swap first")

    def follow(self) -> None:
        """Move and cast the attentions, which the model does not hold, to where it went; of a dry run the layers.

        Raises InputError where the layers have no data, and an attention that followed them would lose its own; where
        attentions that are in the model are stored in 8 bits; and where hooks or wrappers stand between.
        """
        check_unhooked(self.model)
        check_unwrapped(self.model)
        for site in self.candidates:
            inside, outside = (site.layer, site.attention) if self.active else (site.attention, site.layer)
            weight = next(inside.parameters())
            if weight.is_meta:
                raise InputError(
                    f"{site.name} has no data here (offloaded, or a meta tensor); end the offloading first "
                    "(accelerate.hooks.remove_hook_from_submodules, or a pipeline's remove_all_hooks)"
                )
            if weight.dtype.itemsize < 2:
                raise InputError(
                    f"{site.name} has weights in {weight.dtype}, which no layer is computed in; report before casting "
                    "layerwise or quantising"
                )
            outside.to(weight.device, weight.dtype)

    def revert(self) -> None:
        """Put the attentions back, where the layers are now (device and dtype), as they were when they were replaced:
        with the processors of then, and not quantised.

        Raises InputError if that was done, where the model is offloaded or runs hooks, and where it has got fused
        projections or the layers an adapter such as a LoRA, which would not come to the attentions.
        """
        if not self.active:
            raise InputError("there is nothing to revert: this swap was reverted already, or was a dry run")
        self.follow()
        if any(is_fused(module) for module in self.model.modules()):
            raise InputError("the model has fused projections; call unfuse_qkv_projections before revert")
        inside = (each for site in self.sites for each in site.layer.named_modules(prefix=site.name))
        adapted = next((name for name, module in inside if hasattr(module, "base_layer")), None)
        if adapted is not None:
            raise InputError(
                f"{adapted} carries an adapter (LoRA), which the attention that comes back would not have; unload it "
                "first (unload_lora() of the model, unload_lora_weights() of a pipeline), and load it after"
            )
        here = {name: module for name, module in self.model.named_modules() if name in self.layers}
        for site in self.sites:
            if site.name in here:  # of a model that was cut short since
                site.attention.train(site.layer.training)
                self.model.set_submodule(site.name, site.attention)
                self.model._swap_record.replace(site.name, site.attention)
        sweep(self.model)
        record = self.model._swap_record
        left = self.adapter.find(self.model).keys() - self.layers.keys()
        record.config["layers"] = [name for name in record.config["layers"] if name in left]
        self.adapter.mark(self.model)
        _register(self._pipeline, self.model)
        self.active = False


def place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules into a model, by name."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def put_in(swap: AttentionSwap, record: SwapRecord | None) -> None:
    """Put the layers of a swap in their place; record: that of the model, where layers of it were swapped before."""
    model, layers = swap.model, swap.layers
    for site in swap.sites:
        site.layer.train(site.attention.training)
    swap.candidates = swap.sites
    order = list(swap.adapter.find(model))
    if record is None:
        record = model._swap_record = SwapRecord(model, swap.config)
    record.config = {**swap.config, "layers": sorted({*record.config["layers"], *layers}, key=order.index)}
    place(model, layers)
    for name, layer in layers.items():
        record.replace(name, layer)
    swap.config, swap.active = copy.deepcopy(record.config), True
    swap.adapter.mark(model)
    _register(swap._pipeline, model)
    _tell_of_second(swap)


def _register(pipeline, model: nn.Module) -> None:
    """Have the pipeline's configuration name the class that the model has now."""
    for name, module in pipeline.components.items() if pipeline is not None else ():
        if uncompiled(module) is model:
            pipeline.register_modules(**{name: module})


def _tell_of_second(swap: AttentionSwap) -> None:
    """Warn where the pipeline has a second model of this kind, as Wan 2.2 has: its attention stays."""
    pipeline, kind = swap._pipeline, swap.adapter.model
    for name, module in pipeline.components.items() if pipeline is not None else ():
        other = uncompiled(module)
        if not name.startswith(PARTS) or not isinstance(other, kind) or other is swap.model:
            continue
        if getattr(other, "_swap_record", None) is None:
            warnings.warn(
                f"{name} of this {type(pipeline).__name__} is a {kind.__name__} too, and keeps its attention; for it, "
                f"swap pipe.{name} by itself, then call pipe.register_modules({name}=pipe.{name})",
                stacklevel=4,  # who calls swap_attention or load_delta
            )
