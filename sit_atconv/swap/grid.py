"""How a swapped layer, called with a sequence of tokens, knows the grid they lie on: its model's input told it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

from sit_atconv.errors import InputError

Reader = Callable[[nn.Module, tuple, dict], tuple[int, int]]  # module, its arguments -> (H, W) in tokens


class GridReference:
    """The grid (H, W) of the forward pass under way, as the shape of a tensor without elements.

    A shape and not two numbers: torch.compile then takes H and W as it takes the size of any input, and does not
    compile anew for every resolution. The layers of a model share one, in deep copies and pickles too.
    """

    def __init__(self, beside: "GridReference | None" = None):
        """beside: another one of the same model, at another resolution."""
        self.shape: torch.Tensor | None = None
        self.first: list[tuple[int, int]] = [] if beside is None else beside.first  # the first grid of the model

    def set(self, grid: tuple[int, int], device: torch.device) -> None:
        self.shape = torch.empty((*grid, 0), device=device)
        if torch.compiler.is_compiling():
            return
        # Compiled blocks: one graph for the first grid, and one for all the others, of whatever resolution.
        if not self.first:
            self.first.append(tuple(grid))
        if tuple(grid) != self.first[0]:
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
        tensor = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
        if tensor is None:
            raise InputError(f"{type(module).__name__} was called without a tensor, and with none it has no grid")
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


# torch.compile(model) calls the model's hooks outside of its graph, and would make graphs of this one by itself, for
# every resolution. Where the hook is traced as part of a graph (of a U-Net, say) this changes nothing.
set_code_exec_strategy(GridHook.__call__.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


class GridKeeper:
    """A forward hook of a block that its model checkpoints by itself: the backward pass begins on the forward's grid.

    The gradient reaches a block's output before anything of the block is computed anew, whatever other resolutions
    have passed through the model in between.
    """

    def __init__(self, reference: GridReference):
        self.reference = reference

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad and not torch.compiler.is_compiling():
            output.register_hook(partial(self._tell, self.reference.shape))

    def _tell(self, shape: torch.Tensor, _) -> None:
        self.reference.shape = shape

    def remove_from(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if hook is self:
                del module._forward_hooks[key]


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


def argument(name: str, args: tuple, kwargs: dict, position: int = 0):
    """The argument `name` of a call, or the one at its position; None where it is not there."""
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None


def latent_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a diffusers model called with `hidden_states` (B, C, H, W), which it cuts into patches, or not."""
    height, width = argument("hidden_states", args, kwargs).shape[-2:]
    patch = getattr(module.config, "patch_size", None) or 1
    return height // patch, width // patch


@torch.compiler.disable(
    reason="a swapped Flux reads its grid from the values of img_ids, which a traced function cannot; compile the "
    "model itself, torch.compile(model), or its blocks, model.compile_repeated_blocks(fullgraph=True)"
)
def raster_of_ids(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of Flux, whose tokens come packed: from `img_ids` (N, 3) or (1, N, 3), columns image, row and column.

    Raises InputError where they are no full raster of one image. The one value that is read, so it runs uncompiled.
    """
    ids = argument("img_ids", args, kwargs, 4)
    if ids is None:
        raise InputError("img_ids: none were given, and they tell the grid of the image tokens")
    found = f"img_ids of shape {tuple(ids.shape)}"
    ids = (ids[0] if ids.ndim == 3 else ids).detach().double().cpu()
    images, rows, columns = ids.unbind(1)
    if (images != images[0]).any():
        raise InputError(
            f"{found} number {images.unique().numel()} images (column 0), which make no single grid; a swapped model "
            "takes one image at a time"
        )
    width = int((rows == rows[0]).sum())
    height = len(ids) // width
    table = ids[: height * width, 1:].unflatten(0, (height, width))
    raster = torch.stack([rows[::width, None].expand(-1, width)[:height], columns[:width].expand(height, -1)], -1)
    rising = (rows[::width].diff() > 0).all() and (columns[:width].diff() > 0).all()
    if len(ids) != height * width or not rising or not torch.equal(table, raster):
        raise InputError(
            f"{found} have rows {rows.min():g} to {rows.max():g} and columns {columns.min():g} to {columns.max():g}, "
            "but are no full raster, row by row; a swapped model needs every token of a rectangle"
        )
    return height, width
