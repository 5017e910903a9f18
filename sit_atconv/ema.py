"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of `model` whose parameters follow it: ema <- decay * ema + (1 - decay) * model; buffers are copied.

    `model` (fp32) is the copy, in eval mode and without gradients. Raises KeyError when the tracked model's tensors
    are not exactly those of the copy, as with a wrapped or compiled model: pass the bare model.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the weights of `model`. Raises KeyError when its tensors are not the copy's."""
        for kind in ("named_parameters", "named_buffers"):
            own, new = dict(getattr(self.model, kind)()), dict(getattr(model, kind)())
            if own.keys() != new.keys():
                raise KeyError(f"EMA: tensors differ from the model's: {sorted(own.keys() ^ new.keys())[:3]}")
            if not own:
                continue
            if kind == "named_parameters":
                torch._foreach_lerp_(list(own.values()), [new[name].detach() for name in own], 1 - self.decay)
            else:
                torch._foreach_copy_(list(own.values()), [new[name] for name in own])
