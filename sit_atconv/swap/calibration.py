"""What calibration learns of the attentions to be swapped and of the layers for them: taps, errors, cost."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.bench.timing import in_turn
from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.runtime.compat.torch import formulas_of_attention, tree_leaves, tree_map
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.hooks import of_this_thread
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.processes import is_main
from sit_atconv.swap.grafts import Graft, foreign_maps
from sit_atconv.swap.grid import GridReference
from sit_atconv.swap.start import TapFit

ROUNDS = (8, 100)  # of a timing, at least and at most
ROUND_SECONDS = 1e-3  # that one of the two is run for in a round, at least
TIMING_SECONDS = 5.0  # after which a timing ends that has its least number of rounds
SLOW_SECONDS, SLOW_ROUNDS = 60.0, 3  # after which so many rounds are enough
STEADY = 1.05  # a quarter of the rounds, at least, within this factor of the fastest


@dataclass
class LayerReport:
    """One layer: parameters, multiply-accumulates and milliseconds of the call seen in calibration, relative errors.

    ms_*: medians over rounds, with the interquartile ranges ms_spread_*. slowdown: see `Timing`; select="auto" goes by
    it. error: of the layer's own output.
    output_error: of the model's output where this layer alone is swapped. chosen: whether it is swapped, in a table
    over all layers; reason: why not. None: not measured.
    """

    name: str
    params_before: int | None
    params_after: int | None
    macs_before: int | None = None
    macs_after: int | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    error: float | None = None
    ms_spread_before: float | None = None
    ms_spread_after: float | None = None
    output_error: float | None = None
    chosen: bool | None = None
    reason: str | None = None
    slowdown: float | None = None


@dataclass
class SwapReport:
    """What a swap did, a row per layer; printed as a table in Markdown.

    output_error: relative, of the model's output with all chosen layers swapped. refusal: why none is chosen.
    """

    layers: list[LayerReport]
    output_error: float | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        titles, rows = self._cells()
        told = [markdown_table(titles, ([f"`{name}`", *cells] for name, *cells in rows))]
        if self.refusal is not None:
            told.append(f"None is chosen: {self.refusal}.")
        elif self.output_error is not None:
            told.append(f"Error of the model's output with all chosen layers swapped: {self.output_error:.3g}")
        return "\n\n".join(told)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """The titles of the columns, and what stands in them."""

        def pair(before, after, scale=1.0, digits=1, spreads=(None, None)):
            if before is None or after is None:
                return "not measured"
            told = (
                f"{value / scale:,.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
                for value, spread in zip((before, after), spreads, strict=True)
            )
            return " -> ".join(told)

        def ratio(row: LayerReport) -> str:
            if row.ms_before is None:
                return "not measured"
            return "unsteady" if row.slowdown is None else f"{row.slowdown:.3g}"

        titles = ["layer", "params (k)", "MACs (M)", "latency (ms)", "time ratio", "error"]
        rows = [
            [
                row.name,
                pair(row.params_before, row.params_after, 1e3),
                pair(row.macs_before, row.macs_after, 1e6),
                pair(row.ms_before, row.ms_after, digits=3, spreads=(row.ms_spread_before, row.ms_spread_after)),
                ratio(row),
                "not measured" if row.error is None else f"{row.error:.3f}",
            ]
            for row in self.layers
        ]
        if any(row.chosen is not None for row in self.layers):
            titles += ["output error", "chosen"]
            for row, cells in zip(self.layers, rows, strict=True):
                cells.append("not measured" if row.output_error is None else f"{row.output_error:.3g}")
                cells.append("yes" if row.chosen else f"no ({row.reason})" if row.reason else "no")
        return titles, rows


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
        return None if self.call is None else relative(*self.squares)


def relative(error: float, whole: float) -> float:
    """The root of the ratio of two sums of squares; of a whole of 0, 0 or infinite."""
    if whole == 0:
        return 0.0 if error == 0 else math.inf
    return (error / whole) ** 0.5


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """All in evaluation mode while this is open, and every submodule as it was after."""
    training = {each: each.training for module in modules for each in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def run_over(model: nn.Module, sites: list[Site], inputs: list, visit: Callable, title: str) -> None:
    """Run the model over the inputs, in evaluation mode, and `visit(site, args, kwargs, output)` every attention."""
    visiting = False

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

        return site.attention.register_forward_hook(of_this_thread(hook), with_kwargs=True)

    with ExitStack() as stack, evaluating(model, *(site.layer for site in sites)):
        for site in sites:
            stack.enter_context(watch(site))
        for each in Progress(inputs, title, leave=False, disable=len(inputs) < 2 or not is_main()):
            call_model(model, each)


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
        site.graft.approximated(site.layer, each, args, kwargs).double()
        for each in (site.layer(*args, **kwargs), output)
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


def call_model(model: nn.Module, each):
    """A forward pass on an input: a dict of keyword arguments, or a tuple of arguments."""
    return model(**each) if isinstance(each, dict) else model(*each)


def parameters_of(module: nn.Module) -> int:
    """How many weights; of linears that keep theirs packed, those that they stand for."""
    count = sum(parameter.numel() for parameter in module.parameters())
    for each in foreign_maps(module).values() if isinstance(module, KernelGenerator) else ():
        if hasattr(each, "in_features"):
            bias = each.bias() if callable(each.bias) else each.bias
            count += each.in_features * each.out_features + (0 if bias is None else each.out_features)
            count -= sum(parameter.numel() for parameter in each.parameters())
    return count


def _materialised(site: Site) -> tuple[tuple, dict]:
    """Random arguments like those of the call seen in calibration, in the dtype that the model has now."""
    weight = next(site.attention.parameters())
    device = weight.device
    generator = torch.Generator(device).manual_seed(0)

    def random(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.bool:  # a mask, that lets all tokens count
            return torch.ones(value.shape, dtype=value.dtype, device=device)
        if not value.is_floating_point():  # whole numbers, and turns of RoPE as complex ones: their values take no time
            return torch.zeros(value.shape, dtype=value.dtype, device=device)
        return torch.randn(value.shape, dtype=weight.dtype, device=device, generator=generator)

    if site.reference is not None:
        site.reference.set(site.grid, device)
    return tree_map(random, site.call)


@torch.no_grad()
def macs_of_call(module: nn.Module, call: Callable) -> int:
    """Multiply-accumulates of a call of `module`."""
    counter, before, unseen = FlopCounterMode(display=False, custom_mapping=formulas_of_attention()), [], []

    def total() -> int:
        return counter.get_total_flops() // 2 + sum(unseen)

    def start(*_):
        before.append(total())

    def end(_, inputs, output):
        if total() == before.pop():  # kernels of quantised weights, which torch has no formula for
            unseen.append(inputs[0].numel() * output.shape[-1])

    # The linear maps of a model or a layer, whoever's class they are of.
    layers = (each for each in module.modules() if isinstance(each, KernelGenerator))
    linears = {each for layer in layers for each in foreign_maps(layer).values()}
    linears |= {each for each in module.modules() if hasattr(each, "in_features")}
    with ExitStack() as stack, counter:
        for each in linears:
            stack.enter_context(each.register_forward_pre_hook(start))
            stack.enter_context(each.register_forward_hook(end))
        call()
    return total()


@dataclass
class Timing:
    """Milliseconds of an attention and of its layer: medians over rounds, and interquartile ranges.

    slowdown: the layer's least time over the attention's, since other work on a machine only ever adds to a time; None
    where these are no steady floor: fewer than a quarter of the rounds come within 5% of it.
    """

    before: float
    after: float
    spread_before: float
    spread_after: float
    slowdown: float | None


@dataclass
class Cost:
    """Multiply-accumulates of an attention and of its layer, and their timing."""

    macs_before: int
    macs_after: int
    timing: Timing

    @property
    def saved(self) -> int:
        return self.macs_before - self.macs_after


def cost_of(site: Site, known: dict[Hashable, Cost]) -> Cost:
    """What a call as seen in calibration costs, in evaluation mode: from `known`, or measured for all of its shape."""
    shape = shape_of(site)
    if shape not in known:
        with evaluating(site.attention, site.layer):
            args, kwargs = _materialised(site)
            macs = [macs_of_call(each, partial(each, *args, **kwargs)) for each in (site.attention, site.layer)]
            known[shape] = Cost(*macs, timing_of(site))
    return known[shape]


def shape_of(site: Site) -> Hashable:
    """What sites have in common that take the same time: classes, sizes, dtypes, device, grid."""
    modules = (site.attention, site.layer)
    return (
        site.grid,
        site.graft.heads(site.attention),
        type(getattr(site.attention, "processor", None)),
        tuple(type(each) for module in modules for each in module.modules()),
        tuple((type(p), p.shape, p.dtype, p.device) for module in modules for p in module.parameters()),
        tuple((each.shape, each.dtype) for each in tree_leaves(site.call) if isinstance(each, torch.Tensor)),
    )


def row_of(site: Site, costs: dict[Hashable, Cost] | None) -> LayerReport:
    """The row of a layer, with what it costs, from `costs` or measured; without where `costs` is None."""
    row = LayerReport(site.name, parameters_of(site.attention), parameters_of(site.layer), error=site.error)
    if costs is not None and site.call is not None:
        cost = cost_of(site, costs)
        row.macs_before, row.macs_after = cost.macs_before, cost.macs_after
        row.ms_before, row.ms_after = cost.timing.before, cost.timing.after
        row.ms_spread_before, row.ms_spread_after = cost.timing.spread_before, cost.timing.spread_after
        row.slowdown = cost.timing.slowdown
    return row


def timing_of(site: Site) -> Timing:
    args, kwargs = _materialised(site)
    calls = [lambda: site.attention(*args, **kwargs), lambda: site.layer(*args, **kwargs)]
    with torch.no_grad():
        return settled(in_turn(calls, next(site.attention.parameters()).device, ROUND_SECONDS))


def settled(rounds: Iterable[tuple[float, float]]) -> Timing:
    """The timing of rounds of (attention, layer) in seconds, of which no more are taken than make it steady, or than
    TIMING_SECONDS allow beyond the least number."""
    seen, steady, start = [], False, None
    for each in itertools.islice(rounds, ROUNDS[1]):
        start = time.monotonic() if start is None else start  # after the calls that only warm up
        seen.append(each)
        ordered = [sorted(times) for times in zip(*seen, strict=True)]
        steady = all(times[len(times) // 4] <= STEADY * times[0] for times in ordered)
        spent = time.monotonic() - start
        if len(seen) >= ROUNDS[0] and (steady or spent > TIMING_SECONDS):
            break
        if len(seen) >= SLOW_ROUNDS and spent > SLOW_SECONDS:
            break
    quartiles = [[1e3 * each for each in statistics.quantiles(times, method="inclusive")] for times in ordered]
    (low, before, high), (low_after, after, high_after) = quartiles
    slowdown = ordered[1][0] / ordered[0][0] if steady else None
    return Timing(before, after, high - low, high_after - low_after, slowdown)
