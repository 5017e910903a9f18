"""What calibration learns of the attentions to be swapped and of the layers for them: taps, errors, cost."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from sit_atconv.errors import InputError, speaks
from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.swap.grafts import Graft
from sit_atconv.swap.grid import GridReference
from sit_atconv.swap.start import TapFit


@dataclass
class LayerReport:
    """One layer: parameters, multiply-accumulates of the call seen in calibration, milliseconds, relative error."""

    name: str
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    error: float | None = None


@dataclass
class SwapReport:
    """What a swap did, a row per layer; printed as a table in Markdown."""

    layers: list[LayerReport]

    def __str__(self) -> str:
        def pair(before, after, scale=1.0, digits=1):
            if before is None:
                return "not measured"
            return f"{before / scale:,.{digits}f} -> {after / scale:,.{digits}f}"

        lines = ["| layer | params (k) | MACs (M) | latency (ms) | error |", "|---|---|---|---|---|"]
        for row in self.layers:
            cells = [
                f"`{row.name}`",
                pair(row.params_before, row.params_after, 1e3),
                pair(row.macs_before, row.macs_after, 1e6),
                pair(row.ms_before, row.ms_after, digits=3),
                "not measured" if row.error is None else f"{row.error:.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


@dataclass
class Site:
    """A candidate: the attention and its layer, and what calibration learnt of them."""

    name: str
    attention: nn.Module
    graft: Graft
    layer: KernelGenerator
    fit: TapFit
    reference: GridReference | None
    shares: list[torch.Tensor] = field(default_factory=list)  # of the text, a tensor (heads,) per call
    call: tuple | None = None  # the first call seen, its tensors without storage
    grid: tuple[int, int] | None = None
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the error, of the attention's output

    @property
    def error(self) -> float | None:
        """Relative to the attention's output in norm; of one that gives zeros, 0 or infinite. None: not measured."""
        if self.call is None:
            return None
        if self.squares[1] == 0:
            return 0.0 if self.squares[0] == 0 else math.inf
        return (self.squares[0] / self.squares[1]) ** 0.5


@torch.no_grad()
def run_over(model: nn.Module, sites: list[Site], inputs: list, visit: Callable, title: str) -> None:
    """Run the model over the inputs, in evaluation mode, and `visit(site, args, kwargs, output)` every attention."""
    visiting = False
    training = {module: module.training for module in model.modules()}

    def watch(site: Site):
        def hook(_, args, kwargs, output):
            nonlocal visiting
            if visiting:  # a visit may call the attention itself
                return
            visiting = True
            try:
                visit(site, args, kwargs, output)
            finally:
                visiting = False

        return site.attention.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(site) for site in sites]
    model.eval()
    for site in sites:
        site.layer.eval()
    try:
        for each in tqdm(inputs, title, leave=False, disable=len(inputs) < 2 or not speaks()):
            call_model(model, each)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def read_share(site: Site, args: tuple, kwargs: dict, _) -> None:
    site.shares.append(site.graft.text_share(site.attention, site.layer, args, kwargs))


def fit_site(site: Site, args: tuple, kwargs: dict, _) -> None:
    values, targets = site.graft.observe(site.attention, site.layer, args, kwargs)
    _check_finite(site, targets)
    site.fit.add(values, targets, site.graft.grid(site.layer, args, kwargs))


def compare_site(site: Site, args: tuple, kwargs: dict, output) -> None:
    if site.call is None:
        site.call = tree_map(lambda each: each.to("meta") if isinstance(each, torch.Tensor) else each, (args, kwargs))
        site.grid = site.graft.grid(site.layer, args, kwargs)
    ours, theirs = (
        site.graft.approximated(site.layer, each).double() for each in (site.layer(*args, **kwargs), output)
    )
    _check_finite(site, theirs)
    site.squares[0] += (ours - theirs).square().sum().item()
    site.squares[1] += theirs.square().sum().item()


