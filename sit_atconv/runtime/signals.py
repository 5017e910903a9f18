"""Signals: what work does with SIGTERM, SIGINT and SIGHUP while it goes on.

Outside the main thread Python takes no handlers, and there these classes take none; nor from a program that Python runs
within, which could not be put back.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

# A launcher passes on what its terminal or scheduler has sent to the whole process group already.
LAUNCHED, SAME_SIGNAL_SECONDS = "TORCHELASTIC_RUN_ID", 2.0

ENDING = (signal.SIGINT, signal.SIGTERM)
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)  # the last one not on Windows


@contextmanager
def handled(numbers: Iterable[int], handler: Callable) -> Iterator[None]:
    """While this is open, the handler gets these signals, as `signal.signal` calls it."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in numbers if signal.getsignal(number) is not None]
        before = {number: signal.signal(number, handler) for number in ours}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class _Handling(ExitStack):
    """A context manager within which `_handle` gets the signals `numbers`; a subclass has both."""

    def __enter__(self) -> Self:
        self.enter_context(handled(self.numbers, self._handle))
        return self


class StopSignals(_Handling):
    """SIGTERM, SIGINT and SIGHUP as a request: `received` is the first one's name, a second one stops at once.

    Under torchrun a signal within two seconds of the first is the first one, passed on. A context manager.
    """

    numbers = STOPPING
    received: str | None = None
    _time = 0.0

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._time = signal.Signals(number).name, now
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                text = f"\n{self.received}: finishing the step, then saving; a second signal stops at once\n"
                with suppress(OSError, ValueError, AttributeError):  # closed, or none at all
                    os.write(sys.__stderr__.fileno(), text.encode())
        elif LAUNCHED not in os.environ or now - self._time > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. No Exception: a library must not take it for a fault of its own."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interruptions(_Handling):
    """SIGINT and SIGTERM end what is done within `working` at once; those that come between, at its next beginning.

    So no process is ended where the others wait for its answer. A context manager.
    """

    numbers = ENDING
    _received: int | None = None
    _working = False

    def _handle(self, number: int, frame) -> None:
        if self._received is None:  # a launcher may pass on what its terminal has sent to all: one signal, twice
            self._received = number
            if self._working:
                raise Interrupted(number)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What a signal may end. Raises Interrupted."""
        try:
            self._working = True
            if self._received is not None:
                raise Interrupted(self._received)
            yield
        finally:
            self._working = False


@contextmanager
def stops_told(told: Callable[[], str | None]) -> Iterator[None]:
    """Within it, an Interrupted ends the process with the status of the signal, and stderr has its name and what is
    told; None, and another process tells it."""
    try:
        yield
    except Interrupted as stop:
        if (text := told()) is not None:
            print(f"{signal.Signals(stop.number).name}: {text}", file=sys.stderr)
        sys.exit(128 + stop.number)
