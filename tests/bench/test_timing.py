"""The clock's statistics on a fake clock, and what is counted as memory."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from sit_atconv.bench import timing

CPU = torch.device("cpu")


def test_medians_are_interleaved_and_per_call(monkeypatch):
    clock, order = [0.0], []
    durations = {"fast": iter([9.0, 1.0, 1.0, 1.0, 5.0]), "slow": iter([9.0, 3.0, 3.0, 7.0, 3.0])}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name):
        def function():
            order.append(name)
            clock[0] += next(durations[name])

        return function

    fast, slow = timing.interleaved([call("fast"), call("slow")], 3, CPU, "")
    assert order == ["fast", "slow"] * 2 + ["fast", "slow"] * 3
    assert (fast.median, slow.median) == (1.0, 3.0)
    assert (fast.iqr, slow.iqr) == (4.0, 4.0)


@pytest.mark.parametrize(("glibc", "says"), [(True, ", memory kept"), (False, ", memory not kept")])
def test_memory_that_was_not_kept_is_not_said_to_be(monkeypatch, glibc, says):
    monkeypatch.setattr(timing, "keep_memory", lambda: glibc)
    assert timing.caption({"memory_kept": timing.memory_kept(CPU)}) == says
    assert timing.caption({}) == ", memory kept"  # of before it was recorded
    assert timing.memory_kept(torch.device("cuda"))


def test_short_calls_are_repeated_within_a_measurement(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call():
        calls.append(1)
        clock[0] += 0.004

    (taken,) = timing.interleaved([call], 2, CPU, "")
    assert len(calls) == 2 + 2 * 5
    assert taken.median == pytest.approx(0.004)


FAULTS = """
import resource, sys, torch
from sit_atconv.bench import timing

def call():
    torch.ones(20_000_000)

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

call()
before = faults(20)
timing.interleaved([call], 1, torch.device("cpu"), "")
print(before, faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.slow
def test_no_page_is_zeroed_anew_by_what_is_timed():
    """80 MB are thousands of pages, or some tens of huge ones; the heap may grow now and then."""
    said = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before, kept = map(int, said.split())
    assert before >= 20 * 40, said
    assert kept < before / 2


def test_peak_memory_is_weights_plus_activations_plus_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 1))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    x = torch.randn(1000, 64)

    @torch.no_grad()
    def forward():
        model(x)

    hidden = 1000 * 512 * 4
    peak = timing.peak_bytes(forward, model, x)
    assert weights + x.nbytes + hidden <= peak < weights + x.nbytes + 1.05 * hidden

    def backward():
        model(x).sum().backward()
        model.zero_grad()

    # The hidden layer and its gradient are alive together, with some of the weights' gradients.
    assert 2 * hidden <= timing.peak_bytes(backward, model, x) - weights - x.nbytes < 2.05 * hidden + weights


def test_commit_tells_changed_code_apart(monkeypatch):
    answers = {"rev-parse": "abc1234\n", "status": "", "ls-files": "timing.py\n"}
    uncached = timing.commit.__wrapped__

    def run(command, **_):
        return timing.subprocess.CompletedProcess(command, 0, stdout=answers[command[1]])

    monkeypatch.setattr(timing.subprocess, "run", run)
    assert uncached() == "abc1234"
    answers["status"] = " M file\n"
    assert uncached() == "abc1234+"

    def fail(command, **_):
        raise timing.subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(timing.subprocess, "run", fail)
    assert uncached() == "unknown"


