"""How images are drawn: the one set of settings, of previews, scores, commands, tables and the pipeline."""

import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sit_atconv.flow.guidance import CHANNELS
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.samplers import ADAMS, ATOL, LEAST_STEPS, RTOL, STARTS
from sit_atconv.flow.samplers import SAMPLERS as ODE_SAMPLERS
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE, SDE_SAMPLERS, last_step
from sit_atconv.flow.times import (
    GRIDS,
    SAMPLE_EPSILON,
    SBDM_EPSILON,
    check_grid,
    sampling_interval,
    time_grid,
    within,
)
from sit_atconv.runtime.bounded import read_bytes
from sit_atconv.runtime.errors import InputError, named, told
from sit_atconv.runtime.fields import FLAG, HELP, PATH, When, chosen, setting, settle
from sit_atconv.runtime.limits import (
    DIFFUSION_NORM,
    EPSILON,
    EVALUATIONS,
    EVERY,
    GUIDANCE,
    LAST_STEP_SIZE,
    TIME,
    TIME_SHIFT,
    Range,
    ranged,
)
from sit_atconv.runtime.limits import check as check_ranges

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sit_atconv.flow.samplers import Sampler

MOST_GRID = 1 << 17  # bytes of a file of times
SAMPLERS = (*ODE_SAMPLERS, *SDE_SAMPLERS)
OF_SDE = When(f"sampler={' or '.join(SDE_SAMPLERS)}", lambda sampling: sampling.sampler in SDE_SAMPLERS)
LAST_STEP = When(
    f"{OF_SDE.text} and a last_step", lambda sampling: OF_SDE.holds(sampling) and sampling.last_step != "none"
)
OF_ADAMS = When(f"sampler={' or '.join(ADAMS)}", lambda sampling: sampling.sampler in ADAMS)

# Steps and guidance where none are asked for.
OF_FLOW, OF_AVERAGE = (50, 1.5), (1, 1.0)

# What a setting is called on a command line and in a table, where that is not its name.
SHORT = {
    "guidance_scale": "cfg", "guidance_channels": "cfg_channels", "guidance_interval": "cfg_interval",
    "guidance_every": "cfg_every", "guidance_batches": "cfg_batches",
}  # fmt: skip
# With these values a setting changes nothing. LATER: those that earlier versions did not have; records say None there.
PLAIN = {"guidance_channels": "all", "guidance_interval": [0, 1]}
LATER = {"grid": "uniform", "time_shift": 1, "guidance_every": 1, "guidance_batches": 1}
OF_TIMES, OF_GUIDANCE = ("grid", "time_shift", "guidance_every"), (*PLAIN, "guidance_every", "guidance_batches")


def flag(name: str) -> str:
    """The flag of an option; SHORT where its name is another one there."""
    return f"--{SHORT.get(name, name).replace('_', '-')}"


@contextmanager
def in_short() -> Iterator[None]:
    """Within it, an InputError calls the settings as the command line does."""
    try:
        yield
    except InputError as error:
        names = "|".join(entry.name for entry in fields(Sampling))
        said = re.sub(rf"(?<![\w.])({names})=", lambda found: f"{flag(found[1])}=", str(error))
        raise InputError(said) from None


