"""What a swap of a class of models would come to, before anyone trains: by arithmetic on tensors without storage, and
by timing one layer of each shape. No weights are needed."""

import copy
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.runtime.compat.torch import (
    flops_between_tokens,
    formulas_of_attention,
    tree_leaves,
    tree_map,
    without_weights,
)
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.hooks import of_this_thread
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.swap.adapters import SwapAdapter, adapter_of
from sit_atconv.swap.building import build
from sit_atconv.swap.calibration import Site, Timing, evaluating, shape_of, timing_of

_ONE_AT_A_TIME = threading.Lock()  # of counts, see `without_weights`
SETTINGS = {"kernel_size": 3, "pool": "raster", "prefix": "attend"}


@dataclass
class Kind:
    """The attentions of a model that have a pattern of names and a shape in common.

    layers: how many. grid: of their image or video tokens.
    macs_before, macs_after: multiply-accumulates of one, and of the layer for it. products: the part of macs_before
    that grows with the square of the tokens. timing: milliseconds of one; None: not measured. refusal: why they stay.
    """

    name: str
    layers: int
    grid: tuple[int, ...] | None
    macs_before: int
    macs_after: int | None
    products: int
    timing: Timing | None = None
    refusal: str | None = None


@dataclass
class SwapCheck:
    """What a swap of all attentions of a model would come to, for one forward pass on its example.

    macs_before, macs_after: multiply-accumulates of the whole model. batch: samples of the pass.
    """

    model: str
    parameters: int
    macs_before: int
    macs_after: int
    batch: int
    kinds: list[Kind] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the model's multiply-accumulates, those between tokens and tokens in the attentions that would go."""
        return sum(kind.products * kind.layers for kind in self.kinds if kind.refusal is None) / self.macs_before

    @property
    def limit(self) -> float:
        """How many times faster the model can become by arithmetic: its multiply-accumulates before over after."""
        return self.macs_before / self.macs_after

    def record(self) -> dict:
        """All of it as plain values."""
        return {**asdict(self), "share": self.share, "limit": self.limit}

    def __str__(self) -> str:
        rows = []
        for kind in self.kinds:
            grid = "-" if kind.grid is None else " x ".join(map(str, kind.grid))
            tokens = "-" if kind.grid is None else f"{torch.Size(kind.grid).numel():,}"
            after = "stays" if kind.macs_after is None else f"{kind.macs_after / 1e9:,.2f}"
            macs = f"{kind.macs_before / 1e9:,.2f} -> {after}"
            products = f"{kind.products / kind.macs_before:.0%}"
            time = "not measured"
            if kind.timing is not None:
                time = f"{kind.timing.before:,.1f} -> {kind.timing.after:,.1f}"
            rows.append([f"`{kind.name}`", str(kind.layers), grid, tokens, macs, products, time])
        titles = ["attention", "layers", "grid", "tokens", "GMACs of one", "of it between tokens", "ms of one"]
        told = [
            f"{self.model}: {self.parameters / 1e6:,.1f} M parameters, {self.macs_before / 1e12:,.3f} TMACs a pass of "
            f"{self.batch}",
            markdown_table(titles, rows),
        ]
        told += [f"`{kind.name}` stays: it {kind.refusal}." for kind in self.kinds if kind.refusal is not None]
        told.append(
            f"Products between tokens (N^2): {self.share:.0%} of the model. Limit of the speed by arithmetic, all "
            f"swapped: {self.limit:.2f} times."
        )
        return "\n\n".join(told)


