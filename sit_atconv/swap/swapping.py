"""Put ATConv in the place of a model's attention, and take it out again."""

import copy
import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map

from sit_atconv.errors import InputError, check_choice
from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.ops.atconv import POOLS
from sit_atconv.reading import POSITIVE, fault_of
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
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
from sit_atconv.swap.grafts import Graft, LayerOptions, is_fused
from sit_atconv.swap.grid import BlockScope, GridHook, GridReference, PassScope, remove_hooks
from sit_atconv.swap.marking import SwapRecord
from sit_atconv.swap.start import TapFit, set_kernels
from sit_atconv.swap.survey import Survey, survey_of

SCHEMA = 1
INITS = ("closed_form", "copy_vo", "random")
JOINTS = ("keep", "split")
PREFIXES = ("attend", "error")
MAX_ERROR = 0.2  # relative error of the model's output up to which select="auto" takes layers, if no target is given
EXAMPLES = 4  # synthetic calibration inputs

STORED_FORM = {
    "layers": [str], "kernel_size": POSITIVE, "pool": str, "prefix": PREFIXES,
    "teacher": {"class": str, "name": (str, None), "revision": (str, None), "fingerprint": str},
}  # fmt: skip


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
        """Parameters, MACs, latency and calibration error of every layer, before and after.

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
        _sweep(self.model)
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
    max_error: float | None = None,
    speedup: float | None = None,
    dry_run: bool = False,
) -> AttentionSwap:
    """Replace self-attention by ATConv in a model of diffusers, timm or this library, or in a pipeline's model.

    select: "all"; "even" or "odd" (by 0-based place among the model's layers, those swapped before among them); a
        share in (0, 1]; a regular expression found in the name of an attention; a list of names; a callable
        (name, module) -> bool; or "auto", see `choose_best`: the layers with the least error at the model's output, on
        the calibration inputs, per multiply-accumulate saved; as many as keep that error within `max_error` with all
        of them swapped (0.2 if neither is given), until the model has `speedup` times fewer multiply-accumulates, if
        that is given. A clock has a veto alone: a layer that is clearly slower than its attention is not taken.
        exclude: names, or regular expressions found in them; these keep their attention.
    init: "closed_form" (value and output maps of the attention, kernels fitted to what it did on `calib`), "copy_vo"
        (the maps, and box kernels) or "random".
    calib: calibration inputs, each a dict of keyword arguments or a tuple of arguments of the model; None: four random
        ones of the model's own size.
    joint: "keep" leaves attention over text and image together alone; "split" swaps it, where the adapter can.
    prefix: what a ViT's class and register tokens do: "attend" (softmax over all tokens), "error" (refuse them).
    pool, kernel_size: of `ATConv`. dry_run: build, calibrate and measure all layers, selected or not, for `report()`,
        and leave the model as it is; none is chosen where "auto" finds none or a selected attention cannot be swapped.

    The model is changed in place, and a diffusers model's class becomes its ATConv subclass, so `save_pretrained`
    writes what `from_pretrained` reads. Layers swapped before stay as they are and are no candidates any more. The new
    layers can be trained, those of a frozen model too.
    Raises InputError, the model untouched, for a class without adapter, nothing to swap, an attention that ATConv does
    not stand for, adapters or quantisation on it, hooks, offloading or parallelism on the model, calibration that is
    not finite or of another dtype, or an unknown option; and, with the report's table, where "auto" finds no layers
    that do, or a model's output is all zeros.
    """
    check_choice("init", init, INITS)
    check_choice("joint", joint, JOINTS)
    check_choice("prefix", prefix, PREFIXES)
    check_choice("pool", pool, POOLS)
    for name, value in (("max_error", max_error), ("speedup", speedup)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InputError(f"{name}={value!r}: give a number")
        if value is not None and select != "auto":
            raise InputError(f"{name}={value}: a target needs select='auto', and select={select!r}; leave one out")
        if value is not None and not value > (1 if name == "speedup" else 0):
            raise InputError(f"{name}={value}: must be greater than {1 if name == 'speedup' else 0}")
    pipeline, model = model_of(model_or_pipeline)
    _check_unsharded(model)
    adapter = adapter_of(model)
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
        sites = _build(model, adapter, {name: grafts[name] for name in looked_at}, config)
        survey = None
        with told_of(model, "calib", inputs):
            _start(model, sites, init, inputs)
            if dry_run or select == "auto":
                target = (max_error, speedup) if select == "auto" else None
                survey = survey_of(model, sites, inputs, names, refused, refusal, target)
        swap = AttentionSwap(model, adapter, sites, config, pipeline, survey)
        config["layers"] = [site.name for site in swap.sites]
        if not dry_run:
            if not swap.sites:
                raise InputError(f"select='auto': {survey.choice.refusal}. The layers: {swap.report().line()}")
            _put_in(swap, record)
    finally:
        _sweep(model)
    return swap


def _start(model: nn.Module, sites: list[Site], init: str, inputs: list) -> None:
    """Give the layers their starting weights, and measure how far they are from the attentions."""
    if init != "random":
        for site in sites:
            site.graft.copy(site.attention, site.layer)
            set_kernels(site.layer, torch.full_like(site.fit.cross, 1 / site.fit.cross.shape[1]))
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
                set_kernels(site.layer, site.fit.expressible())
    if inputs:
        run_over(model, sites, inputs, compare_site, "measuring errors")


def _put_in(swap: AttentionSwap, record: SwapRecord | None) -> None:
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
    _check_unsharded(model)
    if hasattr(model, "_swap_record"):
        raise InputError(f"{type(model).__name__} has swapped layers already; revert them, or take the original model")
    adapter = adapter_of(model)
    _check_stored(config)
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
        _put_in(swap, None)
    finally:
        _sweep(model)
    return swap


def _check_stored(config: dict) -> None:
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else config
        raise InputError(f"atconv schema {found!r}: this version reads {SCHEMA}; use the one that wrote it")
    missing = [name for name in STORED_FORM if name not in config]
    if missing:
        raise InputError(f"atconv has no {', '.join(missing)}; it is not as swap_attention wrote it")
    if fault := fault_of(config, STORED_FORM):
        raise InputError(f"atconv: {fault}; it is not as swap_attention wrote it")


def _build_as_stored(model: nn.Module, adapter: SwapAdapter, config: dict) -> list[Site]:
    _check_stored(config)
    grafts = adapter.find(model)
    for name in config["layers"]:
        check_choice("atconv layer", name, grafts)
    return _build(model, adapter, {name: grafts[name] for name in config["layers"]}, config)


def teacher_of(model: nn.Module) -> dict:
    """What identifies an unswapped model: class, name or path, the revision if these tell it, and a fingerprint."""
    config = getattr(model, "config", None) or getattr(model, "pretrained_cfg", None) or {}
    return {
        "class": type(model).__name__,
        "name": str(config.get("_name_or_path") or config.get("hf_hub_id") or "") or None,
        "revision": _revision(str(config.get("_name_or_path") or ""), str(config.get("hf_hub_id") or "")),
        "fingerprint": fingerprint(model.state_dict()),
    }


def _revision(path: str, hub_id: str) -> str | None:
    """The commit that a folder of the hub's cache is of, as a pipeline loads its models, or of timm's NAME@REVISION."""
    found = re.search(r"[\\/]snapshots[\\/]([0-9a-f]{40})(?:[\\/]|$)", path)
    return found[1] if found else hub_id.partition("@")[2] or None


def fingerprint(state: Mapping) -> str:
    """SHA-256 over name, shape and some 4,096 evenly spaced values of every tensor, as bf16.

    It tells revisions apart in little time, and is the same for fp32 and bf16 copies of the same weights. Quantised
    weights count by the tensors that they are made of, and what is no tensor by its representation.
    """
    digest = hashlib.sha256()
    for name, tensor in (each for entry in sorted(state.items()) for each in _plain(*entry)):
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r} ".encode())
            continue
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, value) -> Iterator[tuple[str, object]]:
    """An entry of a state dict as plain tensors, and what is none: of quantised weights the tensors within them."""
    if isinstance(value, tuple | list):
        for index, each in enumerate(value):
            yield from _plain(f"{name}.{index}", each)
    elif not isinstance(value, torch.Tensor):
        yield name, value
    elif type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # a subclass around others
        inner = {key: each for key, each in vars(value).items() if isinstance(each, torch.Tensor)}
        if hasattr(value, "__tensor_flatten__"):
            inner = {key: getattr(value, key) for key in value.__tensor_flatten__()[0]}
        yield name, (type(value).__name__, tuple(value.shape))
        for key in sorted(inner):
            yield from _plain(f"{name}.{key}", inner[key])
    else:
        yield name, value.dequantize() if value.is_quantized else value


def _register(pipeline, model: nn.Module) -> None:
    """Have the pipeline's configuration name the class that the model has now."""
    for name, module in pipeline.components.items() if pipeline is not None else ():
        if uncompiled(module) is model:
            pipeline.register_modules(**{name: module})


def uncompiled(module):
    """What torch.compile(module) wraps, or the module."""
    return module._orig_mod if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) else module


