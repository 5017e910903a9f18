"""Options that several commands have; read without torch."""

import argparse
import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Iterable
from typing import Any

from sit_atconv.config.shipped import set_names
from sit_atconv.flow.sde import SDE_SAMPLERS
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, add_force, named
from sit_atconv.runtime.fields import CHOICES, DEFAULT, FLAG, HELP, WHEN
from sit_atconv.runtime.files import check_checkpoint
from sit_atconv.runtime.limits import RANGE, Range
from sit_atconv.runtime.precision import DTYPES
from sit_atconv.sampling import SCHEDULERS
from sit_atconv.sampling.caches import parse
from sit_atconv.sampling.settings import LAST_STEP, OF_SDE, Sampling, flag, in_short
from sit_atconv.scoring import BATCH


def is_alone() -> bool:
    """Whether this is the only process: of several, all are told together of what one of them lacks."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe of a command, and what is laid over it."""
    parser.add_argument("recipe", help="name of a recipe, see `sit-atconv recipes`, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value",
        help=f"laid over the recipe, e.g. train.lr=2e-4; or the name of a set of keys: {', '.join(set_names())}",
    )  # fmt: skip


def add_training_mode(parser: argparse.ArgumentParser) -> None:
    """What a trainer does with its recipe."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run", action="store_true",
        help="print size, compute, memory, schedule, and what a start would do at run.out, then stop; data and vae "
        "are opened where the recipe does not state what they decide",
    )  # fmt: skip
    mode.add_argument("--resume", action="store_true", help="refuse to begin anew; a run goes on anyway")
    mode.add_argument(
        "--force", action="store_true", help="set aside (NAME.aside) what is at run.out and is not this run, and begin"
    )


def pasted(*words: str) -> str:
    """A command of `sit-atconv` as a shell takes it."""
    return shlex.join(["sit-atconv", *words])


def override(key: str, value: str) -> str:
    """A text laid over a recipe, as `config.load_recipe` takes it."""
    special = value in ("", "null", "~") or value[0] in "\"'"
    return f"{key}={json.dumps(value, ensure_ascii=False) if special else value}"


def tell_plan(text: str) -> None:
    """Print a plan as a training begins: where `--dry-run` prints it, on stdout, so that an error is alone on stderr.
    At once: stdout may be a file, in which it would stand at the end alone."""
    print(text, flush=True)


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
    parser.add_argument("--device", help="default: cuda where there is one")


def add_settings(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """The options of Sampling, each stored under its name there, less those left out."""
    of_sde, plain = parser.add_argument_group(f"SDE samplers ({', '.join(SDE_SAMPLERS)})"), Sampling()
    for entry in dataclasses.fields(Sampling):
        if entry.name in leave_out:
            continue
        said, default = entry.metadata, getattr(plain, entry.name)
        options = said[RANGE].flag if RANGE in said else {"choices": said[CHOICES]} if CHOICES in said else {}
        options |= said.get(FLAG, {})
        if "path" in said:
            options |= {"metavar": "PATH"}
        if isinstance(default, list):
            options |= {"nargs": 2, "metavar": ("LOW", "HIGH")}
        acting = said.get(DEFAULT, default)
        shown = "" if acting is None else f" (default: {_text(acting)})"
        (of_sde if said.get(WHEN) in (OF_SDE, LAST_STEP) else parser).add_argument(
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
    parser.add_argument(
        "--lora", metavar="PATH",
        help="run that trained a LoRA, its checkpoint, or adapters as diffusers stores them: added to the weights of "
        "--ckpt, which may be a public file, too, then",
    )  # fmt: skip
    add_settings(parser)
    parser.add_argument(
        "--scheduler", choices=SCHEDULERS, help="a diffusers scheduler in the place of --sampler; --steps are its steps"
    )
    parser.set_defaults(sampler=None)  # told from one that was asked for
    add_number(parser, "--seed", limits.SEED, 0, "noise of image i is drawn from (seed, i)")
    add_number(parser, "--batch", limits.BATCH, 64, "images per network call", metavar="N")
    parser.add_argument(
        "--vae", metavar="PATH", help="the autoencoder of a model alone, or of a checkpoint's that moved"
    )
    add_device_options(parser)
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks (torch.compile): some minutes first, faster then"
    )
    parser.add_argument(
        "--cache", metavar="SPEC",
        help="leave blocks out where they change little: first_block:THRESHOLD, taylorseer[:INTERVAL[:ORDER]], or "
        "mag:THRESHOLD after `sit-atconv calibrate`",
    )  # fmt: skip
    parser.add_argument(
        "--no-cuda-graphs", dest="graphs", action="store_false",
        help="launch every kernel anew, to find a fault or to save memory; the images are the same (a CPU has no "
        "graphs)",
    )  # fmt: skip


def check_models(args: argparse.Namespace) -> None:
    """Raise InputError where --ckpt, --lora or --guide name nothing in which a model, or adapters of one, may be."""
    if args.lora is None:
        check_checkpoint(args.ckpt)
    else:
        for option in ("ckpt", "lora"):
            if not os.path.exists(path := getattr(args, option)):
                raise InputError(f"--{option} {path}: no such file or folder")
    if args.guide is not None:
        with named(flag("guide")):
            check_checkpoint(args.guide)


def sampling_asked(args: argparse.Namespace) -> Sampling:
    """The settings that `add_settings` read. Raises InputError for a value that cannot be, or does nothing, and for a
    --cache that is none."""
    if getattr(args, "cache", None) is not None:
        parse(args.cache)
    asked = {entry.name: vars(args)[entry.name] for entry in dataclasses.fields(Sampling) if entry.name in args}
    if scheduler := getattr(args, "scheduler", None):
        for name, plain in (("sampler", None), ("start", None), ("epsilon", None), ("grid", Sampling.grid)):
            if (value := asked[name]) != plain:
                words = " ".join(map(str, value if isinstance(value, list) else [value]))
                raise InputError(f"{flag(name)} {words} does nothing with --scheduler {scheduler}; leave one out")
        if not args.graphs:
            raise InputError(f"--no-cuda-graphs does nothing with --scheduler {scheduler}; leave one out")
    with in_short():
        return Sampling(**asked | {"sampler": asked["sampler"] or Sampling.sampler})


def add_extractor_arguments(parser: argparse.ArgumentParser, default: str | None = "inception") -> None:
    """What all commands that extract take: what may follow a recipe, before options or after them; and the options.

    default: the extractor; None where the reference decides.
    """
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="laid over a recipe, e.g. data.root=DIR data.image_size=64",
    )
    parser.add_argument(
        "--extractor", default=default, metavar="SPEC",
        help='inception, digits, dinov2, "dinov2:NAME" of timm, "dinov2:local-dir:FOLDER", "attnet:RUN" with '
        "the folder of a run of `classify`, or one of its checkpoints, for a classifier of your own, or "
        '"package.module:callable" for a module of your own '
        f"(default: {default or 'what the file or features record; digits for the digits; inception for images'})",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="FILE", help="Inception weights (default: torch's hub cache)")
    parser.add_argument(
        "--batch", **limits.BATCH.flag, default=BATCH, metavar="B", help=f"images at once (default: {BATCH})"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--allow-lossy", action="store_true", help="let JPEG and WebP in")


def register_extractors() -> None:
    """Have the scoring know the extractors that need a model of this library, which it does not see itself."""
    from sit_atconv.classification.extractor import ATTNET
    from sit_atconv.scoring.extractor import register

    register(ATTNET)


def add_features_argument(parser: argparse.ArgumentParser) -> None:
    """The option of commands that leave features behind."""
    parser.add_argument(
        "--features", metavar="DIR",
        help="folder to put features into, and to find them in (default: `features` in the folder of the images, or "
        "beside it NAME.features, where they lie in folders of classes)",
    )  # fmt: skip
