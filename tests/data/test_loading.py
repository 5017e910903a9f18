"""Loader processes: they change nothing, they report what is bad, and their death or sleep is one line."""

import gc
import itertools
import math
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sampled import sampled
from torch.utils.data import DataLoader

from sit_atconv.classification.samples import ClassifierSamples
from sit_atconv.config import Data
from sit_atconv.data import loading
from sit_atconv.data.digits import Digits
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import Unreadable
from sit_atconv.data.loading import TrainingBatches, check_bad
from sit_atconv.data.samples import RankPositions
from sit_atconv.runtime.errors import InputError


def batches(
    dataset, workers: int, steps: int = 6, timeout: float = 60.0, start: int = 0, for_cuda: bool = False, **options
) -> TrainingBatches:
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    positions = RankPositions(start, start + steps, 6, accumulation=options.pop("accumulation", 1))
    samples = sampled(dataset, shape, 6, seed=3, **options)
    return TrainingBatches(samples, positions, Data(workers=workers, worker_timeout=timeout), for_cuda)


def assert_equal(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def folder(tmp_path):
    """Eight images of two classes, two of them no images."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            array = random.integers(0, 256, (10, 12, 3), np.uint8)
            Image.fromarray(array).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"no image")
    (tmp_path / "images" / "dog" / "2.png").write_bytes((tmp_path / "images" / "dog" / "2.png").read_bytes()[:80])
    return Folder(str(tmp_path / "images"), 8)


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_loader_processes_change_nothing(folder, sampling, workers):
    options = {"sampling": sampling, "flip": True, "drop": 0.2, "accumulation": 2}
    plain, loaded = batches(folder, 0, **options), batches(folder, workers, **options)
    assert_equal(list(plain), list(loaded))
    bad = plain.pop_bad()
    assert bad == loaded.pop_bad()
    assert set(bad) == {1, 6}
    assert "cat/1.png" in bad[1]
    assert plain.pop_bad() == loaded.pop_bad() == {}


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device, number 1, as far as a thread that makes batches asks for one. devices: by thread; pinned: where
    pinned tensors lie."""
    pretended = SimpleNamespace(devices={}, pinned=set())

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert pretended.devices[threading.get_ident()] == 1
        copy = tensor.clone()
        pretended.pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr(
        "torch.cuda.set_device", lambda number: pretended.devices.update({threading.get_ident(): number})
    )
    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    return pretended


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_thread_makes_the_same_batches_in_pinned_memory(folder, cuda, accumulation):
    options = {"sampling": "balanced", "flip": True, "drop": 0.2, "accumulation": accumulation}
    plain, ahead = batches(folder, 0, **options), batches(folder, 0, for_cuda=True, **options)
    for wanted, found in itertools.zip_longest(plain, ahead):
        assert_equal([wanted], [found])
        assert {value.data_ptr() for value in found.values()} <= cuda.pinned
        assert plain.pop_bad() == ahead.pop_bad()  # with the batch that met it, not with the one that is made beside
    assert threading.get_ident() not in cuda.devices


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_batches_is_made_while_the_one_before_is_computed(cuda, accumulation):
    asked, loaded = [], batches(Digits(), 0, for_cuda=True, accumulation=accumulation)
    fetch, made = loaded._loader._fetch, threading.Semaphore(0)

    def counted(positions):
        asked.append(positions[0])
        fetched = fetch(positions)
        made.release()
        return fetched

    loaded._loader._fetch = counted
    for step in range(6):
        for _ in range(accumulation):
            next(loaded)
        # The step is computed now, and nothing is asked for: what follows comes all the same, and no more.
        for _ in range(accumulation * (2 if step == 0 else 1 if step < 5 else 0)):
            assert made.acquire(timeout=30)
        assert len(asked) == accumulation * min(step + 2, 6)
    assert asked == sorted(asked)
    assert next(loaded, None) is None


def test_what_a_thread_meets_is_raised_where_the_batch_would_come(folder, cuda):
    loaded, fetch = batches(folder, 0, for_cuda=True), batches(folder, 0)._loader.dataset.fetch

    def faulty(positions):
        step = positions[0] // 6
        if step == 2:
            return InputError("the disk is gone"), {7: "bad"}
        if step == 4:
            raise ZeroDivisionError(step)
        return fetch(positions)

    loaded._loader._fetch = faulty
    plain = list(batches(folder, 0))
    assert_equal([next(loaded), next(loaded)], plain[:2])
    loaded.pop_bad()
    with pytest.raises(InputError, match="the disk is gone"):
        next(loaded)
    assert loaded.pop_bad() == {7: "bad"}
    assert_equal([next(loaded)], plain[3:4])
    with pytest.raises(ZeroDivisionError):
        next(loaded)


@pytest.mark.parametrize("wanted", [6, 1])
def test_no_thread_is_left_behind(cuda, wanted):
    """At the end, and where nobody wants the rest."""

    before = {*threading.enumerate()}

    def threads() -> set[threading.Thread]:
        return {*threading.enumerate()} - before

    loaded = batches(Digits(), 0, for_cuda=True)
    for _ in range(wanted):
        next(loaded)
    assert len(threads()) == 1
    if wanted == 6:
        assert next(loaded, None) is None
    else:
        del loaded
        gc.collect()
    end = time.monotonic() + 30
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not threads()


DIES = """
import sys, threading, time
import torch
from sit_atconv.config import Data
from sit_atconv.data.loading import TrainingBatches

torch.cuda.current_device, torch.cuda.set_device = lambda: 0, lambda number: None

class Slow(torch.utils.data.Dataset):
    in_thread = True

    def __getitems__(self, positions):
        time.sleep(0.2)
        return [], {}

batches = TrainingBatches(Slow(), [[0]] * 1000, Data(), True)
next(batches)
raise {"exit": SystemExit(3), "error": ZeroDivisionError(), "interrupt": KeyboardInterrupt()}[sys.argv[1]]
"""


ENDS = [("error", 1), ("exit", 3), ("interrupt", -2)]


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), ENDS)
def test_a_process_ends_whatever_its_thread_is_at(end, code):
    done = subprocess.run([sys.executable, "-c", DIES, end], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Traceback") == (end != "exit")


def test_batches_that_draw_from_the_process_are_made_by_no_thread():
    augmented = ClassifierSamples(Digits(), lambda picture: torch.zeros(1), 6, 0)
    loader = TrainingBatches(augmented, RankPositions(0, 2, 6), Data(), for_cuda=True)._loader
    assert isinstance(loader, DataLoader)
    assert loader.pin_memory
    assert not isinstance(batches(Digits(), 0, for_cuda=True)._loader, DataLoader)
    assert isinstance(batches(Digits(), 0)._loader, DataLoader)  # on a CPU


def test_batches_go_on_from_any_step(folder):
    whole = list(batches(folder, 0, steps=6))
    assert_equal(whole[4:], list(batches(folder, 2, steps=2, start=4)))


def test_bad_images_are_told_with_the_batch_that_met_them(folder):
    loaded = batches(folder, 2)
    order = np.random.default_rng(np.random.SeedSequence([3, 0, 0])).permutation(8)[:6]
    next(loaded)
    assert {1, 6} & set(order.tolist()) <= loaded.pop_bad().keys()
    assert len(list(loaded)) == 5
    assert loaded.pop_bad().keys() <= {1, 6}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_gone_is_an_error_with_its_words(folder, workers):
    os.rename(folder.root, f"{folder.root}-elsewhere")
    with pytest.raises(InputError, match=r"images' is no longer there; bring it back") as error:
        next(batches(folder, workers))
    assert error.value.every_rank


def test_all_images_bad_are_told_besides_the_error(folder):
    for index in range(8):
        os.truncate(folder.name(index), 10)
    loaded = batches(folder, 1)
    with pytest.raises(InputError, match="in a row"):
        next(loaded)
    assert len(loaded.pop_bad()) == 8


def test_the_global_generator_stays_where_it_is():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(batches(Digits(), workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_processes_leave_signals_to_the_main_process():
    expected, loaded = list(batches(Digits(), 0)), batches(Digits(), 2)
    first = next(loaded)
    for pid in loaded.pids():
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert_equal(expected, [first, *loaded])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "SIGKILL, as the system does when memory runs out"), (signal.SIGBUS, "SIGBUS: a file was cut")],
)
def test_a_dead_loader_process_is_one_line(number, reason):
    loaded = batches(Digits(), 2, steps=1000)
    next(loaded)
    pids = loaded.pids()
    os.kill(pids[0], number)
    words = rf"loader process \(pid {pids[0]}\) was ended by {reason}.*data.workers"
    with pytest.raises(InputError, match=words) as error:
        for _ in loaded:
            pass
    assert error.value.every_rank
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_death_of_a_loader_process_interrupts_nothing_else():
    loaded = batches(Digits(), 1, steps=1000)
    next(loaded)
    (pid,) = loaded.pids()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # torch's handler of SIGCHLD runs by now, and says nothing
    assert sum(range(1000)) == 499_500
    with pytest.raises(InputError, match="SIGKILL"):
        list(loaded)


