"""Runs `python -m sit_atconv.latents` in processes that die when they are told to.

    python tests/encode_process.py

A line of JSON on stdin is a list of processes, which start together: {"arguments": [...], "environment": {...},
"stderr": PATH, "kill": ["rename", 2]}. The last, if there, is SIGKILL on itself in place of the second call of
Path.rename. One that is killed takes the others with it, as a launcher would. The answer is the list of exit codes. All
are forked from here, so that the libraries are imported once.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from sit_atconv.latents.__main__ import main


def kill_at(method: str, number: int) -> None:
    original, calls = getattr(Path, method), iter(range(1, number))

    def counted(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(Path, method, counted)


def run(process: dict) -> None:
    os.environ.update(process["environment"])
    for stream, name in ((sys.stdout, os.devnull), (sys.stderr, process["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    if process.get("kill"):
        kill_at(*process["kill"])
    if process.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (process["largest_file"],) * 2)
    main(process["arguments"])


def start(process: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(process)
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


for line in sys.stdin:
    pids = [start(process) for process in json.loads(line)]
    codes, running = {}, set(pids)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] < 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
