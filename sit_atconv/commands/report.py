"""One self-contained HTML page of a run, or of several side by side: samples, curves, metrics, speed, settings.

RUN is the folder of a training run, with its samples in RUN/samples/NAME, or a folder of samples alone: images, with
or without the files that say how they were made and how they score.
"""

import argparse
from pathlib import Path

from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import REPORT, check_out, write_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training run, or of samples")
    parser.add_argument("--out", required=True, metavar="HTML", help="the page to write")
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Write the page. Raises InputError, and writes none, for a RUN with nothing to report or with a broken file."""
    from sit_atconv.report.page import render
    from sit_atconv.report.runs import read_runs

    out = Path(args.out)
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {args.out!r}: must end in .html")
    check_out(out, force=args.force, ours=REPORT)
    page = render(read_runs(args.runs))
    write_out(out, page.encode("ascii"), force=args.force)
    print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)")
