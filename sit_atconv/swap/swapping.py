"""Put ATConv in the place of a model's attention, and take it out again."""

import copy
import inspect
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from sit_atconv.layers.atconv import VOLUMES, KernelGenerator
from sit_atconv.ops.atconv import POOLS
from sit_atconv.runtime.compat.torch import uncompiled
from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
from sit_atconv.swap.building import build, sweep
from sit_atconv.swap.calibration import (
    Cost,
    Site,
    SwapReport,
    compare_site,
    fit_site,
    read_share,
    row_of,
    run_over,
)
from sit_atconv.swap.choosing import Select, choose
from sit_atconv.swap.grafts import Graft, is_fused
from sit_atconv.swap.identity import teacher_of
from sit_atconv.swap.inputs import calibration_inputs, told_of
from sit_atconv.swap.marking import SwapRecord
from sit_atconv.swap.start import start_as_box, start_as_fitted
from sit_atconv.swap.survey import Survey, survey_of
from sit_atconv.swap.wrapping import check_bare, check_unhooked, check_unwrapped, model_of

SCHEMA = 1
INITS = ("closed_form", "copy_vo", "random")
JOINTS = ("keep", "split")
PREFIXES = ("attend", "error")
MAX_ERROR = 0.2  # relative error of the model's output up to which select="auto" takes layers, if no target is given


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