def _check_finite(site: Site, output: torch.Tensor) -> None:
    if not output.isfinite().all():
        raise InputError(
            f"{site.name} gives NaN or infinity on the calibration inputs; look at calib, and calibrate an fp16 model "
            "in bf16 or fp32"
        )


def ranked(
    model: nn.Module, sites: list[Site], inputs: list, max_error: float | None, speedup: float | None
) -> list[Site]:
    """The layers worth swapping: by error per millisecond saved, up to a speed-up of the model or an error of a layer.

    Raises InputError where none saves time within the error.
    """
    saved = {site.name: before - after for site in sites for before, after in [latency_of(site)]}
    order = sorted((site for site in sites if saved[site.name] > 0), key=lambda site: site.error / saved[site.name])
    whole = _milliseconds([lambda: call_model(model, inputs[0])])[0] if speedup is not None else 0.0
    taken, left = set(), whole
    for site in order:
        if speedup is not None and whole >= speedup * left:
            break
        if max_error is None or site.error <= max_error:
            taken.add(site.name)
            left -= saved[site.name]
    if not order:
        raise InputError(
            f"select='auto': at this size attention is the faster one in all {len(sites)} layers; calibrate on larger "
            "inputs, or name the layers by select"
        )
    if not taken or (speedup is not None and whole < speedup * left):
        best = min(sites, key=lambda site: site.error)
        given = {"raise max_error": max_error, "lower speedup": speedup}
        remedy = " or ".join(each for each, value in given.items() if value is not None)
        within = "" if max_error is None else f" with an error of at most {max_error:g}"
        wanted = "no layer saves time" if speedup is None else f"all that save time do not give {speedup:g}x"
        raise InputError(
            f"select='auto': {wanted}{within} (least error: {best.error:.3f}, {best.name}; {len(order)} of "
            f"{len(sites)} save time); {remedy}, or name the layers by select"
        )
    return [site for site in sites if site.name in taken]


def call_model(model: nn.Module, each) -> None:
    """A forward pass on an input: a dict of keyword arguments, or a tuple of arguments."""
    model(**each) if isinstance(each, dict) else model(*each)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _materialised(site: Site) -> tuple[tuple, dict]:
    """Random arguments like those of the call seen in calibration, in the dtype that the model has now."""
    weight = next(site.attention.parameters())
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)

    def random(value):
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        return torch.randn(value.shape, dtype=weight.dtype, device=device, generator=generator)

    if site.reference is not None:
        site.reference.set(site.grid, device)
    return tree_map(random, site.call)


@torch.no_grad()
def macs_of(module: nn.Module, site: Site) -> int:
    args, kwargs = _materialised(site)
    aten = torch.ops.aten

    def count_flash(*args, out_val=None, **kwargs) -> int:  # torch has the formula, and does not know it for CPUs
        return flop_registry[aten._scaled_dot_product_flash_attention](*args, out_val=out_val, **kwargs)

    count_flash._get_raw = True
    mapping = {aten._scaled_dot_product_flash_attention_for_cpu: count_flash}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops() // 2


def latency_of(site: Site) -> list[float]:
    """Milliseconds of the attention and of the layer."""
    args, kwargs = _materialised(site)
    return _milliseconds([lambda: site.attention(*args, **kwargs), lambda: site.layer(*args, **kwargs)])


@torch.no_grad()
def _milliseconds(functions: list[Callable], rounds: int = 5) -> list[float]:
    """Medians over rounds in which the functions take turns."""
    from torch.utils.benchmark import Timer  # which looks for compilers, and warns where CUDA is half there

    timers = [
        Timer("function()", globals={"function": each}, num_threads=torch.get_num_threads()) for each in functions
    ]
    runs = [max(1, int(0.02 / max(timer.timeit(1).mean, 1e-9))) for timer in timers]
    times = [[timer.timeit(count).mean for timer, count in zip(timers, runs, strict=True)] for _ in range(rounds)]
    return [1e3 * statistics.median(each) for each in zip(*times, strict=True)]
