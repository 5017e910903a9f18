"""The families of models that swap_attention knows, each as a tiny model and inputs for it."""

from collections.abc import Iterable

import torch
from conftest import slowly
from torch import nn

from sit_atconv.runtime.compat.torch import tree_leaves
from sit_atconv.swap import swap_attention
from sit_atconv.swap.adapters import known_adapters

ADAPTERS = {adapter.model.__name__: adapter for adapter in known_adapters() if adapter.tiny is not None}

# One for each way of a graft: separate projections on a plane and in a volume, joint and single streams, maps, and
# patches behind a prefix.
FEW = (
    "DiTTransformer2DModel", "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "UNet2DModel",
    "VisionTransformer", "WanTransformer3DModel", "ZImageTransformer2DModel",
)  # fmt: skip


def few(names: Iterable[str]) -> list:
    """Parameters of a test: those of FEW in the ordinary suite, the others `slow`."""
    names = list(names)
    return [*(name for name in names if name in FEW), *slowly(name for name in names if name not in FEW)]


def aligned(model: nn.Module) -> nn.Module:
    """The model, its weights laid out as in a new one: mapped from a file, they may be added up in another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


class Family:
    """A family's tiny model, always with the same weights, and inputs on two grids with two lengths of text."""

    def __init__(self, name: str):
        self.adapter = ADAPTERS[name]
        sides = getattr(self.adapter, "sides", 2)
        self.calls = [((2, 6, 4)[-sides:], 3), ((3, 4, 8)[-sides:], 5)]
        if name == "DiTTransformer2DModel":  # its original unpatchifies squares alone
            self.calls = [((4, 4), None), ((6, 6), None)]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.adapter.tiny().eval()

    def inputs(self, model: nn.Module, which: int) -> dict:
        return self.inputs_of(model, *self.calls[which])

    def inputs_of(self, model: nn.Module, grid: tuple[int, ...], text: int | None) -> dict:
        """Of a class that takes one grid alone, whose example of another is None, on its own."""
        given = [{"grid": grid, "text": text}, {"text": text}]
        found = (self.adapter.example(model, torch.Generator().manual_seed(0), **each) for each in given)
        return next(inputs for inputs in found if inputs is not None)

    def idle(self) -> set[str]:
        """The attentions with weights that the original's output does not depend on: a last block's for the text."""
        model = self.model()
        loss_of(model, self.inputs(model, 1)).backward()
        return {
            name
            for name in self.adapter.find(model)
            if not all(each.grad is not None and each.grad.any() for each in model.get_submodule(name).parameters())
        }

    def swapped(self, model: nn.Module | None = None, init: str = "closed_form"):
        model = self.model() if model is None else model
        return swap_attention(model, "all", joint="split", init=init, calib=[self.inputs(model, 0)])


def tensors(output) -> list[torch.Tensor]:
    return [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.is_floating_point()]


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    return tensors(model(**inputs))


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def loss_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    return sum(each.double().square().mean() for each in tensors(model(**inputs)))
