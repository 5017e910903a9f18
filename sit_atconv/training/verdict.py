"""Whether a step counts: where loss or gradient is not finite in any process, all of them skip it.

That is decided on the device. `AtOnce` reads it there and then, and takes the step or not. `Late` hands it as a tensor
to a fused optimiser, and it is read when the next step is on its way: the host waits for nothing newer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer

from sit_atconv.runtime import processes
from sit_atconv.runtime.compat.torch import copy_each


@dataclass(frozen=True)
class Outcome:
    """What was found of a step. excused: it is skipped for what the scale of fp16's scaler alone made overflow."""

    grad_norm: float
    skipped: bool
    excused: bool = False


class Verdict:
    """The decision on a step, over all processes. Collective.

    loss, norm: of the process's share of the step, and of all gradients; tensors () on the device.
    late: whether `outcome` is better asked for later, since it waits for the device.
    """

    late: bool

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor):
        figures = torch.stack([loss, norm])
        self.wrong = processes.add_up((~figures.isfinite()).float())  # losses and norms, in how many processes
        self.figures = Fetched(torch.cat([figures, self.wrong]))

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        """Take a step of the optimiser; a skipped one leaves weights, moments and counts as they are."""
        raise NotImplementedError

    def put_back(self, tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
        """Give tensors the values that they had before the step, where it is skipped."""
        raise NotImplementedError

    def outcome(self) -> Outcome:
        """What was found. It waits for the device to have come so far."""
        raise NotImplementedError


class AtOnce(Verdict):
    """Of a CPU, and of fp16's scaler, which has to know of each step before the next: it is read as it is made."""

    late = False

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor, scaler: torch.amp.GradScaler | None = None):
        super().__init__(loss, norm)
        self.scaler = scaler
        _, norm, losses, norms = self.figures.values()
        # That gradients overflow says nothing of the weights where the scaler makes them larger, but of its scale. It
        # scales less from each such step to the next, so they are few.
        excused = bool(norms and not losses and scaler is not None and scaler.get_scale() > 1)
        self.found = Outcome(norm, losses + norms > 0, excused)

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        if not self.found.skipped:
            optimizer.step()
        elif self.scaler is not None:  # which knows of infinities since the clipping, and adapts
            self.scaler.update()

    def put_back(self, tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
        if self.found.skipped and tensors:
            copy_each(list(tensors), list(before))

    def outcome(self) -> Outcome:
        return self.found


class Late(Verdict):
    """Of a fused optimiser on a device that the host runs ahead of: nothing waits for it but `outcome`."""

    late = True

    def __init__(self, loss: torch.Tensor, norm: torch.Tensor):
        super().__init__(loss, norm)
        self.skipped = self.wrong.sum() > 0

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        own = optimizer.optimizer
        own.found_inf = self.skipped.float()  # where torch's gradient scaler puts it: 1 skips, and takes the count back
        optimizer.step()
        del own.found_inf

    def put_back(self, tensors: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
        values = [torch.where(self.skipped, old, new) for new, old in zip(tensors, before, strict=True)]
        if values:
            copy_each(list(tensors), values)

    def outcome(self) -> Outcome:
        _, norm, losses, norms = self.figures.values()
        return Outcome(norm, losses + norms > 0)


class Fetched:
    """A small tensor on its way to the host, behind what the device has still to do; nothing waits but `values`."""

    def __init__(self, tensor: torch.Tensor):
        self.host, self.arrival = tensor, None
        if tensor.device.type == "cuda":
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def values(self) -> list[float]:
        """The numbers of the tensor, once they are there; what the device does after it is not waited for."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.host.tolist()
