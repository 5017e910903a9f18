"""The processes of a launch, which find faults and answer signals together: none waits for one that has left.

What they tell each other is short and goes over gloo, whatever device their networks are on.
"""

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from sit_atconv.errors import InputError

PATIENCE = timedelta(days=7)  # how long a process waits for the others

T = TypeVar("T")


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. No Exception: a library must not take it for a fault of its own."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Processes:
    """All processes of a launch, or the only one. A context manager: outside it, signals are as they were.

    count, rank, local_rank: how many there are, and which this is, of all and on its machine.
    """

    def __init__(self):
        self._state = PartialState(cpu=True, timeout=PATIENCE)
        self.count, self.rank = self._state.num_processes, self._state.process_index
        self.local_rank = self._state.local_process_index
        self._received: int | None = None
        self._working = False
        self._before = {}

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def __enter__(self) -> "Processes":
        if threading.current_thread() is threading.main_thread():  # Python takes no handlers elsewhere
            # None is a handler of a program that Python runs within, which could not be put back.
            ours = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not None]
            self._before = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._state.destroy_process_group()

    def _handle(self, number: int, frame) -> None:
        if self._received is None:  # a launcher may pass on what its terminal has sent to all: one signal, twice
            self._received = number
            if self._working:
                raise Interrupted(number)

    def each(self, task: Callable[[], T]) -> list[T]:
        """What the task returned in every process, in their order. Collective.

        A signal ends the task at once. Raises in every process the InputError or Interrupted of the first that has one.
        """
        result, fault = None, None
        try:
            try:
                self._working = True
                if self._received is not None:
                    raise Interrupted(self._received)
                result = task()
            finally:
                self._working = False
        except InputError as error:
            fault = InputError(str(error))  # every process is about to know it
        except Interrupted as error:
            fault = error
        try:
            answers = gather_object([(result, fault)])
        except RuntimeError:  # gloo's, of a connection that is closed
            raise InputError("another process was killed or has failed; the same command goes on", True) from None
        for _, error in answers:
            if error is not None:
                raise error
        return [answer for answer, _ in answers]

    def main(self, task: Callable[[], T]) -> T:
        """What the task returned in the first process, the only one that does it; see `each`. Collective."""
        return self.each(lambda: task() if self.is_main else None)[0]

    def own_device(self, name: str) -> str:
        """The device of this process where the command line says `name`: of several on CUDA, each has its own.

        Raises InputError for one that several would share.
        """
        kind, _, index = name.partition(":")
        if self.count == 1 or kind != "cuda":
            return name
        if index:
            raise InputError(f"--device {name}: {self.count} processes take a GPU each; say --device cuda")
        return f"cuda:{self.local_rank}"
