"""Time models against attention, the paper's form of ATConv, and their own matrix products, interleaved."""

import argparse

from sit_atconv.bench import BASELINES, PASSES
from sit_atconv.commands.options import add_device_options, add_number, add_out, add_settings, sampling_asked
from sit_atconv.runtime import limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME", help="presets, such as SiT-ATConv-XL/2")
    sizes = limits.Range(1, 8_192, "attention over the tokens of more pixels fits no memory")
    parser.add_argument(
        "--sizes", nargs="+", **sizes.flag, metavar="PX", help="image sizes (default: 256; on CUDA 256 512 1024)"
    )
    parser.add_argument(
        "--batch", **limits.BATCH.flag, metavar="B",
        help="images per network evaluation (default: 1; on CUDA 64 at 256 px, 16 at 512, 4 at 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=["forward"],
        help="forward; backward (forward and backward); sampling (a whole guided run); default: forward",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES, default=list(BASELINES),
        help="what is timed beside each model: its attention twin, ATConv as the paper computes it, "
        "its matrix products alone (default: all)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, of the baselines too")
    add_number(parser, "--rounds", limits.ROUNDS, 10, "measurements of each, in turn")
    add_out(parser, "writes STEM.json, STEM.md and STEM.png", default="runs/speed", metavar="STEM")
    add_settings(parser, leave_out=("guidance_channels", "guidance_interval", "guide", "epsilon"))
    add_device_options(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, write the table and the plot, print the table."""
    args.sampling = sampling_asked(args)

    from sit_atconv.bench.speed import run as measure

    measure(args)