def model_of(model_or_pipeline) -> tuple:
    """(pipeline or None, model)."""
    if isinstance(model_or_pipeline, nn.Module):
        return None, model_or_pipeline
    for name in ("transformer", "unet"):
        model = getattr(model_or_pipeline, name, None)
        if isinstance(model, nn.Module):
            return model_or_pipeline, model
    raise InputError(f"{type(model_or_pipeline).__name__}: give a model, or a pipeline with a `transformer` or `unet`")


CASTING = {"layerwise_casting", "peft_autocast_disable"}  # hooks of diffusers that leave what a module does


def check_unhooked(model: nn.Module, allowed: Collection[str] = CASTING) -> None:
    """Raises InputError where diffusers' hooks offload the model by groups, cache or skip what its modules give."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = sorted(set(registry.hooks) - set(allowed)) if registry is not None else ()
        if hooks:
            raise InputError(
                f"{name or 'the model'} runs diffusers' hook {hooks[0]!r}; swap, report, regress and revert without "
                "such hooks, and put them on after (disable_cache() takes caches off; an offloaded model, load anew)"
            )


def check_unwrapped(model: nn.Module) -> None:
    """Raises InputError where torch.compile has renamed parts of the model."""
    wrapped = torch._dynamo.eval_frame.OptimizedModule
    name = next((name for name, module in model.named_modules() if isinstance(module, wrapped)), None)
    if name is not None:
        raise InputError(
            f"{name} is wrapped by torch.compile; put the module itself back, and use its compile() method"
        )


def _check_unsharded(model: nn.Module) -> None:
    check_unhooked(model)
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    ):
        raise InputError("the model is compiled, or blocks of it; swap first and compile after")
    if getattr(model, "_parallel_config", None) is not None:
        raise InputError("the model runs under context or tensor parallelism, which swapped layers do not; swap before")
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise InputError(
                f"{name or 'the model'} is offloaded or dispatched by hooks; swap first and offload after, or end it "
                "(a pipeline's reset_device_map or remove_all_hooks, accelerate.hooks.remove_hook_from_submodules)"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name} has no data here (offloaded, or a meta tensor); swap first and offload after")
        if type(parameter).__name__ == "DTensor":
            raise InputError(f"{name} is sharded over devices; swap before sharding")


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


def _build(model, adapter: SwapAdapter, grafts: dict[str, Graft], config: dict) -> list[Site]:
    """Layers for the attentions, not yet in their place, and the hooks that tell them their grids, in place."""
    options = LayerOptions(config["kernel_size"], config["pool"], getattr(model, "num_prefix_tokens", 0))
    sites = []
    for name, graft in grafts.items():
        attention, owner = model.get_submodule(name), adapter.owner_of(model, name)
        reference = None if owner is None else _reference_on(owner, model, adapter)
        layer = graft.build(attention, reference, options)
        if reference is not None:
            _keep_grid(layer, reference, owner, model, name)
        fit = TapFit(graft.heads(attention), options.kernel_size)
        sites.append(Site(name, attention, graft, layer, fit, reference))
    return sites


def _reference_on(owner: nn.Module, model: nn.Module, adapter: SwapAdapter) -> GridReference:
    """The reference that a hook on `owner` sets; the hook is registered if it is the first."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, GridHook):
            return hook.reference
    others = (each for module in model.modules() for each in module._forward_pre_hooks.values())
    beside = next((each.reference for each in others if isinstance(each, GridHook)), None)
    hook = GridHook(GridReference(beside), adapter.grid)
    owner.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    return hook.reference


