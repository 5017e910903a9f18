"""The call of a linear that torch.compile can fuse with what follows."""

import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.runtime.compat.torch import is_hooked

FORWARD = nn.Linear.forward


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x), (..., C) -> (..., D), its bias added in the loop that torch.compile makes of what comes next on a CPU.

    `module` is an nn.Linear, or whatever took its place, which is called as it is.
    oneDNN adds a bias in a second pass over the product, which Inductor keeps, and which takes a fifth of the time.
    """
    if not torch.compiler.is_compiling() or not _is_plain(module, x) or module.bias is None:
        return module(x)
    y = F.linear(x, module.weight)
    return y + module.bias.to(y.dtype)


def _is_plain(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether module(x) is a product and a bias and nothing else, on a CPU.

    It is more with a forward or a weight of another kind (adapters, offloading, quantised or sharded weights) or with
    hooks; and a graph of torch.export keeps its linears, for whoever converts or quantises it.
    """
    return (
        x.device.type == "cpu"
        and type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.forward == FORWARD.__get__(module)  # of the ways to ask, the one that torch.compile asks every time
        and not is_hooked(module)
        and not torch.compiler.is_exporting()
    )
