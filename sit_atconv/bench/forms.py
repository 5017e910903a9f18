"""One ATConv layer and its operator in their forms, beside attention: what is timed, after it computes what it must.

Needs no more than torch, and triton where the operator does.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_atconv.bench.timing import Timing
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.linear import linear
from sit_atconv.ops.atconv import BACKEND_VARIABLE, dynamic_depthwise_conv
from sit_atconv.ops.atconv.grouped import grouped_convolution

HEAD = 72  # channels of a head in SiT-XL
LINEARS, ATTENTION, PAPER, ATCONV = "two linears", "attention", "paper's form", "ATConv"
COMPILED = " compiled"
# Of torch's attention on CUDA: any of them may be the fastest, and torch does not look which is.
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MOST_CALLS = 16  # samples from which the backend `conv`, a launch for each, is not timed on CUDA
# Largest distance of an output from another form of the same function, over its norm.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


class PaperForm(nn.Module):
    """An ATConv layer computed as published: `kernel_proj` on all N tokens, the pool after it, the convolution grouped.

    x (B, H, W, C) -> (B, H, W, C), the same function of the same weights as `layer`, up to rounding.
    Raises ValueError for a layer with options that the paper does not have.
    """

    def __init__(self, layer: ATConv):
        super().__init__()
        if (layer.routing, layer.inhibition, layer.pool) != ("adaptive", "learned", "raster"):
            raise ValueError(f"{layer}: the paper's form has adaptive routing, learned inhibition, raster pooling")
        self.layer = layer

    def kernels(self, keys: torch.Tensor) -> torch.Tensor:
        """From `kernel_proj` of all tokens, (B, C, N), to the kernels (B, C, K)."""
        layer = self.layer
        pooled = layer.activation(F.adaptive_avg_pool1d(keys, layer.kernel_size**2))
        kernels = F.linear(pooled, layer.kernel_gen.weight, layer.kernel_gen.bias)  # never as sums
        return kernels - layer.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        kernels = self.kernels(linear(layer.kernel_proj, x).flatten(1, 2).transpose(1, 2))
        mixed = grouped_convolution(linear(layer.x_proj, x).permute(0, 3, 1, 2), kernels)
        return linear(layer.proj, mixed.permute(0, 2, 3, 1))


class FusedAttention(nn.Module):
    """Multi-head self-attention by torch's calls alone: x (..., N, C) -> (..., N, C), as `layers.attention` has it.

    backend: a name in FUSED, or None for the one that torch takes. Raises RuntimeError where it does not run.
    """

    def __init__(self, dim: int, heads: int, backend: str | None = None):
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(-4, -2).unbind(-3)
        with sdpa_kernel(FUSED[self.backend]) if self.backend else nullcontext():
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(-3, -2).flatten(-2))


@dataclass(frozen=True)
class Form:
    """One thing to time: a function without arguments, its leaves, and what it must compute (None: not checked)."""

    name: str
    call: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    oracle: Callable[[], torch.Tensor] | None


Compile = Callable[[Callable], Callable]


@contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Within it the environment asks for a backend of the operator."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(BACKEND_VARIABLE)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def in_one_graph(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def layer_forms(x: torch.Tensor, compiled: Compile = in_one_graph, fused: Collection[str] | None = None) -> list[Form]:
    """The layer for x (B, H, W, C) in its forms, beside its linears and attention.

    fused: names in FUSED; attention is of each of these backends, and what stands beside the layer is compiled too. On
    CUDA all of them by default; on a CPU none, and attention is as torch takes it.
    """
    return _forms(x, compiled, fused)[0]


def operator_forms(x: torch.Tensor, compiled: Compile = in_one_graph) -> list[Form]:
    """The operator alone in its backends, for what a layer's linears make of x (B, H, W, C)."""
    return _forms(x, compiled)[1]


def forms(x: torch.Tensor) -> list[Form]:
    """`layer_forms`, then `operator_forms` of the same layer."""
    return [form for part in _forms(x, in_one_graph) for form in part]


