"""Give real images their likelihood, in bits per dimension, under a pixel model."""

import argparse

from sit_atconv.commands.options import add_device, add_number, add_out
from sit_atconv.flow.samplers import LEAST_STEPS, SAMPLERS
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, check_one_process
from sit_atconv.runtime.files import check_checkpoint, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="run folder, checkpoint, or its ema/ folder")
    parser.add_argument("--num", **limits.IMAGES.flag, required=True, help="the first N images of the split")
    parser.add_argument(
        "--split", choices=("test", "train"), default="test",
        help="held-out images, by data.held_out or of the digits, or those that the model trained on (default: test)",
    )  # fmt: skip
    probes = limits.Range(1, 10_000, "each is a backward pass in every network call")
    add_number(parser, "--probes", probes, 1, "random probes per image")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dopri5", help="ODE solver (default: dopri5)")
    add_number(parser, "--steps", limits.EVALUATIONS, 50, "dopri5 sets its own")
    add_number(parser, "--seed", limits.SEED, 0, "probes of image i are drawn from (seed, i)")
    add_number(parser, "--batch", limits.BATCH, 64, "images per network call", metavar="N")
    add_device(parser)
    add_out(parser, "JSON file: the mean and every image's", required=True, metavar="FILE")


def run(args: argparse.Namespace) -> None:
    """Write the likelihood of every image, and print the mean."""
    check_one_process()
    if args.steps < (least := LEAST_STEPS.get(args.sampler, 1)):
        raise InputError(f"--steps {args.steps}: --sampler {args.sampler} needs at least {least}; take more")
    check_out(args.out, force=args.force)
    check_checkpoint(args.ckpt)

    from sit_atconv.sampling.likelihood import run as measure

    measure(args)
