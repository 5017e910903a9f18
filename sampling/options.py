"""Command-line options that every sampling command shares."""

import argparse
import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sit_atconv import limits, processes
from sit_atconv.checkpoint import Trained, load_trained
from sit_atconv.devices import resolve_device
from sit_atconv.errors import InputError, add_force
from sit_atconv.fields import CHOICES, DEFAULT, HELP, WHEN
from sit_atconv.flow.sde import SDE_SAMPLERS
from sit_atconv.latents.codecs import reopen_codec
from sit_atconv.layers.atconv import check_backend
from sit_atconv.limits import RANGE, Range
from sit_atconv.sampling.settings import Sampling

# What a setting is called on a command line and in a table, where that is not its name.
SHORT = {"guidance_scale": "cfg", "guidance_channels": "cfg_channels", "guidance_interval": "cfg_interval"}
VAE_BATCH = 16  # images per pass through the decoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_number(parser: argparse.ArgumentParser, name: str, within: Range, default: Any, about: str, **more) -> None:
    """The option of a number within a range; its help ends in the default. more: as `add_argument` takes it."""
    parser.add_argument(name, **within.flag, default=default, help=f"{about} (default: {default})", **more)


def add_out(parser: argparse.ArgumentParser, about: str, **more) -> None:
    """The option of what is written, and --force beside it. more: as `add_argument` takes it."""
    parser.add_argument("--out", help=about, **more)
    add_force(parser)


def add_device_options(parser: argparse.ArgumentParser, dtypes: Iterable[str] = DTYPES) -> None:
    parser.add_argument("--dtype", choices=dtypes, default="fp32", help="dtype of the network (default: fp32)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def flag(name: str) -> str:
    """The flag of an option; SHORT where its name is another one there."""
    return f"--{SHORT.get(name, name).replace('_', '-')}"


def add_settings(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """The options of Sampling, each stored under its name there, less those left out."""
    of_sde, plain = parser.add_argument_group(f"SDE samplers ({', '.join(SDE_SAMPLERS)})"), Sampling()
    for entry in dataclasses.fields(Sampling):
        if entry.name in leave_out:
            continue
        said, default = entry.metadata, getattr(plain, entry.name)
        options = said[RANGE].flag if RANGE in said else {"choices": said[CHOICES]}
        if isinstance(default, list):
            options |= {"nargs": 2, "metavar": ("LOW", "HIGH")}
        acting = said.get(DEFAULT, default)
        shown = "" if acting is None else f" (default: {_text(acting)})"
        (of_sde if WHEN in said else parser).add_argument(
            flag(entry.name), dest=entry.name, **options, default=default, help=f"{said[HELP]}{shown}"
        )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return value if isinstance(value, str) else f"{value:g}"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt", required=True, metavar="PATH", help="run folder, checkpoint, its ema/ folder, or a model"
    )
    add_settings(parser)
    add_number(parser, "--seed", limits.SEED, 0, "noise of image i is drawn from (seed, i)")
    add_number(parser, "--batch", limits.BATCH, 64, "images per network call", metavar="N")
    parser.add_argument(
        "--vae", metavar="PATH", help="the autoencoder of a model alone, or of a checkpoint's that moved"
    )
    add_device_options(parser)


def sampling_asked(args: argparse.Namespace) -> Sampling:
    """The settings that `add_settings` read. Raises InputError for a value that cannot be, or does nothing."""
    with in_short():
        return Sampling(
            **{entry.name: vars(args)[entry.name] for entry in dataclasses.fields(Sampling) if entry.name in args}
        )


@contextmanager
def in_short() -> Iterator[None]:
    """Within it, an InputError calls the settings as the command line does."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for name in SHORT:
            text = text.replace(f"{name}=", f"{flag(name)}=")
        raise InputError(text) from None


def check_one_process() -> None:
    """Raise InputError where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this command runs in one process; start it without a launcher")


@dataclass
class Setup:
    """A trained model and its codec, on the device, and the settings asked for, as they are for the model."""

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
    with in_short():
        sampling = sampling.for_model(trained.model)
    codec = reopen_codec(trained.stated("codec"), args.vae, VAE_BATCH).to(device)
    trained.model.to(device)
    check_backend(trained.model, device)
    return Setup(trained, codec, sampling)
