"""What the experiments that train a run per arm and seed have in common: their arguments, and runs side by side."""

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sit_atconv.commands.options import add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, InputError
from sit_atconv.runtime.signals import Interruptions, stops_told

Result = TypeVar("Result")


def parser_of(name: str, about: str) -> ArgumentParser:
    """The parser of `python -m experiments.NAME`. about: its module's docstring."""
    parser = ArgumentParser(prog=f"python -m experiments.{name}", description=about.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", **limits.SEED.flag, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / name, help="folder of the runs")
    add_out(parser, "folder of the tables", type=Path, default=Path("experiments/results") / name)
    parser.add_argument(
        "--processes", **limits.PROCESSES.flag, default=os.cpu_count(), help="runs at once (default: one per core)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the commands that are left, and run none")
    return parser


def parsed(parser: ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises InputError for a seed that is given twice."""
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {args.seeds}: give different ones")
    return args


def side_by_side(calls: Sequence[Callable[[], Result]], label: str, args: argparse.Namespace) -> list[Result]:
    """What the calls give, in their order, `args.processes` of them at once.

    A signal that stops this process ends it once the runs under way have ended, to which a terminal sends it too; no
    other begins, and one line says that the same command goes on.
    """
    there = f"whole runs are in {str(args.runs)!r}; the same command goes on"
    with Interruptions() as signals, stops_told(lambda: there), ThreadPoolExecutor(args.processes) as pool:
        tasks = [pool.submit(call) for call in calls]
        try:
            with signals.working():
                bar = Progress(tasks, desc=label, unit="run", disable=args.dry_run, delay=1)
                return [task.result() for task in bar]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