def test_no_room_for_loader_processes_is_one_line(monkeypatch):
    def refuse() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(InputError, match=r"cannot be started: Cannot allocate memory; use fewer data\.workers"):
        next(batches(Digits(), 1))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


class Leaves(Digits):
    def __getitem__(self, key):
        os._exit(7)


def test_the_exit_status_of_a_loader_process_is_told():
    with pytest.raises(InputError, match="ended with exit status 7"):
        next(batches(Leaves(), 1))


class Hangs(Digits):
    """Never gives its second batch."""

    def __init__(self):
        super().__init__()
        self.never, self.given = multiprocessing.Event(), 0

    def __getitem__(self, key):
        self.given += 1
        if self.given > 6:
            self.never.wait()
        return super().__getitem__(key)


def test_a_hung_loader_process_is_one_line():
    loaded = batches(Hangs(), 1, timeout=1.0)
    next(loaded)
    (pid,) = loaded.pids()
    words = rf"no batch from the loader processes \(pid {pid}\) for 1 s.*worker_timeout"
    with pytest.raises(InputError, match=words) as error:
        next(loaded)
    assert error.value.every_rank
    assert not alive(pid)


def test_a_loader_process_that_is_frozen_with_a_batch_on_the_way_is_one_line():
    loaded = batches(Digits(), 1, steps=1000, timeout=1.0)
    next(loaded)
    (pid,) = loaded.pids()
    assert loaded._iterator._worker_result_queue._reader.poll(60)  # it has told of a batch, and is yet to hand it over
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"no batch from the loader processes \(pid {pid}\) for 1 s"):
        for _ in loaded:
            pass
    assert not alive(pid)


