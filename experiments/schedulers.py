"""python -m experiments.schedulers: every setting of the pipeline's schedulers against a flow of which all is known.

The data are Gaussian, so their velocity is a formula and the pipeline must draw their mean and standard deviation.
Writes results/schedulers/schedulers.json and schedulers.md.
"""

import json
import reprlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from sit_atconv import SiTPipeline, SiTTransformer2DModel
from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_out
from sit_atconv.flow.samplers import STARTS
from sit_atconv.pipelines.adams import FlowMatchAdamsScheduler
from sit_atconv.pipelines.schedulers import check_scheduler
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, InputError, command
from sit_atconv.runtime.files import named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.sampling import FLOW

MEANS, STDS = (0.5, -0.3), (1.28, 0.4)  # of the data, one channel each
STEPS = (20, 80, 320)
DRAWN = (32, 2, 32, 32)  # noise for schedulers that draw: 32,768 numbers a channel, so deviations are known to 0.4%

# Options that change nothing, all at once.
IDLE_EULER = {"base_shift": 1.0, "max_shift": 2.0, "base_image_seq_len": 64, "max_image_seq_len": 64}
IDLE_EULER |= {"time_shift_type": "linear"}
IDLE_MULTISTEP = {"steps_offset": 1, "beta_start": 0.01, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
IDLE_MULTISTEP |= {"rescale_betas_zero_snr": True, "sample_max_value": 0.5, "dynamic_thresholding_ratio": 0.5}
IDLE_MULTISTEP |= {"time_shift_type": "exponential"}

EULER = [
    {}, IDLE_EULER, {"shift": 3.0}, {"shift": 0.5}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True}, {"shift": 3.0, "use_karras_sigmas": True}, {"shift_terminal": 0.02},
    {"num_train_timesteps": 10}, {"stochastic_sampling": True},
]  # fmt: skip
LCM = [
    {}, IDLE_EULER | {"upscale_mode": "nearest"}, {"shift": 3.0}, {"num_train_timesteps": 100},
    {"shift_terminal": 0.02}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
]  # fmt: skip
MULTISTEP = [
    {"flow_shift": 3.0}, {"flow_shift": 0.5}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"},
    {"trained_betas": [0.01] * 1000}, {"num_train_timesteps": 2000},
]  # fmt: skip
ACCEPTED = {
    FlowMatchAdamsScheduler: [
        *({"solver_order": order, "start": start} for order in (2, 3, 4) for start in STARTS),
        *({"solver_order": order, "corrected": True} for order in (2, 3)),
        {"shift": 3.0}, {"shift": 0.5}, {"num_train_timesteps": 10},
    ],
    FlowMatchEulerDiscreteScheduler: EULER,
    FlowMatchHeunDiscreteScheduler: [{}, {"shift": 3.0}, {"shift": 0.5}, {"num_train_timesteps": 100}],
    FlowMatchLCMScheduler: LCM,
    UniPCMultistepScheduler: [
        *({"solver_order": order, "disable_corrector": off} for order in (1, 2, 3) for off in ([], [0, 1])),
        *MULTISTEP, {"shift_terminal": 0.02}, {"solver_order": 1, "lower_order_final": False},
        IDLE_MULTISTEP | {"sigma_min": 0.1, "sigma_max": 5.0},
    ],
    DPMSolverMultistepScheduler: [
        *({"solver_order": order, "solver_type": kind} for order in (1, 2, 3) for kind in ("midpoint", "heun")),
        *({"solver_order": order, "lower_order_final": False, "euler_at_final": True} for order in (2, 3)),
        *(
            {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": kind}
            for order in (1, 2) for kind in ("midpoint", "heun")
        ),
        *MULTISTEP, IDLE_MULTISTEP | {"lambda_min_clipped": -5.1, "variance_type": "learned"},
    ],
}  # fmt: skip

NO_FLOW = [{"use_dynamic_shifting": True}, {"invert_sigmas": True}]
NO_MULTISTEP = [
    {"use_flow_sigmas": False}, *({"prediction_type": name} for name in ("epsilon", "v_prediction", "sample")),
    {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
    {"use_dynamic_shifting": True}, {"final_sigmas_type": "sigma_min"}, {"thresholding": True}, {"solver_order": 4},
    {"flow_shift": 1e6}, {"num_train_timesteps": 10}, {"timestep_spacing": "else"},
]  # fmt: skip
REFUSED = {
    FlowMatchAdamsScheduler: [{"shift": 25.0}],
    FlowMatchEulerDiscreteScheduler: [*NO_FLOW, {"shift": 25.0}, {"shift_terminal": 0.1}],
    FlowMatchHeunDiscreteScheduler: [{"shift": 12.0}, {"num_train_timesteps": 10}],
    FlowMatchLCMScheduler: [*NO_FLOW, {"scale_factors": [0.5]}],
    UniPCMultistepScheduler: [
        *NO_MULTISTEP, {"solver_type": "bh1"}, {"lower_order_final": False}, {"predict_x0": False},
        {"solver_p": FlowMatchEulerDiscreteScheduler()}, {"shift_terminal": 0.1},
    ],
    DPMSolverMultistepScheduler: [
        *NO_MULTISTEP, {"use_lu_lambdas": True}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        *({"algorithm_type": name, "final_sigmas_type": "sigma_min"} for name in ("dpmsolver", "sde-dpmsolver")),
        {"flow_shift": 0.1}, {"num_train_timesteps": 100},
    ],
}  # fmt: skip


def make_scheduler(kind: type[SchedulerMixin], options: dict[str, Any]) -> SchedulerMixin:
    """With the options, and what a multistep scheduler needs for a flow beside them."""
    multistep = kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler)
    return kind(**(FLOW if multistep else {}) | options)


class GaussianFlow(SiTTransformer2DModel):
    """The exact velocity for data of independent N(MEANS, STDS^2) in each channel, in the place of a network."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, return_dict: bool = False) -> tuple:
        """(E[data - noise | x_t = x],) by the regression of two Gaussians; x (B, 2, H, W), t (B,)."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEANS, STDS))
        t = t[:, None, None, None]
        slope = (t * std**2 - (1 - t)) / ((t * std) ** 2 + (1 - t) ** 2)
        return (mean + slope * (x - t * mean),)


def make_pipe(scheduler: SchedulerMixin) -> SiTPipeline:
    model = GaussianFlow(
        sample_size=2, patch_size=2, in_channels=len(MEANS), hidden_size=8, depth=1, num_heads=1, num_classes=1
    )
    pipe = SiTPipeline(model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SiTPipeline, steps: int, random: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (2,) of each channel of the data drawn.

    random: the scheduler draws too. Without that the data are an affine function of the noise, which two points give.
    """
    noise = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 2, 2, 2)
    if random:
        noise = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    data = pipe(
        [0] * len(noise), steps, 1.0, latents=noise, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images.double()
    if random:
        return data.mean((0, 2, 3)), data.std((0, 2, 3))
    low, high = data[:, :, 0, 0]
    return (low + high) / 2, (high - low) / 2


def measure(kind: type[SchedulerMixin], options: dict[str, Any], steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
    """A row: errors of mean and deviation over the true deviation, of the worse channel, or why it is refused."""
    row = {"scheduler": kind.__name__, "options": {name: reprlib.repr(value) for name, value in options.items()}}
    scheduler = make_scheduler(kind, options)
    try:
        caution = check_scheduler(scheduler)
    except InputError as error:
        return row | {"refused": str(error).partition(f"{kind.__name__} ")[2]}
    random = caution is not None or options.get("algorithm_type", "").startswith("sde")
    mean, std = torch.tensor(MEANS), torch.tensor(STDS)
    errors = {"mean": [], "std": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what `caution` says
        for count in steps:
            drawn = draw(make_pipe(scheduler), count, random)
            for name, value, true in zip(errors, drawn, (mean, std), strict=True):
                relative = (value - true) / std
                errors[name].append(relative[relative.abs().argmax()].item())
    return row | {"distilled_alone": caution is not None, "random": random, "steps": list(steps), **errors}


def rows(steps: tuple[int, ...] = STEPS) -> Iterator[dict[str, Any]]:
    asked = [(kind, options) for kind in ACCEPTED for options in (*ACCEPTED[kind], *REFUSED[kind])]
    for kind, options in Progress(asked, "schedulers", unit="setting", delay=1):
        yield measure(kind, options, steps)


def table(measured: list[dict[str, Any]]) -> str:
    """The rows in Markdown: those that are accepted, then those that are refused."""
    data = " and ".join(f"N({mean:g}, {std:g}^2)" for mean, std in zip(MEANS, STDS, strict=True))
    head = ["scheduler", "options", *(f"deviation, {steps} steps" for steps in STEPS), f"mean, {STEPS[-1]} steps", ""]
    lines = [
        f"The data are {data}. The network is their exact velocity; the pipeline draws from it without guidance.",
        "Errors of mean and standard deviation are over the true deviation, of the worse of the two. They are exact,",
        "but where a scheduler draws noise: there they are known to some 0.4%.",
        f"UniPC and DPM++ have `{', '.join(f'{name}={value!r}' for name, value in FLOW.items())}` beside the options.",
        "",
    ]
    accepted = []
    for row in measured:
        if "refused" not in row:
            cells = [f"{error:+.2%}" for error in (*row["std"], row["mean"][-1])]
            what = "distilled models alone: warns" if row["distilled_alone"] else "follows the flow"
            accepted.append([row["scheduler"], settings(row), *cells, what])
    refused = [[row["scheduler"], settings(row), row["refused"]] for row in measured if "refused" in row]
    titles = ["refused before the run", "options", "why, and the remedy"]
    return "\n".join([*lines, markdown_table(head, accepted), "", markdown_table(titles, refused)])


def settings(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "(defaults)"


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.schedulers", description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "schedulers"
    add_out(parser, "folder (default: experiments/results/schedulers)", type=Path, default=default)
    args = parser.parse_args(argv)
    files = Results(named(args.out / "schedulers", ".json", ".md"), args.force, "scheduler", "options")
    measured = list(rows())
    stated = "[\n" + ",\n".join(map(json.dumps, measured)) + "\n]\n"
    files.write(stated, f"# The pipeline's schedulers against a closed form\n\n{table(measured)}\n")
    refused = sum("refused" in row for row in measured)
    print(f"{len(measured) - refused} settings measured, {refused} refused: {args.out}")


if __name__ == "__main__":
    main()