@dataclass
class Sampling:
    """How images are drawn, whichever images they are; each setting says what it does as its `help`.

    The settings of an SDE are None for an ODE sampler. Their defaults are those of the public SiT code's evaluation.
    steps and guidance_scale are None until `fitted` puts in what fits the model.
    guide: a checkpoint's place, where settings are stated; the SiT in it, where images are drawn.
    Raises InputError for a value out of range, or one that would do nothing.
    """

    sampler: str = chosen("euler", SAMPLERS, help="how t goes from noise to data")
    steps: int | None = ranged(
        None, EVALUATIONS,
        help="steps from noise to data, an SDE's last step included; dopri5 sets its own (default: "
        f"{OF_FLOW[0]}; {OF_AVERAGE[0]} of a MeanFlow model)",
    )  # fmt: skip
    guidance_scale: float | None = ranged(
        None, GUIDANCE,
        help=f"guidance, classifier-free or by a guide; 1 is none (default: {OF_FLOW[1]:g}; {OF_AVERAGE[1]:g} of a "
        "MeanFlow model)",
    )  # fmt: skip
    guidance_channels: str = chosen("all", CHANNELS, help="latent channels guided")
    guidance_interval: list[float] = ranged([0.0, 1.0], TIME, help="guidance acts for t in it, t = 0 noise, t = 1 data")
    guide: Any = field(
        default=None,
        metadata=PATH | {HELP: "autoguidance: a weaker model of the same latents and classes, instead of no class"},
    )
    epsilon: float | None = ranged(
        None, EPSILON,
        help=f"how far t keeps from 0 or 1 where the flow is singular there (default: {SAMPLE_EPSILON:g}; "
        f"{SBDM_EPSILON:g} for sbdm where alpha vanishes)",
    )  # fmt: skip
    diffusion: str | None = setting(OF_SDE, "sigma", choices=DIFFUSIONS, help="the form of w(t)")
    diffusion_norm: float | None = setting(
        OF_SDE, 1.0, DIFFUSION_NORM,
        help="w(t) is multiplied by it; the form decreasing is w(t) = (norm cos(pi t) + 1)^2 / 4",
    )  # fmt: skip
    last_step: str | None = setting(OF_SDE, "mean", choices=LAST_STEPS, help="the last step, which draws no noise")
    last_step_size: float | None = setting(
        LAST_STEP, 0.04, LAST_STEP_SIZE, help="the last step goes from t = 1 - size to 1"
    )
    start: str | None = setting(
        OF_ADAMS, "lower", choices=STARTS,
        help="the first steps, before there are enough velocities: of a lower order, or by a Runge-Kutta method of the "
        "same order, whose every step takes as many evaluations as its order",
    )  # fmt: skip
    grid: Any = field(
        default="uniform",
        metadata={
            HELP: f"the times of the steps: {', '.join(GRIDS)}, a file with a time a line, or the times, which rise "
            "from 0 to 1 and say how many steps there are",
            FLAG: {"nargs": "+", "metavar": "GRID"},
        },
    )
    time_shift: float = ranged(
        1.0,
        TIME_SHIFT,
        help="s: noise level 1 - t becomes s (1 - t) / (1 + (s - 1) (1 - t)); over 1 is nearer to noise",
    )
    guidance_every: int = ranged(
        1, EVERY, help="guidance is evaluated at every so many evaluations of its interval, and reused between"
    )
    guidance_batches: int = ranged(
        1,
        Range(1, 2, "there is one of both classes, or one of each"),
        help="of an evaluation without a guide: 1 of class and no class together, or 2 with half of the memory",
    )

    def __post_init__(self):
        check_ranges(Sampling, vars(self))
        self._settle()

    def _settle(self) -> None:
        """Put what None stands for in its place, and check all but ranges."""
        settle("", self)
        self._settle_grid()
        if self.steps is not None and self.steps < self.least_steps:
            if self.sampler in ADAMS:
                lower = ", or a lower order" if self.least_steps > min(LEAST_STEPS.values()) else ", or euler"
                needed = f"{self.sampler} with start={self.start} needs at least {self.least_steps} steps"
                raise InputError(f"steps={self.steps}: {needed}; take more{lower}")
            raise InputError(f"steps={self.steps}: must be at least 2 with a last step, which is one of them")
        interval = self.guidance_interval
        if not (isinstance(interval, list | tuple) and len(interval) == 2 and interval[0] <= interval[1]):
            raise InputError(
                f"guidance_interval={interval}: give two numbers, low and high, 0 <= low <= high <= 1 (t = 0 noise, "
                "t = 1 data)"
            )
        self.guidance_interval = list(interval)
        for held, names, why in (
            (self.guidance_scale == 1, OF_GUIDANCE, "with guidance_scale=1 nothing is guided"),
            (self.sampler == "dopri5", OF_TIMES, "dopri5 chooses its own times"),
            (self.guide is not None, ("guidance_batches",), "model and guide have a batch each"),
        ):
            if held:
                self._check_left_out(names, why)
        if isinstance(self.guide, os.PathLike):
            self.guide = os.fspath(self.guide)
        if self.guide is not None and self.guidance_scale == 1:
            stated = f"guide={self.guide}" if isinstance(self.guide, str) else "guide"
            raise InputError(f"{stated}: with guidance_scale=1 nothing is guided; leave it out")

    def _check_left_out(self, names: Iterable[str], why: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != (PLAIN | LATER)[name]:
                raise InputError(f"{name}={value}: {why}; leave it out")

    def fitted(self, average: bool = False) -> "Sampling":
        """The settings, with what fits a flow in the place of None in steps and guidance_scale; average: what fits a
        model of average velocities (MeanFlow). Raises InputError for settings of guidance where that is none."""
        steps, scale = OF_AVERAGE if average else OF_FLOW
        if self.guidance_scale is None and scale == 1:
            self._check_left_out(OF_GUIDANCE, "guidance_scale=1 is this model's default, and guides nothing")
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            guidance_scale=scale if self.guidance_scale is None else self.guidance_scale,
        )

    def _settle_grid(self) -> None:
        """Put the times of a file in the place of its name, and their number in that of the steps."""
        stated = self.grid[0] if isinstance(self.grid, list | tuple) and len(self.grid) == 1 else self.grid
        if stated in tuple(GRIDS):
            self.grid = stated
            return
        called, times = f"grid={reprlib.repr(stated) if isinstance(stated, list) else stated}", stated
        if isinstance(stated, str | os.PathLike):
            remedy = f"choose from {list(GRIDS)}, or give a file with a time a line"
            with told(called, OSError, remedy=remedy), told(called, ValueError, remedy="give a time a line"):
                times = read_bytes(os.path.expanduser(stated), MOST_GRID).decode("utf-8-sig").split()
        with told(called, TypeError, ValueError, remedy="give times such as 0 0.1 0.4 1"):
            times = [float(t) for t in times]
            check_grid(times)
        steps = len(times) - 1 + (self.last_step_size is not None)
        if self.steps not in (None, steps):
            raise InputError(f"steps={self.steps}: grid has the times of {steps}; leave one of them out")
        self.grid, self.steps = times, steps

    @property
    def solver(self) -> "Sampler":
        """The ODE sampler, which begins as `start` says."""
        sampler = ODE_SAMPLERS[self.sampler]
        return sampler if self.start is None else partial(sampler, start=self.start)

    def times(self, model: "nn.Module") -> "torch.Tensor":
        """The times of the steps on a SiT; an SDE's last step goes on from the last of them.

        Raises ValueError where nothing is left of [0, 1], and for times that fp32 does not tell apart.
        """
        steps = self.steps - (self.last_step_size is not None)
        return time_grid(*self.interval(model), steps, grid=self.grid, shift=self.time_shift)

    @property
    def guide_model(self) -> "nn.Module | None":
        """The guide that images are drawn with; None without one. Raises InputError where only its place is known."""
        if isinstance(self.guide, str):
            raise InputError(f"guide={self.guide!r} is a place; load it, and give its model to draw with")
        return self.guide

    @property
    def guidance(self) -> tuple[float, str, list[float]]:
        """Scale, channels and interval, as `GuidedVelocity` takes them."""
        return self.guidance_scale, self.guidance_channels, self.guidance_interval

    @property
    def reused(self) -> tuple:
        """Interval, every and batches of classifier-free guidance, as `caches.check` takes them; none without it."""
        if self.guidance_scale == 1 or self.guide is not None:
            return ()
        return self.guidance_interval, self.guidance_every, self.guidance_batches

    def guided_times(self, times: Sequence[float]) -> list[float]:
        """Those of the times of evaluation at which guidance is evaluated, too."""
        return [t for t in times if within(t, self.guidance_interval)][:: self.guidance_every]

    @property
    def least_steps(self) -> int:
        """How few steps there can be: one, and the last step of an SDE; of an Adams sampler as many velocities as a
        step, uncorrected, goes by."""
        return LEAST_STEPS.get(self.sampler, 1 if self.last_step_size is None else 2)

    def interval(self, model: "nn.Module") -> tuple[float, float]:
        """The times [t0, t1] between which a SiT is integrated, where what it and its guide predict gives a velocity;
        an SDE's last step goes on from t1.

        Raises ValueError where nothing is left of [0, 1].
        """
        path, last, epsilon = PATHS[model.config.path](), self.last_step_size or 0.0, self._epsilon(model)
        networks = [model] if self.guide is None else [model, self.guide_model]
        starts, ends = zip(
            *(sampling_interval(path, each.config.prediction, self.diffusion, last, epsilon) for each in networks),
            strict=True,
        )
        return max(starts), min(ends)

    def _epsilon(self, model: "nn.Module") -> float:
        if self.epsilon is not None:
            return self.epsilon
        steep = self.diffusion == "sbdm" and PATHS[model.config.path].alpha_vanishes
        return SBDM_EPSILON if steep else SAMPLE_EPSILON

    def for_model(self, model: "nn.Module") -> "Sampling":
        """The settings as they act on this SiT: `fitted`, and with epsilon None where no end of its flow is singular.

        Raises InputError when the model cannot be sampled as asked, or something asked would do nothing to it.
        """
        check_path(model)
        average = model.config.use_meanflow
        if average and self.sampler != "euler":
            raise InputError(
                f"sampler={self.sampler}: this model predicts average velocities (MeanFlow), which only euler follows, "
                "whose steps along them are exact; use sampler=euler"
            )
        if self.guide is not None:
            guide = self.guide_model
            with named("guide"):
                check_guide(guide, model)
                check_velocities(guide, model)
        if self.steps is None or self.guidance_scale is None:
            return self.fitted(average).for_model(model)
        if self.guidance_scale != 1 and (trained := model.config.trained_guidance) != 1:
            raise InputError(
                f"guidance_scale={self.guidance_scale:g}: this model has guidance {trained:g} in its weights; use "
                "guidance_scale=1"
            )
        if self.guidance_scale != 1 and model.null_label is None and self.guide is None:
            raise InputError(
                f"guidance_scale={self.guidance_scale:g} needs a null class, and this model was trained without class "
                "dropout; use guidance_scale=1, or a guide"
            )
        if self.guidance_channels == "first3" and model.config.in_channels <= 3:
            raise InputError(
                f"guidance_channels=first3 would do nothing: this model has {model.config.in_channels}; leave it out"
            )
        with told("", ValueError, remedy="make the last step or epsilon smaller"):
            singular = self.interval(model) != (0, 1 - (self.last_step_size or 0))
        with told("grid", ValueError, remedy="take fewer steps, or a time_shift nearer to 1"):
            self.times(model)
        if self.epsilon is not None and not singular:
            raise InputError(f"epsilon={self.epsilon:g} would do nothing: no end is singular here; leave it out")
        return replace(self, epsilon=self._epsilon(model) if singular else None)

    def check_acts(self, times: Iterable[float]) -> None:
        """Raise InputError where guidance is asked for, and its interval holds none of the times of evaluation."""
        if self.guidance_scale != 1 and not any(within(t, self.guidance_interval) for t in times):
            raise InputError(
                f"guidance_interval={self.guidance_interval}: no step evaluates the model at a time in it, so nothing "
                "would be guided; widen it, take more steps, or guidance_scale=1"
            )

    def check_acts_on(self, model: "nn.Module") -> None:
        """`check_acts`, at the times at which the sampler evaluates a SiT; dopri5 chooses its own as it goes."""
        if self.sampler != "dopri5":
            self.check_acts(self.evaluation_times(model))

    def evaluation_times(self, model: "nn.Module") -> "list[torch.Tensor]":
        """The times at which the sampler, whose steps are given, evaluates the velocity: those that it asks for when it
        integrates nought."""
        import torch

        nought, times = torch.zeros(1), []

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times.append(t)
            return x

        grid = self.times(model)
        if self.sampler in ODE_SAMPLERS:
            self.solver(velocity, nought, grid)
        else:
            sde = SDE(PATHS[model.config.path](), self.diffusion, self.diffusion_norm)
            SDE_SAMPLERS[self.sampler](velocity, nought, grid, sde, lambda step: nought)
            last_step(self.last_step, velocity, nought, grid[-1], sde)
        return times

    def describe(self) -> dict[str, Any]:
        """What a manifest records: the settings, None where one did not act, and dopri5's tolerances.

        The guide is told by who loaded it, see `trained.describe_guide`.
        """
        settings = {entry.name: getattr(self, entry.name) for entry in fields(Sampling) if entry.name != "guide"}
        settings |= {name: None for name, plain in LATER.items() if settings[name] == plain}
        if self.guidance_scale == 1:
            settings |= {"guidance_channels": None, "guidance_interval": None}
        if self.sampler == "dopri5":
            settings |= {"steps": None, "rtol": RTOL, "atol": ATOL}
        return settings


