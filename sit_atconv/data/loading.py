"""From samples to the batches of one process, through loader processes or a thread, and what goes wrong there."""

import math
import multiprocessing.connection
import multiprocessing.util
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from sit_atconv.config import Loading
from sit_atconv.data.samples import Batch
from sit_atconv.runtime.compat.torch import consider_ended, ignore_deaths, loader_processes
from sit_atconv.runtime.errors import InputError, told

Fetched = tuple[Any, dict[int, str]]  # what `Samples.fetch` gives
Fetch = Callable[[list[int]], Fetched]

POLL_SECONDS = 1.0  # between two looks at whether the loader processes are alive, while none gives a batch
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OF_A_WORKER = re.compile(r"DataLoader (worker \(pid|timed out after)")
REMEDY = "use fewer data.workers, or give more memory"


class TrainingBatches:
    """The batches of one process in order; an iterator. Its loader processes start with the first batch.

    samples: gives by `__getitems__` what `Samples.fetch` does. positions: of every batch, such as `RankPositions`.
    data: says how many loader processes there are, and after how many seconds without a batch they count as hung.
    for_cuda: batches come in pinned memory. Without loader processes a thread then makes those of the next step while
    this one is computed, if the samples say that they can be made `in_thread`. Beside a CPU it would take its cores.
    `next` raises the InputError of a dataset that is gone, and of a loader process that died or hangs. Nothing is
    raised anywhere else: torch's way of raising from a signal handler, in whatever the process is doing, is off.
    The loader processes leave signals to this one: a terminal and a scheduler send them to all. They end by SIGKILL
    with this object, at the latest with this process.
    """

    def __init__(self, samples: Dataset, positions: Iterable, data: Loading, for_cuda: bool = False):
        self.timeout, self._bad, self._iterator, self._watchdog = data.worker_timeout, {}, None, None
        accumulation = getattr(positions, "accumulation", 1)
        if for_cuda and not data.workers and getattr(samples, "in_thread", False):
            self._loader = _Ahead(samples.__getitems__, positions, accumulation)
            return
        options = {}
        if data.workers:
            # Enough for two batches of every loader process, and for the micro-batches of two steps.
            options = {
                "prefetch_factor": max(2, math.ceil(2 * accumulation / data.workers)),
                "timeout": min(POLL_SECONDS, self.timeout),
                "worker_init_fn": _begin,
            }
        self._loader = DataLoader(
            samples,
            batch_sampler=positions,
            num_workers=data.workers,
            collate_fn=_as_it_is,
            pin_memory=for_cuda,
            generator=torch.Generator(),  # torch would take a seed from the global one, which is not its to move
            **options,
        )

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._start()
        with self._watchdog:
            while True:
                try:
                    batch, bad = next(self._iterator)
                    break
                except (RuntimeError, OSError, EOFError) as error:
                    fault = self._fault(error)
                    if fault is not None:
                        _end(self._iterator, self._watchdog)
                        raise fault from None
        self._bad |= bad
        if isinstance(batch, InputError):
            raise batch
        return batch

    def pop_bad(self) -> dict[int, str]:
        """What was wrong with images, by index, as far as found since the last call."""
        bad, self._bad = self._bad, {}
        return bad

    def pids(self) -> list[int]:
        """The loader processes."""
        return [worker.pid for worker in loader_processes(self._iterator)]

    def _start(self) -> None:
        before = _mask("SIG_BLOCK", SIGNALS)  # till they are left alone there
        try:
            with told("the loader processes cannot be started", OSError, remedy=REMEDY, every_rank=True):
                self._iterator = iter(self._loader)
        finally:
            _mask("SIG_SETMASK", before)
        workers = loader_processes(self._iterator)
        self._watchdog = _Watchdog(workers, self.timeout)
        if workers:
            self._watchdog.start()
            ignore_deaths(self._iterator)
            # Before multiprocessing ends its processes by SIGTERM at exit, and waits for them.
            multiprocessing.util.Finalize(self, _end, (self._iterator, self._watchdog), exitpriority=10)

    def _fault(self, error: Exception) -> InputError | None:
        """What is wrong with the loader processes, or None where they are only slow. Raises any other error."""
        workers = loader_processes(self._iterator)
        if not workers:
            raise error
        if self._watchdog.bitten:
            return InputError(
                f"no batch from the loader processes (pid {', '.join(map(str, self.pids()))}) for {self.timeout:g} s: "
                "reading data.root hangs, /dev/shm is full, or data.worker_timeout is too short",
                every_rank=True,
            )
        slow = isinstance(error, RuntimeError) and OF_A_WORKER.match(str(error))
        if not slow:  # a dying process's connections break before it is dead, its sentinel among them
            broken = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=POLL_SECONDS)
            for worker in workers:
                if worker.sentinel in broken:
                    worker.join(POLL_SECONDS)
        dead = [worker for worker in workers if not worker.is_alive()]
        if dead:
            return InputError(_how_it_ended(dead[0].pid, dead[0].exitcode), every_rank=True)
        if not slow:
            raise error
        return None


