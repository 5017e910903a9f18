"""The files of weights in a folder: those that diffusers' `from_pretrained` would load, by one rule for all who look.

The errors do not name the folder: who looks says what it is of.
"""

import hashlib
import io
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from sit_atconv.runtime.errors import InputError, said
from sit_atconv.runtime.reading import FILE, fault_of, read_json

NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
STEM = Path(SAFETENSORS_WEIGHTS_NAME).stem
INDEX = ".index.json"
SPARE = 1 << 16  # numbers that a model may have beyond twice those of its weights
OF_A_VARIANT = re.compile(rf"{STEM}(?:\.safetensors\.index)?\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)")


def weight_files(folder: Path, variant: str | None = None, pickles: bool = False) -> list[Path]:
    """The files that diffusers loads a model of: what its index of shards lists, else the one file.

    Arguments and errors as in `main_file`; InputError also for an index that is damaged, or lists what is not there.
    """
    main = main_file(folder, variant, pickles)
    return read_index(main) if main.name.endswith(".json") else [main]


def main_file(folder: Path, variant: str | None = None, pickles: bool = False) -> Path:
    """The index of shards that diffusers would go by, where there is one, else the one file of weights.

    variant: such as "fp16"; without it files of variants are passed over. pickles: whether a .bin does where there are
    no safetensors, to be read by what runs nothing. Raises InputError where there is none; it names the
    variants that there are.
    """
    for name in NAMES if pickles else NAMES[:1]:
        for each in (name + INDEX, name):
            if (file := folder / _of_variant(each, variant)).is_file():
                return file
    if others := variants(folder):
        rule = f"there are variants {others}" + " alone" * (variant is None)
        remedy = "name one with variant" + ", or save the model without" * (variant is None)
    elif variant is not None:
        rule, remedy = "there are no variants", "leave the variant out"
    else:
        rule = "pickles can run code" if list(folder.glob("*.bin")) else "nothing else is read"
        remedy = "save the model with safetensors"
    raise InputError(f"no {_of_variant(NAMES[0], variant)}, and {rule}; {remedy}")


def variants(folder: Path) -> list[str]:
    """The variants that a folder has safetensors of."""
    found = (OF_A_VARIANT.fullmatch(path.name) for path in folder.glob(f"{STEM}*"))
    return sorted({match[1] for match in found if match})


def own_variant(folder: Path, variant: str | None) -> str | None:
    """`variant` where the folder has it, else None: a part of a pipeline without it is loaded as it is."""
    return variant if variant in variants(folder) else None


def read_index(index: Path) -> list[Path]:
    """The files that an index of shards lists. Raises InputError for one that is damaged, or not whole."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index.name} lists no files in weight_map")
    for name in shards.values():
        if fault_of(name, FILE):
            raise InputError(f"{index.name} lists {name!r}, which is no name of a file beside it")
        if not index.with_name(name).is_file():
            raise InputError(f"it is not whole: {index.name} lists {name!r}, not there")
    return [index.with_name(name) for name in sorted(set(shards.values()))]


def load_pretrained(kind: type, source: str | Path, variant: str | None, **options) -> Any:
    """A model of diffusers by its `from_pretrained`, with all of its weights and no others, from safetensors alone.

    Raises InputError, in the words of whatever refuses them, where it cannot be made.
    """
    try:
        model, found = kind.from_pretrained(
            source, variant=variant, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # options and files of any kind: diffusers and torch refuse them in every way there is
        # diffusers goes on to advise drawing tensors of other shapes at random.
        raise InputError(said(error).partition(". If you want")[0]) from None
    strays = {what: sorted(found[what])[:3] for what in ("missing_keys", "unexpected_keys") if found[what]}
    if strays:  # which diffusers only warns of, drawing what is missing at random
        raise InputError(f"its tensors are not those of its config.json: {strays}")
    return model


@contextmanager
def fits(files: list[Path]) -> Iterator[None]:
    """What is made meanwhile is a model of these safetensors files: it has at most twice their numbers.

    A configuration can ask for any number of layers of any width. Raises InputError while one that asks for more is
    made. Positions and classes of another number than the file's are let by.
    """
    stored = sum(map(_numbers, files))
    made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal made
        if threading.get_ident() == thread and tensor is not None and not is_lazy(tensor):
            made += tensor.numel()
            if made > 2 * stored + SPARE:
                raise InputError(f"its configuration is of another, larger model than its {stored:,} weights are")

    with register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count):
        yield


def _numbers(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (no mapping)


def _of_variant(name: str, variant: str | None) -> str:
    """A file's name, with the variant before its last part."""
    start, _, end = name.rpartition(".")
    return name if variant is None else f"{start}.{variant}.{end}"


def digest_of(state: Mapping[str, object]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a module's state dict, wherever its tensors lie."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor):  # what get_extra_state gave
            stored = io.BytesIO()
            torch.save(value, stored)
            digest.update(f"{name} {stored.tell()}\n".encode() + stored.getvalue())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
