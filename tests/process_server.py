"""Runs commands and programs in processes of their own, which fail when they are told to.

A line of JSON on stdin is a list of processes, which start together: {"program": MODULE, "arguments": [...],
"environment": {...}, "stdout": PATH, "stderr": PATH, "at": ["data", 2, "KILL"], "largest_file": BYTES, "spared": true}.
MODULE has a command's `main`; without one, "code" is run, with `sys.argv[1:]` as the arguments. "at": the signal that
the process sends itself in place of giving a file its name, the second of data ("record": of what says of a folder what
it is, "evaluate" and "classify": a call of a SiT or an AttNet, which then goes on). One that is killed takes the others
with it, as a launcher would, but for those that are spared. The answer is the list of exit codes. All are forked from
here, so that libraries are imported once: with --bare, the others' alone, as where this project is not installed.
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import diffusers
import torch

if "--bare" not in sys.argv:
    from sit_atconv.models.attnet import AttNet
    from sit_atconv.models.sit import SiTTransformer2DModel

del sys.argv[1:]
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # as in conftest.py
assert diffusers.DiffusionPipeline, diffusers.AutoModel  # loaded, lazy as they are
RECORDS = {"settings.json", "manifest.json", "index.json", "features.json"}


def signal_at(call: str, number: int, name: str) -> None:
    owner, method = {"evaluate": (SiTTransformer2DModel, "forward"), "classify": (AttNet, "forward")}.get(
        call, (Path, "replace")
    )
    original, calls = getattr(owner, method), iter(range(1, number))
    sent = []

    def counted(*arguments, **options):
        if owner is Path and (arguments[1].name in RECORDS) != (call == "record"):
            return original(*arguments, **options)
        if next(calls, None) is None and not sent:
            sent.append(name)
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        return original(*arguments, **options)

    setattr(owner, method, counted)


def run(process: dict) -> None:
    os.environ.update(process["environment"])
    sys.path[:0] = filter(None, [process["environment"].get("OWN")])
    os.chdir(process.get("cwd", "."))
    signal.alarm(300)  # one that hangs is a fault
    if cache := process["environment"].get("HF_MODULES_CACHE"):
        for module in list(sys.modules.values()):  # which have read it as they were imported
            if hasattr(module, "HF_MODULES_CACHE"):
                module.HF_MODULES_CACHE = cache
    for stream, name in ((sys.stdout, process["stdout"]), (sys.stderr, process["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    if process.get("at"):
        signal_at(*process["at"])
    if process.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (process["largest_file"],) * 2)
    if process["program"]:
        return importlib.import_module(process["program"]).main(process["arguments"])
    sys.argv[1:] = process["arguments"]
    exec(process["code"], {"__name__": "__main__"})


def start(process: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(process)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in iter(sys.stdin.readline, ""):
    if (jobs := json.loads(line)) is None:  # the end of the pipe is not enough: whoever was forked from pytest holds it
        break
    for program in {job["program"] for job in jobs} - {None}:
        with suppress(Exception):  # the process that needs it says so
            importlib.import_module(program)
    pids = [start(process) for process in jobs]
    codes, running = {}, set(pids)
    spared = {pid for pid, process in zip(pids, jobs, strict=True) if process.get("spared")}
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] < 0:
            for other in running - spared:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
