"""Where the models of the page draw: one after the other, whoever asks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Event
from typing import TypeVar

import torch

from sit_atconv.app.form import Drawn, Form, Side, Stop
from sit_atconv.runtime.devices import resolve_device
from sit_atconv.runtime.errors import InputError, named

T = TypeVar("T")


class Stopped(InputError):
    """The user stopped a drawing."""


class Studio:
    """One model, or two that draw from the same form, in a thread of their own: a server answers each request in
    another thread, and a model draws one picture at a time.

    device: of the models. Used as a context, it ends with its thread.
    """

    def __init__(self, sides: Sequence[Side], device: torch.device):
        self.sides, self._stop = list(sides), Event()
        self._worker = ThreadPoolExecutor(1, "studio", initializer=resolve_device, initargs=(str(device),))

    def __enter__(self) -> "Studio":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._worker.shutdown()

    def draw(self, form: Form, tell: Callable[[float, str], None]) -> list[Drawn]:
        """What each model draws by the form. tell: told the share that is done, and a text.

        Raises InputError, in a form of two models with the name of the model, and Stopped.
        """

        def work() -> list[Drawn]:
            self._stop.clear()
            drawn = []
            for number, side in enumerate(self.sides):

                def bar(total: int, number: int = number, title: str = side.title) -> Told:
                    def told(share: float, text: str) -> None:
                        if self._stop.is_set():
                            raise Stopped("stopped; draw again")
                        tell((number + share) / len(self.sides), f"{title}: {text}")

                    return Told(total, told)

                drawn.append(self._named(side, lambda side=side, bar=bar: side.draw(form, bar)))
            return drawn

        return self._alone(work)

    def at(self, drawn: Sequence[Drawn], moment: float) -> list[Stop | None]:
        """Of each drawing the stop that is nearest to a time in [0, 1]; None where its states were not kept."""
        return self._alone(lambda: [each.way and each.way(moment) for each in drawn])

    def stop(self) -> None:
        """End the drawing that is under way, at its next evaluation."""
        self._stop.set()

    def _named(self, side: Side, work: Callable[[], T]) -> T:
        if len(self.sides) == 1:
            return work()
        try:
            with named(side.title):
                return work()
        except InputError:
            if self._stop.is_set():
                raise Stopped("stopped; draw again") from None
            raise

    def _alone(self, work: Callable[[], T]) -> T:
        return self._worker.submit(copy_context().run, work).result()


class Told:
    """A bar of so many images, which tells what share of them is done."""

    def __init__(self, total: int, tell: Callable[[float, str], None]):
        self.total, self.tell, self.done = total, tell, 0

    def note(self, text: str, part: float | None = None) -> None:
        """So many of the next images are done."""
        self.tell((self.done + (part or 0)) / self.total, text)

    def update(self, count: int = 1) -> None:
        """So many images more are done."""
        self.done += count
        self.tell(self.done / self.total, f"{self.done:,} of {self.total:,} images")
