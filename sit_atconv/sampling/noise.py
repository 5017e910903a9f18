"""The noise of samples: that of all images at once, and that of an SDE's next step while the device works."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from sit_atconv.runtime import draws

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from sit_atconv.flow.sde import Draw
    from sit_atconv.runtime.draws import Stream


def noise(shape: tuple[int, ...], seed: int, stream: Stream, indices: Sequence[int], *step: int) -> torch.Tensor:
    """`draws.normal` of every image and this step, on the CPU: (B, *shape)."""
    return draws.normal_batch(shape, seed, stream, np.array([(index, *step) for index in indices]))


def brought(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers of the CPU on the device; a CUDA device copies them from pinned memory, which the host does not await."""
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


@contextmanager
def steps_ahead(draw: Draw, steps: int, device: torch.device) -> Iterator[Draw]:
    """Gives draw(i) on the device, 0 <= i < `steps`; draw: the same on the CPU.

    A CPU draws a step when it is asked for; for another device a thread has drawn it while that device worked, if the
    steps are asked for in turn. The numbers are the same.
    """
    if device.type == "cpu":
        yield draw
        return
    with ThreadPoolExecutor(1) as thread:
        ahead = {0: thread.submit(draw, 0)}

        def drawn(step: int) -> torch.Tensor:
            nonlocal ahead
            numbers = (ahead.get(step) or thread.submit(draw, step)).result()
            ahead = {step + 1: thread.submit(draw, step + 1)} if step + 1 < steps else {}
            return brought(numbers, device)

        yield drawn
