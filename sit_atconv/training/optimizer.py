"""AdamW as SiT is trained with it: schedule, weight decay, and how large its steps are."""

import math
from itertools import chain

import torch

from sit_atconv.config import Train
from sit_atconv.runtime.sharding import local


def learning_rate(step: int, train: Train) -> float:
    """Learning rate of optimisation step `step` (0-based): linear warm-up, then constant, linear or cosine to 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return train.lr * decay[train.lr_schedule]


def make_optimizer(model: torch.nn.Module, train: Train, fused: bool = False) -> torch.optim.AdamW:
    """AdamW of what is not frozen; weight decay on matrices alone, never on vectors such as biases.

    fused: one kernel for many tensors, which a CPU has too.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=tuple(train.betas), fused=fused or None)


@torch.no_grad()
def step_and_weight_squares(optimizer: torch.optim.AdamW) -> torch.Tensor:
    """Sums of squares (2,) of AdamW's last step w' - w and of the weights w before it, of this process's shards.

    Of the weights that have a gradient: the others had no step. Nothing waits for the device, and after a step that a
    fused AdamW was told to skip the sums are of no step.

    The step is computed again from the moments that it left behind, a tensor at a time; nothing is copied beforehand:
    w' = (1 - lr wd) w - u with u = lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps).
    """
    sums = []
    for group in optimizer.param_groups:
        (b1, b2), lr, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
        for parameter in group["params"]:
            if parameter.grad is None or not (state := optimizer.state.get(parameter)):
                continue
            m, v, new = (local(tensor) for tensor in (state["exp_avg"], state["exp_avg_sq"], parameter))
            steps = state["step"].double()  # which lies on the device where AdamW is fused
            update = m / (v / (1 - b2**steps)).sqrt_().add_(group["eps"]) * (lr / (1 - b1**steps))
            old = (new + update) / (1 - decay)
            sums.append(torch.stack([(update + decay * old).square().sum(), old.square().sum()]))
    device = local(next(chain.from_iterable(group["params"] for group in optimizer.param_groups))).device
    return torch.stack(sums).sum(0) if sums else torch.zeros(2, device=device)
