"""Which attention of which model is swapped: a registry by model class, open to models of one's own."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sit_atconv.layers.atconv import VOLUMES, KernelGenerator
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grafts import Graft
from sit_atconv.swap.grid import Reader, above, patch_sizes
from sit_atconv.swap.marking import mark_nothing
from sit_atconv.swap.refused import refusal_of

Grid = Sequence[int] | None
Example = Callable[..., dict | None]


@dataclass(frozen=True)
class SwapAdapter:
    """How the attention of a class of models is found and replaced.

    model: the class, and those that derive from it, where `check` lets them.
    sites: Graft by pattern, which the whole name of an attention matches.
    grid: reads the grid from the arguments of `owner`: the class (or classes) of the nearest module above the attention
        that sees it, or the name of such a module; None where the attention is called with its grid.
    example: given (model, generator, grid=None, text=None), the keyword arguments of one forward pass on random inputs,
        for calibration where none is given: on the model's own grid, or on one of (H, W) or (T, H, W) tokens, with its
        own longest text, or with `text` tokens of it; None if there is no telling.
    mark: brings class and configuration of the model in line with its layers, after a swap or a revert; see `models`.
    check: given the model and the settings of a swap to come, raises InputError where they do not go together.
    tiny: makes a model of random weights that runs in milliseconds, with every kind of site in it.
    prefix_tokens: how many tokens of a model come before those on the grid.
    sides: of the grid that the tokens fill: 2 (H, W), or 3 (T, H, W).
    stays: of a model, the names of attentions that the patterns match and that are left alone.
    """

    model: type[nn.Module]
    sites: Mapping[str, Graft]
    owner: type[nn.Module] | tuple[type[nn.Module], ...] | str | None = None
    grid: Reader | None = None
    example: Example | None = None
    mark: Callable[[nn.Module], None] = mark_nothing
    check: Callable[[nn.Module, dict], None] = lambda model, config: None
    tiny: Callable[[], nn.Module] | None = None
    prefix_tokens: Callable[[nn.Module], int] = lambda model: getattr(model, "num_prefix_tokens", 0)
    sides: int = 2
    stays: Callable[[nn.Module], Collection[str]] = lambda model: ()

    def find(self, model: nn.Module) -> dict[str, Graft]:
        """Name -> Graft of all attentions that the patterns match and that do not stay, in the model's order."""
        found, stay = {}, self.stays(model)
        for name, module in model.named_modules():
            graft = next((graft for pattern, graft in self.sites.items() if re.fullmatch(pattern, name)), None)
            known = graft is not None and (not graft.only or isinstance(module, (*graft.only, KernelGenerator)))
            if known and name not in stay:
                found[name] = graft
        return found

    def volume(self, given: str | None) -> str | None:
        """The setting of a swap for its volumes, of which `given` says nothing where it is None; None of grids of two
        sides. Raises InputError for a setting there."""
        if self.sides == 3:
            return VOLUMES[0] if given is None else given
        if given is not None:
            raise InputError(
                f"volume={given!r}: the tokens of {self.model.__name__} lie on a grid of rows and columns, and fill no "
                "volume of frames; leave it out"
            )
        return None

    def owner_of(self, model: nn.Module, name: str) -> nn.Module | None:
        """The module whose input tells the grid of the attention `name`. Raises InputError where there is none."""
        if self.owner is None:
            return None
        if isinstance(self.owner, str):
            return model.get_submodule(self.owner)
        owner = next((module for module in above(model, name) if isinstance(module, self.owner)), None)
        if owner is None:
            owners = self.owner if isinstance(self.owner, tuple) else (self.owner,)
            wanted = " or ".join(each.__name__ for each in owners)
            raise InputError(f"{name} has no {wanted} above it, which would tell its grid")
        return owner


_ADAPTERS: list[SwapAdapter] = []
_AWAITED: dict[str, tuple[Sequence[str], Callable[[], None]]] = {}  # module -> its models, what registers them


def register_adapter(adapter: SwapAdapter) -> None:
    """Make `swap_attention` know a class of models; the adapter registered last for a class is the one used."""
    _no_longer_await(adapter.model.__module__)  # first, so that this one stands before it
    _ADAPTERS.insert(0, adapter)


def await_adapters(module: str, models: Sequence[str], register: Callable[[], None]) -> None:
    """Have `register` called when a model of a class of `module` arrives, which is not imported before.

    models: the names of the classes that it registers adapters for.
    """
    _AWAITED[module] = models, register


def _no_longer_await(module: str) -> None:
    if module in _AWAITED:
        _AWAITED.pop(module)[1]()


def known_adapters() -> list[SwapAdapter]:
    """All adapters, the one registered last first. Those that were awaited are registered now: their modules load."""
    for module in list(_AWAITED):
        _no_longer_await(module)
    return list(_ADAPTERS)


def adapter_of(model: nn.Module) -> SwapAdapter:
    """The adapter of the model's class, or of the nearest class it derives from. Raises InputError for an unknown."""
    for cls in type(model).__mro__:
        _no_longer_await(cls.__module__)
        for adapter in _ADAPTERS:
            if adapter.model is cls:
                return adapter
        if (reason := refusal_of(cls)) is not None:
            raise InputError(
                f"{cls.__name__} {reason}: it cannot be swapped as it is; for a way of your own call "
                "sit_atconv.swap.register_adapter(SwapAdapter(...))"
            )
    awaited = (name for names, _ in _AWAITED.values() for name in names)
    known = ", ".join(sorted({*(adapter.model.__name__ for adapter in _ADAPTERS), *awaited}))
    raise InputError(
        f"no adapter for {type(model).__name__}; known are {known}; for another class call "
        "sit_atconv.swap.register_adapter(SwapAdapter(...))"
    )


def latents(model: nn.Module, generator: torch.Generator, grid: Grid = None) -> torch.Tensor:
    """Random latents (2, in_channels, H, W) of a diffusers model: of its own size, or of a grid (H, W) of tokens."""
    size, patch = model.config.sample_size, getattr(model.config, "patch_size", None) or 1
    if grid is not None:
        size = [side * patch for side in grid]
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, model.config.in_channels, height, width, generator=generator)


def clip(model: nn.Module, generator: torch.Generator, grid: Sequence[int], batch: int = 1) -> torch.Tensor:
    """Random latents (batch, in_channels, T, H, W) of a diffusers model over videos, for a grid (T, H, W) of tokens."""
    sides = [side * patch for side, patch in zip(grid, patch_sizes(model.config), strict=True)]
    return torch.randn(batch, model.config.in_channels, *sides, generator=generator)


@torch.no_grad()
def randomised(model: nn.Module, std: float = 0.2) -> nn.Module:
    """The model in evaluation mode, with weights drawn anew: for tiny ones, whose parts that start at zero hide errors.

    Vectors (norms, biases) are drawn around the values that they have.
    """
    for parameter in model.parameters():
        parameter.copy_(std * torch.randn_like(parameter) + (parameter if parameter.ndim < 2 else 0))
    return model.eval()
