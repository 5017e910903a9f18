"""What is said on stderr while something works: nothing ends where nobody hears it any more."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TextIO

EVERY = 10.0  # seconds from a line of progress to the next, off a terminal
REDRAWN = 0.2  # seconds from one note on a bar to the next, on a terminal


class Unheard:
    """A stream that may be gone, as after Ctrl-C has ended `tee`, or a connection has ended: writing then does nothing.

    It equals the stream, by which tqdm knows the bars that a line goes between.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def __eq__(self, other) -> bool:
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def say(text: str) -> None:
    """Write a line to stderr, between the bars that are there."""
    stream, bars = Unheard(sys.stderr), sys.modules.get("tqdm")
    if bars is None:  # nothing has loaded it, and there is no bar
        stream.write(f"{text}\n")
    else:
        bars.tqdm.write(text, file=stream)


@contextmanager
def bars_of(library: ModuleType) -> Iterator[None]:
    """Within it, bars of a library of Hugging Face's are left out off a terminal, where each is one endless line."""
    if Unheard(sys.stderr).isatty() or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


class Progress:
    """How far something has come: one bar of tqdm on a terminal; else plain lines, at most one in EVERY seconds and one
    at the end.

    A line says what is done, the number of the unit, the note, the rate, and the time that is left:
    `train: step 1,200 of 400,000, loss 0.1234, 12.5 step/s, 8:51:44 left`.

    iterable: what it goes through; otherwise `update` says what is done. initial: units that were done before. leave:
    whether something stays of it at the end. delay: seconds in which nothing is shown.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        desc: str = "",
        total: int | None = None,
        *,
        unit: str = "it",
        unit_scale: bool = False,
        initial: int = 0,
        leave: bool = True,
        delay: float = 0.0,
        disable: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.desc, self.total, self.unit, self.unit_scale = iterable, desc, total, unit, unit_scale
        self.initial = self.done = self.told = initial
        self.leave, self.delay, self.disable, self.clock = leave, delay, disable, clock
        self.stream, self.text, self.part, self.within, self.bar = Unheard(stream or sys.stderr), "", 0.0, False, None
        self.start = self.last = clock()
        if not disable and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                desc=desc, total=total, unit=unit, unit_scale=unit_scale, initial=initial, leave=leave, delay=delay,
                file=self.stream,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        with self:
            for each in self.iterable:
                yield each
                self.update()

    def update(self, count: int = 1) -> None:
        """So many units more are done."""
        self.done += count
        if self.within:
            self._note("", 0.0, within=False)
        if self.bar is not None:
            self.bar.update(count)
        else:
            self._tell_if_due()

    def note(self, text: str, part: float | None = None) -> None:
        """What is to be said beside the numbers from now on. part: how much of the next units is done, in units; then
        until they are."""
        self._note(text, part or 0.0, within=part is not None)
        if self.bar is None:
            self._tell_if_due()
        elif (now := self.clock()) - self.last >= REDRAWN:
            self.last = now
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.leave and not self.disable and self.done > self.told and self.clock() - self.start >= self.delay:
            self._tell(ended=True)

    def _note(self, text: str, part: float, within: bool) -> None:
        self.text, self.part, self.within = text, part, within
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def _tell_if_due(self) -> None:
        if not self.disable and self.clock() - self.last >= EVERY:
            self._tell()

    def _tell(self, ended: bool = False) -> None:
        self.last, self.told = self.clock(), self.done
        ended = ended or self.done == self.total
        of = f" of {self._number(self.total)}" if self.total else ""
        parts = [("" if self.unit_scale else f"{self.unit} ") + self._number(self.done) + of]
        parts += [self.text] if self.text else []
        seconds, came = self.last - self.start, self.done + self.part - self.initial
        if seconds > 0 and came > 0:
            rate = came / seconds
            if self.unit_scale:
                parts.append(f"{self._number(rate)}/s")
            else:
                parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}")
            if not ended and self.total:
                parts.append(f"{clock_told((self.total - self.done - self.part) / rate)} left")
        if ended:
            parts.append(f"{clock_told(seconds)} in all")
        self.stream.write(f"{self.desc}: {', '.join(parts)}\n")
        self.stream.flush()

    def _number(self, value: float) -> str:
        if not self.unit_scale:
            return f"{value:,}"
        from tqdm import tqdm

        return tqdm.format_sizeof(value) + self.unit


def clock_told(seconds: float) -> str:
    """Seconds as bars of tqdm have them: 05:07, or 1:05:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
