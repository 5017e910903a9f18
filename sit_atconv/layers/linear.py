"""The call of a linear that torch.compile can fuse with what follows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.runtime.compat.torch import is_exporting, is_hooked, is_parameter

FORWARD = nn.Linear.forward


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x), (..., C) -> (..., D), its bias added in the loop that torch.compile makes of what comes next on a CPU.

    `module` is an nn.Linear, or whatever took its place, which is called as it is.
    oneDNN adds a bias in a second pass over the product, which Inductor keeps, and which takes a fifth of the time. A
    graph of torch.export keeps its linears, for whoever converts or quantises it.
    """
    fuses = torch.compiler.is_compiling() and not is_exporting() and x.device.type == "cpu"
    if not fuses or not is_plain(module) or module.bias is None:
        return module(x)
    y = F.linear(x, module.weight)
    return y + module.bias.to(y.dtype)


def is_plain(module: nn.Module, kind: type[nn.Linear] = nn.Linear, forward: Callable = FORWARD) -> bool:
    """Whether module(x) is `forward`, that of the class `kind`, and nothing else.

    It is more with a forward or a weight of another kind (adapters, offloading, quantised or sharded weights) or with
    hooks.
    """
    return (
        type(module) is kind
        and is_parameter(module.weight)
        # Of the ways to ask whose forward it is, one that torch.compile knows and asks every time.
        and "forward" not in module.__dict__
        and type(module).forward is forward
        and module.forward.__func__ is forward
        and not is_hooked(module)
    )
