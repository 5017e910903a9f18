"""Processes forked off one that has loaded the libraries: what is killed hundreds of times begins at once."""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path
from select import select
from typing import Any

from tqdm import tqdm

from experiments.drill.rows import ENVIRONMENT
from sit_atconv.reading import read_json

forks = get_context("forkserver")


def preload() -> None:
    """Say what is loaded before the first one is forked off."""
    os.environ.update(ENVIRONMENT)
    forks.set_forkserver_preload(["experiments.drill.preloaded"])


def _call(function: Callable, arguments: tuple, place: str, pipe) -> None:
    said = os.open(os.path.join(place, "said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    set_start_method(None, force=True)  # of a command that a user gives: this process was given its server's
    tqdm.set_lock(threading.RLock())  # one between processes would be left over by each that is killed
    facts: dict[str, Any] = {"status": 1}
    try:
        function(pipe.fileno(), facts, *arguments)
        facts["status"] = 0
    except SystemExit as stop:
        facts["status"] = stop.code or 0
    finally:
        sys.stdout.flush()
        Path(place, "ended").write_text(json.dumps(facts))


@dataclass
class Ended:
    """How a process ended: its status, what it said, and facts that it left, if it was not killed."""

    status: int
    said: str
    facts: dict[str, Any]

    @property
    def refused(self) -> str | None:
        """Its one line, where it refused something."""
        lines = [line for line in self.said.splitlines() if "error: " in line]
        return lines[-1] if self.status == 2 and lines and "Traceback" not in self.said else None


class Forked:
    """A call of function(descriptor, facts, *arguments): it may write bytes to the descriptor, and fill in facts."""

    def __init__(self, function: Callable, *arguments):
        self._place = Path(tempfile.mkdtemp())
        self._pipe, its = forks.Pipe()
        self._process = forks.Process(target=_call, args=(function, arguments, str(self._place), its))
        self._process.start()
        its.close()

    def read(self, timeout: float | None = None) -> bytes:
        """The next byte that it writes; none once it has ended, or after a number of seconds."""
        if timeout is not None and not select([self._pipe], [], [], timeout)[0]:
            return b""
        try:
            return os.read(self._pipe.fileno(), 1)
        except ConnectionError:
            return b""

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> Ended:
        self._process.join()
        self._pipe.close()
        said, ended = self._place / "said", self._place / "ended"
        facts = read_json(ended) if ended.exists() else {"status": -signal.SIGKILL}
        text = said.read_text(errors="replace") if said.exists() else ""
        shutil.rmtree(self._place)
        return Ended(facts.pop("status"), text, facts)
