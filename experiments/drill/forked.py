"""Processes of the drill: how one ended, and those forked off one that has loaded the libraries and begin at once."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path
from select import select
from typing import Any

from tqdm import tqdm

from experiments.drill.rows import expect
from sit_atconv.runtime.reading import read_json

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
forks = get_context("forkserver")


@dataclass
class Ended:
    """How a process ended: its status, what it said, and facts that it left, if it was not killed."""

    status: int
    said: str
    facts: dict[str, Any] = field(default_factory=dict)

    def expect(self, status: int, words: str = "") -> str:
        """What it said, of status 2 its one line. Raises Failed unless it ended with this status and said these words
        there."""
        lines = [line for line in self.said.splitlines() if "error: " in line and "Traceback" not in self.said]
        told = lines[-1:] if status == 2 else [self.said]
        ended = self.status == status and any(words in each for each in told)
        expect(ended, f"exit status {self.status}: {self.said[-300:]}")
        return told[0]


def python(*words: str, **environment: str) -> Ended:
    """A Python command, to its end."""
    done = subprocess.run(
        [sys.executable, *words], env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout)


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

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        """All that it has said."""
        file = self._place / "said"
        return file.read_text(errors="replace") if file.exists() else ""

    def end(self) -> Ended:
        self._process.join()
        self._pipe.close()
        ended, text = self._place / "ended", self.said()
        facts = read_json(ended) if ended.exists() else {"status": self._process.exitcode}
        shutil.rmtree(self._place)
        return Ended(facts.pop("status"), text, facts)
