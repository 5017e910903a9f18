"""ODE samplers: dx/dt = v(x, t) from noise at t = 0 to data at t = 1.

A velocity is called with x (B, ...) and t, a 0-d tensor, and gives (B, ...). "steps" counts intervals of a uniform
time grid, so there are steps + 1 grid points (the public SiT code counts grid points).
"""

from itertools import pairwise

import torch
from torchdiffeq import odeint

from sit_atconv.flow.path import Velocity

RTOL, ATOL = 1e-3, 1e-6  # of the adaptive sampler


def time_grid(steps: int) -> torch.Tensor:
    """0, 1/steps, ..., 1 in fp32, on the CPU: a loop over it costs a device no synchronisation."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float32)


def euler(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """x += h v(x, t): `steps` evaluations."""
    x, times = noise, time_grid(steps)
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Explicit trapezoidal rule, second order: 2 * `steps` evaluations."""
    x, times = noise, time_grid(steps)
    for t, t_next in pairwise(times):
        slope = velocity(x, t)
        ahead = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + ahead) / 2
    return x


def dopri5(
    velocity: Velocity, noise: torch.Tensor, steps: int | None = None, rtol: float = RTOL, atol: float = ATOL
) -> torch.Tensor:
    """Adaptive Dormand-Prince 5(4): as many evaluations as the tolerances ask for, one step size for the whole batch.

    `steps` belongs to the common signature; here the error control sets the steps. A step ends exactly at t = 1: left
    to itself the solver steps past the end and interpolates, asking the network for times it never saw (t = 2.2).
    """
    times = time_grid(1).to(noise.device)
    options = {"step_t": times[-1:]}
    solution = odeint(lambda t, x: velocity(x, t), noise, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    return solution[-1]


SAMPLERS = {"euler": euler, "heun": heun, "dopri5": dopri5}