def test_a_commit_of_somebody_elses_repository_is_not_ours(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    timing.commit.cache_clear()
    assert timing.commit() == "unknown"
    subprocess.run(["touch", timing.__file__], check=True)
    subprocess.run([*git, "add", "timing.py"], check=True)
    timing.commit.cache_clear()
    assert len(timing.commit().rstrip("+")) >= 7
    timing.commit.cache_clear()


class FakeCuda:
    """The device of the tests of what runs on CUDA: a clock that calls and events read, and what was done in order."""

    def __init__(self, monkeypatch):
        self.now, self.done = 0.0, []
        owner = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = owner.now

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Cache:
            def zero_(self):
                owner.now += 100.0
                owner.done.append("flush")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(timing, "_over_the_cache", lambda device: Cache())
        monkeypatch.setattr(timing, "warm_up", lambda device: owner.done.append("warm"))

    def call(self, name, seconds):
        def function():
            self.now += seconds
            self.done.append(name)

        return function


def test_on_cuda_the_cache_is_flushed_before_every_call_and_not_timed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    taken = timing.seconds(cuda.call("a", 0.25), 3, torch.device("cuda"))
    assert taken == pytest.approx(0.25)
    assert cuda.done == ["flush", "a"] * 3


def test_on_cuda_clocks_are_warm_before_the_first_measurement(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timing.interleaved([cuda.call("a", 1.0)], 2, torch.device("cuda"), "")
    assert cuda.done == ["a", "warm", *["flush", "a"] * 3]


def test_a_device_that_has_just_worked_is_warm(monkeypatch):
    device, products, now = torch.device("cuda"), [], [100.0]

    class Square:
        def __matmul__(self, other):
            now[0] += 0.1
            products.append(now[0])

    monkeypatch.setattr(torch, "randn", lambda *_, **__: Square())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "_ended", {device: 98.5})
    timing.warm_up(device)
    assert products == []
    timing._ended[device] = 97.0
    timing.warm_up(device)
    assert timing.WARM_SECONDS <= products[-1] - 100 <= timing.WARM_SECONDS + 1.1  # ten more at most


def test_graphs_take_turns_with_their_calls_and_what_has_none_says_why(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def capture(call, device):
        if call is slow:
            return None, "RuntimeError: it waits"
        return cuda.call("graph", 0.5), None

    fast, slow = cuda.call("fast", 2.0), cuda.call("slow", 3.0)
    monkeypatch.setattr(timing, "captured", capture)
    found = timing.measured({"fast": fast, "slow": slow}, 2, torch.device("cuda"), "")
    assert found["fast"].facts() == pytest.approx({"ms": 2000, "iqr_ms": 0, "graph_ms": 500, "no_graph": None})
    assert found["slow"].facts() == pytest.approx(
        {"ms": 3000, "iqr_ms": 0, "graph_ms": None, "no_graph": "RuntimeError: it waits"}
    )
    assert [name for name in cuda.done if name != "flush"][-6:] == ["fast", "slow", "graph"] * 2


def test_a_cpu_has_no_graphs_and_no_state():
    assert timing.captured(lambda: None, CPU) == (None, "cpu has no CUDA graphs")
    assert timing.device_state(CPU) is None
    found = timing.measured({"a": lambda: None}, 1, CPU, "")["a"]
    assert found.graph is None
    assert found.call.median > 0


def test_a_flush_is_twice_the_cache_and_256_mb_at_least(monkeypatch):
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size))
    for cache in (50 * 2**20, 2**28):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, cache=cache: SimpleNamespace(L2_cache_size=cache)
        )
        timing._over_the_cache.__wrapped__(torch.device("cuda"))
    assert sizes == [2**28, 2**29]


def test_state_is_what_nvidia_smi_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    asked = []

    def run(command, **_):
        asked.append(command)
        return timing.subprocess.CompletedProcess(command, 0, stdout="1980, 512.25, 61\n")

    monkeypatch.setattr(timing.subprocess, "run", run)
    assert timing.device_state(torch.device("cuda")) == {"sm_mhz": 1980, "watts": 512.25, "celsius": 61}
    assert asked[0][-1] == "--id=GPU-abc"
    monkeypatch.setattr(timing.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert timing.device_state(torch.device("cuda")) is None


def test_the_digest_is_of_the_source(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "bench" / "timing.py"))
    (tmp_path / "a.py").write_text("1")
    first = timing.source_digest.__wrapped__()
    (tmp_path / "a.py").write_text("2")
    assert first != timing.source_digest.__wrapped__()
    (tmp_path / "a.py").write_text("1")
    assert first == timing.source_digest.__wrapped__()
