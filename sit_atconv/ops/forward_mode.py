"""Whether forward-mode derivatives are being taken: `torch.func.jvp` and what is made of it, or dual tensors."""

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result  # torch.compile guards the level itself
def forward_mode() -> bool:
    """Whether tensors may carry tangents here; true for every thread while it is so for one."""
    return forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def levels() -> bool:
    """Whether a transform of torch.func is at work here: `grad`, `vjp`, `jvp` or `vmap`."""
    return torch._C._are_functorch_transforms_active()
