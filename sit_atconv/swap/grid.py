"""How a swapped layer, called with a sequence of tokens, knows the grid they lie on: its model's input told it."""

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sit_atconv.runtime.compat import torch as compat
from sit_atconv.runtime.compat.diffusers import checkpoint_function, set_checkpoint_function
from sit_atconv.runtime.errors import InputError

HALVES = (torch.bfloat16, torch.float16)  # FluxPipeline rounds ids to its own: 257 to 256 in bf16
Grid = tuple[int, ...]  # (H, W) in tokens; of volumes (T, H, W)
Reader = Callable[[nn.Module, tuple, dict], Grid]  # of a module and its arguments
TELL = "layer.reference.set((H, W), device), or with (T, H, W)"


class _Pass(threading.local):
    """What a thread knows of its pass through a model: the grid, and what it knew before (shape, outer)."""

    shape: torch.Tensor | None = None
    outer: tuple | None = None


class GridReference:
    """The grid (H, W) or (T, H, W) of the forward pass under way in this thread, as the shape of a tensor without
    elements.

    A shape and not numbers: torch.compile then takes H and W as it takes the size of any input, and does not compile
    anew for every resolution. The layers of a model share one, in deep copies and pickles too. Passes in other
    threads, and passes within a pass, have grids of their own.
    """

    def __init__(self, beside: "GridReference | None" = None):
        """beside: another one of the same model, at another resolution."""
        self.first: list[Grid] = [] if beside is None else beside.first  # the first grid of the model
        self._reset()

    def _reset(self) -> None:
        self.now = _Pass()
        self.last: torch.Tensor | None = None  # of whatever thread: for a layer that is called outside of any pass,
        self.by_count: dict[int, Grid] = {}  # where the number of tokens tells the grid
        self.ambiguous = False
        self.of_tokens = WeakKeyDictionary()  # storage of what a block was called with -> the grid that it lies on

    def __getstate__(self) -> dict:
        return {"first": self.first}

    def __setstate__(self, state: dict) -> None:
        self.first = state["first"]
        self._reset()

    def set(self, grid: Grid, device: torch.device) -> None:
        """Tell the grid of the pass under way in this thread, or of calls of the layers on their own."""
        self.now.shape = torch.empty((*grid, 0), device=device)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        # Compiled blocks: one graph for the first grid, and one for all the others, of whatever resolution.
        if not self.first:
            self.first.append(tuple(grid))
        if tuple(grid) != self.first[0]:
            compat.maybe_mark_dynamic(self.now.shape, tuple(range(len(grid))))
        self.last = self.now.shape
        self.ambiguous |= self.by_count.setdefault(math.prod(grid), tuple(grid)) != tuple(grid)

    def get(self) -> Grid:
        """The grid. Raises InputError where no forward pass has told one."""
        shape = self.now.shape
        if shape is None:  # part of a block that something else than the model checkpoints, say, computed anew
            shape = self.last
            if shape is None:
                raise InputError(
                    "a swapped layer was called on its own, and knows no grid; call the model that it is part of, "
                    f"or tell it: {TELL}"
                )
            if self.ambiguous:
                raise InputError(
                    "a swapped layer was called on its own, after grids of as many tokens and other sides; call the "
                    "model that it is part of (to checkpoint: the model's own checkpointing, or its blocks, "
                    f"uncompiled), or tell it: {TELL}"
                )
        return tuple(shape.shape[:-1])


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
        _checkpoint_on_grid(module, self.reference)


class Scope:
    """Two hooks of a module within which a grid holds: what a call changes of it, its end takes back."""

    def __init__(self, reference: GridReference):
        self.reference = reference

    def put_on(self, module: nn.Module) -> None:
        """Register them, unless a scope of the same grid is on the module."""
        there = [getattr(hook, "__self__", None) for hook in compat.forward_pre_hooks(module)]
        if not any(isinstance(each, Scope) and each.reference is self.reference for each in there):
            module.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
            module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        now = self.reference.now
        now.outer = (now.shape, now.outer)

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        now = self.reference.now
        if now.outer is not None:
            now.shape, now.outer = now.outer


class PassScope(Scope):
    """Of the module that a pass goes through. With the last pass of a thread goes what it knew of a grid."""

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        super().leave(module, args, output)
        if self.reference.now.outer is None:
            self.reference.now.shape = None


