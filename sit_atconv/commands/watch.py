"""Show how a training run is doing, until it ends: loss, throughput, time left, and its newest preview in characters.

Off a terminal, a line for each that the run logs. The run knows nothing of it: any number may watch, and end.
"""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

from sit_atconv.commands.options import add_number
from sit_atconv.runtime.errors import InputError, check_one_process
from sit_atconv.runtime.limits import Range
from sit_atconv.runtime.signals import Interrupted, Interruptions, stops_told

PAGE = "report.html"  # in the run's folder
SLOWEST, SHARE = 5, 20  # seconds at least between two pages, and at least so many times what one takes
TRIES = 5  # times in a row that a run may not be read: it is writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="folder of a training run, at work or ended")
    every = Range(1, 3_600, "an hour is long enough")
    add_number(parser, "--every", every, 2, "seconds from one look to the next", metavar="SECONDS")
    parser.add_argument(
        "--open", action="store_true", help=f"write RUN/{PAGE}, open it in a browser, and keep both up to date"
    )


def run(args: argparse.Namespace) -> None:
    """Look, show, wait, until the run ends or a signal comes; a run that has ended is shown once."""
    check_one_process()
    if not Path(args.run_folder).is_dir():
        raise InputError(f"RUN {args.run_folder!r} is no folder; give that of a training run")

    from sit_atconv.report.terminal import look

    shown = [_Terminal() if sys.stdout.isatty() else _Lines()]
    if args.open:
        shown.append(_Page(Path(args.run_folder) / PAGE, args.every))
    at, failed = look(args.run_folder), 0
    with stops_told(lambda: "no longer watched; the run goes on"), Interruptions() as stops:
        try:
            while True:
                for each in shown:
                    each.show(at)
                if at.ended:
                    break
                with stops.working():
                    time.sleep(args.every)
                    try:
                        at, failed = look(args.run_folder), 0
                    except InputError:
                        failed += 1
                        if failed == TRIES:
                            raise
        except (Interrupted, InputError):  # the fifth fault in a row, too
            for each in shown:
                each.end(at)
            raise
    print(f"{args.run_folder}: {at.state}", flush=True)


class _Lines:
    """Plain lines: one for each row of the log, and for each preview."""

    def __init__(self):
        self.rows = self.preview = None

    def show(self, at) -> None:
        from sit_atconv.report.terminal import line

        if at.run.log and at.run.log[-1]["step"] != self.rows:
            self.rows = at.run.log[-1]["step"]
            print(line(at), flush=True)
        if at.run.preview and at.run.preview != self.preview:
            self.preview = at.run.preview
            print(f"preview {self.preview[0]}", flush=True)

    def end(self, at) -> None:
        """Nothing is left to do: the last line is the newest."""


class _Terminal:
    """A terminal, in which each look takes the place of the one before."""

    def __init__(self):
        self.lines = 0

    def show(self, at) -> None:
        from sit_atconv.report.terminal import Colours, screen

        size = shutil.get_terminal_size()
        lines = screen(at, size.columns, size.lines, Colours.of(dict(os.environ)))
        back = f"\x1b[{self.lines}F" if self.lines else ""
        print(f"{back}\x1b[J" + "\n".join(lines), flush=True)
        self.lines = len(lines)

    def end(self, at) -> None:
        """Nothing is left to do: the last screen stays."""


class _Page:
    """The report, which is written anew when there is more to tell, and which the browser loads again by itself."""

    def __init__(self, path: Path, every: int):
        from sit_atconv.runtime.files import REPORT, check_out

        self.path, self.told, self.due, self.faulty = check_out(path, "report", ours=REPORT), None, 0.0, False
        self.least = self.again = max(SLOWEST, every)

    def show(self, at) -> None:
        first, began = self.told is None, time.monotonic()
        rows = [len(each) for each in (at.run.log, at.run.scores, at.run.validation, at.run.sets, at.run.frontiers)]
        news = rows, at.run.preview, at.run.checkpoint.get("step")
        if at.ended:
            self.end(at)
        elif news != self.told and began >= self.due:
            if self._write(at, self.again):
                self.told = news
            self.again = max(self.least, math.ceil(SHARE * (time.monotonic() - began)))
            self.due = began + self.again
        if first:
            self._open()

    def end(self, at) -> None:
        """The page as it stays: the browser loads it no more."""
        self._write(at, None)

    def _write(self, at, again: int | None) -> bool:
        """Write the page, and say whether that was done. Files that cannot be read, as they may be half written, cost
        one warning; of the first page they raise InputError."""
        from sit_atconv.report.page import render
        from sit_atconv.runtime.console import say
        from sit_atconv.runtime.files import write_out

        try:
            write_out(self.path, render([at.run], again).encode("ascii"), "report")
        except InputError as error:
            if self.told is None:
                raise
            if not self.faulty:
                say(f"warning: {error}; the page stays as it was")
            self.faulty = True
            return False
        self.faulty = False
        return True

    def _open(self) -> None:
        import webbrowser

        if not webbrowser.open(self.path.resolve().as_uri()):
            print(f"there is no browser here; open {self.path}", file=sys.stderr)
