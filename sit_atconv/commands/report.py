"""One self-contained HTML page of a run, or of several side by side: samples, curves, metrics, speed, settings.

RUN is the folder of a training run, with its samples in RUN/samples/NAME, or a folder of samples alone: images, with
or without the files that say how they were made and how they score. A result of `sit-atconv frontier` is shown where it
lies in the folder of its run, or next to it.
"""

import argparse
import math
import time
from pathlib import Path

from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import REPORT, check_out, in_use, write_out
from sit_atconv.runtime.signals import Interrupted, Interruptions, stops_told

EVERY, SHARE = 10, 20  # seconds between two pages of a run that goes on, and at least so many times what one takes


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
    parser.add_argument(
        "--follow", action="store_true",
        help="write the page anew every few seconds, as long as a RUN is being trained; a browser that shows it "
        "loads it again",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="HTML", help="the page to write")
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises InputError, and writes none, for a RUN with nothing to report or with a broken file."""
    out = Path(args.out)
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {args.out!r}: must end in .html")
    check_out(out, force=args.force, ours=REPORT)
    going = args.follow and _goes_on(args)
    if going:
        _follow(args)
    _write(args)
    if args.follow and not going:
        say("no RUN is being trained: the page is written once")
    print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)")


def _write(args: argparse.Namespace, again: int | None = None) -> None:
    """Read the runs, and write the page, which is to be loaded again after so many seconds."""
    from sit_atconv.report.page import render
    from sit_atconv.report.runs import read_runs

    runs = read_runs(args.runs)
    if args.nearest or args.nearest_in is not None:
        from sit_atconv.report.nearest import find

        find(runs, args.nearest_in)
    write_out(args.out, render(runs, again).encode("ascii"), force=args.force)


def _goes_on(args: argparse.Namespace) -> bool:
    return any(in_use(Path(run)) for run in args.runs)


def _follow(args: argparse.Namespace) -> None:
    """Write the page again and again, until no RUN is trained any more, or a signal comes, after which it stays.

    A file that is damaged meanwhile costs a warning, and the page stays as it was. Raises InputError where the first
    page cannot be written.
    """
    again, told = EVERY, None
    stopped = f"the page {args.out!r} is as the runs were now; the same command follows them again"
    with stops_told(lambda: stopped), Interruptions() as stops:
        try:
            with stops.working():
                _write(args, again)
                say(f"{args.out!r} is written anew every {again} seconds while a RUN is trained; Ctrl-C ends this")
                while _goes_on(args):
                    time.sleep(again)
                    began = time.monotonic()
                    try:
                        _write(args, again)
                    except InputError as error:
                        if str(error) != told:
                            say(f"warning: {error}; the page stays as it was")
                        told = str(error)
                    again = max(EVERY, math.ceil(SHARE * (time.monotonic() - began)))
        except Interrupted:
            _write(args)
            raise
