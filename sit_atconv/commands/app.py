"""Open a page in the browser on which you draw images from a trained model, or from two side by side.

The page has the options of `sit-atconv sample`, and shows the command line that draws the same images.
"""

import argparse
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sit_atconv.commands import parser_of
from sit_atconv.commands.options import add_device_options, pasted, sampling_asked
from sit_atconv.commands.sample import check_asked, request_of
from sit_atconv.runtime import errors
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.errors import MOST_PORT, InputError
from sit_atconv.runtime.files import check_checkpoint
from sit_atconv.runtime.limits import Range
from sit_atconv.sampling.settings import flag, in_short

if TYPE_CHECKING:
    from sit_atconv.app.form import Form
    from sit_atconv.app.own import Read

PORT = Range(1, MOST_PORT, "ports are numbered so")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ckpt", metavar="CKPT",
        help="run folder, checkpoint, its ema/ folder, or a model, as `sit-atconv sample` takes it; or the folder of a "
        "pipeline of diffusers",
    )  # fmt: skip
    parser.add_argument(
        "beside", nargs="?", metavar="CKPT2",
        help="another one, which draws the same beside it; of a pipeline of diffusers the swapped one, or the delta or "
        "the folder of its swapped model",
    )  # fmt: skip
    add_device_options(parser)
    parser.add_argument("--vae", metavar="PATH", help="the autoencoder of a model alone, or of one that moved")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", **PORT.flag, help="port (default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", action="store_true",
        help="make a public address too, through gradio's servers, for whoever knows it; nothing is public without it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Load the models, and serve the page until Ctrl-C."""
    check_checkpoint(args.ckpt)
    if args.beside is not None and not Path(args.beside).exists():
        raise InputError(f"CKPT2 {args.beside!r}: no such file or folder")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("app: the page needs gradio, which is not installed; pip install 'sit_atconv[app]'")

    from sit_atconv.app.opening import opened
    from sit_atconv.app.serving import serve
    from sit_atconv.app.studio import Studio
    from sit_atconv.runtime.devices import numerics, resolve_device

    device = resolve_device(args.device)
    sides = opened(args.ckpt, args.beside, args.dtype, device, args.vae, reading(args))
    with numerics(), Studio(sides, device) as studio:
        serve(studio, args.host, args.port, args.share)


def reading(args: argparse.Namespace) -> "dict[str, Read]":
    """How the form is read for each checkpoint: as `sit-atconv sample` reads its options."""
    return {path: reader(path, args) for path in filter(None, (args.ckpt, args.beside))}


def reader(ckpt: str, args: argparse.Namespace) -> "Read":
    """How the form is read for a checkpoint."""
    parser = parser_of("sample", "sit-atconv sample")
    fixed = [["--ckpt", ckpt]]
    fixed += [[f"--{name}", value] for name in ("vae", "device") if (value := getattr(args, name)) is not None]
    fixed += [["--dtype", args.dtype]] if args.dtype != parser.get_default("dtype") else []

    def read(form: "Form", ready):
        options = fixed + options_of(form)
        classes = Classes(ready.trained.model.config.num_classes, ready.trained.id2label)
        with errors.named("--classes"):
            for word in filled(form["classes"] or ()):
                classes.read(word)  # an option that stands among the classes would act
        # A value that begins with a dash stays a value after an "=".
        words = [word for name, *values in options for word in joined(name, values)]
        asked = parser.parse_args(words)
        check_asked(asked)
        with in_short():
            sampling = sampling_asked(asked).for_model(ready.trained.model)
        line = pasted("sample", *(word for option in options for word in option), "--out", asked.out)
        return sampling, request_of(asked, ready), line

    return read


def joined(name: str, values: list[str]) -> list[str]:
    """An option as it is parsed."""
    return [f"{name}={values[0]}"] if len(values) == 1 and name != "--classes" else [name, *values]


def options_of(form: "Form") -> list[list[str]]:
    """The options of `sample` that a form asks for, each with its values; what is blank is left out."""
    chosen, count = filled([*(form["classes"] or ())]), filled([form["count"]])
    if chosen:
        options = [["--classes", *chosen], *([["--rows", *count]] if count not in ([], ["1"]) else [])]
    else:
        options = [["--num", *count]] if count else []
    named = {"seed": ["seed"], "sampler": ["sampler"], "steps": ["steps"], "guidance_scale": ["guidance"]}
    for name, fields in (named | {"guidance_interval": ["low", "high"], "size": ["height", "width"]}).items():
        values = filled(form[field] for field in fields)
        if values and not (name == "guidance_interval" and values == ["0", "1"]):
            options.append([flag(name), *values])
    return options


def filled(values: Iterable[Any]) -> list[str]:
    """Values as they are written on a command line, without those that are blank."""
    return [text for value in values if (text := written(value))]


def written(value: Any) -> str:
    """A value of the form as a word of the command line; "" for a blank one."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()