def check_path(model: "nn.Module") -> None:
    """Raise InputError for a model that predicts something else than a flow from noise, t = 0, to data, t = 1."""
    if model.config.path not in PATHS:
        raise InputError(
            f"path={model.config.path!r}: a DiT with time 0..999, 999 being noise; our samplers follow {sorted(PATHS)} "
            "from t = 0, noise, to t = 1, data, and cannot draw from it"
        )


def check_velocities(guide: "nn.Module", model: "nn.Module") -> None:
    """Raise InputError where a guide, or what it is to guide, predicts average velocities (MeanFlow)."""
    for what, each in (("it", guide), ("the model that it is to guide", model)):
        if each.config.use_meanflow:
            raise InputError(
                f"{what} predicts average velocities (MeanFlow), and a guide acts on velocities; leave the guide out"
            )


def check_guide(guide: "nn.Module", model: "nn.Module") -> None:
    """Raise InputError for a guide of other latents, classes or another path than the model's, or the model itself."""
    check_path(guide)
    for what, own, wanted in (
        ("in_channels", guide.config.in_channels, model.config.in_channels),
        ("sample_size", list(guide.latent_size), list(model.latent_size)),
        ("num_classes", guide.config.num_classes, model.config.num_classes),
        ("path", guide.config.path, model.config.path),
    ):
        if own != wanted:
            raise InputError(
                f"it has {what}={own}, the model that it is to guide {what}={wanted}; give one that was trained on the "
                "same latents, classes and path"
            )
    if guide is model:
        raise InputError("it is the model itself, and would change nothing; give a weaker one")
