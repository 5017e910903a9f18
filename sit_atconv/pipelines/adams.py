"""The Adams samplers as a scheduler of diffusers, for pipelines of flow matching.

sigma = 1 - t: 1 is noise, 0 is data; what a pipeline hands to `step`, noise - data, is minus the velocity.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from sit_atconv.flow.samplers import BEGUN_BY, STARTS, TABLEAUX, Tableau, adams_weights, moved
from sit_atconv.flow.times import shifted, time_grid
from sit_atconv.runtime.errors import InputError, check_choice
from sit_atconv.runtime.limits import TIME_SHIFT

EULER = TABLEAUX["euler"]


class FlowMatchAdamsScheduler(SchedulerMixin, ConfigMixin):
    """Adams-Bashforth of order 2, 3 or 4, see `sit_atconv.flow.samplers.adams`, to the same numbers.

    corrected: every step is taken again where the next one begins, by Adams-Moulton. What a callback has done to the
    sample between stays.
    start: "lower" calls the network once for each step; "rk" begins with solver_order - 1 steps of a Runge-Kutta method
    of the same order, and calls it solver_order times for each of these. shift: of the noise levels, see
    `sit_atconv.flow.times.shifted`. num_train_timesteps: the timestep is sigma times it.
    Raises InputError for another order or start, and for a shift out of range.
    """

    order = 1  # calls for each step, as diffusers means it

    @register_to_config
    def __init__(
        self,
        solver_order: int = 2,
        corrected: bool = False,
        start: str = "lower",
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
    ):
        check_choice("solver_order", solver_order, BEGUN_BY)
        check_choice("start", start, STARTS)
        TIME_SHIFT.check("shift=", shift)
        self.num_inference_steps = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set the steps: uniform ones down to 0, or those of `sigmas`, falling levels to which the final 0 is added;
        both are shifted. Raises InputError for neither, and for fewer steps than the order."""
        steps, order = num_inference_steps if sigmas is None else len(sigmas), self.config.solver_order
        if steps is None:
            raise InputError("num_inference_steps=None: give the number of steps, or sigmas")
        if steps < order:
            lower = "a lower order" if order > min(BEGUN_BY) else "FlowMatchEulerDiscreteScheduler"
            raise InputError(f"{steps} steps: solver_order={order} needs at least {order}; take more, or {lower}")
        if sigmas is None:
            self.times = time_grid(0, 1, steps, shift=self.config.shift)
        else:
            t = 1 - torch.tensor([*map(float, sigmas), 0.0], dtype=torch.float64)
            self.times = shifted(t, self.config.shift).float()
        # A call for each evaluation: the step, its method, and how many stages of it come before.
        self._calls = [
            (step, method, stage)
            for step in range(steps)
            for method in [self._method(step)]
            for stage in range(len(method.c))
        ]
        asked = torch.stack(
            [self.times[step].lerp(self.times[step + 1], method.c[stage]) for step, method, stage in self._calls]
        )
        self.sigmas = torch.cat([1 - asked, torch.zeros(1)])
        self.timesteps = (self.config.num_train_timesteps * self.sigmas[:-1]).to(device)
        self.num_inference_steps = steps
        self.set_begin_index()

    def _method(self, step: int) -> Tableau:
        order = self.config.solver_order
        return TABLEAUX[BEGUN_BY[order]] if self.config.start == "rk" and step < order - 1 else EULER

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin anew. Raises InputError for a call in the middle, before which velocities are missing."""
        if begin_index:
            raise InputError(f"begin_index={begin_index}: must be 0; give sigmas that begin where the sample is")
        self._call, self._slopes, self._predicted = 0, [], None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """The sample for the next call, from noise - data at this one; both (B, ...). The calls come in turn, whatever
        `timestep` is. Raises InputError where no call is left to make."""
        if self.num_inference_steps is None or self._call == len(self._calls):
            said = "no steps are set" if self.num_inference_steps is None else f"all {self._call} calls are made"
            raise InputError(f"{said}; call set_timesteps first")
        step, method, stage = self._calls[self._call]
        slope, sample = -model_output.float(), sample.float()
        self._call += 1
        if stage == 0:
            self._slopes = [*self._slopes, slope][-self.config.solver_order - 1 :]
            if self._predicted is not None:
                corrected = self._moved(
                    self._begun_at, step - 1, self._weights(step - 1, step, self._slopes), self._slopes
                )
                sample = corrected + (sample - self._predicted)
            self._begun_at, self._stages = sample, []
        self._stages.append(slope)
        if method is EULER:
            last = self._slopes[-self.config.solver_order :]
            sample = self._moved(self._begun_at, step, self._weights(step, step, last), last)
        else:
            sample = self._moved(self._begun_at, step, [*method.a, method.b][stage + 1], self._stages)
        sample = sample.to(model_output.dtype)
        self._predicted = sample.float() if self.config.corrected and method is EULER else None
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def _weights(self, step: int, newest: int, slopes: list[torch.Tensor]) -> list[float]:
        """`adams_weights` of a step, by slopes of which the last is that where step `newest` begins."""
        known = self.times[newest + 1 - len(slopes) : newest + 1].tolist()
        return adams_weights(known, *self.times[step : step + 2].tolist())

    def _moved(
        self, sample: torch.Tensor, step: int, weights: Sequence[float], slopes: list[torch.Tensor]
    ) -> torch.Tensor:
        return moved(sample, self.times[step + 1] - self.times[step], weights, slopes)