class _Ahead:
    """What `fetch` gives for the positions, one after the other, in pinned memory; an iterator.

    A thread calls `fetch`, and is `ahead` calls ahead: what it raises is raised in the place of what it would give. It
    ends with this object, or with the process, once it has done what it was asked for.
    """

    def __init__(self, fetch: Fetch, positions: Iterable[list[int]], ahead: int):
        self._fetch, self._positions, self._ahead = fetch, positions, ahead
        self._awaited: deque[Future] = deque()

    def __iter__(self) -> "_Ahead":
        self._left, self._thread = iter(self._positions), ThreadPoolExecutor(1, "the next batches")
        self._device = torch.cuda.current_device()
        return self

    def __next__(self) -> Fetched:
        while len(self._awaited) <= self._ahead and (positions := next(self._left, None)) is not None:
            self._awaited.append(self._thread.submit(_fetch_pinned, self._fetch, positions, self._device))
        if not self._awaited:
            self._thread.shutdown(wait=False)
            raise StopIteration
        return self._awaited.popleft().result()


def _fetch_pinned(fetch: Fetch, positions: list[int], device: int) -> Fetched:
    torch.cuda.set_device(device)  # a thread begins on the first one, and pinned memory is the current one's
    batch, bad = fetch(positions)
    if isinstance(batch, dict):
        batch = {key: value.pin_memory() for key, value in batch.items()}
    elif isinstance(batch, list):
        batch = [value.pin_memory() for value in batch]
    return batch, bad


class _Watchdog(threading.Thread):
    """Kills the loader processes once a batch has been awaited for `timeout` seconds, and from then on has `bitten`.

    A batch is awaited within `with`. torch's timeout is for the next message alone: to fetch the tensors that it names,
    torch waits for the sender without one. Looks are counted, not seconds: a job that is suspended for hours while it
    waits finds its loader processes as it left them. One thread for all batches: to start a timer for each takes long.
    """

    def __init__(self, workers: list, timeout: float):
        super().__init__(name="watchdog of the loader processes", daemon=True)
        self.bitten, self.ended = False, threading.Event()
        self._number, self._awaited, self._loaders = 0, None, workers
        self._looks = math.ceil(timeout / POLL_SECONDS) + 4
        self._pause = timeout / (self._looks - 1)  # the first look at a batch is at any time of its first pause

    def __enter__(self) -> None:
        self._number += 1
        self._awaited = self._number

    def __exit__(self, *error) -> None:
        self._awaited = None

    def run(self) -> None:
        seen, looks = None, 0
        while not self.ended.wait(self._pause):
            awaited = self._awaited
            looks = looks + 1 if awaited is not None and awaited == seen else 1
            seen = awaited
            if looks == self._looks:
                self.bitten = True
                for worker in self._loaders:
                    worker.kill()
                return


def _how_it_ended(pid: int, exitcode: int) -> str:
    if exitcode >= 0:
        return f"a loader process (pid {pid}) ended with exit status {exitcode}; {REMEDY}"
    name = signal.Signals(-exitcode).name
    reasons = {
        "SIGKILL": ", as the system does when memory runs out",
        "SIGBUS": ": a file was cut while it was read, or /dev/shm is full",
    }
    return f"a loader process (pid {pid}) was ended by {name}{reasons.get(name, '')}; {REMEDY}"


def _as_it_is(fetched: tuple) -> tuple:
    return fetched


def _begin(worker: int) -> None:
    """Leave signals to the process that trains, and end with it: torch looks at the parent process alone, which a fork
    server is where processes begin so (as from Python 3.14 on)."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _mask("SIG_UNBLOCK", SIGNALS)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(process) -> None:
    process.join()
    os._exit(1)


def _mask(how: str, signals: Iterable[int]) -> Iterable[int]:
    """What `signal.pthread_sigmask` returns; Windows has none, and nothing to mask."""
    return signal.pthread_sigmask(getattr(signal, how), signals) if hasattr(signal, "pthread_sigmask") else ()


def _end(iterator, watchdog: _Watchdog) -> None:
    """Kill the loader processes. torch's own way waits on locks that one that was killed may hold, and on hung ones."""
    watchdog.ended.set()
    for worker in loader_processes(iterator):
        worker.kill()
    for worker in loader_processes(iterator):
        worker.join()
    consider_ended(iterator)


def check_bad(bad: dict[int, str], num_images: int, max_share: float) -> None:
    """Raise InputError where more than `max_share` of the images are in `bad`: by index, what is wrong with them."""
    if len(bad) <= max_share * num_images:
        return
    distinct = list(dict.fromkeys(bad[index] for index in sorted(bad)))
    first, more = "; ".join(distinct[:3]), "; ..." if len(distinct) > 3 else ""
    raise InputError(
        f"{len(bad):,} of {num_images:,} images cannot be read, a share of {len(bad) / num_images:.2g} and "
        f"data.max_bad_share={max_share:g}: {first}{more}. Mend the data, or raise data.max_bad_share"
    )
