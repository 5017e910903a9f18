"""Write samples by index, one file each or one npz, with a manifest; go on where the same command was stopped."""

import argparse

from sit_atconv.commands.options import add_out, add_sampling_options, check_models, is_alone, sampling_asked
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling import FORMATS
from sit_atconv.sampling.samples import check_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_options(parser)
    parser.add_argument("--num", **limits.IMAGES.flag, required=True, help="number of images")
    add_out(parser, "new folder for the images, or one that the same command began", required=True, metavar="DIR")
    parser.add_argument(
        "--labels", default="balanced", metavar="balanced|random|FILE",
        help="image i has class i mod classes, one drawn from (seed, i), or that of line i + 1 of a file, which may be "
        "an id or a name (default: balanced)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="png",
        help="a PNG per image, or one samples.npz as ADM's evaluator reads it (default: png)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Make the samples, or what is missing of them; every process of a launch runs this."""
    if not args.out:
        raise InputError("--out '': give the name of a new folder, or of one that the same command began")
    args.sampling = sampling_asked(args)
    if is_alone():
        check_place(args.out, args.force)
        check_models(args)

    from sit_atconv.sampling.generate import run as generate

    generate(args)
