"""Draw images from a trained model into one picture: of random classes, or of the classes asked for.

Each image has the name of its class below it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.commands.options import add_number, add_out, add_sampling_options, check_models, sampling_asked
from sit_atconv.runtime import limits
from sit_atconv.runtime.classes import ID, Classes
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.files import REPORT, check_out, write_out

if TYPE_CHECKING:
    from sit_atconv.sampling.picture import Request
    from sit_atconv.sampling.setup import Setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_options(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--classes", nargs="+", metavar="CLASS",
        help="one image of each, in this order: ids, or names where the checkpoint has them",
    )  # fmt: skip
    add_number(which, "--num", limits.PICTURE, 16, "images of random classes")
    parser.add_argument(
        "--rows", **limits.PICTURE.flag, default=1, help="with --classes: rows of the grid, one image per class each"
    )
    parser.add_argument(
        "--size", **limits.PIXELS.flag, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of an image in pixels (default: those that the model was trained on, and draws best)",
    )  # fmt: skip
    add_out(parser, "PNG file (default: grid.png)", default="grid.png")


def run(args: argparse.Namespace) -> None:
    """Draw, write the picture, and say what it took."""
    if Path(args.out).suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: must end in .png")
    check_asked(args)
    check_out(args.out, force=args.force, ours=REPORT)
    args.sampling = sampling_asked(args)
    check_models(args)

    from sit_atconv.runtime.devices import numerics

    with numerics():
        _draw(args)


def check_asked(args: argparse.Namespace) -> None:
    """Raise InputError for options of the images that do not go together, before anything is loaded."""
    if args.rows != 1 and not args.classes:
        raise InputError(f"--rows {args.rows} goes with --classes")
    ids = [int(word) for word in args.classes or () if ID.fullmatch(word)]
    limits.CLASS_ID.check("--classes ", ids)


def request_of(args: argparse.Namespace, ready: "Setup") -> "Request":
    """The images that the options ask a model for. Raises InputError for what is no class of the model, for more
    images than a picture holds, and for a size that its patches do not fill."""
    from sit_atconv.sampling.picture import Request, latent_size
    from sit_atconv.sampling.sampling import random_label

    classes = Classes(ready.trained.model.config.num_classes, ready.trained.id2label)
    with named("--classes"):
        labels = args.rows * [classes.read(word) for word in args.classes or ()]
    if len(labels) > limits.PICTURE.most:
        raise InputError(
            f"--rows {args.rows}: {len(labels):,} images; one picture holds at most {limits.PICTURE.most:,}"
        )
    labels = labels or [random_label(args.seed, index, classes.number) for index in range(args.num)]
    columns = len(args.classes) if args.classes else max(1, round(len(labels) ** 0.5))
    return Request(labels, columns, args.seed, args.batch, latent_size(args.size, ready))


def _draw(args: argparse.Namespace) -> None:
    from sit_atconv.runtime.console import Progress
    from sit_atconv.sampling.graphs import Graphs
    from sit_atconv.sampling.picture import draw
    from sit_atconv.sampling.schedulers import drawing
    from sit_atconv.sampling.settings import in_short
    from sit_atconv.sampling.setup import setup

    more = {"lora": args.lora, "cache": args.cache}
    ready = setup(args.ckpt, args.sampling, args.dtype, args.device, args.vae, args.compile, **more)
    graphs = Graphs() if args.graphs and not args.scheduler else None
    with in_short():
        by = drawing(args.scheduler, ready, graphs)
    request = request_of(args, ready)
    with Progress(total=len(request.labels), desc="sample", unit="image") as bar:
        picture = draw(ready, request, by, bar, graphs)
    write_out(args.out, picture.png(), force=args.force)
    guides = f" ({picture.of_guide:g} of the guide)" if ready.guide else ""
    count = len(request.labels)
    print(f"{args.out}: {count} images, NFE {picture.nfe:g}{guides}, {picture.seconds / count:.3f} s per image")
