"""Which times a network is trained and asked at: intervals with their epsilons, grids, and the distribution of t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sit_atconv.flow.path import PREDICTIONS, Path, check_name
from sit_atconv.flow.sde import DIFFUSIONS

if TYPE_CHECKING:
    import torch

SAMPLE_EPSILON = 1e-3  # how far sampling keeps from an end where it must
# With the SBDM form where alpha vanishes: w(t) is about 1 / t there, and a first step from 1e-3 throws x far away.
SBDM_EPSILON = 0.04
TIME_TOLERANCE = 1e-6  # a time of a grid in fp32 misses the number that it stands for by some 1e-7
TIME_SAMPLINGS = ("uniform", "logit-normal")
# Of a sampler: t in [0, 1] after the share u of the steps.
GRIDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda u: u,
    # sin^2(pi u / 2): dense at both ends, while a shift makes any grid dense at one. The first step is of the order of
    # N^-2, so Euler's method there leaves order 4 to Adams-Bashforth.
    "cosine": lambda u: (1 - (math.pi * u).cos()) / 2,
}


def training_interval(path: Path, prediction: str) -> tuple[float, float]:
    """[t0, t1] that training draws t from: [0, 1], less the path's `train_epsilon` at an end that is singular.

    That is t = 1 where sigma' diverges (VP), and for score and noise prediction t = 1, and t = 0 where alpha vanishes
    (linear, GVP). Raises ValueError for an unknown prediction.
    """
    check_name("prediction", prediction, PREDICTIONS)
    score = prediction != "velocity"
    return _interval(path, score, score, path.train_epsilon)


def sampling_interval(
    path: Path,
    prediction: str,
    diffusion: str | None = None,
    last_step_size: float = 0.0,
    epsilon: float = SAMPLE_EPSILON,
) -> tuple[float, float]:
    """[t0, t1] that a sampler integrates over: [0, 1], less epsilon at an end that is singular.

    Singular are the ends of `training_interval`, t = 0 for the SBDM form of an SDE and t = 1 for every SDE.
    diffusion: the form of an SDE; None is an ODE. last_step_size: of the last step of an SDE, which goes from
    t1 = 1 - last_step_size to 1; 0 is no last step.
    Raises ValueError for unknown names, an epsilon of 0 at a singular end, and an interval that is empty.
    """
    check_name("prediction", prediction, PREDICTIONS)
    if diffusion is not None:
        check_name("diffusion", diffusion, DIFFUSIONS)
    score = prediction != "velocity"
    start, end = _interval(path, score or diffusion == "sbdm", score or diffusion is not None, epsilon)
    if diffusion is not None and last_step_size:
        end = 1 - last_step_size
    if not start < end:
        raise ValueError(f"epsilon {epsilon:g} and last step size {last_step_size:g} leave nothing of [0, 1]")
    return start, end


def _interval(path: Path, singular_start: bool, singular_end: bool, epsilon: float) -> tuple[float, float]:
    singular_start = singular_start and path.alpha_vanishes
    singular_end = singular_end or path.d_sigma_diverges
    if (singular_start or singular_end) and not epsilon > 0:
        raise ValueError(f"epsilon {epsilon:g}: must be positive, the flow divides by zero at an end of [0, 1]")
    return epsilon if singular_start else 0.0, 1 - epsilon if singular_end else 1.0


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t in [0, 1] whose noise level 1 - t is mapped to s (1 - t) / (1 + (s - 1) (1 - t)), where s = shift > 0.

    Over 1 is nearer to the noise; the ends stay.
    """
    return t / (t + shift * (1 - t))


def check_grid(grid: Sequence[float]) -> None:
    """Raise ValueError unless the times rise from 0 to 1."""
    if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not all(a < b for a, b in pairwise(grid)):
        raise ValueError("times of a grid must rise strictly, from 0 to 1")


def time_grid(
    start: float,
    end: float,
    steps: int,
    dtype: torch.dtype | None = None,
    grid: str | Sequence[float] = "uniform",
    shift: float = 1.0,
) -> torch.Tensor:
    """The times of `steps` steps from start to end, in either direction: steps + 1 (public SiT code counts these).

    dtype: fp32 where it is None. On the CPU: a loop over it costs a device no synchronisation.
    grid: one of GRIDS, or the steps + 1 times themselves, which rise from 0 to 1. shift: see `shifted`. Both are of
    [0, 1], which is mapped onto the interval then.
    Raises ValueError for an unknown grid, times that do not rise from 0 to 1, another number of them, and times that
    the dtype does not tell apart.
    """
    import torch

    if grid == "uniform" and shift == 1:
        return torch.linspace(start, end, steps + 1, dtype=dtype or torch.float32)
    if isinstance(grid, str):
        check_name("grid", grid, GRIDS)
        t = GRIDS[grid](torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    else:
        check_grid(grid)
        if len(grid) != steps + 1:
            raise ValueError(f"{steps} steps: the grid has the times of {len(grid) - 1}")
        t = torch.tensor(grid, dtype=torch.float64)
    t = shifted(t, shift)
    times = (start + (end - start) * t if start < end else end + (start - end) * t.flip(0)).to(dtype or torch.float32)
    times[0], times[-1] = start, end  # the sum misses it by rounding
    if not (times.diff() * (end - start) > 0).all():
        raise ValueError(f"two of its times are the same number in {times.dtype}")
    return times


def within(t: torch.Tensor | float, interval: tuple[float, float]) -> bool:
    """Whether t, a number or a 0-d tensor, lies in the closed interval, to TIME_TOLERANCE at either end."""
    low, high = interval
    return low - TIME_TOLERANCE <= float(t) <= high + TIME_TOLERANCE


@dataclass(frozen=True)
class TimeSampling:
    """The distribution of t in training, as a function of one uniform number u in [0, 1).

    kind: "uniform", t = u; or "logit-normal", t = sigmoid(mean + std N(0, 1)), so a larger mean is nearer to the data;
    mean and std act there alone, and may be None elsewhere.
    shift > 0: see `shifted`.
    interval: [0, 1] is mapped onto it at last.
    Raises ValueError for another kind.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    kind: str = "uniform"
    mean: float | None = 0.0
    std: float | None = 1.0
    shift: float = 1.0

    def __post_init__(self):
        check_name("kind", self.kind, TIME_SAMPLINGS)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """u in [0, 1), fp32 of any shape -> t, fp32 (computed in fp64) of that shape."""
        t = u.double()
        if self.kind == "logit-normal":
            from torch.special import ndtri

            t = (self.mean + self.std * ndtri(t)).sigmoid()
        t = shifted(t, self.shift)
        start, end = self.interval
        return (start + (end - start) * t).float()