def _keep_grid(layer: nn.Module, reference: GridReference, owner: nn.Module, model: nn.Module, name: str) -> None:
    """The hooks that keep a grid to its pass: on the layer, the blocks around it, and the owner (or model) above."""
    parts = name.split(".")
    BlockScope(reference).put_on(layer)
    for end in range(len(parts) - 1, -1, -1):
        above = model.get_submodule(".".join(parts[:end]))
        if above is owner or above is model:
            PassScope(reference).put_on(above)
            return
        if not isinstance(above, nn.ModuleList | nn.Sequential):
            BlockScope(reference).put_on(above)


def _sweep(model: nn.Module) -> None:
    """Remove the hooks that tell a grid to nobody."""
    used = {id(module.reference) for module in model.modules() if hasattr(module, "reference")}
    for module in model.modules():
        remove_hooks(module, used)


def checked_inputs(what: str, inputs: Iterable, most: int | None = None) -> list:
    """The first inputs of a model, at `most` so many, as a list. Raises InputError for what is no list of calls."""
    if isinstance(inputs, dict | str | torch.Tensor) or not isinstance(inputs, Iterable):
        raise InputError(f"{what}: give a list of inputs, each a dict of keyword arguments or a tuple of arguments")
    found = list(itertools.islice(inputs, most))
    if not found:
        raise InputError(f"{what} is empty; give at least one input, or leave it out for synthetic ones")
    for index, each in enumerate(found):
        if not isinstance(each, dict | tuple | list) or not any(isinstance(x, torch.Tensor) for x in tree_leaves(each)):
            raise InputError(
                f"{what}[{index}] is {type(each).__name__}; each input is a dict of keyword arguments or a tuple of "
                "arguments of the model, tensors among them"
            )
    return found