def check_swap(
    model: nn.Module,
    grid: Sequence[int] | None = None,
    text: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> SwapCheck:
    """Count what a model on the meta device does before and after a swap of all its attentions; it is swapped after.

    grid: of the tokens, (H, W) or (T, H, W); None: the model's own. text: tokens of text; None: the longest.
    device: time one attention of each shape there, and the layer for it, on random weights in `dtype`; None: do not.
    Raises InputError for a class without adapter or without synthetic inputs, and a grid that the class does not take.
    """
    adapter = adapter_of(model)
    model.eval()
    if adapter.example is None:
        raise InputError(f"{type(model).__name__} has no synthetic inputs, so there is nothing to count")
    name = type(model).__name__
    asked = [f"{what} {value}" for what, value in (("a grid of", grid), ("tokens of text:", text)) if value is not None]
    with told(f"{name} makes no inputs{' for ' * bool(asked)}{' and '.join(asked)}", Exception):
        inputs = _inputs(adapter, model, grid, text)
    if inputs is None:
        raise InputError(f"{name}: its configuration does not tell its inputs, so there is nothing to count")
    if text is not None and _shapes(_inputs(adapter, model, grid, 1)) == _shapes(_inputs(adapter, model, grid, 2)):
        raise InputError(f"{option('text', text)}: {name} has no text, or text of one length alone; leave it out")
    parameters, grafts = sum(each.numel() for each in model.parameters()), adapter.find(model)
    refusals = {each: graft.refusal(model.get_submodule(each)) for each, graft in grafts.items()}
    with torch.device("meta"):
        sites = build(
            model, adapter, {each: graft for each, graft in grafts.items() if refusals[each] is None}, SETTINGS
        )
    before, of_before = _counted(model, inputs, grafts, {site.name: site for site in sites})
    for site in sites:
        model.set_submodule(site.name, site.layer)
    after, of_after = _counted(model, inputs, grafts, {})
    batch = len(next(iter(inputs.values())))  # of a tensor, or of a list of a sample each
    check = SwapCheck(name, parameters, before, after, batch)
    kinds: dict[tuple, tuple[Kind, Site | None]] = {}
    by_name = {site.name: site for site in sites}
    for each in grafts:
        site, (macs, products) = by_name.get(each), of_before[each]
        key = (_pattern(each), macs, refusals[each], None if site is None else shape_of(site))
        if key in kinds:
            kinds[key][0].layers += 1
            continue
        macs_after = None if site is None else of_after[each][0]
        kind = Kind(_pattern(each), 1, None if site is None else site.grid, macs, macs_after, products)
        kinds[key] = replace(kind, refusal=refusals[each]), site
    check.kinds += [kind for kind, _ in kinds.values()]
    timed = [(kind, site) for kind, site in kinds.values() if site is not None and site.call is not None]
    for kind, site in Progress(timed if device is not None else [], "layers", unit="shape", delay=1, leave=False):
        kind.timing = _timed(site, torch.device(device), dtype)
    return check


def _inputs(adapter: SwapAdapter, model: nn.Module, grid: Sequence[int] | None, text: int | None) -> dict | None:
    return adapter.example(model, torch.Generator().manual_seed(0), grid=grid, text=text)


def _shapes(inputs: dict) -> list:
    return [each.shape for each in tree_leaves(inputs) if isinstance(each, torch.Tensor)]


def _shape(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _counted(model: nn.Module, inputs: dict, names, sites: dict[str, Site]) -> tuple[int, dict[str, tuple[int, int]]]:
    """Multiply-accumulates of a pass, and by name those of each attention and of its products between tokens; the
    sites take note of their calls and grids."""
    of: dict[str, tuple[int, int]] = dict.fromkeys(names, (0, 0))
    counter = FlopCounterMode(display=False, custom_mapping=formulas_of_attention())

    def state() -> tuple[int, int]:
        counts = counter.get_flop_counts().get("Global", {})
        return sum(counts.values()) // 2, flops_between_tokens(counts) // 2

    def watch(name: str, module: nn.Module):
        begun = []

        def begin(_, args, kwargs):
            begun.append(state())
            if name in sites and sites[name].call is None:
                site = sites[name]
                site.call, site.grid = tree_map(_shape, (args, kwargs)), site.graft.grid(site.layer, args, kwargs)

        def end(*_):
            spent = tuple(now - then for now, then in zip(state(), begun.pop(), strict=True))
            of[name] = tuple(map(sum, zip(of[name], spent, strict=True)))

        yield module.register_forward_pre_hook(of_this_thread(begin), with_kwargs=True)
        yield module.register_forward_hook(of_this_thread(end))

    with ExitStack() as stack, _ONE_AT_A_TIME, torch.no_grad(), without_weights(), counter:
        for name in names:
            for handle in watch(name, model.get_submodule(name)):
                stack.enter_context(handle)
        model(**inputs)
    return counter.get_total_flops() // 2, of


def _timed(site: Site, device: torch.device, dtype: torch.dtype) -> Timing:
    """The timing of an attention and of its layer with random weights, on random inputs of the call's shapes."""

    def made(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module).to_empty(device=device).to(dtype).eval()
        for each in (*module.parameters(), *module.buffers()):
            if each.is_floating_point():
                nn.init.normal_(each, std=0.02) if each.ndim > 1 else nn.init.ones_(each)
        return module

    with torch.no_grad():
        own = replace(site, attention=made(site.attention), layer=made(site.layer))
        own.reference = getattr(own.layer, "reference", None)
        with evaluating(own.attention, own.layer):
            return timing_of(own)
