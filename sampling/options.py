"""Command-line options that every sampling command shares."""

import argparse
import os
from dataclasses import dataclass

import torch

from sit_atconv import limits, processes
from sit_atconv.checkpoint import Trained, load_trained
from sit_atconv.devices import resolve_device
from sit_atconv.errors import InputError
from sit_atconv.flow.guidance import CHANNELS
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE_SAMPLERS
from sit_atconv.flow.times import SAMPLE_EPSILON, SBDM_EPSILON
from sit_atconv.generation import SAMPLERS, SDE_DEFAULTS, Sampling
from sit_atconv.latents.codecs import reopen_codec
from sit_atconv.layers.atconv import check_backend

VAE_BATCH = 16  # images per pass through the decoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the network (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", choices=SAMPLERS, default="euler", help="default: euler")
    parser.add_argument(
        "--steps", **limits.EVALUATIONS.flag, default=50,
        help="steps from noise to data, an SDE's last step included; dopri5 sets its own (default: 50)",
    )  # fmt: skip
    sde = parser.add_argument_group(f"SDE samplers ({', '.join(SDE_SAMPLERS)})")
    sde.add_argument("--diffusion", choices=DIFFUSIONS, help=f"w(t) (default: {SDE_DEFAULTS['diffusion']})")
    sde.add_argument(
        "--diffusion-norm", **limits.DIFFUSION_NORM.flag, metavar="NORM",
        help="w(t) is multiplied by it; with --diffusion decreasing w(t) = (NORM cos(pi t) + 1)^2 / 4 "
        f"(default: {SDE_DEFAULTS['diffusion_norm']:g})",
    )  # fmt: skip
    sde.add_argument("--last-step", choices=LAST_STEPS, help=f"default: {SDE_DEFAULTS['last_step']}")
    sde.add_argument(
        "--last-step-size", **limits.LAST_STEP_SIZE.flag, metavar="H",
        help=f"the last step goes from t = 1 - H to 1 (default: {SDE_DEFAULTS['last_step_size']:g})",
    )  # fmt: skip
    parser.add_argument(
        "--cfg", **limits.GUIDANCE.flag, default=1.5, metavar="SCALE", help="guidance scale; 1 is none (default: 1.5)"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt", required=True, metavar="PATH", help="run folder, checkpoint, its ema/ folder, or a model"
    )
    add_sampler_options(parser)
    parser.add_argument("--cfg-channels", choices=CHANNELS, default="all", help="latent channels guided (default: all)")
    parser.add_argument(
        "--cfg-interval", **limits.TIME.flag, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="guidance acts for t in it, t = 0 noise, t = 1 data (default: 0 1)",
    )  # fmt: skip
    parser.add_argument(
        "--epsilon", **limits.EPSILON.flag, metavar="E",
        help=f"how far t keeps from 0 or 1 where the flow is singular there (default: {SAMPLE_EPSILON:g}; "
        f"{SBDM_EPSILON:g} with --diffusion sbdm where alpha vanishes)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", **limits.SEED.flag, default=0, help="noise of image i is drawn from (seed, i) (default: 0)"
    )
    parser.add_argument(
        "--batch", **limits.BATCH.flag, default=64, metavar="N", help="images per network call (default: 64)"
    )
    parser.add_argument(
        "--vae", metavar="PATH", help="the autoencoder of a model alone, or of a checkpoint's that moved"
    )
    add_device_options(parser)


def sampling_of(args: argparse.Namespace, **others) -> Sampling:
    """The sampling that `add_sampler_options` read; others: fields of Sampling beside those."""
    sde = {name: getattr(args, name) for name in SDE_DEFAULTS}
    return Sampling(args.sampler, args.steps, args.cfg, **sde, **others)


def sampling_asked(args: argparse.Namespace) -> Sampling:
    """The sampling that `add_sampling_options` read. Raises InputError for a value that cannot be, or does nothing."""
    return sampling_of(
        args,
        guidance_channels=args.cfg_channels,
        guidance_interval=tuple(args.cfg_interval),
        epsilon=args.epsilon,
        seed=args.seed,
    )


def check_one_process() -> None:
    """Raise InputError where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this command runs in one process; start it without a launcher")


@dataclass
class Setup:
    """A trained model, its codec and the sampling asked for, all on the device."""

    trained: Trained
    codec: torch.nn.Module
    sampling: Sampling


def own_device(name: str) -> str:
    """The device of this process where the command line says `name`: of several on CUDA, each has its own.

    Raises InputError for one that several would share.
    """
    kind, _, index = name.partition(":")
    if processes.count() == 1 or kind != "cuda":
        return name
    if index:
        raise InputError(f"--device {name}: {processes.count()} processes take a GPU each; say --device cuda")
    return f"cuda:{processes.local_rank()}"


def setup(args: argparse.Namespace, launched: bool = False) -> Setup:
    """Load what the options name, on the device of this process.

    launched: as one of the processes of a launch, which it has joined; else there may be one only.
    Raises InputError for a bad checkpoint, option, device or missing autoencoder.
    """
    sampling = sampling_asked(args)
    if not launched:
        check_one_process()
    device = resolve_device(own_device(args.device) if launched else args.device)
    trained = load_trained(args.ckpt, DTYPES[args.dtype])
    sampling.check_model(trained.model)
    codec = reopen_codec(trained.stated("codec"), args.vae, VAE_BATCH).to(device)
    trained.model.to(device)
    check_backend(trained.model, device)
    return Setup(trained, codec, sampling)