@pytest.mark.parametrize("timeout", [1.0, 10.0, 600.0])
def test_the_watchdog_counts_its_looks_at_one_batch(timeout):
    time, start, killed = 0.0, math.inf, []
    watchdog = loading._Watchdog([SimpleNamespace(kill=lambda: killed.append(time))], timeout)

    def wait(pause: float) -> bool:
        nonlocal time, start
        assert pause <= loading.POLL_SECONDS
        time += pause
        if time < 3 * timeout:  # a new batch at every look
            with watchdog:
                pass
            watchdog.__enter__()
        elif time < 6 * timeout:  # none is awaited
            watchdog.__exit__()
        elif start == math.inf:
            start = time
            watchdog.__enter__()
        return time > 9 * timeout

    watchdog.ended = SimpleNamespace(wait=wait)
    watchdog.run()
    assert watchdog.bitten
    assert timeout - 1e-6 <= killed[0] - start <= timeout + loading.POLL_SECONDS
    assert len(killed) == 1


def test_loader_processes_end_with_the_object_also_hung_ones():
    loaded = batches(Hangs(), 2)
    next(loaded)
    pids = loaded.pids()
    assert all(map(alive, pids))
    del loaded
    assert not any(map(alive, pids))


PROGRAM = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
from test_loading import Hangs, batches
held = batches(Hangs(), 2)
next(held)
print(*held.pids())
"""


@pytest.mark.slow
def test_loader_processes_end_with_the_process_also_hung_ones(tmp_path):
    fewer = ["-W", "ignore:This DataLoader will create"]  # of torch, on a machine with one core
    program = [sys.executable, *fewer, "-c", PROGRAM, os.path.dirname(__file__)]  # one that ends as Python ends
    run = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert not any(alive(int(pid)) for pid in run.stdout.split())


class Slow(Digits):
    """Waits for leave before its first image."""

    def __init__(self):
        super().__init__()
        self.leave = multiprocessing.Event()

    def __getitem__(self, key):
        self.leave.wait()
        return super().__getitem__(key)


def test_a_slow_loader_process_is_waited_for(monkeypatch):
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.05)
    dataset, looks = Slow(), []
    loaded = batches(dataset, 1, timeout=60.0)
    whole = TrainingBatches._fault

    def look(self, error):
        looks.append(self._watchdog.bitten)
        if len(looks) == 4:
            dataset.leave.set()
        return whole(self, error)

    monkeypatch.setattr(TrainingBatches, "_fault", look)
    assert_equal(list(batches(Digits(), 0)), list(loaded))
    assert len(looks) >= 4
    assert not any(looks)


class Breaks(Digits):
    def __getitem__(self, key):
        raise RuntimeError("a mistake of the program")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_stay_what_they_are(workers):
    with pytest.raises(RuntimeError, match="a mistake of the program"):
        next(batches(Breaks(), workers))


def test_the_share_of_bad_images():
    bad = {7: "image 7 is bad", 2: "image 2 is bad", 5: "image 5 is bad", 9: "image 9 is bad"}
    check_bad(bad, 4000, 0.001)
    check_bad({}, 10, 0)
    words = r"^4 of 3,999 images.* 0\.001.*image 2 is bad; image 5 is bad; image 7 is bad; \.\.\."
    with pytest.raises(InputError, match=words) as error:
        check_bad(bad, 3999, 0.001)
    assert not error.value.every_rank
    assert "data.max_bad_share" in str(error.value)
    with pytest.raises(InputError, match="1 of 10 images"):
        check_bad({3: "x"}, 10, 0)


def test_unreadable_is_an_input_error_that_a_process_can_send():
    error = pickle.loads(pickle.dumps(Unreadable("a  b", image=7)))
    assert (str(error), error.image, error.every_rank) == ("a b", 7, True)


TRAINER = """
import multiprocessing, os, signal
from sit_atconv.config import Data, Recipe, Run, Train
from sit_atconv.data.digits import Digits
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import RankPositions, TrainingSamples
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    samples = TrainingSamples(Digits(), (1, 8, 8), Recipe(run=Run(out="x", seed=3), train=Train(batch_size=6)))
    loader = TrainingBatches(samples, RankPositions(0, 6, 6, accumulation=1), Data(workers=1))
    next(loader)
    print(loader.pids()[0], flush=True)
    signal.pause()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone tells when a process of another one ends")
def test_loader_processes_of_a_fork_server_end_with_the_process_that_trains(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = os.pidfd_open(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait()
    assert select.select([worker], [], [], 60)[0], "the loader process outlives the process that trains"
    os.close(worker)
    trainer.stdout.close()
