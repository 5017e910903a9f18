"""SDE samplers: dx = (v + w score) dt + sqrt(2 w) dW, with the marginals of the ODE for every w(t) >= 0.

A sampler is called like those of `samplers`, with the SDE and `draw` besides: draw(i) gives the standard normal numbers
of step i, shaped like x and on its device, and is called for i = 0, 1, ... in turn.
It stops at times[-1] < 1; `last_step` goes on to t = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sit_atconv.flow.path import Path, check_name

if TYPE_CHECKING:
    import torch

    from sit_atconv.flow.path import Velocity

    Draw = Callable[[int], torch.Tensor]

# w(t) with its norm: a factor, but in the decreasing form, as in the public SiT code, that of the cosine.
DIFFUSIONS: dict[str, Callable[[Path, torch.Tensor, float], torch.Tensor]] = {
    "constant": lambda path, t, norm: norm * t.new_ones(t.shape),
    "sbdm": lambda path, t, norm: norm * path.drift_variance(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: (norm * (math.pi * t).cos() + 1).square() / 4,
    "increasing-decreasing": lambda path, t, norm: norm * (math.pi * t).sin().square(),
}
LAST_STEPS = ("mean", "euler", "tweedie", "none")


@dataclass(frozen=True)
class SDE:
    """w(t) = DIFFUSIONS[diffusion](path, t, norm). Raises ValueError for an unknown form."""

    path: Path
    diffusion: str = "sigma"
    norm: float = 1.0

    def __post_init__(self):
        check_name("diffusion", self.diffusion, DIFFUSIONS)

    def w(self, t: torch.Tensor) -> torch.Tensor:
        """The diffusion at t. Raises ValueError for the SBDM form where alpha is 0."""
        return DIFFUSIONS[self.diffusion](self.path, t, self.norm)

    def drift(self, velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v + w score, from the velocity at x (B, ...) and t: (B, ...). Raises ValueError where sigma is 0."""
        return velocity + self.w(t) * self.path.score(velocity, x, t)


def euler_maruyama(velocity: Velocity, x: torch.Tensor, times: torch.Tensor, sde: SDE, draw: Draw) -> torch.Tensor:
    """x += h (v + w score) + sqrt(2 w h) noise: an evaluation per interval."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        h = t_next - t
        x = x + h * sde.drift(velocity(x, t), x, t) + (2 * sde.w(t) * h).sqrt() * draw(step)
    return x


def heun(velocity: Velocity, x: torch.Tensor, times: torch.Tensor, sde: SDE, draw: Draw) -> torch.Tensor:
    """The noise first, then a deterministic step of Heun's method along v + w score: two evaluations per interval."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        h = t_next - t
        x = x + (2 * sde.w(t) * h).sqrt() * draw(step)
        slope = sde.drift(velocity(x, t), x, t)
        ahead = x + h * slope
        x = x + h * (slope + sde.drift(velocity(ahead, t_next), ahead, t_next)) / 2
    return x


def last_step(kind: str, velocity: Velocity, x: torch.Tensor, t: torch.Tensor, sde: SDE) -> torch.Tensor:
    """From x at t to t = 1 without noise, by one evaluation.

    kind: "mean" x + (1 - t) (v + w score); "euler" x + (1 - t) v; "tweedie" the data expected at x.
    "none" stays at x, and evaluates nothing. Raises ValueError for another kind.
    """
    check_name("last step", kind, LAST_STEPS)
    if kind == "none":
        return x
    v = velocity(x, t)
    if kind == "tweedie":
        return sde.path.data(v, x, t)
    return x + (1 - t) * (v if kind == "euler" else sde.drift(v, x, t))


SDE_SAMPLERS = {"euler-maruyama": euler_maruyama, "sde-heun": heun}
