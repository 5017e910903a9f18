"""The clock's statistics on a fake clock, and what is counted as memory."""

import platform
import subprocess
import sys

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
