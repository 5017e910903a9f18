"""How this project measures: interleaved medians, peak memory, and the names of what was measured on.

On CUDA: the clocks are up before the first measurement, every call finds an L2 cache without its data, and beside the
time of a call stands that of its CUDA graph, which launches nothing from Python.
"""

import ctypes
import hashlib
import itertools
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sit_atconv.runtime.compat.torch import memory_tracker
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import said

SHORTEST = 0.02  # seconds that one measurement lasts at least
LEAST_FLUSHED = 2**28  # bytes written to empty an L2 cache, or twice its size
WARM_SECONDS, WARM_SIDE = 1.0, 4096  # of matrix products before the first measurement, and of their squares
STAYS_WARM = 2.0  # seconds of rest after which a device is warmed again
_ended: dict[torch.device, float] = {}  # when the last measurement on a CUDA device ended


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the rounds and their interquartile range."""

    median: float
    iqr: float


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call over `repeats` calls in a row: CUDA events on a CUDA device, else the clock on the wall.

    On CUDA the L2 cache is written over before every call, outside its events.
    """
    if device.type == "cuda":
        return _seconds_by_events(call, repeats, device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _seconds_by_events(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    cache, spans = _over_the_cache(device), []
    torch.cuda.synchronize(device)
    for _ in range(repeats):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize(device)
    _ended[device] = time.perf_counter()
    return sum(start.elapsed_time(end) for start, end in spans) / 1e3 / repeats


@lru_cache(maxsize=1)
def _over_the_cache(device: torch.device) -> torch.Tensor:
    """More bytes than the L2 cache of a CUDA device holds: writing them leaves nothing else in it."""
    size = max(LEAST_FLUSHED, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device=device)


def warm_up(device: torch.device) -> None:
    """Raise the clocks of a CUDA device by about WARM_SECONDS of matrix products, unless a measurement has just ended;
    on a CPU nothing."""
    if device.type != "cuda" or time.perf_counter() - _ended.get(device, -math.inf) < STAYS_WARM:
        return
    square = torch.randn(WARM_SIDE, WARM_SIDE, dtype=torch.bfloat16, device=device)
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        for _ in range(10):
            square @ square
        torch.cuda.synchronize(device)


STATE = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}


def device_state(device: torch.device) -> dict[str, float] | None:
    """Clock of the multiprocessors (MHz), power (W) and temperature (degrees Celsius) of a CUDA device, as nvidia-smi
    says them; None where it does not, and of a CPU.

    Asked at once after a measurement it is of its clocks, which fall seconds later.
    """
    try:
        return dict(zip(STATE, map(float, (nvidia_smi(device, *STATE.values()) or "").split(",")), strict=True))
    except ValueError:
        return None


def nvidia_smi(device: torch.device, *fields: str, units: bool = False) -> str | None:
    """What nvidia-smi says of these fields of a CUDA device, between commas; None where it does not, and of a CPU."""
    if device.type != "cuda":
        return None
    form = "csv,noheader" if units else "csv,noheader,nounits"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", f"--format={form}", f"--id={uuid}"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError, RuntimeError, AssertionError):
        return None


def captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object] | None, str | None]:
    """The replay of `call` as a CUDA graph, and None; or None, and why it cannot be captured.

    call: reads and writes the same tensors every time; it is called three times before.
    """
    if device.type != "cuda":
        return None, f"{device.type} has no CUDA graphs"
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    try:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return None, f"{type(error).__name__}: {said(error)[:200]}"
    return graph.replay, None


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
    learn how long it takes, go before the clock; on CUDA also `warm_up`.
    """
    for call in calls:
        call()
    warm_up(device)
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


def timed(calls: dict[str, Callable], rounds: int, device: torch.device, label: str) -> dict[str, Timing]:
    """`interleaved`, by name."""
    return dict(zip(calls, interleaved([*calls.values()], rounds, device, label), strict=True))


@dataclass(frozen=True)
class Measured:
    """The timing of a call, and of its CUDA graph; no_graph: why there is none."""

    call: Timing
    graph: Timing | None
    no_graph: str | None

    def facts(self) -> dict[str, float | str | None]:
        """What a row says of it, in milliseconds."""
        graph_ms = self.graph and 1e3 * self.graph.median
        times = {"ms": 1e3 * self.call.median, "iqr_ms": 1e3 * self.call.iqr, "graph_ms": graph_ms}
        return times | {"no_graph": self.no_graph}


def measured(
    calls: dict[str, Callable], rounds: int, device: torch.device, label: str, graphs: Collection[str] | None = None
) -> dict[str, Measured]:
    """`timed`, with the graph of every call among those that take turns. graphs: of which alone one is captured."""
    replays, reasons = {}, {}
    for name, call in calls.items():
        if graphs is not None and name not in graphs:
            reasons[name] = "not asked for"
            continue
        replay, reasons[name] = captured(call, device)
        if replay is not None:
            replays[name, "graph"] = replay
    taken = timed(calls | replays, rounds, device, label)
    return {name: Measured(taken[name], taken.get((name, "graph")), reasons[name]) for name in calls}


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
    threads = torch.get_num_threads()
    return f"{processor}{known}, {threads} thread{'s' * (threads > 1)}"


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


@lru_cache(maxsize=1)
def source_digest() -> str:
    """The first 12 hex digits of a SHA-256 over the library's source files: what the code is where there is no git."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
