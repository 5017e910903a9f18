"""What a swap is calibrated on: inputs of the model, given or synthetic."""

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sit_atconv.runtime.compat.torch import keystr, tree_leaves, tree_leaves_with_path, tree_map
from sit_atconv.runtime.errors import InputError, said, told
from sit_atconv.swap.adapters import SwapAdapter

EXAMPLES = 4  # synthetic calibration inputs
# What torch, timm and transformers say of inputs of another shape.
SHAPES = re.compile(
    r"mat1 and mat2|must match|expected input|shape .* is invalid|[Ii]nput (image size|height|width) .*doesn't match"
    r"|channel dimension"
)


def calibration_inputs(
    model: nn.Module, adapter: SwapAdapter, calib: Iterable | None, needed: bool, seed: int = 0
) -> list:
    """Calibration inputs: those given, else synthetic ones of a seed, else none if they are not needed."""
    if calib is not None:
        return checked_inputs(model, "calib", calib)
    generator, device, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).device, dtype_of(model)
    examples = []
    # An IP-Adapter takes images, of which no configuration tells.
    processors = (type(getattr(module, "processor", None)).__name__ for module in model.modules())
    if adapter.example is not None and not any("IPAdapter" in name for name in processors):
        examples = [adapter.example(model, generator) for _ in range(EXAMPLES if needed else 1)]
        examples = [each for each in examples if each is not None]
    if needed and not examples:
        raise InputError(
            f"{type(model).__name__} has no synthetic inputs; give calib=[dict of keyword arguments of a forward "
            "pass, ...], or init='copy_vo' with a select other than 'auto'"
        )

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return [tree_map(placed, each) for each in examples]


def checked_inputs(model: nn.Module, what: str, inputs: Iterable, most: int | None = None) -> list:
    """The first inputs of a model, at `most` so many, as a list. Raises InputError for what is no list of its calls."""
    if isinstance(inputs, dict | str | torch.Tensor) or not isinstance(inputs, Iterable):
        raise InputError(f"{what}: give a list of inputs, each a dict of keyword arguments or a tuple of arguments")
    found = list(itertools.islice(inputs, most))
    if not found:
        raise InputError(f"{what} is empty; give at least one input, or leave it out for synthetic ones")
    for index, each in enumerate(found):
        if not isinstance(each, dict | tuple | list) or not any(isinstance(x, torch.Tensor) for x in tree_leaves(each)):
            raise InputError(
                f"{what}[{index}] is {type(each).__name__}; each input is a dict of keyword arguments or a tuple of "
                "arguments of the model, tensors among them"
            )
        args, kwargs = _arguments(each)
        signature = inspect.signature(model.forward)
        names = ", ".join(signature.parameters)
        with told(f"{what}[{index}] does not fit {type(model).__name__}", TypeError, remedy=f"it takes {names}"):
            signature.bind(*args, **kwargs)
    return found


def _arguments(each) -> tuple[tuple, dict]:
    return ((), each) if isinstance(each, dict) else (tuple(each), {})


def _left_out(model: nn.Module, each) -> list[str]:
    """The arguments that an input gives no value, or None, and whose default is None."""
    args, kwargs = _arguments(each)
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    return [
        name for name, entry in signature.parameters.items() if entry.default is None and given.get(name) is None
    ]  # fmt: skip


@contextmanager
def told_of(model: nn.Module, what: str, inputs: list, given: bool) -> Iterator[None]:
    """An error within becomes an InputError where the inputs are the cause: they are of another dtype or device than
    the model, or, if a user has `given` them, leave out what is None by default and the model needs, or are of another
    shape than it takes."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        left = next(filter(None, (_left_out(model, each) for each in inputs)), None) if given else None
        if left is None or "NoneType" not in str(error):
            raise
        raise InputError(
            f"{what}: {type(model).__name__} needs more arguments ({said(error)}); the inputs leave out "
            f"{', '.join(left)}: give those that it needs"
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        device, dtype = next(model.parameters()).device, dtype_of(model)
        other = {
            f"{what}[{index}]{keystr(path)}": f"{value.dtype} on {value.device}"
            for index, each in enumerate(inputs)
            for path, value in tree_leaves_with_path(each)
            if isinstance(value, torch.Tensor)
            and (value.device != device or (value.is_floating_point() and value.dtype != dtype))
        }
        if not other or not re.search("type|device", str(error)):
            if given and SHAPES.search(str(error)):
                raise InputError(
                    f"{what}: {type(model).__name__} does not take inputs of these shapes ({said(error)}); give those "
                    "of a call of the model"
                ) from error
            raise
        raise InputError(
            f"{', '.join(list(other)[:4])}: {next(iter(other.values()))}, which the model in {dtype} on {device} does "
            f"not take; give it what it takes, such as value.to({str(device)!r}, {dtype})"
        ) from error


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in: the dtype of its first weight that is neither quantised nor stored in 8 bits."""
    weights = (each.dtype for each in model.parameters())
    return next((each for each in weights if each.is_floating_point and each.itemsize > 1), torch.float32)
