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
from math import prod
from typing import TYPE_CHECKING

from sit_atconv.flow.path import check_name

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
        x, _ = _stages(tableau, velocity, x, t, t_next)
    return x


def _stages(
    tableau: Tableau, velocity: Velocity, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x at t_next by one step of the method, and the velocity at t."""
    h, slopes = t_next - t, []
    for c, a in zip(tableau.c, tableau.a, strict=True):
        # lerp meets t_next exactly where c = 1
        slopes.append(velocity(moved(x, h, a, slopes), t.lerp(t_next, c)))
    return moved(x, h, tableau.b, slopes), slopes[0]


def moved(x: torch.Tensor, h: torch.Tensor, weights: Sequence[float], slopes: Sequence[torch.Tensor]) -> torch.Tensor:
    """x + h sum_i weights[i] slopes[i]; x (B, ...) and slopes alike, h 0-d."""
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return x + h * sum(terms) if terms else x


STARTS = ("lower", "rk")  # of Adams-Bashforth
BEGUN_BY = {2: "heun", 3: "heun3", 4: "rk4"}  # with start=rk, by the order


def adams_weights(times: Sequence[float], start: float, end: float) -> list[float]:
    """b_i of x(end) = x(start) + (end - start) sum_i b_i v(times[i]).

    b_i is the integral of the Lagrange polynomial that is 1 at times[i] and 0 at the other times, over the step and by
    its length: exact for any distances (Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, III.5).
    """
    nodes = [(t - start) / (end - start) for t in times]  # the step goes from 0 to 1
    weights = []
    for i, node in enumerate(nodes):
        others = nodes[:i] + nodes[i + 1 :]
        powers = [1.0]  # of prod (s - other), by rising power
        for other in others:
            powers = [up - other * same for up, same in zip([0.0, *powers], [*powers, 0.0], strict=True)]
        integral = sum(factor / (power + 1) for power, factor in enumerate(powers))
        weights.append(integral / prod(node - other for other in others))
    return weights


def adams(
    order: int, corrected: bool, velocity: Velocity, x: torch.Tensor, times: torch.Tensor, start: str = "lower"
) -> torch.Tensor:
    """Adams-Bashforth: every step integrates the polynomial through the last `order` velocities, on any times.

    corrected: where a step ends the velocity is evaluated for the next one, and with it the step is taken again, by
    Adams-Moulton through order + 1 velocities (a predictor-corrector, III.1 there): no further evaluation, and the
    whole is of order + 1. The last step stays as it is.
    start: of the first order - 1 steps, which have fewer velocities behind them. "lower" takes those that there are: an
    evaluation for every step, but the first is Euler's, so on equal steps the whole is of order 2, corrected 3,
    whatever `order` is.
    "rk" takes a Runge-Kutta method of the same order: `order` evaluations for each of these steps.
    Each item has velocities of its own.
    Raises ValueError for fewer steps than `order`, of which none would have it, and for an unknown start.
    """
    check_name("start", start, STARTS)
    if len(times) - 1 < order:
        raise ValueError(f"{len(times) - 1} steps: Adams-Bashforth of order {order} needs at least {order}")
    moments, slopes, predicted = times.tolist(), [], None  # of fp64
    for step, (t, t_next) in enumerate(pairwise(times)):
        if start == "rk" and step < order - 1:
            x, slope = _stages(TABLEAUX[BEGUN_BY[order]], velocity, x, t, t_next)
            slopes = [*slopes, slope]
            continue
        slopes = [*slopes, velocity(x, t)][-order - 1 :]
        if corrected and predicted is not None:
            known = moments[step + 1 - len(slopes) : step + 1]
            x = moved(predicted, t - times[step - 1], adams_weights(known, *moments[step - 1 : step + 1]), slopes)
        predicted, last = x, slopes[-order:]
        weights = adams_weights(moments[step + 1 - len(last) : step + 1], *moments[step : step + 2])
        x = moved(x, t_next - t, weights, last)
    return x


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


# The order, and whether corrected.
ADAMS = {"adams2": (2, False), "adams3": (3, False), "adams4": (4, False), "abm2": (2, True), "abm3": (3, True)}
LEAST_STEPS = {name: order for name, (order, _) in ADAMS.items()}
SAMPLERS: dict[str, Sampler] = {
    **{name: partial(runge_kutta, tableau) for name, tableau in TABLEAUX.items()},
    **{name: partial(adams, *kind) for name, kind in ADAMS.items()},
    "dopri5": dopri5,
}