@contextmanager
def told_of(model: nn.Module, what: str, inputs: list) -> Iterator[None]:
    """An error of torch's within, over inputs of another dtype or device than the model's, becomes an InputError."""
    try:
        yield
    except RuntimeError as error:
        device, dtype = next(model.parameters()).device, dtype_of(model)
        other = {
            f"{what}[{index}]{keystr(path)}": f"{value.dtype} on {value.device}"
            for index, each in enumerate(inputs)
            for path, value in tree_leaves_with_path(each)
            if isinstance(value, torch.Tensor)
            and (value.device != device or (value.is_floating_point() and value.dtype != dtype))
        }
        if not other or not re.search("type|device", str(error)) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"{', '.join(list(other)[:4])}: {next(iter(other.values()))}, which the model in {dtype} on {device} does "
            f"not take; give it what it takes, such as value.to({str(device)!r}, {dtype})"
        ) from error


def _takes_images(model: nn.Module) -> bool:
    """Whether an IP-Adapter is on it, whose images no configuration tells of."""
    return any("IPAdapter" in type(getattr(module, "processor", None)).__name__ for module in model.modules())


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in: the dtype of its first weight that is neither quantised nor stored in 8 bits."""
    weights = (each.dtype for each in model.parameters())
    return next((each for each in weights if each.is_floating_point and each.itemsize > 1), torch.float32)


def calibration_inputs(
    model: nn.Module, adapter: SwapAdapter, calib: Iterable | None, needed: bool, seed: int = 0
) -> list:
    """Calibration inputs: those given, else synthetic ones of a seed, else none if they are not needed."""
    if calib is not None:
        return checked_inputs("calib", calib)
    generator, device, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).device, dtype_of(model)
    examples = []
    if adapter.example is not None and not _takes_images(model):
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
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return [tree_map(placed, each) for each in examples]
