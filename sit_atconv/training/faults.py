"""What may go wrong beside a run: signals, and faults that one process finds and all have to answer together."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TextIO

import torch
from accelerate import Accelerator

# A launcher passes on what its terminal or scheduler has sent to the whole process group already.
LAUNCHED, SAME_SIGNAL_SECONDS = "TORCHELASTIC_RUN_ID", 2.0


NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a request: `received` is the first one's name, a second one stops at once.

    Under torchrun a signal within two seconds of the first is the first one, passed on. A context manager; outside the
    main thread, where Python takes no handlers, it takes none. Within it nothing is lost with the terminal: writing to
    stdout and stderr may fail without a word, as after Ctrl-C has ended `tee`, or a connection has ended.
    """

    def __init__(self):
        self.received: str | None = None
        self._before, self._time = {}, 0.0
        self._streams = sys.stdout, sys.stderr

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in NUMBERS}
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_Unheard, self._streams)
        return self

    def __exit__(self, *error) -> None:
        sys.stdout, sys.stderr = self._streams
        for number, handler in self._before.items():
            signal.signal(number, handler)

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


class _Unheard:
    """A stream that may be gone."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def agree(accelerator: Accelerator, *counts: int) -> list[int]:
    """The sums of the counts over all processes; every process must call it at the same place."""
    if accelerator.num_processes == 1:
        return list(counts)
    tensor = torch.tensor(counts, dtype=torch.int64, device=accelerator.device)
    return accelerator.reduce(tensor, "sum").tolist()
