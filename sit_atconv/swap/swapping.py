"""Put ATConv in the place of a model's attention, and take it out again."""

import copy
import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map

from sit_atconv.errors import InputError, check_choice
from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.ops.atconv import POOLS
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
from sit_atconv.swap.calibration import (
    LayerReport,
    Site,
    SwapReport,
    compare_site,
    fit_site,
    latency_of,
    macs_of,
    parameters_of,
    ranked,
    run_over,
)
from sit_atconv.swap.choosing import Select, choose
from sit_atconv.swap.grafts import Graft, LayerOptions
from sit_atconv.swap.grid import GridHook, GridReference, Reader
from sit_atconv.swap.marking import SwapRecord
from sit_atconv.swap.start import TapFit, set_kernels

SCHEMA = 1
INITS = ("closed_form", "copy_vo", "random")
JOINTS = ("keep", "split")
PREFIXES = ("attend", "error")
MAX_ERROR = 0.2  # relative error of a layer's output up to which select="auto" takes it, if no target is given
EXAMPLES = 4  # synthetic calibration inputs


class AttentionSwap:
    """A swap that was made, or with `dry_run` planned: `report()`, `revert()` and `config`.

    It holds the attentions that were replaced, outside the model, whose state dict and copies know nothing of them;
    drop it to free their memory. config: what `save_pretrained` and `save_delta` write, see `swap_attention`.
    """

    def __init__(self, model: nn.Module, adapter: SwapAdapter, sites: list[Site], config: dict):
        self.model, self.adapter, self.config, self._sites = model, adapter, config, sites
        self.active = False

    @property
    def attentions(self) -> dict[str, nn.Module]:
        """The replaced attentions, by name."""
        return {site.name: site.attention for site in self._sites}

    @property
    def layers(self) -> dict[str, KernelGenerator]:
        """The layers in their place, by name."""
        return {site.name: site.layer for site in self._sites}

    def report(self, measure: bool = True) -> SwapReport:
        """Parameters, MACs, latency and calibration error of every layer, before and after.

        MACs and latency are measured now (`measure`), on random inputs of the shapes seen in calibration; before and
        after alternate, and the median of rounds counts. Left out where there was no calibration.
        """
        rows = []
        for site in self._sites:
            row = LayerReport(site.name, parameters_of(site.attention), parameters_of(site.layer), error=site.error)
            if measure and site.call is not None:
                row.macs_before, row.macs_after = (macs_of(module, site) for module in (site.attention, site.layer))
                row.ms_before, row.ms_after = latency_of(site)
            rows.append(row)
        return SwapReport(rows)

    def revert(self) -> None:
        """Put the attentions back, where the layers are now (device and dtype). Raises InputError if that was done."""
        if not self.active:
            raise InputError("there is nothing to revert: this swap was reverted already, or was a dry run")
        for site in self._sites:
            weight = next(site.layer.parameters())
            site.attention.to(weight.device, weight.dtype).train(site.layer.training)
            self.model.set_submodule(site.name, site.attention)
        _sweep(self.model)
        record = self.model._swap_record
        names = set(self.layers)
        record.config["layers"] = [name for name in record.config["layers"] if name not in names]
        self.adapter.mark(self.model)
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
    max_error: float | None = None,
    speedup: float | None = None,
    dry_run: bool = False,
) -> AttentionSwap:
    """Replace self-attention by ATConv in a model of diffusers, timm or this library, or in a pipeline's model.

    select: "all"; "odd" (every second); a share in (0, 1]; a regular expression found in the name of an attention; a
        list of names; a callable (name, module) -> bool; or "auto": layers ranked by calibration error per millisecond
        saved, taken until the model is `speedup` times as fast or the next one's error exceeds `max_error` (0.2 if
        neither is given). exclude: names or regular expressions, which keep their attention.
    init: "closed_form" (value and output maps of the attention, kernels fitted to what it did on `calib`), "copy_vo"
        (the maps, and box kernels) or "random".
    calib: calibration inputs, each a dict of keyword arguments or a tuple of arguments of the model; None: four random
        ones of the model's own size.
    joint: "keep" leaves attention over text and image together alone; "split" swaps it, where the adapter can.
    prefix: what a ViT's class and register tokens do: "attend" (softmax over all tokens), "error" (refuse them).
    pool, kernel_size: of `ATConv`. dry_run: build, calibrate and measure, and leave the model as it is.

    The model is changed in place, and a diffusers model's class becomes its ATConv subclass, so `save_pretrained`
    writes what `from_pretrained` reads. Layers swapped before stay as they are and are no candidates any more.
    Raises InputError, the model untouched, for a class without adapter, nothing to swap, an attention that ATConv does
    not stand for, adapters or parallelism on it, or an unknown option.
    """
    check_choice("init", init, INITS)
    check_choice("joint", joint, JOINTS)
    check_choice("prefix", prefix, PREFIXES)
    check_choice("pool", pool, POOLS)
    for name, value in (("max_error", max_error), ("speedup", speedup)):
        if value is not None and select != "auto":
            raise InputError(f"{name}={value}: a target needs select='auto', and select={select!r}; leave one out")
        if value is not None and not value > (1 if name == "speedup" else 0):
            raise InputError(f"{name}={value}: must be greater than {1 if name == 'speedup' else 0}")
    pipeline, model = _model_of(model_or_pipeline)
    adapter = adapter_of(model)
    options = LayerOptions(kernel_size, pool, prefix)
    _check_unsharded(model)
    record = getattr(model, "_swap_record", None)
    config = {
        "schema": SCHEMA,
        "layers": [],
        "kernel_size": kernel_size,
        "pool": pool,
        "prefix": prefix,
        "teacher": teacher_of(model) if record is None else record.config["teacher"],
    }
    if record is not None:
        for name in ("kernel_size", "pool", "prefix"):
            if record.config[name] != config[name]:
                raise InputError(
                    f"{name}={config[name]!r}: this model has layers swapped with {record.config[name]!r}, and a model "
                    "has one setting; revert them, or use theirs"
                )
    grafts = _candidates(model, adapter, joint, record, select)
    names = choose({name: model.get_submodule(name) for name in grafts}, select, exclude)
    for name in names:
        reason = grafts[name].refusal(model.get_submodule(name))
        if reason is not None:
            raise InputError(f"{name} {reason}; or leave it out by exclude={name!r}")

    inputs = _inputs(model, adapter, calib, needed=init == "closed_form" or select == "auto")
    try:
        sites = _build(model, adapter, {name: grafts[name] for name in names}, options)
        _start(model, sites, init, inputs)
        if select == "auto":
            default = MAX_ERROR if max_error is None and speedup is None else None
            sites = ranked(model, sites, inputs, max_error or default, speedup)
        config["layers"] = [site.name for site in sites]
        swap = AttentionSwap(model, adapter, sites, config)
        if not dry_run:
            _put_in(swap, record)
    finally:
        _sweep(model)
    if pipeline is not None and not dry_run:
        component = next(name for name, module in pipeline.components.items() if module is model)
        pipeline.register_modules(**{component: model})
    return swap


