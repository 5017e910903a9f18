"""The process of one stage of an acceptance run.

    python -m sit_atconv.bench.gpu.worker MODULE CHANNEL FOLDER SCRATCH SECONDS MODE

What it finds goes to the file CHANNEL as it is found, a JSON object a line, so that the death of the process costs only
what it was about to find. It imports torch, and what the stage imports.
"""

import faulthandler
import gc
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from sit_atconv.bench.forms import on_backend
from sit_atconv.bench.timing import commit, device_name, device_state, measured, nvidia_smi, source_digest
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import said

REHEARSAL = "rehearsal"
SOFT = 0.85  # of a stage's time: nothing new is begun after it
MOST_TEXT = 4000  # characters of a traceback
ROUNDS = 7
LIBRARIES = ("torch", "triton", "diffusers", "accelerate", "numpy")

MEMORY, TIME, ABSENT = "memory", "time", "absent"  # why something is left out


class Bench:
    """What a stage measures with, and tells what it found.

    device: the CUDA device, or in a rehearsal the CPU. rehearsal: sizes are tiny, and times mean nothing.
    folder: of the acceptance. scratch: a folder that goes with the process.
    """

    def __init__(self, channel: TextIO, folder: Path, scratch: Path, seconds: float, rehearsal: bool):
        self.folder, self.scratch = folder, scratch
        self._channel, self._end = channel, time.monotonic() + SOFT * seconds
        self.rehearsal = rehearsal
        self.device = resolve_device("cpu" if rehearsal else "cuda")

    def _tell(self, kind: str, **facts: Any) -> None:
        self._channel.write(json.dumps({"kind": kind, **facts}, default=str, allow_nan=False) + "\n")
        self._channel.flush()

    def where(self) -> None:
        """Tell what this process runs on."""
        self._tell("where", **machine(self.device))

    def row(self, table: str, **facts: Any) -> None:
        """A row of a table. Numbers that are not finite are told as text."""
        self._tell("row", table=table, **{key: _finite(value) for key, value in facts.items()})

    def check(self, what: str, error: float, bound: float) -> None:
        """A check, which holds where 0 <= error <= bound."""
        self._tell("check", what=what, error=_finite(error), bound=_finite(bound), holds=0 <= error <= bound)

    def leave_out(self, what: str, reason: str, why: str) -> None:
        """Something is not done. reason: MEMORY, TIME or ABSENT."""
        self._tell("left out", what=what, reason=reason, why=why)

    def fault(self, what: str) -> None:
        """The exception that is handled now ended something."""
        self._tell("fault", what=what, error=said(sys.exception()), traceback=traceback.format_exc()[-MOST_TEXT:])

    def seconds_left(self) -> float:
        """Until nothing new is begun."""
        return self._end - time.monotonic()

    def free(self) -> float:
        """Bytes that tensors can still take on the device; of a CPU it is not known."""
        return float(torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else math.inf

    def attempt(self, what: str, do: Callable[[], Any], needs: float = 0) -> Any:
        """What `do` returns; None where it is left out, or ends in an error: that is told, and the stage goes on.

        needs: bytes, about, that it takes on the device.
        """
        if self.seconds_left() < 0:
            return self.leave_out(what, TIME, "the time of the stage is over")
        if needs > (free := self.free()):
            return self.leave_out(what, MEMORY, f"needs about {needs / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
        begun = time.monotonic()
        try:
            return do()
        except torch.OutOfMemoryError as error:
            return self.leave_out(what, MEMORY, said(error))
        except Exception:
            return self.fault(what)
        finally:
            print(f"{time.monotonic() - begun:7.2f} s  {what}")  # for the log
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def supported(self, what: str, call: Callable[[], Any]) -> Any:
        """What a call returns; None where torch says that this device, or this build of it, has no kernel for that."""
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return self.leave_out(what, ABSENT, said(error))

    def kernels(self) -> AbstractContextManager[None]:
        """Within it the operator runs on its Triton kernels, as on a CUDA device; in a rehearsal they are asked for."""
        return on_backend("triton") if self.rehearsal else nullcontext()

    def compiled(self, function: Callable) -> Callable:
        """torch.compile for fixed shapes, in one graph; in a rehearsal without the generation of code."""
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.compiler)

    @property
    def compiler(self) -> str:
        return "aot_eager" if self.rehearsal else "inductor"

    def times(
        self, calls: dict[Any, Callable[[], object]], graphs: Collection[str] | None = None, rounds: int | None = None
    ) -> dict[Any, dict[str, Any]]:
        """By the name of each call its facts, see `timing.Measured`, with the state of the device after all of them.

        graphs: of which alone a CUDA graph is captured.
        """
        rounds = 1 if self.rehearsal else rounds or ROUNDS
        taken = measured(calls, rounds, self.device, "rounds", graphs)
        state = device_state(self.device) or {}
        return {name: each.facts() | state for name, each in taken.items()}


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def installed(name: str) -> str | None:
    """The version of a distribution, None of one that is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """What is needed to know later what was measured: device and driver, libraries, and the code itself."""
    facts = {
        "device": device_name(device),
        "commit": commit(),
        "source": source_digest(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: installed(name) for name in LIBRARIES},
    }
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "memory_bytes": of.total_memory,
            "l2_bytes": of.L2_cache_size,
            "driver": nvidia_smi(device, "driver_version"),
        }
    return facts


def status_within(seconds: float, words: Sequence[str], **settings: Any) -> int | None:
    """The exit status of a command, None where it was ended after that time, with what it had started. What it says is
    in the log."""
    process = subprocess.Popen(words, start_new_session=True, **settings)
    try:
        return process.wait(max(0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


@numerics()
def main() -> None:
    faulthandler.enable()
    module, channel, folder, scratch, seconds, mode = sys.argv[1:]
    with open(channel, "a") as file:
        bench = Bench(file, Path(folder), Path(scratch), float(seconds), mode == REHEARSAL)
        bench.where()
        try:
            # Every function compiles for its own shapes alone, however many there are.
            with torch.compiler.config.patch(automatic_dynamic_shapes=False, recompile_limit=256):
                importlib.import_module(module).run(bench)
        except Exception:
            bench.fault(f"the stage, in {os.path.basename(module)}")
            raise


if __name__ == "__main__":
    main()
