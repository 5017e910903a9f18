"""How a swapped layer, called with a sequence of tokens, knows the grid they lie on: its model's input told it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from sit_atconv.errors import InputError

Reader = Callable[[nn.Module, tuple, dict], tuple[int, int]]  # module, its arguments -> (H, W) in tokens


class GridReference:
    """The grid (H, W) of the forward pass under way, as the shape of a tensor without elements.

    A shape and not two numbers: torch.compile then takes H and W as it takes the size of any input, and does not
    compile anew for every resolution. The layers of a model share one, in deep copies and pickles too.
    """

    def __init__(self):
        self.shape: torch.Tensor | None = None
        self.first: tuple[int, int] | None = None

    def set(self, grid: tuple[int, int], device: torch.device) -> None:
        self.shape = torch.empty((*grid, 0), device=device)
        if torch.compiler.is_compiling():
            return
        # Compiled blocks: one graph for the first grid, and one for all the others.
        self.first = self.first or tuple(grid)
        if tuple(grid) != self.first:
            torch._dynamo.maybe_mark_dynamic(self.shape, (0, 1))

    def get(self) -> tuple[int, int]:
        """The grid (H, W). Raises InputError where no forward pass has told one."""
        if self.shape is None:
            raise InputError(
                "a swapped layer was called on its own, and knows no grid; call the model that it is part of, "
                "or tell it: layer.reference.set((H, W), device)"
            )
        return self.shape.shape[0], self.shape.shape[1]


class GridHook:
    """A forward pre-hook of the module that sees the grid: reads it and tells the layers below.

    Where that module checkpoints its blocks, the recomputation in the backward pass gets the grid of its own forward
    pass, whatever other resolutions have passed through the model in between.
    """

    def __init__(self, reference: GridReference, read: Reader):
        self.reference, self.read = reference, read

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        self.reference.set(self.read(module, args, kwargs), tensor.device)
        if getattr(module, "gradient_checkpointing", False):
            function = module._gradient_checkpointing_func
            if not isinstance(function, _CheckpointOnGrid):
                module._gradient_checkpointing_func = _CheckpointOnGrid(self.reference, function)

    def remove_from(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is self:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, _CheckpointOnGrid):
            module._gradient_checkpointing_func = function.checkpoint


class _CheckpointOnGrid:
    """checkpoint(function, *args), with the function run on the grid of now whenever it is run."""

    def __init__(self, reference: GridReference, checkpoint: Callable):
        self.reference, self.checkpoint = reference, checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        return self.checkpoint(partial(self._on, self.reference.shape, function), *args, **kwargs)

    def _on(self, shape: torch.Tensor, function: Callable, *args, **kwargs):
        before, self.reference.shape = self.reference.shape, shape
        try:
            return function(*args, **kwargs)
        finally:
            self.reference.shape = before


def argument(name: str, args: tuple, kwargs: dict):
    """The argument `name` of a call, which comes first where it is not named."""
    return kwargs[name] if name in kwargs else args[0]


def latent_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a diffusers model called with `hidden_states` (B, C, H, W), which it cuts into patches, or not."""
    height, width = argument("hidden_states", args, kwargs).shape[-2:]
    patch = getattr(module.config, "patch_size", None) or 1
    return height // patch, width // patch