def _start(model: nn.Module, sites: list[Site], init: str, inputs: list) -> None:
    """Give the layers their starting weights, and measure how far they are from the attentions."""
    if init != "random":
        for site in sites:
            site.graft.copy(site.attention, site.layer)
            set_kernels(site.layer, torch.full_like(site.fit.cross, 1 / site.fit.cross.shape[1]))
    if init == "closed_form":
        run_over(model, sites, inputs, fit_site, "fitting kernels")
        for site in sites:
            set_kernels(site.layer, site.fit.expressible())
    if inputs:
        run_over(model, sites, inputs, compare_site, "measuring errors")


def _put_in(swap: AttentionSwap, record: SwapRecord | None) -> None:
    model, layers = swap.model, swap.layers
    for site in swap._sites:
        site.layer.train(site.attention.training)
    order = list(swap.adapter.find(model))
    if record is None:
        record = model._swap_record = SwapRecord(model, swap.config)
    record.config = {**swap.config, "layers": sorted({*record.config["layers"], *layers}, key=order.index)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    swap.config, swap.active = copy.deepcopy(record.config), True
    swap.adapter.mark(model)


def install(model: nn.Module, model_class: type[nn.Module], config: dict) -> dict[str, KernelGenerator]:
    """Put freshly started layers where `config` says, for weights to be loaded into; name -> layer.

    For constructors (model_class: the class that the model derives from) and deltas. Raises InputError for a schema of
    another version, or layers that the model does not have.
    """
    if config.get("schema") != SCHEMA:
        raise InputError(
            f"atconv schema {config.get('schema')!r}: this version reads {SCHEMA}; use the one that wrote it"
        )
    adapter = adapter_of(model)
    grafts = adapter.find(model)
    for name in config["layers"]:
        check_choice("atconv layer", name, grafts)
    options = LayerOptions(config["kernel_size"], config["pool"], config["prefix"])
    sites = _build(model, adapter, {name: grafts[name] for name in config["layers"]}, options)
    for site in sites:
        model.set_submodule(site.name, site.layer)
    model._swap_record = SwapRecord(model, config)
    model._swap_record.model_class = model_class
    return {site.name: site.layer for site in sites}


def teacher_of(model: nn.Module) -> dict:
    """What identifies an unswapped model: class, name or path, revision, and a fingerprint of its weights.

    The fingerprint is a SHA-256 over name, shape and some 4,096 evenly spaced values of every tensor, as bf16: it
    tells revisions apart in little time, and is the same for fp32 and bf16 copies of the same weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    config = getattr(model, "config", None) or getattr(model, "pretrained_cfg", None) or {}
    return {
        "class": type(model).__name__,
        "name": str(config.get("_name_or_path") or config.get("hf_hub_id") or "") or None,
        "revision": getattr(model, "_commit_hash", None) or config.get("_commit_hash"),
        "fingerprint": digest.hexdigest(),
    }


def _model_of(model_or_pipeline) -> tuple:
    """(pipeline or None, model)."""
    if isinstance(model_or_pipeline, nn.Module):
        return None, model_or_pipeline
    for name in ("transformer", "unet"):
        model = getattr(model_or_pipeline, name, None)
        if isinstance(model, nn.Module):
            return model_or_pipeline, model
    raise InputError(f"{type(model_or_pipeline).__name__}: give a model, or a pipeline with a `transformer` or `unet`")


def _check_unsharded(model: nn.Module) -> None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise InputError("the model is compiled; swap first and compile after")
    if getattr(model, "_parallel_config", None) is not None:
        raise InputError("the model runs under context or tensor parallelism, which swapped layers do not; swap before")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise InputError(f"{name} is sharded over devices; swap before sharding")


def _candidates(model, adapter: SwapAdapter, joint: str, record, select) -> dict[str, Graft]:
    """The attentions that may be swapped. Raises InputError where there are none, saying why."""
    grafts = adapter.find(model)
    swapped = set(record.config["layers"]) if record is not None else set()
    if isinstance(select, list | tuple):
        for name in select:
            if name in swapped:
                raise InputError(f"select: {name} is swapped already; leave it out")
            if name in grafts and grafts[name].joint and joint == "keep":
                raise InputError(
                    f"select: {name} is joint attention over text and image; give joint='split' to swap it"
                )
    free = {name: graft for name, graft in grafts.items() if name not in swapped}
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


def _build(model, adapter: SwapAdapter, grafts: dict[str, Graft], options: LayerOptions) -> list[Site]:
    """Layers for the attentions, not yet in their place, and the hooks that tell them their grids, in place."""
    sites = []
    for name, graft in grafts.items():
        attention, owner = model.get_submodule(name), adapter.owner_of(model, name)
        reference = None if owner is None else _reference_on(owner, adapter.grid)
        layer = graft.build(attention, reference, options)
        fit = TapFit(graft.heads(attention), options.kernel_size)
        sites.append(Site(name, attention, graft, layer, fit, reference))
    return sites


def _reference_on(owner: nn.Module, read: Reader) -> GridReference:
    """The reference that a hook on `owner` sets; the hook is registered if it is the first."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, GridHook):
            return hook.reference
    hook = GridHook(GridReference(), read)
    owner.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    return hook.reference


def _sweep(model: nn.Module) -> None:
    """Remove the hooks that tell a grid to nobody."""
    used = {id(module.reference) for module in model.modules() if hasattr(module, "reference")}
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, GridHook) and id(hook.reference) not in used:
                hook.remove_from(module)


def _inputs(model: nn.Module, adapter: SwapAdapter, calib: Iterable | None, needed: bool) -> list:
    """Calibration inputs: those given, else synthetic ones, else none if they are not needed."""
    if calib is not None:
        if isinstance(calib, dict | torch.Tensor):
            raise InputError("calib: give a list of inputs, each a dict of keyword arguments or a tuple of arguments")
        inputs = list(calib)
        if not inputs:
            raise InputError("calib is empty; give at least one input, or leave it out for synthetic ones")
        return inputs
    generator, weight = torch.Generator().manual_seed(0), next(model.parameters())
    examples = []
    if adapter.example is not None and weight.device.type != "meta":
        examples = [adapter.example(model, generator) for _ in range(EXAMPLES if needed else 1)]
        examples = [each for each in examples if each is not None]
    if needed and not examples:
        raise InputError(
            f"{type(model).__name__} has no synthetic inputs; give calib=[dict of keyword arguments of a forward "
            "pass, ...], or init='copy_vo' with a select other than 'auto'"
        )

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)

    return [tree_map(placed, each) for each in examples]