def swap_attention(
    model_or_pipeline,
    select: Select = "auto",
    exclude: str | Sequence[str] = (),
    init: str = "closed_form",
    calib: Iterable | None = None,
    joint: str = "keep",
    prefix: str = "attend",
    pool: str = "raster",
    kernel_size: int = 3,
    volume: str | None = None,
    max_error: float | None = None,
    speedup: float | None = None,
    dry_run: bool = False,
    weights: str | Path | None = None,
) -> AttentionSwap:
    """Replace self-attention by ATConv in a model of diffusers, timm or this library, or in a pipeline's model.

    select: "all"; "even" or "odd" (by 0-based place among the model's layers, those swapped before among them); a
        share in (0, 1]; a regular expression found in the name of an attention; a list of names; a callable
        (name, module) -> bool; or "auto", see `choose_best`: the layers with the least error at the model's output, on
        the calibration inputs, per multiply-accumulate saved; as many as keep that error within `max_error` with all
        of them swapped (0.2 if neither is given), until the model has `speedup` times fewer multiply-accumulates, if
        that is given. A layer that takes over 1.25 times as long as its attention here is not taken.
        exclude: names, or regular expressions found in them; these keep their attention.
    init: "closed_form" (value and output maps of the attention, kernels fitted to what it did on `calib`), "copy_vo"
        (the maps, and box kernels) or "random".
    calib: calibration inputs, each a dict of keyword arguments or a tuple of arguments of the model; None: four random
        ones of the model's own size.
    joint: "keep" leaves attention over text and image together alone; "split" swaps it, where the adapter can.
    prefix: what a ViT's class and register tokens do: "attend" (softmax over all tokens), "error" (refuse them).
    pool, kernel_size: of `ATConv`. volume: of `ATConv`, for models whose tokens lie in volumes: "full" (None) or
        "factored".
    dry_run: build, calibrate and measure all layers, selected or not, for `report()`, and leave the model as it is;
        none is chosen where "auto" finds none or a selected attention cannot be swapped.
    weights: a delta that was published for this model, see `load_delta`: it names the layers and all else, and brings
        their weights, so no other option goes with it.

    The model is changed in place, and a diffusers model's class becomes its ATConv subclass, so `save_pretrained`
    writes what `from_pretrained` reads. Layers swapped before stay as they are and are no candidates any more. The new
    layers can be trained, those of a frozen model too.
    Raises InputError, the model untouched, for a class without adapter, nothing to swap, an attention that ATConv does
    not stand for, adapters or quantisation on it, hooks, offloading or parallelism on the model, calibration that is
    not finite, of another dtype or without arguments that the model needs, or an unknown option; and where "auto" finds
    no layers that do, or a model's output is all zeros.
    """
    if weights is not None:
        from sit_atconv.swap.delta import load_delta  # here: it stands on this module

        given = {name: value for name, value in locals().items() if name in OPTIONS and value != OPTIONS[name]}
        if given:
            name, value = next(iter(given.items()))
            raise InputError(
                f"{name}={value!r}: weights={str(weights)!r} bring the layers and their options; leave it out"
            )
        return load_delta(model_or_pipeline, weights)
    check_choice("init", init, INITS)
    check_choice("joint", joint, JOINTS)
    check_choice("prefix", prefix, PREFIXES)
    check_choice("pool", pool, POOLS)
    for name, value, least in (("max_error", max_error, 0), ("speedup", speedup, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{name}={value!r}: give a number")
        if value is not None and select != "auto":
            raise InputError(f"{name}={value}: a target needs select='auto', and select={select!r}; leave one out")
        if value is not None and not value > least:
            raise InputError(f"{name}={value}: must be greater than {least}")
    check_choice("volume", volume, (None, *VOLUMES))
    pipeline, model = model_of(model_or_pipeline)
    check_bare(model)
    adapter = adapter_of(model)
    record = getattr(model, "_swap_record", None)
    settings = {"kernel_size": kernel_size, "pool": pool, "prefix": prefix}
    if adapter.sides == 3:
        settings["volume"] = "full" if volume is None else volume
    elif volume is not None:
        raise InputError(
            f"volume={volume!r}: the tokens of {type(model).__name__} lie on a grid of rows and columns, and fill no "
            "volume of frames; leave it out"
        )
    teacher = teacher_of(model) if record is None else record.config["teacher"]
    config = {"schema": SCHEMA, "layers": [], **settings, "teacher": teacher}
    for name, value in settings.items() if record is not None else ():
        theirs = record.config.get(name, "full")  # volumes swapped before there was a choice
        if theirs != value:
            raise InputError(
                f"{name}={value!r}: this model has layers swapped with {theirs!r}, and a model has one "
                "setting; revert them, or use theirs"
            )
    grafts = _candidates(model, adapter, joint, record, select)
    counted = [name for name, graft in adapter.find(model).items() if joint == "split" or not graft.joint]
    names = choose({name: model.get_submodule(name) for name in grafts}, select, exclude, counted)
    reasons = {name: grafts[name].refusal(model.get_submodule(name)) for name in (grafts if dry_run else names)}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    wrong = next((name for name in names if name in refused), None)
    refusal = None if wrong is None else f"{wrong} {refused[wrong]}; or leave it out by exclude={wrong!r}"
    if refusal is not None and not dry_run:
        raise InputError(refusal)
    adapter.check(model, config)

    inputs = calibration_inputs(model, adapter, calib, needed=init == "closed_form" or select == "auto")
    if select == "auto" and max_error is None and speedup is None:
        max_error = MAX_ERROR
    try:
        looked_at = [name for name in grafts if name not in refused] if dry_run else names
        sites = build(model, adapter, {name: grafts[name] for name in looked_at}, config)
        survey = None
        with told_of(model, "calib", inputs, given=calib is not None):
            _start(model, sites, init, inputs)
            if dry_run or select == "auto":
                target = (max_error, speedup) if select == "auto" else None
                survey = survey_of(model, sites, inputs, names, refused, refusal, target)
        swap = AttentionSwap(model, adapter, sites, config, pipeline, survey)
        config["layers"] = [site.name for site in swap.sites]
        if not dry_run:
            if not swap.sites:
                raise InputError(
                    f"select='auto': {survey.choice.refusal}; the same call with dry_run=True has a report() of all "
                    "layers"
                )
            put_in(swap, record)
    finally:
        sweep(model)
    return swap


# The options of a swap and their defaults, less the delta that takes the place of all others.
OPTIONS = {
    name: each.default
    for name, each in inspect.signature(swap_attention).parameters.items()
    if name not in ("model_or_pipeline", "weights")
}


def _candidates(model, adapter: SwapAdapter, joint: str, record, select) -> dict[str, Graft]:
    """The attentions that may be swapped. Raises InputError where there are none, saying why."""
    grafts = adapter.find(model)
    swapped = set(record.config["layers"]) & grafts.keys() if record is not None else set()
    if isinstance(select, list | tuple):
        for name in select:
            if name in swapped:
                raise InputError(f"select: {name} is swapped already; leave it out")
            if name in grafts and grafts[name].joint and joint == "keep":
                raise InputError(
                    f"select: {name} is joint attention over text and image; give joint='split' to swap it"
                )
    free = {name: each for name, each in grafts.items() if not isinstance(model.get_submodule(name), KernelGenerator)}
    kept = {name: graft for name, graft in free.items() if joint == "split" or not graft.joint}
    if not kept:
        if free:
            raise InputError(
                f"joint={joint!r}: {type(model).__name__} has joint attention over text and image only "
                f"({len(free)} layers); give joint='split' to swap it"
            )
        if swapped:
            raise InputError(f"all {len(swapped)} attentions of this model are swapped already; revert them first")
        raise InputError(f"{type(model).__name__} has no attention that its adapter knows")
    return kept


def _start(model: nn.Module, sites: list[Site], init: str, inputs: list) -> None:
    """Give the layers their starting weights, and measure how far they are from the attentions."""
    if init != "random":
        for site in sites:
            site.graft.copy(site.attention, site.layer)
            start_as_box(site.layer)
        joint = [site for site in sites if site.graft.joint]
        if joint and inputs:
            run_over(model, joint, inputs, read_share, "reading text shares")
            for site in joint:
                if site.shares:
                    site.graft.settle(site.layer, torch.stack(site.shares).mean(0))
    if init == "closed_form":
        run_over(model, sites, inputs, fit_site, "fitting kernels")
        for site in sites:
            if site.fit.gram.any():  # else the inputs do not reach it
                start_as_fitted(site.layer, site.fit)
    if inputs:
        run_over(model, sites, inputs, compare_site, "measuring errors")


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
    for name, layer in layers.items():
        model.set_submodule(name, layer)
        record.replace(name, layer)
    swap.config, swap.active = copy.deepcopy(record.config), True
    swap.adapter.mark(model)
    _register(swap._pipeline, model)


def _register(pipeline, model: nn.Module) -> None:
    """Have the pipeline's configuration name the class that the model has now."""
    for name, module in pipeline.components.items() if pipeline is not None else ():
        if uncompiled(module) is model:
            pipeline.register_modules(**{name: module})
