"""How this project measures: interleaved medians, peak memory, and the names of what was measured on."""

import csv
import ctypes
import itertools
import math
import os
import platform
import reprlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sit_atconv.runtime.compat.torch import memory_tracker
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import check_out
from sit_atconv.runtime.reading import opened

MOST_HEADER = 1 << 16  # bytes
SHORTEST = 0.02  # seconds that one measurement lasts at least


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the rounds and their interquartile range."""

    median: float
    iqr: float


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call over `repeats` calls in a row: CUDA events on a CUDA device, else the clock on the wall."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - begin
    if on_cuda:
        end.record()
        torch.cuda.synchronize(device)
        taken = start.elapsed_time(end) / 1e3
    return taken / repeats


@lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Freed memory stays with this process from here on, as CUDA's allocator does it; False where glibc is not there.

    Else every large tensor is given back and taken anew, and a clock reads how long Linux fills pages with zeros: half
    the time of a network whose activations exceed 32 MB.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # of malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def memory_kept(device: torch.device) -> bool:
    """Whether `interleaved` measures there with freed memory kept, for the record beside its times."""
    return device.type == "cuda" or (device.type == "cpu" and keep_memory())


def caption(result: dict) -> str:
    """What a caption says of that after "interleaved rounds"; records of before it had memory kept."""
    return ", memory kept" if result.get("memory_kept", True) else ", memory not kept"


def in_turn(
    calls: Sequence[Callable[[], object]], device: torch.device, shortest: float = SHORTEST
) -> Iterator[tuple[float, ...]]:
    """Endless rounds of seconds per call, in each of which every call is measured once, in turn: a drift of the machine
    meets all alike.

    A call that takes less than `shortest` seconds is repeated within its measurement. One call each, and one more to
    learn how long it takes, go before the clock.
    """
    for call in calls:
        call()
    repeats = [max(1, math.ceil(shortest / max(seconds(call, 1, device), 1e-9))) for call in calls]
    while True:
        yield tuple(seconds(call, count, device) for call, count in zip(calls, repeats, strict=True))


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, label: str) -> list[Timing]:
    """The timing of each call over so many rounds, see `in_turn`. On a CPU memory is kept, see `keep_memory`. `label`
    names the progress bar."""
    if device.type == "cpu":
        keep_memory()
    taken = itertools.islice(in_turn(calls, device), rounds)
    records = list(zip(*Progress(taken, desc=label, total=rounds, unit="round", leave=False), strict=True))
    quartiles = [statistics.quantiles(record, n=4) if len(record) > 1 else [record[0]] * 3 for record in records]
    return [Timing(statistics.median(record), q[2] - q[0]) for record, q in zip(records, quartiles, strict=True)]


def peak_bytes(call: Callable[[], object], model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Largest total of live tensors, the weights of `model` and `inputs` included, during one call.

    On CUDA as its allocator counts. On a CPU as torch's MemTracker does: it does not look inside an operator, nor into
    compiled code, so there the model must not be compiled.
    """
    if inputs[0].is_cuda:
        own = sum(tensor.nbytes for tensor in (*model.state_dict().values(), *inputs))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before + own
    tracker = memory_tracker()
    tracker.track_external(model, *inputs)
    with tracker:
        call()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def device_name(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    extensions = {"AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "AMX BF16": "amx_bf16"}
    known = "".join(f", {name}" for name, flag in extensions.items() if flag in flags)
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}{known}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the code, with a `+` when files differ from it; "unknown" outside a git checkout of it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed, it may lie within somebody else's repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_csv(path: Path, columns: Sequence[str]) -> bool:
    """Whether a CSV file is there already. Raises InputError where it has other columns, or takes no more rows."""
    with told(f"{path} is no CSV file that takes more rows", OSError, UnicodeError, csv.Error, remedy="move it away"):
        if not os.path.lexists(path):
            check_out(path, "CSV file")
            return False
        with opened(path) as file:
            header = next(csv.reader([file.readline(MOST_HEADER).decode()]), [])
        open(path, "ab").close()
    if header != list(columns):
        raise InputError(f"{path} has the columns {reprlib.repr(header)}, not {list(columns)}; move it away")
    return True


def append_csv(path: Path, rows: Sequence[dict]) -> None:
    """Append rows to a CSV file, with their keys as its header. Raises InputError as `check_csv`, which tells before
    the work, and where the disk does not take them."""
    there = check_csv(path, list(rows[0]))
    with told(f"{path} cannot be written", OSError, remedy="make room, and run again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if not there:
                writer.writeheader()
            writer.writerows(rows)
