"""Average the snapshots of a run to another width of the EMA than was tracked."""

import argparse
from pathlib import Path

from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run with snapshots")
    parser.add_argument(
        "--std", **limits.EMA_STD.flag, required=True, help="width of the average, relative to the step"
    )
    parser.add_argument(
        "--step", **limits.STEPS.flag, metavar="N", help="where it ends; there must be a snapshot (default: newest)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the model")
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Write the averaged model, and say how near its profile comes to the one wanted."""
    check_out(args.out, force=args.force)
    if not Path(args.run_folder).is_dir():
        raise InputError(f"run {args.run_folder!r}: no such folder")

    from sit_atconv.training.posthoc import write_model

    found = write_model(Path(args.run_folder), args.std, args.step, Path(args.out), args.force)
    print(
        f"{args.out}: std {found.std:g} at step {found.step:,} out of {len(found.snapshots)} snapshots, "
        f"relative error of the profile {found.error:.1e}"
    )
