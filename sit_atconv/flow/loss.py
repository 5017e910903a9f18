"""Flow-matching losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sit_atconv.flow.path import PREDICTIONS, Path, check_name, expand_time

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

WEIGHTS = ("none", "velocity", "likelihood")


def flow_loss(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    path: Path,
    data: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    prediction: str = "velocity",
    weight: str = "none",
) -> torch.Tensor:
    """The squared error of a network's prediction at x_t, the mean over all but the batch: (B,).

        velocity |v - v*|^2     noise w |eps_hat - noise|^2     score w |sigma s + noise|^2

    network: called with x_t (B, ...) and t (B,), gives (B, ...). data, noise (B, ...), t (B,) in [0, 1].
    weight: w = 1 for "none", (q / sigma)^2 for "velocity", which makes it the error of the velocity, and q / sigma^2
    for "likelihood", with the path's drift variance q. Raises ValueError for unknown names, a weight with velocity
    prediction, and where a weight divides by zero (alpha = 0, sigma = 0) on a CPU; elsewhere the loss is not finite.
    """
    check_name("prediction", prediction, PREDICTIONS)
    check_name("weight", weight, WEIGHTS)
    output = network(path.interpolate(data, noise, t), t)
    if prediction == "velocity":
        if weight != "none":
            raise ValueError(f"weight={weight!r}: velocity prediction has no weight; choose 'none'")
        error = output - path.velocity(data, noise, t)
    elif prediction == "noise":
        error = output - noise
    else:
        error = path.sigma(expand_time(t, data)) * output + noise
    loss = error.square().flatten(1).mean(1)
    return loss if weight == "none" else _weight(weight, path, t) * loss


def _weight(weight: str, path: Path, t: torch.Tensor) -> torch.Tensor:
    sigma = path.sigma(t)
    if sigma.device.type == "cpu" and (sigma == 0).any():
        raise ValueError("the weight of the loss is infinite where sigma is 0; keep t an epsilon away from 1")
    q = path.drift_variance(t)
    return (q / sigma).square() if weight == "velocity" else q / sigma.square()
