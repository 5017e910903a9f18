"""MeanFlow: the average velocity between two times, learned and followed (Geng et al., arXiv 2505.13447).

    u(x_t, t, s) = 1 / (s - t) * integral from t to s of v(x_tau, tau) d tau,   x_s = x_t + (s - t) u(x_t, t, s)

for times t <= s, with t = 0 noise and t = 1 data; u(x_t, t, t) is the velocity v. Derived by t along the path, at fixed
s, the definition is u = v + (s - t) du/dt, with du/dt the derivative of u along (v, 1) in (x, t).
An average is called with x (B, ...), t and s, both (B,) in training and 0-d in sampling, and gives (B, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sit_atconv.flow.path import expand_time

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Average = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def jump(average: Average, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """x at times[-1], from x (B, ...) at times[0]: one evaluation per interval of times (N,)."""
    for t, s in pairwise(times):
        x = x + (s - t) * average(x, t, s)
    return x


@dataclass(frozen=True)
class Guidance:
    """Guidance inside the target: of what the network learns, instead of at every evaluation afterwards.

    omega, kappa: the velocity of the target is omega v + kappa u(class) + (1 - omega - kappa) u(null), with u the
    network's own velocity at (t, t). What is learned is guided by the scale omega / (1 - kappa).
    """

    omega: float = 1.0
    kappa: float = 0.0

    @property
    def scale(self) -> float:
        """As classifier-free guidance counts it; 1 is none. To nine places, which tell a scale from rounding."""
        return round(self.omega / (1 - self.kappa), 9)

    @property
    def rest(self) -> float:
        """The share of u(null), to nine places."""
        return round(1 - self.omega - self.kappa, 9)

    def __call__(
        self, v: torch.Tensor, wanted: Callable[[], torch.Tensor], null: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The guided velocity (B, ...) of v (B, ...). wanted, null: give the network's velocities (B, ...) for the
        class and for none; they are called where they count."""
        guided = self.omega * v
        if self.kappa:
            guided = guided + self.kappa * wanted()
        if self.rest:
            guided = guided + self.rest * null()
        return guided


def change(average: Average, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """du/dt (B, ...) along the path through x (B, ...) at t (B,), at fixed s (B,): one product of the Jacobian with
    (v, 1) in (x, t), in forward mode, without a gradient. Raises torch's NotImplementedError where an operator of the
    network has no forward mode."""
    import torch

    with torch.no_grad():
        return torch.func.jvp(lambda x, t: average(x, t, s), (x, t), (v, torch.ones_like(t)))[1]


def meanflow_errors(
    average: Average,
    rate: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    v: torch.Tensor,
    apart: torch.Tensor,
) -> torch.Tensor:
    """(B,): the squared error of the average velocity at x (B, ...) for t <= s (B,), the sum over all but the batch.

        |u - stopgrad(v + (s - t) du/dt)|^2

    average: the network that learns. v (B, ...): the velocity of the target. apart (n,): the samples with s > t, the
    others are known to have s = t, where the target is v. rate: called with `apart` where there are any, gives their
    du/dt (n, ...), see `change`.
    """
    target = v.detach()
    if len(apart):
        target = target.index_add(0, apart, (expand_time(s - t, v)[apart] * rate(apart)).detach().to(v.dtype))
    return (average(x, t, s) - target).square().flatten(1).sum(1)


def weigh(errors: torch.Tensor, power: float, offset: float) -> torch.Tensor:
    """Errors (B,) times stopgrad((error + offset)^-power): of power 0 they stay, of 1 all samples weigh alike."""
    return errors * (errors.detach() + offset) ** -power
