"""The layers that mix positions, and what they do while a model runs."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import timm.layers
import torch
from torch import nn

from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.layers.attention import Attention
from sit_atconv.principles.measures import offset_moments
from sit_atconv.runtime.errors import InputError

KINDS = ("ATConv", "static ATConv", "depthwise", "attention")


@dataclass
class Seen:
    """What a layer did in one pass.

    kernels (B, K, C): that it mixed positions with. before: ATConv's, without inhibition.
    Of attention, kernels are the means of `offset_moments`, and squares its mean squares.
    mixed (B, C, H, W): what the mixing gave, before the layer's own output map, if it has one.
    grid: of the tokens, where the layer has tokens.
    """

    kernels: torch.Tensor | None = None
    before: torch.Tensor | None = None
    mixed: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    grid: tuple[int, int] | None = None

    def without_mixed(self) -> "Seen":
        """The rest of it, on the CPU."""
        rest = ((name, getattr(self, name)) for name in ("kernels", "before", "squares"))
        return Seen(grid=self.grid, **{name: value.cpu() for name, value in rest if value is not None})


def kind_of(layer: nn.Module) -> str | None:
    """Which of KINDS a layer is, None for another one.

    ATConv: every `KernelGenerator`, so those of swapped models too. depthwise: a Conv2d with as many groups as
    channels, more than one, and a kernel larger than 1 x 1. attention: that of this library and timm's `Attention`.
    """
    if isinstance(layer, KernelGenerator):
        if len(layer.sizes) == 3:  # of volumes: what is measured here is of grids
            return None
        return "ATConv" if layer.routing == "adaptive" else "static ATConv"
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups == layer.in_channels == layer.out_channels > 1 and max(layer.kernel_size) > 1
        return "depthwise" if depthwise else None
    return "attention" if isinstance(layer, Attention | timm.layers.Attention) else None


def find_layers(model: nn.Module) -> dict[str, str]:
    """Name -> kind of all layers that are measured, in the model's order. Raises InputError where there is none."""
    found = {name: kind for name, layer in model.named_modules() if (kind := kind_of(layer))}
    if not found:
        other = unmeasured(model)
        first = model.get_submodule(other[0]) if other else None
        over = " over volumes, which are not measured" if isinstance(first, KernelGenerator) else ""
        has = f"; its {other[0]} is a {type(first).__name__}{over}" if other else ""
        raise InputError(
            f"{type(model).__name__} has no ATConv, depthwise convolution or attention of this library's or timm's "
            f"Attention class to be measured{has}"
        )
    return found


def unmeasured(model: nn.Module) -> list[str]:
    """Names of ATConv over volumes, and of what calls itself attention, holds nothing that is measured, and is not part
    of what is."""
    layers = dict(model.named_modules())
    generators = [name for name, layer in layers.items() if isinstance(layer, KernelGenerator)]
    volumes = [
        name for name in generators if kind_of(layers[name]) is None and name.rpartition(".")[0] not in generators
    ]
    known = [*(name for name, layer in layers.items() if kind_of(layer)), *volumes]
    attentions = [name for name, layer in layers.items() if re.search("Attention|Attn", type(layer).__name__)]
    named = [
        name
        for name in attentions
        if not any(f"{each}.".startswith(f"{name}.") or f"{name}.".startswith(f"{each}.") for each in known)
        and not any(other.startswith(f"{name}.") for other in attentions)
    ]
    return [name for name in layers if name in volumes or name in named]


def factors(layer: KernelGenerator, channels: int) -> torch.Tensor:
    """The shares (C,) of its kernels' means that an ATConv subtracts: learned, or 1 of "full" and 0 of "none"."""
    if layer.inhibition == "learned":
        return layer.difference_control.detach().sigmoid().cpu()
    return torch.full((channels,), 1.0 if layer.inhibition == "full" else 0.0)


@contextmanager
def recording(model: nn.Module, names: dict[str, str], grid: tuple[int, int] | None) -> Iterator[dict[str, Seen]]:
    """Within it, every pass of the model fills a dictionary: what each layer of `names` (by `find_layers`) did.

    grid: of the tokens, for attention that is called with a sequence. The model is as before, after.
    """
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        for name, kind in names.items():
            layer = model.get_submodule(name)
            record = {"depthwise": _record_depthwise, "attention": _record_attention}.get(kind, _record_atconv)
            record(layer, name, seen, grid, stack)
        yield seen


def _record_depthwise(layer: nn.Conv2d, name: str, seen: dict[str, Seen], grid, stack: ExitStack) -> None:
    def keep(_, args: tuple, output: torch.Tensor) -> None:
        kernels = layer.weight.detach().flatten(1).T
        seen[name] = Seen(kernels.expand(len(output), -1, -1), mixed=output)

    stack.callback(layer.register_forward_hook(keep).remove)


def _record_atconv(layer: KernelGenerator, name: str, seen: dict[str, Seen], grid, stack: ExitStack) -> None:
    make = layer.kernels

    def kernels(x: torch.Tensor) -> torch.Tensor:
        made = make(x)
        inhibition, layer.inhibition = layer.inhibition, "none"
        try:
            before = make(x)
        finally:
            layer.inhibition = inhibition
        seen[name] = Seen(made.detach(), before.detach(), grid=tuple(x.shape[1:3]))
        return made

    layer.kernels = kernels  # not a module's forward, so no hook sees it
    stack.callback(delattr, layer, "kernels")
    out = layer.to_out[0] if hasattr(layer, "to_out") else layer.proj
    _record_mixed(out, name, seen, stack)


def _record_attention(layer: nn.Module, name: str, seen: dict[str, Seen], grid, stack: ExitStack) -> None:
    def keep(_, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs.get("x")
        given = x.shape[1:3] if x.ndim == 4 else grid
        if given is None:
            raise InputError(f"{name}: its model tells no grid of its tokens, and attention is measured on one")
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise InputError(f"{name}: attention under a mask is not measured")
        kernels, squares = attention_kernels(layer, x.detach().flatten(1, -2), tuple(given))
        seen[name] = Seen(kernels, squares=squares, grid=tuple(given))

    stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
    _record_mixed(layer.proj, name, seen, stack)


def _record_mixed(out: nn.Module, name: str, seen: dict[str, Seen], stack: ExitStack) -> None:
    """Keep what goes into the output map: (B, H, W, C), or tokens (B, N, C), of which those of the grid come last."""

    def keep(_, args: tuple) -> None:
        grid = seen[name].grid
        seen[name].mixed = args[0].flatten(1, -2)[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

    stack.callback(out.register_forward_pre_hook(keep).remove)


@torch.no_grad()
def attention_kernels(layer: nn.Module, x: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`offset_moments` of an attention with `qkv`, `q_norm`, `k_norm` over tokens x (B, P + H W, dim): (B, 9, heads).

    The P prefix tokens (class, registers) take their share of the softmax and are left out, as queries and as keys.
    """
    prefix = x.shape[1] - grid[0] * grid[1]
    if prefix < 0:
        raise InputError(f"attention over {x.shape[1]} tokens, too few for a grid of {grid[0]} x {grid[1]}")
    q, k, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q)[:, :, prefix:], layer.k_norm(k)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return offset_moments(scores.float().softmax(-1)[..., prefix:], grid)
