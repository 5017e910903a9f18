"""python sample.py --ckpt PATH [--classes 0 1 2 | --num N]: draw images from a trained model into one grid."""

import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from sampling.options import add_number, add_out, add_sampling_options, setup
from sampling.schedulers import SCHEDULERS, make_scheduler
from sampling.schedulers import generate as generate_scheduled
from sit_atconv import limits
from sit_atconv.devices import numerics
from sit_atconv.errors import ArgumentParser, InputError, command
from sit_atconv.files import REPORT, check_out, write_out
from sit_atconv.sampling.sampling import check_labels, generate, grid_png, random_label


@command
@numerics()
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="sample.py", description=__doc__)
    add_sampling_options(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--classes", **limits.CLASS_ID.flag, nargs="+", metavar="ID", help="one image of each, in this order"
    )
    add_number(which, "--num", limits.PICTURE, 16, "images of random classes")
    parser.add_argument(
        "--rows", **limits.PICTURE.flag, default=1, help="with --classes: rows of the grid, one image per class each"
    )
    parser.add_argument(
        "--scheduler", choices=SCHEDULERS, help="a diffusers scheduler in the place of --sampler; --steps are its steps"
    )
    parser.set_defaults(sampler=None)  # told from one that was asked for
    add_out(parser, "PNG file (default: grid.png)", default="grid.png")
    args = parser.parse_args(argv)
    if args.rows != 1 and not args.classes:
        raise InputError(f"--rows {args.rows} goes with --classes")
    if Path(args.out).suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: must end in .png")
    check_out(args.out, force=args.force, ours=REPORT)
    if args.scheduler and args.sampler:
        raise InputError(f"--sampler {args.sampler} does nothing with --scheduler {args.scheduler}; leave one out")
    if args.scheduler and args.epsilon is not None:
        raise InputError(f"--epsilon {args.epsilon:g} does nothing with --scheduler {args.scheduler}; leave one out")
    args.sampler = args.sampler or "euler"
    ready = setup(args)
    draw = generate
    if args.scheduler:
        draw = partial(generate_scheduled, make_scheduler(args.scheduler, ready.trained.model))
    classes = ready.trained.model.config.num_classes
    labels = args.rows * args.classes if args.classes else []
    if len(labels) > limits.PICTURE.most:
        raise InputError(
            f"--rows {args.rows}: {len(labels):,} images; one picture holds at most {limits.PICTURE.most:,}"
        )
    check_labels(labels, classes)
    labels = labels or [random_label(args.seed, index, classes) for index in range(args.num)]

    images, nfe, start = [], 0, time.perf_counter()
    with tqdm(total=len(labels), desc="sample", unit="image") as bar:
        for first in range(0, len(labels), args.batch):
            part = labels[first : first + args.batch]
            indices = range(first, first + len(part))
            batch, evaluations = draw(ready.trained.model, ready.codec, indices, part, ready.sampling, args.seed)
            images.append(batch)
            nfe += evaluations * len(part)
            bar.update(len(part))
    seconds = (time.perf_counter() - start) / len(labels)
    columns = len(args.classes) if args.classes else max(1, round(len(labels) ** 0.5))
    write_out(args.out, grid_png(torch.cat(images), columns), force=args.force)
    print(f"{args.out}: {len(labels)} images, NFE {nfe / len(labels):g}, {seconds:.3f} s per image")


if __name__ == "__main__":
    main()
