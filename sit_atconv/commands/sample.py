"""Draw images from a trained model into one picture: of random classes, or of the classes asked for.

Each image has the name of its class below it.
"""

import argparse
import time
from pathlib import Path

from sit_atconv.commands.options import add_number, add_out, add_sampling_options, check_models, sampling_asked
from sit_atconv.runtime import limits
from sit_atconv.runtime.classes import ID, Classes
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.files import REPORT, check_out, write_out


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
    add_out(parser, "PNG file (default: grid.png)", default="grid.png")


def run(args: argparse.Namespace) -> None:
    """Draw, write the picture, and say what it took."""
    if args.rows != 1 and not args.classes:
        raise InputError(f"--rows {args.rows} goes with --classes")
    if Path(args.out).suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: must end in .png")
    ids = [int(word) for word in args.classes or () if ID.fullmatch(word)]
    limits.CLASS_ID.check("--classes ", ids)
    check_out(args.out, force=args.force, ours=REPORT)
    args.sampling = sampling_asked(args)
    check_models(args)

    from sit_atconv.runtime.devices import numerics

    with numerics():
        _draw(args)


def _draw(args: argparse.Namespace) -> None:
    import torch

    from sit_atconv.runtime.console import Progress
    from sit_atconv.sampling.graphs import Graphs
    from sit_atconv.sampling.sampling import caption_of, grid_png, noted, random_label, too_large
    from sit_atconv.sampling.schedulers import drawing
    from sit_atconv.sampling.settings import in_short
    from sit_atconv.sampling.setup import setup

    more = {"lora": args.lora, "cache": args.cache}
    ready = setup(args.ckpt, args.sampling, args.dtype, args.device, args.vae, args.compile, **more)
    graphs = Graphs() if args.graphs and not args.scheduler else None
    with in_short():
        draw = drawing(args.scheduler, ready, graphs)
    classes = Classes(ready.trained.model.config.num_classes, ready.trained.id2label)
    with named("--classes"):
        labels = args.rows * [classes.read(word) for word in args.classes or ()]
    if len(labels) > limits.PICTURE.most:
        raise InputError(
            f"--rows {args.rows}: {len(labels):,} images; one picture holds at most {limits.PICTURE.most:,}"
        )
    labels = labels or [random_label(args.seed, index, classes.number) for index in range(args.num)]

    images, nfe, of_guide, start = [], 0, 0, time.perf_counter()
    with Progress(total=len(labels), desc="sample", unit="image") as bar:
        for first in range(0, len(labels), args.batch):
            part = labels[first : first + args.batch]
            indices = range(first, first + len(part))
            model, watch = ready.trained.model, noted(bar, len(part))
            try:
                batch, evaluations = draw(model, ready.codec, indices, part, ready.sampling, args.seed, watch=watch)
            except torch.OutOfMemoryError:
                raise too_large(args.batch, model.device, "a smaller one", graphs) from None
            images.append(batch)
            nfe += evaluations * len(part)
            of_guide += evaluations.of_guide * len(part)
            bar.update(len(part))
    seconds = (time.perf_counter() - start) / len(labels)
    columns = len(args.classes) if args.classes else max(1, round(len(labels) ** 0.5))
    names = [(ready.trained.id2label or {}).get(label, "") for label in range(classes.number)]
    captions = [caption_of(label, names) for label in labels]
    write_out(args.out, grid_png(torch.cat(images), columns, captions), force=args.force)
    guides = f" ({of_guide / len(labels):g} of the guide)" if ready.guide else ""
    print(f"{args.out}: {len(labels)} images, NFE {nfe / len(labels):g}{guides}, {seconds:.3f} s per image")
