"""Put ATConv in the place of a model's attention."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from sit_atconv.layers.atconv import VOLUMES, KernelGenerator
from sit_atconv.ops.atconv import POOLS
from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
from sit_atconv.swap.building import build, sweep
from sit_atconv.swap.calibration import (
    Site,
    compare_site,
    fit_site,
    read_share,
    run_over,
)
from sit_atconv.swap.choosing import Select, choose
from sit_atconv.swap.delta import load_delta
from sit_atconv.swap.grafts import Graft
from sit_atconv.swap.handle import PREFIXES, SCHEMA, AttentionSwap, put_in
from sit_atconv.swap.identity import teacher_of
from sit_atconv.swap.inputs import calibration_inputs, told_of
from sit_atconv.swap.start import start_as_box, start_as_fitted
from sit_atconv.swap.survey import survey_of
from sit_atconv.swap.wrapping import check_bare, model_of

INITS = ("closed_form", "copy_vo", "random")
JOINTS = ("keep", "split")
MAX_ERROR = 0.2  # relative error of the model's output up to which select="auto" takes layers, if no target is given


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
    if (volume := adapter.volume(volume)) is not None:
        settings["volume"] = volume
    teacher = teacher_of(model) if record is None else record.config["teacher"]
    config = {"schema": SCHEMA, "layers": [], **settings, "teacher": teacher}
    for name, value in settings.items() if record is not None else ():
        theirs = record.config.get(name)
        theirs = adapter.volume(theirs) if name == "volume" else theirs  # before there was a choice, it was not stored
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
