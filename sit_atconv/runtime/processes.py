"""The processes of a launch: which one this is, and what they do together.

A function that is "collective" must be called by all of them at the same place.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from sit_atconv.runtime.compat.accelerate import joined_rank
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.signals import Interrupted

PATIENCE = timedelta(days=7)  # how long a process waits for another one, which may read all images meanwhile

_words: dist.ProcessGroup | None = None  # of CPUs, by which the processes talk; None: by that of their tensors

T = TypeVar("T")


def join(cpu: bool | None = None) -> PartialState:
    """Take part in a launch; the device of this process.

    cpu: whether the processes compute on CPUs; left out, where the machine has no accelerator: told nothing, Accelerate
    takes the processes of such a launch for as many single ones.
    """
    if cpu is None:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def talk_apart(patience: timedelta) -> None:
    """From here on what processes tell each other goes from CPU to CPU, and waits for no device. Collective.

    Where their tensors go so too, it goes with these. patience: how long one waits for another.
    """
    global _words
    apart = count() > 1 and dist.get_backend() != dist.Backend.GLOO
    _words = dist.new_group(backend=dist.Backend.GLOO, timeout=patience) if apart else None


def leave() -> None:
    """End the process groups of a launch, once nothing more is shared."""
    global _words
    _words = None  # it ends with the others
    PartialState().destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; before a launch is joined, as the launcher says it.

    A process that has joined, and of which Accelerate has made no group, is alone, whatever the environment says.
    """
    if dist.is_initialized():
        return dist.get_rank()
    joined = joined_rank()
    return int(os.environ.get("RANK", "0")) if joined is None else joined


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes, and speaks for all."""
    return rank() == 0


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order. Collective."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    dist.all_gather_object(values, value, group=_words)
    return values


def each(task: Callable[[], T]) -> list[T]:
    """What the task returned in every process, in their order. Collective.

    All end their tasks before they hear of a fault. Raises in every process the InputError or Interrupted of the first
    that has one.
    """
    result, fault = None, None
    try:
        result = task()
    except InputError as error:
        error.every_rank, fault = False, error  # every process is about to know it
    except Interrupted as error:
        fault = error
    answers = gathered((result, fault))
    for _, error in answers:
        if error is not None:
            raise error
    return [answer for answer, _ in answers]


def first(task: Callable[[], T]) -> T:
    """What the task returned in the main process, the only one that does it; see `each`. Collective."""
    return each(task if is_main() else lambda: None)[0]


def together(task: Callable[[], T]) -> T:
    """What the task returned in this process, once all have done theirs; see `each`. Collective."""
    kept: list[T] = []
    each(lambda: kept.append(task()))
    return kept[0]


def raise_together(error: Exception | None) -> None:
    """Raise the error of the first process that has one in all of them. Collective."""
    for fault in gathered(error):
        if fault is not None:
            raise fault


def agree(*counts: int) -> list[int]:
    """The sums of the counts over all processes; see `talk_apart`. Collective."""
    if count() == 1:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(sums, group=_words)
    return sums.tolist()


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensor over all processes, in its place, on their devices, and not waited for. Collective."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def lost_ones_told() -> Iterator[None]:
    """Tell as an InputError, in every process that is left, what torch says where another of a launch has gone, or was
    never reached: gloo in words alone, NCCL and the store by a class of their own."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise InputError(
            "another process of the launch was killed or has failed, or cannot be reached; the same command goes on "
            "from what is there",
            every_rank=True,
        ) from None
