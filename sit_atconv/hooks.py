"""What modules are called with, and give, while a block of code runs."""

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def recorded(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, tuple]]:
    """By key, (arguments, keyword arguments, output) of this thread's latest call of each module while this is open."""
    seen: dict[Key, tuple] = {}
    thread = threading.get_ident()

    def keep(key: Key):
        def hook(_, args: tuple, kwargs: dict, output) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() == thread:
                seen[key] = args, kwargs, output

        return hook

    handles = [module.register_forward_hook(keep(key), with_kwargs=True) for key, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
