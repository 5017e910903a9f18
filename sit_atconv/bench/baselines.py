"""What a model is timed against: attention, ATConv in the paper's form, and its matrix products alone."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from sit_atconv.bench.forms import PaperForm
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.models.sit import PRESETS, SiTTransformer2DModel

SCORE_BYTES = 2**26  # of attention scores that are alive at once in the matrix products


def in_paper_form(model: SiTTransformer2DModel) -> SiTTransformer2DModel:
    """The same model on the same weight tensors, with every ATConv layer in the paper's form."""
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    for block in twin.blocks:
        if isinstance(block.attn, ATConv):
            block.attn = PaperForm(block.attn)
    return twin.requires_grad_(True).eval()


def attention_twin(name: str) -> str:
    """The preset of the same size and patch with attention in every block."""
    wanted = {**PRESETS[name], "token_mixer": "attention"}
    return next(other for other, preset in PRESETS.items() if preset == wanted)


class MatrixProducts:
    """The matrix products of one evaluation of `model` on `inputs`, alone: with its own weights, on random operands.

    Linears without their bias, the patch embedding as the linear it is, attention's two products per head, whose scores
    are written to memory (a fused attention may be quicker). With `backward`, also the gradients of every weight and of
    every operand that has one. Calling the object runs them all and keeps nothing; `macs` counts multiply-accumulates.
    """

    def __init__(self, model: nn.Module, *inputs: torch.Tensor, backward: bool = False):
        self.products: list[Callable[[], object]] = []
        self.macs = 0
        self._backward, self._buffers = backward, {}
        hooks = [
            module.register_forward_pre_hook(self._record)
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d | Attention)
        ]
        try:
            with torch.set_grad_enabled(backward):
                model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def __call__(self) -> None:
        for product in self.products:
            product()

    def _buffer(self, use: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        key = (use, shape)
        if key not in self._buffers:
            self._buffers[key] = torch.randn(shape, device=like.device).to(like.dtype)
        return self._buffers[key]

    def _record(self, module: nn.Module, arguments: tuple) -> None:
        x = arguments[0]
        if isinstance(module, Attention):
            self._attention(x.flatten(1, -2), module.num_heads)
        else:
            self._linear(x, module.weight.detach().flatten(1))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        out, width = weight.shape
        rows = x.numel() // width
        source, target = self._buffer("x", x, rows, width), self._buffer("y", x, rows, out)
        products = [(source, weight.t(), target)]
        if self._backward:
            products.append((target.t(), source, self._buffer("dw", x, out, width)))
        if x.requires_grad:
            products.append((target, weight, self._buffer("dx", x, rows, width)))
        self._add(torch.mm, products)

    def _add(self, multiply: Callable, products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        for left, right, target in products:
            self.products.append(partial(multiply, left, right, out=target))
            self.macs += math.prod(left.shape) * right.shape[-1]

    def _attention(self, x: torch.Tensor, heads: int) -> None:
        maps, tokens, width = x.shape[0] * heads, x.shape[1], x.shape[2] // heads
        q, k, v, y = (self._buffer(use, x, maps, tokens, width) for use in "qkvy")
        at_once = max(1, min(maps, SCORE_BYTES // (tokens * tokens * x.element_size())))
        scores = self._buffer("scores", x, at_once, tokens, tokens)
        for start in range(0, maps, at_once):
            some = slice(start, min(start + at_once, maps))
            part = scores[: some.stop - some.start]
            pairs = [(q[some], k[some].mT, part), (part, v[some], y[some])]
            if self._backward:
                to_q, to_k, to_v = (self._buffer(use, x, maps, tokens, width)[some] for use in ("dq", "dk", "dv"))
                pairs += [(part.mT, y[some], to_v), (y[some], v[some].mT, part)]
                pairs += [(part, k[some], to_q), (part.mT, q[some], to_k)]
            self._add(torch.bmm, pairs)
