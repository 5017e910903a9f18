"""What a model is timed against: attention, ATConv in the paper's form, and its matrix products alone."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.models.sit import PRESETS, SiTTransformer2DModel

SCORE_BYTES = 2**26  # of attention scores that are alive at once in the matrix products


class PaperForm(nn.Module):
    """An ATConv layer computed as published: `kernel_proj` on all N tokens, the pool after it, the convolution grouped.

    x (B, N, C) -> (B, N, C), the same function of the same weights as `layer`, up to rounding.
    Raises ValueError for a layer with options that the paper does not have.
    """

    def __init__(self, layer: ATConv):
        super().__init__()
        if (layer.routing, layer.inhibition, layer.pool) != ("adaptive", "learned", "raster"):
            raise ValueError(f"{layer}: the paper's form has adaptive routing, learned inhibition, raster pooling")
        self.layer = layer

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        layer, (batch, tokens, channels), k = self.layer, x.shape, self.layer.kernel_size
        keys = F.adaptive_avg_pool1d(layer.kernel_proj(x).transpose(1, 2), k * k)
        kernels = layer.kernel_gen(layer.activation(keys))
        kernels = kernels - layer.difference_control.sigmoid()[:, None] * kernels.mean(2, keepdim=True)
        values = layer.x_proj(x).transpose(1, 2).reshape(1, batch * channels, *grid)
        weight = kernels.to(values.dtype).reshape(batch * channels, 1, k, k)
        mixed = F.conv2d(values, weight, padding=k // 2, groups=batch * channels)
        return layer.proj(mixed.reshape(batch, channels, tokens).transpose(1, 2))


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

    Linears with their bias, the patch embedding as the linear it is, attention's two products per head. With
    `backward`, also the gradients of every product's operands. Calling the object runs them all and keeps nothing;
    `macs` counts the multiply-accumulates.
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
            with torch.no_grad():
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
            self._buffers[key] = torch.randn(shape, dtype=torch.float32).to(like.device, like.dtype)
        return self._buffers[key]

    def _record(self, module: nn.Module, arguments: tuple) -> None:
        x = arguments[0]
        if isinstance(module, Attention):
            self._attention(x, module.num_heads)
        else:
            weight = module.weight.detach().flatten(1)
            rows = x.numel() // weight.shape[1]
            self._linear(x, rows, weight, None if module.bias is None else module.bias.detach())

    def _linear(self, x: torch.Tensor, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        (out, width), source = weight.shape, self._buffer("x", x, rows, weight.shape[1])
        target = self._buffer("y", x, rows, out)
        if bias is None:
            self.products.append(lambda: torch.mm(source, weight.t(), out=target))
        else:
            self.products.append(lambda: torch.addmm(bias, source, weight.t(), out=target))
        self.macs += rows * width * out
        if self._backward:
            to_x, to_weight = self._buffer("dx", x, rows, width), self._buffer("dw", x, out, width)
            self.products.append(lambda: torch.mm(target, weight, out=to_x))
            self.products.append(lambda: torch.mm(target.t(), source, out=to_weight))
            self.macs += 2 * rows * width * out

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
            for left, right, target in pairs:
                self.products.append(lambda left=left, right=right, target=target: torch.bmm(left, right, out=target))
                self.macs += math.prod(left.shape) * right.shape[-1]
