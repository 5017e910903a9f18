"""Which schedulers, diffusers' and our own, with which settings, sample the distribution of a model of the linear flow.

sigma = 1 - t: 1 is noise, 0 is data. Everything here is decided before the first network evaluation.
"""

import copy
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sit_atconv.pipelines.adams import FlowMatchAdamsScheduler
from sit_atconv.runtime.errors import InputError, option, told

LEAST_START = 0.998  # what is drawn is noise, of sigma 1: begun at 1 - e, the spread of the images is up to e off
FINE_STEPS, LARGEST_FALL = 1000, 0.02  # of so many steps none may take more than that of sigma
OFF = (False,)


@dataclass(frozen=True)
class Rule:
    """An option that must have one of the values `allowed` where `applies` holds; what any other value `does`."""

    option: str
    allowed: tuple
    does: str = "does not follow the flow of this model"
    applies: Callable[[Mapping[str, Any]], bool] = lambda config: True


FLOW = (
    Rule("use_dynamic_shifting", OFF),
    Rule("invert_sigmas", OFF),
    Rule("scale_factors", (None,), "changes the size of the latents within a run"),
)
MULTISTEP = (
    Rule("use_flow_sigmas", (True,)),
    Rule("prediction_type", ("flow_prediction",)),
    Rule("use_dynamic_shifting", OFF),
    Rule("use_karras_sigmas", OFF),
    Rule("use_exponential_sigmas", OFF),
    Rule("use_beta_sigmas", OFF),
    Rule("final_sigmas_type", ("zero",), "leaves noise in the images"),
    Rule("thresholding", OFF, "clips the data that the model expects"),
)
UNIPC = (
    *MULTISTEP,
    Rule("predict_x0", (True,), "cannot use a flow prediction"),
    Rule("solver_type", ("bh2",), "divides by zero in its last step"),
    Rule("solver_order", (1, 2, 3), "is unstable in fp32"),
    Rule("lower_order_final", (True,), "divides by zero in its last step", lambda config: config["solver_order"] > 1),
    Rule("solver_p", (None,), "leaves the steps to a scheduler that is not checked"),
)
DPM = (
    Rule("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"), "cannot use a flow prediction"),
    *MULTISTEP,
    Rule("use_lu_lambdas", OFF),
    Rule("solver_order", (1, 2, 3), "is not a solver that it has"),
    Rule(
        "solver_order",
        (1, 2),
        "and algorithm_type='sde-dpmsolver++' draws too wide a distribution, however many the steps",
        lambda config: config["algorithm_type"] == "sde-dpmsolver++",
    ),
)
OF_FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
RULES = dict.fromkeys(OF_FLOWS, FLOW) | {UniPCMultistepScheduler: UNIPC, DPMSolverMultistepScheduler: DPM}
RULES[FlowMatchAdamsScheduler] = ()  # it takes no others
# Options with no rule of their own. They make the noise levels, which are checked themselves, ...
LEVELS = {"num_train_timesteps", "shift", "flow_shift", "shift_terminal", "timestep_spacing"}
LEVELS |= {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max"}
# ... or choose among steps that all lead to the distribution, or are warned of, ...
STEPS = {"solver_order", "corrected", "start", "solver_type", "lower_order_final", "euler_at_final"}
STEPS |= {"disable_corrector", "stochastic_sampling"}
# ... or do nothing here.
IDLE = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type", "upscale_mode"}
IDLE |= {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "lambda_min_clipped"}
IDLE |= {"dynamic_thresholding_ratio", "sample_max_value", "variance_type", "steps_offset"}


def check_scheduler(scheduler: SchedulerMixin, average: bool = False) -> str | None:
    """Raise InputError for a scheduler that does not sample the distribution of a model of the linear flow.

    average: the model predicts average velocities (MeanFlow), which Euler's steps alone follow.
    It must be one of RULES, or of a class derived from one, and have what the rules there allow; an option that this
    module does not know must have its default. Its noise levels must fall from 1, noise, to 0, data, by steps that get
    small as their number grows. Returns what to warn of: a scheduler that is right for distilled models alone.
    """
    name, euler = type(scheduler).__name__, option("scheduler", "flow-match-euler", "FlowMatchEulerDiscreteScheduler()")
    kind = next((kind for kind in RULES if isinstance(scheduler, kind)), None)
    if kind is None:
        raise InputError(
            f"scheduler {name} is not one for flow matching; use FlowMatchEulerDiscreteScheduler, "
            "FlowMatchAdamsScheduler of sit_atconv.pipelines.adams, "
            "FlowMatchHeunDiscreteScheduler or FlowMatchLCMScheduler, or UniPCMultistepScheduler or "
            "DPMSolverMultistepScheduler with use_flow_sigmas=True, prediction_type='flow_prediction'"
        )
    options, defaults = _options(scheduler, kind)
    other = kind is not FlowMatchEulerDiscreteScheduler
    if average and (other or options.get("stochastic_sampling")):
        raise InputError(
            f"scheduler {name} does not follow average velocities, which this model predicts (MeanFlow); use "
            f"{euler}{'' if other else ' without stochastic_sampling'}"
        )
    known = LEVELS | STEPS | IDLE | {rule.option for rule in RULES[kind]}
    others = [Rule(option, (defaults[option],), "is not known to follow the flow") for option in options.keys() - known]
    for rule in (*RULES[kind], *others):
        value = options.get(rule.option, rule.allowed[0])
        allowed = value in rule.allowed or not (value or rule.allowed[0])  # None is as good as False
        if rule.applies(options) and not allowed:
            shown, remedy = reprlib.repr(value), " or ".join(map(repr, rule.allowed))
            raise InputError(
                f"scheduler {name} with {rule.option}={shown} {rule.does}; make it with {rule.option}={remedy}"
            )
    fine = copy.copy(scheduler)  # set_timesteps gives it lists of its own
    set_steps(fine, FINE_STEPS)
    if kind is FlowMatchLCMScheduler or options.get("stochastic_sampling"):
        asked = "" if kind is FlowMatchLCMScheduler else " with stochastic_sampling=True"
        return (
            f"scheduler {name}{asked} draws new noise at every step: right for a model that was distilled to such "
            "steps, but images of any other model vary too little, however many the steps; use "
            f"{euler} for those"
        )
    falls = -fine.sigmas.diff()
    if falls.max() > LARGEST_FALL:
        worst = falls.argmax()
        raise InputError(
            f"scheduler {name}{_levels_options(fine)} goes from noise level {fine.sigmas[worst]:.3g} to "
            f"{fine.sigmas[worst + 1]:.3g} in a single step, even of {FINE_STEPS}, and {LARGEST_FALL} is the "
            "most: bring these options nearer to their defaults"
        )
    return None


def set_steps(
    scheduler: SchedulerMixin,
    steps: int,
    sigmas: Sequence[float] | None = None,
    device: torch.device | None = None,
    partial: bool = False,
) -> torch.Tensor:
    """Set the scheduler's timesteps; returns the noise level sigma of each of its calls, on the CPU.

    steps: at least 1. sigmas: noise levels in their place, for schedulers that take them; the final 0 is added.
    partial: they may begin under 1, for latents of that level.
    Raises InputError for levels that do not fall from 1 to 0.
    """
    name = type(scheduler).__name__
    if sigmas is None and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = np.linspace(1, 1 / steps, steps)  # its own default stops at the smallest sigma of training
    if sigmas is not None and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise InputError(f"{name} takes no sigmas; leave them out, or take another scheduler")
    # Exception: options of any kind, which diffusers, numpy and torch refuse in every way there is. What is not finite
    # is told below.
    with told(f"scheduler {name} refuses its own settings", Exception), np.errstate(all="ignore"):
        asked = {"num_inference_steps": steps} if sigmas is None else {"sigmas": np.array(sigmas, dtype=np.float64)}
        scheduler.set_timesteps(**asked, device=device)
    levels = scheduler.sigmas.cpu()
    again = scheduler.order == 2 or isinstance(scheduler, FlowMatchAdamsScheduler)  # Runge-Kutta visits levels twice
    distinct = levels.unique_consecutive() if again else levels
    if not (levels[0] <= 1 and levels[-1] == 0 and (distinct.diff() < 0).all()):
        shown = ", ".join(f"{level:.3g}" for level in distinct[:3].tolist())
        raise InputError(
            f"scheduler {name}{_levels_options(scheduler)} has noise levels {shown}, ... {levels[-1]:.3g} for "
            f"{len(distinct) - 1} steps; they must fall at every step, to 0: use the defaults of its options, or "
            "another number of steps"
        )
    if levels[0] < LEAST_START and not partial:
        raise InputError(
            f"scheduler {name}{_levels_options(scheduler)} begins at noise level {levels[0]:.4g}, and the latents are "
            f"noise, of level 1; it must begin at {LEAST_START} or above: "
            f"{'bring these options nearer to their defaults' if sigmas is None else 'give latents of that level'}"
        )
    return levels[: len(scheduler.timesteps)]


def _options(scheduler: SchedulerMixin, kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that the scheduler has, with the values in use, and their defaults.

    A config also keeps what another class left there, which does nothing; and a setter may go past it.
    """
    parameters = inspect.signature(kind.__init__).parameters | inspect.signature(type(scheduler).__init__).parameters
    defaults = {option: parameter.default for option, parameter in parameters.items() if option in scheduler.config}
    state = vars(scheduler)
    return {
        option: state.get(f"_{option}", state.get(option, scheduler.config[option])) for option in defaults
    }, defaults


def _levels_options(scheduler: SchedulerMixin) -> str:
    """The options that decide the noise levels, where they are not the defaults, for a message."""
    options, defaults = _options(scheduler, type(scheduler))
    hidden = {option: scheduler.config[option] for option in ("sigma_min", "sigma_max") if option in scheduler.config}
    changed = {option: value for option, value in (options | hidden).items() if option in LEVELS}
    named = [f"{option}={value!r}" for option, value in changed.items() if value != defaults.get(option)]
    return f" with {', '.join(named)}" if named else ""
