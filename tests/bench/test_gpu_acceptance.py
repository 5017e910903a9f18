"""The acceptance run without a GPU: its stages in a rehearsal, and stages that lack something, fail, die or hang."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, unmarked

from sit_atconv.bench.gpu import __main__ as command
from sit_atconv.bench.gpu import driver
from sit_atconv.bench.gpu.driver import Acceptance, summed, to_markdown
from sit_atconv.bench.gpu.stages import STAGES, Stage
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.reading import read_json

# A worker without torch, which tells as the true one does.
WORKER = """
import faulthandler, importlib, json, sys

class Bench:
    def __init__(self, channel):
        self.channel = open(channel, "a")

    def tell(self, kind, **facts):
        self.channel.write(json.dumps({"kind": kind, **facts}) + chr(10))
        self.channel.flush()

module, channel, folder, scratch, seconds, mode = sys.argv[1:]
assert mode == "rehearsal"
bench = Bench(channel)
bench.tell("where", torch="0")
importlib.import_module(module).run(bench)
"""
PLANTED = """
import os, signal, subprocess, sys, time

def run(bench):
    bench.tell("row", table="found", what="a row", value=1.5)
    {then}
"""
ENDLESS = "[sys.executable, '-c', 'import time; time.sleep(600)']"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(name, code, **settings) -> a stage whose module runs the code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(driver, "PACKAGE", "planted")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "worker.py").write_text(WORKER)

    def plant(name: str, then: str, **settings) -> Stage:
        (tmp_path / f"planted_{name}.py").write_text(PLANTED.format(then=then))
        return Stage(90, name, f"it {name}", f"planted_{name}", **{"seconds": 60, "rehearsal_seconds": 60, **settings})

    return plant


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are found in /proc")
def test_a_stage_that_dies_or_hangs_is_named_its_children_ended_and_the_others_go_on(planted, tmp_path):
    keep = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen({ENDLESS}, start_new_session=True).pid))"
    stages = [
        planted("dies", f"{keep}; os.kill(os.getpid(), signal.SIGSEGV)"),
        planted("hangs", "time.sleep(600)", rehearsal_seconds=2),
        planted("fails", "raise KeyError('gone')"),
        planted("errs", "bench.tell('check', what='far', error=2.0, bound=1.0, holds=False)"),
        planted("lacks", "pass", needs=("no_such_package",)),
        planted("works", "bench.tell('check', what='near', error=0.5, bound=1.0, holds=True)"),
    ]
    acceptance = Acceptance(tmp_path / "out", rehearsal=True)
    assert not acceptance.run(stages)
    assert not alive(int((tmp_path / "pid").read_text()))
    found = read_json(tmp_path / "out" / "acceptance.json")["stages"]
    states = {name: record["state"] for name, record in found.items()}
    assert states == {
        "dies": driver.DIED, "hangs": driver.HUNG, "fails": driver.FAILED, "errs": driver.WRONG,
        "lacks": driver.LACKS, "works": driver.OK,
    }  # fmt: skip
    assert "SIGSEGV" in found["dies"]["why"]
    assert "2 s" in found["hangs"]["why"]
    assert found["hangs"]["seconds"] < 60
    assert "status 1" in found["fails"]["why"]
    assert "1 of 1 checks" in found["errs"]["why"]
    assert "no_such_package" in found["lacks"]["why"]
    for name in ("dies", "hangs", "fails", "works"):  # what was found before stays
        assert found[name]["rows"] == [{"table": "found", "what": "a row", "value": 1.5}]
        assert found[name]["where"]["torch"]
    table = unmarked(tmp_path / "out" / "acceptance.md")
    assert all(f"| {name} | {state} |" in table for name, state in states.items())
    assert "==== dies ====" in (tmp_path / "out" / "acceptance.log").read_text()
    assert "KeyError" in (tmp_path / "out" / "acceptance.log").read_text()


def test_what_is_done_stays_done_and_is_done_again_when_asked(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        Acceptance, "_result", lambda self, stage, limit: done.append((stage.name, limit)) or {"state": "ok", "why": ""}
    )
    first, second = (Stage(n, name, "", "none", 60, 60) for n, name in ((1, "first"), (2, "second")))
    assert Acceptance(tmp_path / "out", rehearsal=True).run([first])
    assert Acceptance(tmp_path / "out", rehearsal=True).run([first, second])
    assert [name for name, _ in done] == ["first", "second"]
    assert Acceptance(tmp_path / "out", rehearsal=True).run([first], again=True)
    assert len(done) == 3
    with pytest.raises(InputError, match=r"holds a rehearsal; choose another folder"):
        Acceptance(tmp_path / "out", rehearsal=False)


def test_no_stage_is_begun_without_time_and_none_gets_more_than_is_left(tmp_path, monkeypatch):
    now, limits = [0.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def result(self, stage, limit):
        limits[stage.name] = limit
        now[0] += limit
        return {"state": "ok", "why": ""}

    monkeypatch.setattr(Acceptance, "_result", result)
    stages = [Stage(n, name, "", "none", 100) for n, name in enumerate(("a", "b", "c"))]
    acceptance = Acceptance(tmp_path / "out", rehearsal=False)
    assert not acceptance.run(stages, minutes=2.5)
    assert limits == {"a": 100, "b": 50}
    assert acceptance.stages["c"]["state"] == driver.NOT_BEGUN
    assert not Acceptance(tmp_path / "out", rehearsal=False).run(stages[2:], minutes=0.1)
    assert Acceptance(tmp_path / "out", rehearsal=False).run(stages)
    assert limits["c"] == 100


def found_of(state: str, rows: int, checks: int = 0) -> dict:
    """The record of a stage that told so much."""
    checked = [{"what": "near", "error": 0.0, "bound": 1.0, "holds": True}] * checks
    return {"state": state, "why": state, "rows": [{"table": "t", "what": "x"}] * rows, "checks": checked}


def test_a_later_call_loses_nothing_that_was_found(tmp_path, monkeypatch):
    results = {}
    monkeypatch.setattr(Acceptance, "_result", lambda self, stage, limit: dict(results[stage.name]))
    stage = Stage(1, "late", "", "none", 60, 60)

    def call(found: dict | None, stage: Stage = stage, minutes: float | None = None) -> dict:
        results["late"] = found
        assert Acceptance(tmp_path / "out", True).run([stage], minutes, again=True) == (
            found is not None and found["state"] == driver.OK
        )
        return read_json(tmp_path / "out" / "acceptance.json")["stages"]["late"]

    first = call(found_of(driver.HUNG, 3, 2))
    assert call(None, minutes=0.1) == first  # not begun
    assert call(None, Stage(1, "late", "", "none", 60, 60, needs=("no_such_package",))) == first
    kept = call(found_of(driver.PART, 3, 1))
    assert (kept["state"], len(kept["rows"]), len(kept["checks"])) == (driver.HUNG, 3, 2)
    assert kept["later"] == "a later try told less, in part: in part"
    assert "a later try told less, in part" in (tmp_path / "out" / "acceptance.md").read_text()
    more = call(found_of(driver.PART, 4, 1))
    assert (more["state"], len(more["rows"]), "later" in more) == (driver.PART, 4, False)
    assert call(found_of(driver.OK, 2))["state"] == driver.OK  # whole, whatever it tells


def test_a_second_call_begins_with_what_was_never_begun_and_gives_twice_the_time_to_what_lacked_it(
    tmp_path, monkeypatch
):
    now, limits, states = [0.0], [], {"a": driver.OK, "b": driver.HUNG, "c": driver.PART, "d": driver.FAILED}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def result(self, stage, limit):
        limits.append((stage.name, limit))
        now[0] += limit
        return found_of(states.get(stage.name, driver.OK), 1)

    monkeypatch.setattr(Acceptance, "_result", result)
    stages = [Stage(n, name, "", "none", 100) for n, name in enumerate("abcde")]
    assert not Acceptance(tmp_path / "out", False).run(stages, minutes=350 / 60)
    assert limits == [("a", 100), ("b", 100), ("c", 100), ("d", 50)]
    limits.clear()
    states.clear()
    assert not Acceptance(tmp_path / "out", False).run(stages, minutes=450 / 60)
    assert limits == [("e", 100), ("b", 200), ("c", 150)]  # the sum is that of the minutes
    limits.clear()
    assert Acceptance(tmp_path / "out", False).run(stages)
    assert limits == [("d", 100)]


def test_five_minutes_hold_what_matters_most():
    """Those before the model leave it at least 100 seconds, where the first takes 25, as is usual."""
    assert [stage.number for stage in STAGES[:4]] == [1, 2, 4, 5]
    assert 25 + sum(stage.seconds for stage in STAGES[1:3]) + 100 <= 300
    assert sorted(stage.number for stage in STAGES) == list(range(1, 10))


def test_users_files_are_refused_before_the_work(tmp_path):
    for name, content in (
        ("acceptance.json", '{"thesis": 1}'),
        ("acceptance.md", "thesis"),
        ("acceptance.log", "x"),
        ("acceptance.x.jsonl", '{"kind": "mine"}'),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="exists already"):
            Acceptance(folder, rehearsal=True)
        assert (folder / name).read_text() == content


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "there is no CUDA device here; --rehearse runs all stages on the CPU"),
        (["--rehearse", "--stages", "machin"], "did you mean 'machine'?"),
        (["--rehearse", "--minutes", "0"], "--minutes 0.0: must be at least 0.5"),
    ],
)
def test_wrong_calls_are_told_before_the_work(options, says, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert says in fails(command.main, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_or_time_leaves_out_by_name_and_the_others_go_on(tmp_path, monkeypatch):
    import torch

    from sit_atconv.bench.gpu.worker import Bench

    with open(tmp_path / "channel", "w+") as channel:
        bench = Bench(channel, tmp_path, tmp_path, 100, True)
        monkeypatch.setattr(Bench, "free", lambda self: 3 * 2**30)

        def too_large():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

        assert bench.attempt("large", lambda: 1 / 0, needs=4 * 2**30) is None
        assert bench.attempt("larger than thought", too_large) is None
        assert bench.attempt("small", lambda: "done", needs=2**30) == "done"
        assert bench.attempt("wrong", lambda: 1 / 0) is None
        bench.check("near", 0.5, 1.0)
        bench.check("not a number", float("nan"), 1.0)
        bench.check("below", -0.5, 1.0)
        bench.row("table", what="endless", value=float("inf"))
        monkeypatch.setattr(Bench, "seconds_left", lambda self: -1.0)
        assert bench.attempt("late", lambda: 1 / 0) is None
        channel.seek(0)
        told = [json.loads(line) for line in channel]
    assert [(each["kind"], each["what"], each.get("reason")) for each in told] == [
        ("left out", "large", "memory"), ("left out", "larger than thought", "memory"), ("fault", "wrong", None),
        ("check", "near", None), ("check", "not a number", None), ("check", "below", None), ("row", "endless", None),
        ("left out", "late", "time"),
    ]  # fmt: skip
    assert told[0]["why"] == "needs about 4.0 GiB, and 3.0 are free"
    assert "Tried to allocate 5 GiB" in told[1]["why"]
    assert [each["holds"] for each in told if each["kind"] == "check"] == [True, False, False]
    record = summed(told, 0, 100)
    assert record["state"] == driver.FAILED
    late = {"kind": "left out", "what": "late", "reason": "time", "why": "over"}
    assert summed([dict(late)], 0, 100)["state"] == driver.PART
    short, row = late | {"reason": "memory"}, {"kind": "row", "table": "t", "what": "small"}
    assert summed([dict(short), row], 0, 100)["state"] == driver.OK
    assert summed([short], 0, 100)["state"] == driver.PART
    text = to_markdown({"rehearsal": False, "stages": {"x": {"number": 1, "about": "", "seconds": 1.0, **record}}})
    assert "- left out: large: needs about 4.0 GiB, and 3.0 are free" in text


def test_a_row_with_the_foreach_optimizer_is_told_where_the_trainer_has_the_fused_one(tmp_path, monkeypatch):
    from sit_atconv.bench.gpu import training
    from sit_atconv.bench.gpu.worker import Bench
    from sit_atconv.training.objectives.flow import FlowObjective

    make = FlowObjective.make_optimizer
    monkeypatch.setattr(FlowObjective, "make_optimizer", lambda self, fused: make(self, True))  # as on CUDA
    monkeypatch.setattr(training, "TINY", [setting for setting in training.TINY if "foreach" in setting])
    with open(tmp_path / "channel", "w+") as channel:
        training.run(Bench(channel, tmp_path, tmp_path, 100, True))
        channel.seek(0)
        told = [json.loads(line) for line in channel]
    assert [(each["kind"], each.get("error")) for each in told] == [("row", None)]
    assert "foreach" in told[0]["what"]


IMPORTED = """
import sys
from sit_atconv.bench.gpu import __main__, correct, driver, layer, machine, operator, tests, worker
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({libraries!r})))
"""


@pytest.mark.slow
def test_the_command_and_the_stages_of_the_operator_import_torch_and_triton_alone():
    libraries = ["diffusers", "accelerate", "omegaconf", "torch_fidelity", "datasets", "timm", "matplotlib", "sklearn"]
    libraries += [
        "torchvision",
        "torchdiffeq",
        "einops",
        "PIL",
        "safetensors",
        "transformers",
        "yaml",
    ]  # torch loads tqdm where it is
    code = IMPORTED.format(libraries=libraries)
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.slow
def test_a_stage_is_rehearsed(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--rehearse", "--stages", "1", "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    table = capsys.readouterr().out
    assert "| 1 | machine | ok |" in table
    assert "A rehearsal on a CPU: its times mean nothing." in table
    record = read_json(tmp_path / "out" / "acceptance.json")["stages"]["machine"]
    assert {"device", "commit", "source", "torch", "triton", "python"} <= record["where"].keys()
    assert [row["what"] for row in record["rows"] if row["table"] == "ceilings"][1:] == [
        "64 x 64 product in bfloat16", "64 x 64 product in float32",
    ]  # fmt: skip


INTERRUPTED = """
import sys
from pathlib import Path
from sit_atconv.bench.gpu import __main__ as command, driver
from sit_atconv.bench.gpu.stages import Stage
driver.PACKAGE = "planted"
command.STAGES = [Stage(n, f"hangs{n}", "", "planted_hangs", 60, 60) for n in range(3)]
command.main(["--rehearse", "--out", sys.argv[1]])
"""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are found in /proc")
def test_a_signal_ends_the_stage_that_runs_and_keeps_what_is_done(planted, tmp_path):
    planted("hangs", f"open({str(tmp_path)!r} + '/pid-' + str(os.getpid()), 'w'); time.sleep(600)")
    words = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    while len(begun := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < driver.AT_ONCE:
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + 15
    assert "SIGTERM: what is done is in" in said
    assert "Traceback" not in said
    assert not any(map(alive, begun))
    assert len(list(tmp_path.glob("pid-*"))) == driver.AT_ONCE  # no other one was begun
    found = read_json(tmp_path / "out" / "acceptance.json")["stages"]
    assert [record["state"] for record in found.values()] == [driver.INTERRUPTED] * driver.AT_ONCE
    assert all(record["rows"] == [{"table": "found", "what": "a row", "value": 1.5}] for record in found.values())
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are found in /proc")
def test_what_a_killed_driver_had_found_is_taken_up(planted, tmp_path):
    planted("hangs", f"open({str(tmp_path)!r} + '/pid-' + str(os.getpid()), 'w'); time.sleep(600)")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path / "out")], env=environment)
    while len(begun := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < driver.AT_ONCE:
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(InputError, match="holds a rehearsal"):
        Acceptance(tmp_path / "out", rehearsal=False)
    assert Acceptance(tmp_path / "out", rehearsal=True).run([planted("works", "pass")])
    assert not any(map(alive, begun))
    found = read_json(tmp_path / "out" / "acceptance.json")["stages"]
    assert {name: record["state"] for name, record in found.items()} == {
        "hangs0": driver.INTERRUPTED, "hangs1": driver.INTERRUPTED, "works": driver.OK,
    }  # fmt: skip
    assert found["hangs1"]["rows"] == found["works"]["rows"]
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.slow
def test_all_stages_are_rehearsed(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--rehearse", "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert end.value.code == 0, table
    for stage in STAGES:
        assert f"| {stage.number} | {stage.name} | ok |" in table
