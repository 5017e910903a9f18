"""python -m experiments.schedulers: every setting of diffusers' schedulers against a flow of which all is known.

The data are Gaussian, so their velocity is a formula and the pipeline must draw their mean and standard deviation.
Writes results/schedulers/schedulers.json and schedulers.md.
"""

import argparse
import json
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
from sit_atconv.errors import InputError, command
from sit_atconv.files import write_atomic
from sit_atconv.pipelines.schedulers import check_scheduler

MEANS, STDS = (0.5, -0.3), (1.28, 0.4)  # of the data, one channel each
STEPS = (20, 80, 320)
DRAWN = (64, 2, 32, 32)  # noise for schedulers that draw: 65,536 numbers a channel, so deviations are known to 0.3%

EULER = [
    {}, {"shift": 3.0}, {"shift": 0.5}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True}, {"shift": 3.0, "use_karras_sigmas": True}, {"shift_terminal": 0.02},
    {"num_train_timesteps": 10}, {"base_shift": 1.0}, {"max_shift": 2.0}, {"base_image_seq_len": 64},
    {"max_image_seq_len": 64}, {"time_shift_type": "linear"}, {"shift": 25.0}, {"shift_terminal": 0.1},
    {"use_dynamic_shifting": True}, {"invert_sigmas": True},
]  # fmt: skip
MULTISTEP = [
    {"flow_shift": 3.0}, {"flow_shift": 0.5}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"},
    {"steps_offset": 1}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 0.01}, {"beta_end": 0.03},
    {"trained_betas": [0.01] * 1000}, {"rescale_betas_zero_snr": True}, {"num_train_timesteps": 2000},
    {"time_shift_type": "exponential"}, {"sample_max_value": 0.5}, {"dynamic_thresholding_ratio": 0.5},
    {"num_train_timesteps": 10}, {"flow_shift": 1e6}, {"flow_shift": 0.1}, {"timestep_spacing": "else"},
    {"final_sigmas_type": "sigma_min"}, {"thresholding": True}, {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"use_dynamic_shifting": True},
    {"use_flow_sigmas": False}, {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
]  # fmt: skip
SETTINGS = {
    FlowMatchEulerDiscreteScheduler: [*EULER, {"stochastic_sampling": True}],
    FlowMatchHeunDiscreteScheduler: [
        {}, {"shift": 3.0}, {"shift": 0.5}, {"num_train_timesteps": 100}, {"shift": 12.0}, {"num_train_timesteps": 10},
    ],
    FlowMatchLCMScheduler: [*EULER, {"upscale_mode": "nearest"}, {"scale_factors": [0.5]}],
    UniPCMultistepScheduler: [
        *({"solver_order": order, "disable_corrector": off} for order in (1, 2, 3) for off in ([], [0, 1])),
        {"solver_order": 1, "lower_order_final": False}, {"sigma_min": 0.1}, {"sigma_max": 5.0},
        {"shift_terminal": 0.02}, *MULTISTEP, {"shift_terminal": 0.1}, {"solver_order": 4}, {"solver_type": "bh1"},
        {"lower_order_final": False}, {"predict_x0": False}, {"solver_p": FlowMatchEulerDiscreteScheduler()},
    ],
    DPMSolverMultistepScheduler: [
        *(
            {"solver_order": order, "solver_type": kind, "lower_order_final": lower, "euler_at_final": euler}
            for order in (1, 2, 3) for kind in ("midpoint", "heun") for lower in (True, False) for euler in (True, False)
        ),
        *(
            {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": kind}
            for order in (1, 2, 3) for kind in ("midpoint", "heun")
        ),
        {"lambda_min_clipped": -5.1}, {"variance_type": "learned"}, *MULTISTEP, {"num_train_timesteps": 100},
        {"solver_order": 4}, {"use_lu_lambdas": True}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
}  # fmt: skip


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
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    asked = flow | options if kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler) else options
    row = {"scheduler": kind.__name__, "options": {name: str(value)[:40] for name, value in options.items()}}
    try:
        scheduler = kind(**asked)
        caution = check_scheduler(scheduler)
    except InputError as error:
        return row | {"refused": str(error).partition("scheduler ")[2]}
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
    for kind, settings in SETTINGS.items():
        for options in settings:
            yield measure(kind, options, steps)


def table(measured: list[dict[str, Any]]) -> str:
    """The rows in Markdown: those that are accepted, then those that are refused."""
    head = ["scheduler", "options", *(f"deviation, {steps} steps" for steps in STEPS), f"mean, {STEPS[-1]} steps", ""]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in measured:
        if "refused" not in row:
            cells = [f"{error:+.2%}" for error in (*row["std"], row["mean"][-1])]
            what = "distilled models alone: warns" if row["distilled_alone"] else "follows the flow"
            lines.append(f"| {row['scheduler']} | {settings(row)} | {' | '.join(cells)} | {what} |")
    lines += ["", "| refused before the run | options | why, and the remedy |", "|---|---|---|"]
    lines += [f"| {row['scheduler']} | {settings(row)} | {row['refused']} |" for row in measured if "refused" in row]
    return "\n".join(lines)


def settings(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "(defaults)"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.schedulers", description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "schedulers"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: experiments/results/schedulers)")
    args = parser.parse_args(argv)
    measured = list(rows())
    write_atomic(args.out / "schedulers.json", json.dumps(measured, indent=1) + "\n")
    data = " and ".join(f"N({mean:g}, {std:g}^2)" for mean, std in zip(MEANS, STDS, strict=True))
    said = (
        f"The data are {data}, their exact velocity is the network, and the pipeline draws from it without guidance. "
        "Errors are those of the drawn mean and standard deviation over the true deviation, of the worse of the two. "
        f"Where the scheduler draws noise, they are known to about {1 / (2 * DRAWN[0] * DRAWN[2] * DRAWN[3]) ** 0.5:.1%}; "
        "elsewhere they are exact. UniPC and DPM++ have `use_flow_sigmas=True, prediction_type='flow_prediction'`."
    )
    write_atomic(
        args.out / "schedulers.md", f"# diffusers' schedulers against a closed form\n\n{said}\n\n{table(measured)}\n"
    )
    refused = sum("refused" in row for row in measured)
    print(f"{len(measured) - refused} settings measured, {refused} refused: {args.out}")


if __name__ == "__main__":
    main()