class BlockScope(Scope):
    """Of a layer and the blocks around it, which may be checkpointed: run again, they get the grid of their tokens.

    By the tokens, since nothing else is the same: the backward pass may run in a thread of autograd's own, among other
    passes, and whatever checkpoints a block calls it again with the tokens of before, if detached. A block of
    transformers checkpoints what is within its hooks, and does it on the grid of the call.
    """

    # One key on all modules: a compiled block, in whose graph its hooks are, would guard one of its own, and blocks
    # that share a graph would not.
    key = compat.hook_key()

    def put_on(self, module: nn.Module) -> None:
        compat.put_hooks(module, self.key, self.enter, self.leave)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        super().enter(module, args, kwargs)
        _checkpoint_on_grid(module, self.reference)
        storage, now = _storage_of_tokens(args, kwargs), self.reference.now
        if storage is None:
            return
        if compat.in_backward():
            now.shape = self.reference.of_tokens.get(storage, now.shape)
        if now.shape is not None:  # there too: a pass that is run again may checkpoint its blocks
            self.reference.of_tokens[storage] = now.shape

    def leave(self, module: nn.Module, args: tuple, output) -> None:
        if not torch.compiler.is_compiling():
            super().leave(module, args, output)


# torch.compile(model) calls the model's hooks outside of its graph, and would make graphs of these by themselves, for
# every resolution. Where a hook is traced as part of a graph (of a U-Net, say) this changes nothing.
compat.skip_as_frame(GridHook.__call__, Scope.enter, Scope.leave, PassScope.leave, BlockScope.enter, BlockScope.leave)


def _storage_of_tokens(args: tuple, kwargs: dict) -> torch.UntypedStorage | None:
    """The storage of the tokens (B, N, dim) that a block is called with; None within torch.func, where there is none.

    Detached tensors share it, and it is the same object as long as there is a tensor on it.
    """
    tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.ndim > 2)
    tokens = next(tensors, None)
    if tokens is None or compat.is_wrapped(tokens):
        return None
    return tokens.untyped_storage()


def remove_hooks(module: nn.Module, used: set[int]) -> None:
    """Take off the hooks that tell a grid to nobody. used: ids of the references that layers have."""

    def unwanted(hook: Callable) -> bool:
        ours = getattr(hook, "__self__", hook)
        return isinstance(ours, GridHook | Scope) and id(ours.reference) not in used

    compat.remove_hooks(module, unwanted)
    function = checkpoint_function(module)
    if isinstance(function, _CheckpointOnGrid) and id(function.reference) not in used:
        set_checkpoint_function(module, function.checkpoint)


def _checkpoint_on_grid(module: nn.Module, reference: GridReference) -> None:
    """Have a module that checkpoints its parts, or itself, run them anew on the grid that they were run on."""
    if getattr(module, "gradient_checkpointing", False):
        function = checkpoint_function(module)
        if not isinstance(function, _CheckpointOnGrid):
            set_checkpoint_function(module, _CheckpointOnGrid(reference, function))


class _CheckpointOnGrid:
    """checkpoint(function, *args), with the function run on the grid of now whenever it is run.

    diffusers' checkpoint takes no keywords, and its HunyuanImage gives some: they go to the function.
    """

    def __init__(self, reference: GridReference, checkpoint: Callable):
        self.reference, self.checkpoint = reference, checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        return self.checkpoint(partial(self._on, self.reference.now.shape, function, **kwargs), *args)

    def _on(self, shape: torch.Tensor, function: Callable, *args, **kwargs):
        now = self.reference.now  # of the thread that runs it: not always the one that it was checkpointed in
        before, now.shape = now.shape, shape
        try:
            return function(*args, **kwargs)
        finally:
            now.shape = before


def above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold the one of that name, from the inside out; the model is the last."""
    parts = name.split(".")
    return (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1))


def argument(name: str, args: tuple, kwargs: dict, position: int = 0):
    """The argument `name` of a call, or the one at its position; None where it is not there."""
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None


def given(name: str, module: nn.Module, args: tuple, kwargs: dict):
    """The argument `name` of a call of `module`, by its signature; its default where it is not there."""
    if name in kwargs:
        return kwargs[name]
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)


def latent_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of a diffusers model called with `hidden_states` (B, C, H, W), which it cuts into patches, or not."""
    height, width = argument("hidden_states", args, kwargs).shape[-2:]
    patch = getattr(module.config, "patch_size", None) or 1
    return height // patch, width // patch


def patch_sizes(config) -> tuple[int, int, int]:
    """Frames, rows and columns of a patch, of the configuration of a diffusers model over videos."""
    patch = config.patch_size
    return (getattr(config, "patch_size_t", None) or 1, patch, patch) if isinstance(patch, int) else tuple(patch)


