"""ATConv in the place of self-attention, with the argument and parameter names of diffusers' attention."""

from collections import OrderedDict

import torch
from torch import nn

from sit_atconv.compat.torch import metadata_of
from sit_atconv.errors import InputError
from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.ops.atconv import dynamic_depthwise_conv, on_grid
from sit_atconv.swap.grid import GridReference


class SwappedLayer(KernelGenerator):
    """The base of the layers in the place of attention, whose grid `reference` tells: a hook of their model sets it.

    Their weights load into such a layer, and into no other module.

    A class that makes a network of parts of another, as ControlNets do in diffusers, loads those parts without asking
    for all of their weights: from a swapped model it would keep random attention and say nothing.
    """

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


class SelfATConv(SwappedLayer):
    """to_out(K2 * to_v(x)), called as diffusers calls an attention: hidden_states (B, N, dim) -> (B, N, out_dim).

    K2 (B, K, inner_dim) as `KernelGenerator` makes it from x; `*` is the depthwise convolution on the grid that
    `reference` tells. Raises InputError for a context or an attention mask, which ATConv has no use for.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        out_dim: int,
        reference: GridReference,
        value_bias: bool = False,
        out_bias: bool = True,
        dropout: float = 0.0,
        kernel_size: int = 3,
        pool: str = "raster",
    ):
        super().__init__(dim, inner_dim, kernel_size, pool=pool)
        self.to_v = nn.Linear(dim, inner_dim, bias=value_bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, out_dim, bias=out_bias), nn.Dropout(dropout)])
        self.reference = reference
        self.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            what = "attention_mask" if encoder_hidden_states is None else "encoder_hidden_states"
            raise InputError(f"{what} was given to a layer swapped for ATConv, which knows no such thing; leave it out")
        x = on_grid(hidden_states, self.reference.get())
        kernels = self.kernels(x)
        v = self.to_v(x)
        mixed = dynamic_depthwise_conv(v, kernels.to(v.dtype)).flatten(1, 2)
        return self.to_out[1](self.to_out[0](mixed))
