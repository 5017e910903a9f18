"""What the loop knows of all that it can train."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from sit_atconv.data.samples import Batch, Samples
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.checkpoint import Part
from sit_atconv.training.log import TIME_BINS
from sit_atconv.training.verdict import Verdict


@dataclass(frozen=True)
class Forward:
    """How a micro-batch goes through the network that is trained.

    network: `Objective.trained`, as the processes share it. autocast: the precision of the run. step: optimisation
    steps before this one. part: number of the micro-batch in the step, over all processes.
    """

    network: nn.Module
    autocast: Callable[[], AbstractContextManager]
    step: int
    part: int

    def __call__(self, *args, **kwargs) -> Any:
        with self.autocast():  # which `Accelerator.prepare` puts around the forward pass, but not under FSDP2
            return self.network(*args, **kwargs)


class Averaged(Protocol):
    """Moving averages of a model. models: the averaged modules, by their folders in a checkpoint."""

    models: Mapping[str, nn.Module]

    def update(self, model: nn.Module, updates: int) -> None:
        """One step towards the model's weights. updates: how many there were, this one included.

        It may come after the next step's forward passes: what these change in the model is to be taken from elsewhere.
        """


class Objective:
    """What training minimises, with its modules, losses, averages and learning rate.

    The trainer calls `check_launch`, `begin`, `make_optimizer` and `prepare` once, in this order, and asks for
    `flops_per_image` before `prepare`; then, in every step, `begin_step`, `set_learning_rate`, `losses` of each
    micro-batch, `idle`, and `end_step`. The averages follow a step that counts, before the next one changes a weight. A
    resumed run asks for `idle(0)` first, of which the optimiser may have no state.

    model: what is averaged and stored. trained: the module with all that is trained: the model, or one around it.
    weights: of the losses in their sum, by the names of the losses. steps: of the whole training.
    averages: of the model; there from `begin` on. frozen: other modules, for the device.
    flops_per_image: None where steps differ in cost. time_bins: of t, in which the first loss is reported; 0 without t.
    no_fsdp: why it cannot be sharded, where it cannot.
    """

    model: nn.Module
    trained: nn.Module
    weights: Mapping[str, float]
    steps: int
    averages: Averaged
    frozen: Sequence[nn.Module] = ()
    flops_per_image: float | None = None
    time_bins: int = TIME_BINS
    no_fsdp: str | None = None

    @classmethod
    def check_launch(cls, accelerator: Accelerator) -> None:
        """Raise InputError where this cannot be trained as Accelerate was launched."""
        if cls.no_fsdp and accelerator.is_fsdp2:
            raise InputError(cls.no_fsdp)

    def begin(self, samples: Samples, checkpoint: Path | None) -> None:
        """Give the model the weights of a checkpoint, or those that it starts from, and make its averages."""
        raise NotImplementedError

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        """The optimiser of what is trained; fused: torch's fused form of it, which takes `found_inf`."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Switch on what the recipe asks of the model: gradient checkpointing, compilation."""

    def begin_step(self) -> None:
        """What comes before a step's forward passes."""

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of the optimiser's groups for this step (0-based); the one that is reported."""
        raise NotImplementedError

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        """The losses (B,) of a micro-batch, in the order of `weights`; None for one that this step has not."""
        raise NotImplementedError

    def idle(self, step: int) -> list[nn.Parameter]:
        """The parameters that a step (0-based) does not train."""
        return []

    def end_step(self, verdict: Verdict) -> None:
        """What comes after a step of the optimiser: undo what the forward passes of a skipped one did to the model."""

    def parts(self) -> list[Part]:
        """The modules of a checkpoint: the model, and the averages of it."""
        return [Part(name, each, self.write) for name, each in {"model": self.model, **self.averages.models}.items()]

    @staticmethod
    def write(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the model or an average, see `checkpoint.Part`."""
        raise NotImplementedError
