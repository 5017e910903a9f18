"""What a swap of a model's attention would come to, before anyone trains: tokens, arithmetic, the limit of the speed.

Nothing is downloaded, and no weights are needed.
"""

import argparse
import json

from sit_atconv.commands.options import add_device_options, add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a class, such as DiTTransformer2DModel, or a model's folder")
    parser.add_argument(
        "--grid", nargs="+", **limits.Range(1, 4_096, "more tokens a side fit no memory").flag, metavar="N",
        help="tokens: rows and columns, of a video model frames before them (default: the model's own)",
    )  # fmt: skip
    longest = limits.Range(1, 65_536, "longer texts fit no memory")
    parser.add_argument("--text", **longest.flag, metavar="N", help="tokens of text (default: the model's longest)")
    parser.add_argument("--no-timing", action="store_true", help="arithmetic alone: time no layer")
    add_out(parser, "writes what it found to this JSON file too", metavar="FILE")
    add_device_options(parser)


def run(args: argparse.Namespace) -> None:
    """Count, time one layer of each shape, and print the table."""
    if args.grid is not None and len(args.grid) not in (2, 3):
        raise InputError(f"--grid {' '.join(map(str, args.grid))}: give rows and columns, or frames, rows and columns")

    from sit_atconv.runtime.devices import resolve_device
    from sit_atconv.runtime.files import check_out, made_here, write_out
    from sit_atconv.runtime.precision import dtype_of
    from sit_atconv.swap.blank import blank
    from sit_atconv.swap.checking import check_swap

    ours = made_here("model", "macs_before", "macs_after")
    if args.out:
        check_out(args.out, "result", args.force, ours=ours)
    device = None if args.no_timing else resolve_device(args.device)
    check = check_swap(blank(args.model), args.grid, args.text, device, dtype_of(args.dtype))
    if args.out:
        write_out(args.out, json.dumps(check.record(), indent=1, allow_nan=False), "result", args.force, ours=ours)
    print(check)
