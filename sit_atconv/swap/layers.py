"""ATConv in the place of self-attention, with the argument and parameter names of diffusers' attention."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.utils import logging
from torch import nn

from sit_atconv.layers.atconv import KernelGenerator, volume_sizes
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.compat.torch import metadata_of
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grid import GridReference

QUIET = ("ip_adapter_masks", "ip_hidden_states")  # which a model of diffusers gives to attentions without use for them

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LayerOptions:
    """What all swapped layers of a model share. kernel_size, pool, volume: of `ATConv`. prefix_tokens: before the
    patches."""

    kernel_size: int = 3
    pool: str = "raster"
    prefix_tokens: int = 0
    volume: str | None = None

    def __post_init__(self):
        if type(self.kernel_size) is not int:
            raise InputError(f"kernel_size={self.kernel_size!r}: choose an odd whole number, such as 3")


class SwappedLayer(KernelGenerator):
    """The base of the layers in the place of attention, whose grid `reference` tells: a hook of their model sets it.
    None: the layer is called with its grid.

    dim, channels: of `KernelGenerator`. Their weights load into such a layer, and into no other module.

    A class that makes a network of parts of another, as ControlNets do in diffusers, loads those parts without asking
    for all of their weights: from a swapped model it would keep random attention and say nothing.
    """

    def __init__(self, dim: int, channels: int, reference: GridReference | None, options: LayerOptions):
        sizes, time = volume_sizes(options.kernel_size, options.volume)
        super().__init__(dim, channels, sizes, pool=options.pool, time=time)
        self.reference = reference
        self.expected: tuple[str, ...] | None = None  # the arguments of the attention; None: it takes any

    def expect_as(self, attention: nn.Module) -> None:
        """Know the arguments of an attention of diffusers: its own, and those of its processor."""
        if (processor := getattr(attention, "processor", None)) is not None:
            calls = attention.forward, processor.__call__
            self.expected = (*QUIET, *(name for call in calls for name in inspect.signature(call).parameters))

    def warn_of(self, names: Iterable[str]) -> None:
        """Say which keywords of a call are ignored that the attention did not expect, as diffusers' attentions do."""
        unknown = [] if self.expected is None else [name for name in names if name not in self.expected]
        if unknown:
            logger.warning(f"{unknown} are not expected by {type(self).__name__} and will be ignored.")

    def __prepare_scriptable__(self):
        raise InputError(
            "torch.jit.script: a swapped layer gets its grid from hooks in Python, which a script cannot hold; use "
            "torch.export.export or torch.jit.trace"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (metadata := metadata_of(destination)) is not None:
            metadata[prefix[:-1]] = OfSwappedLayer(metadata[prefix[:-1]])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        super()._load_from_state_dict(state_dict, prefix, dict(local_metadata), *others)


class OfSwappedLayer(OrderedDict):
    """The metadata of such a layer in a state dict; `Module.load_state_dict` has every module that loads ask them."""

    def get(self, *_):
        raise InputError(
            "these weights are of a layer swapped for ATConv, and the module that loads them is another; make "
            "ControlNets and the like from the unswapped model, or leave the swapped layers out of the state dict"
        )

    def __reduce__(self):  # in files it is what torch has there
        return OrderedDict, (), None, None, iter(self.items())


def refuse(**given) -> None:
    """Raise InputError for what a layer was called with, other than None or False, and ATConv has no use for."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError(f"{name} was given to a layer swapped for ATConv, which knows no such thing; leave it out")


class SelfATConv(SwappedLayer):
    """to_out(K2 * to_v(x)), called as diffusers calls an attention: hidden_states (B, N, dim) -> (B, N, out_dim).

    K2 (B, K, inner_dim) as `KernelGenerator` makes it from x; `*` is the depthwise convolution on the grid that
    `reference` tells, of volumes too. value, out: the attention's maps, whose sizes, device and dtype it takes.
    Raises InputError for a context or an attention mask, which ATConv has no use for.
    """

    def __init__(
        self,
        value: nn.Linear,
        out: nn.Linear,
        reference: GridReference | None,
        options: LayerOptions,
        dropout: float = 0.0,
    ):
        inner, biased = value.out_features, value.bias is not None
        super().__init__(value.in_features, inner, reference, options)
        self.to_v = nn.Linear(value.in_features, inner, bias=biased)
        to_out = nn.Linear(inner, out.out_features, bias=biased or out.bias is not None)
        self.to_out = nn.ModuleList([to_out, nn.Dropout(dropout)])
        self.reset_parameters()
        self.to(value.weight.device, value.weight.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **others,
    ) -> torch.Tensor:
        refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        self.warn_of(others)
        return self.output(hidden_states)

    def output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the attention gives for what it is called with, here tokens (B, N, dim)."""
        return self.mix(on_grid(hidden_states, self.reference.get()))

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, *grid, dim) -> (B, N, out_dim)."""
        kernels = self.kernels(x)  # first: see `ATConv.forward`
        mixed = self.convolve(x, self.to_v(x), kernels).flatten(1, -2)
        return self.to_out[1](self.to_out[0](mixed))
