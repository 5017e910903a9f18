"""ODE samplers: dx/dt = v(x, t) along a grid of times, from noise at t = 0 to data at t = 1 or backwards.

A sampler is called with a velocity, x (B, ...) at times[0] and times (N,), on the CPU, and gives x at times[-1].
The velocity is called with x (B, ...) and t, a 0-d tensor, and gives (B, ...). On any device t is of the CPU, as the
times are: what is computed of it, and what is decided by it, waits for no device, and a kernel takes it as an argument.
`dopri5` alone, whose times depend on x, has it on the device of x, and reads an error there at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from sit_atconv.flow.path import Velocity

    Sampler = Callable[[Velocity, torch.Tensor, torch.Tensor], torch.Tensor]

RTOL, ATOL = 1e-3, 1e-6  # of the adaptive sampler


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: k_i = v(x + h sum_j a_ij k_j, t + c_i h), then x + h sum_i b_i k_i."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUX = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # the classic method; torchdiffeq's "rk4" is the 3/8 rule
    "rk4": Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def runge_kutta(tableau: Tableau, velocity: Velocity, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """One step of the method per interval of `times`: len(tableau.c) evaluations each."""
    for t, t_next in pairwise(times):
        h, slopes = t_next - t, []
        for c, a in zip(tableau.c, tableau.a, strict=True):
            # lerp meets t_next exactly where c = 1
            slopes.append(velocity(_move(x, h, a, slopes), t.lerp(t_next, c)))
        x = _move(x, h, tableau.b, slopes)
    return x


def _move(x: torch.Tensor, h: torch.Tensor, weights: Sequence[float], slopes: Sequence[torch.Tensor]) -> torch.Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return x + h * sum(terms) if terms else x


def dopri5(
    velocity: Velocity, x: torch.Tensor, times: torch.Tensor, rtol: float = RTOL, atol: float = ATOL
) -> torch.Tensor:
    """Adaptive Dormand-Prince 5(4): as many evaluations as the tolerances ask for, one step size for the whole batch.

    The host waits for a device at every step, to know the next one's size.

    Of `times` the ends count alone. The network is never asked beyond them: a step ends exactly at the last one, where
    the solver by itself would step past it and interpolate, and the trial step that sets its first step is cut short.
    The public SiT code does step past the end: its ends differ from ours by more than rounding, within the tolerances
    for velocity prediction, by more for score and noise prediction, whose velocity is steep there.
    Where the velocity is not finite, or too steep, there is no step size to go on with: the end is NaN, of all items.
    """
    ends = times[[0, -1]].to(x.device)
    low, high = ends.aminmax()
    stepping = False

    import torchdiffeq  # here, with these words: what is exported names this sampler, and does without the library

    def within(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        nonlocal stepping
        stepping = False
        v = velocity(x, t.clamp(low, high))
        stepping = True
        return v

    try:
        options = {"step_t": ends[-1:]}
        return torchdiffeq.odeint(within, x, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
    except AssertionError:  # torchdiffeq's, of a step size of 0 or NaN; before it begins, of its arguments
        if not stepping:  # or the velocity's own
            raise
        return x.new_full(x.shape, float("nan"))


SAMPLERS: dict[str, Sampler] = {
    **{name: partial(runge_kutta, tableau) for name, tableau in TABLEAUX.items()},
    "dopri5": dopri5,
}
