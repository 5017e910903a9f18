"""What may go wrong beside a run: signals, and faults that one process finds and all have to answer together."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

import torch
from accelerate import Accelerator

# A launcher passes on what its terminal or scheduler has sent to the whole process group already.
LAUNCHED, SAME_SIGNAL_SECONDS = "TORCHELASTIC_RUN_ID", 2.0


NAMES = ("SIGTERM", "SIGINT", "SIGHUP")  # the last one not on Windows
NUMBERS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a request: `received` is the first one's name, a second one stops at once.

    Under torchrun a signal within two seconds of the first is the first one, passed on. A context manager; outside the
    main thread, where Python takes no handlers, it takes none, and none from a program that Python runs within, which
    it could not put back.
    """

    def __init__(self):
        self.received: str | None = None
        self._before, self._time = {}, 0.0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            ours = [number for number in NUMBERS if signal.getsignal(number) is not None]
            self._before = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def __exit__(self, *error) -> None:
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


def agree(accelerator: Accelerator, *counts: int) -> list[int]:
    """The sums of the counts over all processes; every process must call it at the same place."""
    if accelerator.num_processes == 1:
        return list(counts)
    tensor = torch.tensor(counts, dtype=torch.int64, device=accelerator.device)
    return accelerator.reduce(tensor, "sum").tolist()