def volume_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int, int]:
    """Of a diffusers model called with `hidden_states` (B, C, T, H, W), which it cuts into patches."""
    sides = argument("hidden_states", args, kwargs).shape[-3:]
    return tuple(side // patch for side, patch in zip(sides, patch_sizes(module.config), strict=True))


def frames_grid(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int, int]:
    """Of one called with the frames before the channels: `hidden_states` (B, T, C, H, W)."""
    return volume_grid(module, (argument("hidden_states", args, kwargs).transpose(1, 2),), {})


@torch.compiler.disable(
    reason="such a model reads its grid from the values of video_coords, which a traced function cannot; give "
    "num_frames, height and width alone, or compile its blocks, model.compile_repeated_blocks(fullgraph=True)"
)
def coords_grid(coords: torch.Tensor) -> tuple[int, int, int]:
    """The grid of tokens at coordinates (B, 3, N) of frame, row and column. Raises InputError where they fill none."""
    axes = [axis.unique() for axis in coords[0].detach().cpu()]
    raster = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    if raster.shape != coords.shape[1:] or not coords.detach().cpu().eq(raster).all():
        sides = " x ".join(str(len(axis)) for axis in axes)
        raise InputError(
            f"video_coords of {coords.shape[-1]} tokens name a volume of {sides}, but not every place of it, once, in "
            "raster order and alike for all samples; a swapped model takes one volume, without tokens of keyframes or "
            "references beside it"
        )
    return tuple(len(axis) for axis in axes)


@torch.compiler.disable(
    reason="such a model reads its grid from the values of ids, which a traced function cannot; compile the model "
    "itself, torch.compile(model), or its blocks, model.compile_repeated_blocks(fullgraph=True)"
)
def ids_grid(module: nn.Module, args: tuple, kwargs: dict, name: str = "img_ids", image: str = "") -> tuple[int, int]:
    """Of Flux and its like, whose tokens come packed: from ids (N, 3 or more) or (1, N, 3 or more), columns image, row
    and column; those after are of the text.

    name: the argument that they are. image: the argument (B, N, dim) that the last of them are of; "": all are, of
    `hidden_states`.
    Raises InputError where they are no full raster of one image, or of another number of tokens. The one value that is
    read, so it runs uncompiled.
    """
    ids = given(name, module, args, kwargs)
    if ids is None:
        raise InputError(f"{name}: none were given, and they tell the grid of the image tokens")
    found = f"{name} of shape {tuple(ids.shape)}"
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3].detach().double().cpu()
    if image:
        ids = ids[-given(image, module, args, kwargs).shape[1] :]
    images, rows, columns = ids.unbind(1)
    if (images != images[0]).any():
        raise InputError(
            f"{found} number {images.unique().numel()} images (column 0), which make no single grid; a swapped model "
            "takes one image at a time"
        )
    ends = (columns.diff() < 0).nonzero()  # of the rows but the last; rounded, neighbours may be equal, but never fall
    width = int(ends[0]) + 1 if len(ends) else 1 if columns.eq(columns[0]).all() else len(ids)
    height = len(ids) // width
    table = ids[: height * width, 1:].unflatten(0, (height, width))
    raster = torch.stack([rows[::width, None].expand(-1, width)[:height], columns[:width].expand(height, -1)], -1)
    if len(ids) != height * width or not (_rises(rows[::width]) and _rises(columns[:width]) and table.equal(raster)):
        raise InputError(
            f"{found} have rows {rows.min():g} to {rows.max():g} and columns {columns.min():g} to {columns.max():g}, "
            "but are no full raster, row by row; a swapped model needs every token of a rectangle"
        )
    check_count((height, width), found, given(image or "hidden_states", module, args, kwargs))
    return height, width


def check_count(grid: Grid, told_by: str, tokens: torch.Tensor) -> None:
    """Raises InputError where tokens (B, N, dim) are not as many as the grid has, which an argument told."""
    if math.prod(grid) != tokens.shape[1]:
        sides = " x ".join(map(str, grid))
        raise InputError(
            f"{told_by} tell the grid of {math.prod(grid)} tokens, {sides}, and the call has {tokens.shape[1]}; give "
            "those of its image"
        )


@torch.compiler.disable(reason="the values of attention_mask are read; compile the model itself, or its blocks")
def check_whole(mask: torch.Tensor | None, count: int) -> None:
    """Raises InputError where a mask over text and image, (B, S) or (B, 1, 1 or S, S), does not let the image's tokens,
    the last `count`, all read one another alike."""
    if mask is None:
        return
    part = mask[..., -count:] if mask.ndim == 2 or mask.shape[-2] == 1 else mask[..., -count:, -count:]
    if part.ne(part.flatten()[0]).any() or not (part.isfinite() if part.is_floating_point() else part).all():
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)} leaves out image tokens, and a grid with tokens missing is "
            "none; it may leave out text"
        )


def _rises(sides: torch.Tensor) -> bool:
    """Whether coordinates (n,) rise, or rose in equal steps before they were rounded to half precision."""
    if (sides.diff() > 0).all():
        return True
    even = sides[0] + (sides[1] - sides[0]) * torch.arange(len(sides), dtype=sides.dtype)
    return bool(sides[1] > sides[0]) and any(sides.equal(even.to(each).double()) for each in HALVES)
