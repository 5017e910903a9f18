"""What modules are called with, and give, while a block of code runs."""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

Key = TypeVar("Key", bound=Hashable)


def of_this_thread(hook: Callable) -> Callable:
    """A hook that does as `hook` in calls that this thread makes, and nothing in others."""
    thread = threading.get_ident()

    def ours(*args):
        if torch.compiler.is_compiling() or threading.get_ident() == thread:
            return hook(*args)

    return ours


@contextmanager
def recorded(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, tuple]]:
    """By key, (arguments, keyword arguments, output) of this thread's latest call of each module while this is open."""
    seen: dict[Key, tuple] = {}

    def keep(key: Key):
        def hook(_, args: tuple, kwargs: dict, output) -> None:
            seen[key] = args, kwargs, output

        return of_this_thread(hook)

    with ExitStack() as stack:
        for key, module in modules.items():
            stack.enter_context(module.register_forward_hook(keep(key), with_kwargs=True))
        yield seen