def _forms(x: torch.Tensor, compiled: Compile, fused: Collection[str] | None = None) -> tuple[list[Form], list[Form]]:
    torch.manual_seed(0)
    layer = ATConv(x.shape[3]).to(x.device, x.dtype)
    fused = (FUSED if x.is_cuda else ()) if fused is None else fused
    backends = (*fused,) or (None,)
    attentions = {name: FusedAttention(x.shape[3], x.shape[3] // HEAD, name).to(x.device, x.dtype) for name in backends}
    paper = PaperForm(layer)
    # Attention reads a row, and torch's counters refuse the view that it would be of a leaf without gradients.
    row = x.flatten(1, 2).clone().requires_grad_()
    x = x.clone().requires_grad_()
    with torch.no_grad():
        v, kernels = layer.x_proj(x), layer.kernels(x).contiguous()
    v.requires_grad_(), kernels.requires_grad_()
    weights, operands = (x, *layer.parameters()), (v, kernels)

    def operate(backend: str) -> torch.Tensor:
        return dynamic_depthwise_conv(v, kernels, backend=backend)

    def oracle() -> torch.Tensor:
        return layer.proj(dynamic_depthwise_conv(layer.x_proj(x), layer.kernels(x), backend="reference"))

    def fast(function: Callable, *arguments) -> Callable[[], torch.Tensor]:
        made = compiled(function)
        return lambda: made(*arguments)

    of_layer = [
        Form(LINEARS, lambda: layer.proj(layer.x_proj(x)), weights, None),
        Form(ATCONV, lambda: layer(x), weights, oracle),
        Form(ATCONV + COMPILED, fast(layer, x), weights, oracle),
        Form(PAPER, lambda: paper(x), weights, oracle),
    ]
    if fused:
        of_layer.append(Form(PAPER + COMPILED, fast(paper, x), weights, oracle))
    for name, attention in attentions.items():
        leaves, title = (row, *attention.parameters()), f"{ATTENTION}, {name}" if name else ATTENTION
        of_layer.append(Form(title, lambda attention=attention: attention(row).view_as(x), leaves, None))
        if fused:
            made = compiled(attention)
            of_layer.append(Form(title + COMPILED, lambda made=made: made(row).view_as(x), leaves, None))
    native = ["native", *(["conv"] if not x.is_cuda or len(x) < MOST_CALLS else []), *(["triton"] if x.is_cuda else [])]
    of_operator = [
        *(
            Form(f"operator {name}", lambda name=name: operate(name), operands, lambda: operate("reference"))
            for name in native
        ),
        Form(f"operator{COMPILED}", fast(operate, "auto"), operands, lambda: operate("reference")),
    ]
    return of_layer, of_operator


def make_call(form: Form, step: str, upstream: torch.Tensor) -> Callable[[], object]:
    """A pass of a form: forward, or forward and the gradients of its leaves, which are dropped again."""

    def backward() -> None:
        form.call().backward(upstream)
        for leaf in form.leaves:
            leaf.grad = None

    return torch.no_grad()(form.call) if step == "forward" else backward


def check(form: Form, shape: str, upstream: torch.Tensor, dtype: str) -> None:
    """Compare the outputs of both graphs, with and without gradients, and every gradient with the oracle's."""

    def results(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            alone = call()
        y = call()
        return alone, y.detach(), *torch.autograd.grad(y, form.leaves, upstream)

    for actual, true in zip(results(form.call), results(form.oracle), strict=True):
        assert_close(f"{form.name} at {shape}", actual, true, TOLERANCE[dtype])


def best_attention(name: str, timings: Mapping[str, Timing]) -> str | None:
    """The fastest attention to compare a form with: a compiled one with a compiled one, where that was measured."""
    all_of_them = [other for other in timings if other.startswith(ATTENTION)]
    alike = [other for other in all_of_them if other.endswith(COMPILED) == name.endswith(COMPILED)]
    return min(alike or all_of_them, key=lambda other: timings[other].median, default=None)


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise RuntimeError unless `actual` is finite, not zero, and within `tolerance` of `expected`, over its norm."""
    distance = ((actual - expected).float().norm() / expected.float().norm()).item()
    if not (actual.isfinite().all() and actual.any() and distance <= tolerance):
        raise RuntimeError(f"{what} is {distance:.1e} away from what it must be; not timed")
