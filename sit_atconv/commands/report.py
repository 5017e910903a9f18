"""One self-contained HTML page of a run, or of several side by side: samples, curves, metrics, speed, settings.

RUN is the folder of a training run, with its samples in RUN/samples/NAME, or a folder of samples alone: images, with
or without the files that say how they were made and how they score. A result of `sit-atconv frontier` is shown where it
lies in the folder of its run, or next to it.
"""

import argparse
from pathlib import Path

from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import REPORT, check_out, write_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run, or of samples")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--nearest", action="store_true",
        help="show below each sample the training image that is nearest to it in pixels, of those that the run's "
        "recipe.yaml names",
    )  # fmt: skip
    beside.add_argument(
        "--nearest-in", metavar="DATA",
        help="the same, of these training images: a recipe (.yaml), an npz with arr_0, or a folder of images, of the "
        "samples' size",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="HTML", help="the page to write")
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises InputError, and writes none, for a RUN with nothing to report or with a broken file."""
    out = Path(args.out)
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {args.out!r}: must end in .html")
    check_out(out, force=args.force, ours=REPORT)

    from sit_atconv.report.page import render
    from sit_atconv.report.runs import read_runs

    runs = read_runs(args.runs)
    if args.nearest or args.nearest_in is not None:
        from sit_atconv.report.nearest import find

        find(runs, args.nearest_in)
    write_out(args.out, render(runs).encode("ascii"), force=args.force)
    print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)")
