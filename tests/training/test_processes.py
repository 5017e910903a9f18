"""One run on one, two and four processes: the same samples and losses, also when their number changes on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_bits, log_rows, run_recipe

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(processes: int, recipe: Path, *overrides: str, kill_at: int | None = None) -> None:
    """train_sit.py under torchrun; kill_at: SIGKILL for all of it once the bar has reached that step."""
    command = [*TORCHRUN, str(processes), "train_sit.py", str(recipe), *overrides]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0
    )
    seen = b""
    while chunk := process.stderr.read(1):
        seen += chunk
        steps = [int(number) for number in re.findall(rb" (\d+)/40 ", seen)]
        if kill_at is not None and steps and steps[-1] >= kill_at:
            # The launcher's children have a group of their own each.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, children)]:
                os.kill(pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), seen.decode()


def assert_same_run(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other) == 40
    for a, b in zip(one, other, strict=True):
        assert b["images_seen"] == a["images_seen"] == 8 * a["step"]  # each sample by one process, not by all
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        by_time = [[loss or 0.0 for loss in row["loss_by_time"]] for row in (a, b)]  # None: no sample there
        assert by_time[1] == pytest.approx(by_time[0], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["update_ratio"] == pytest.approx(a["update_ratio"], rel=1e-2)


@pytest.fixture
def recipe(recipe_file):
    return recipe_file(train={"max_steps": 40, "lr": 1e-4}, data={"flip": True}, checkpoint={"every": 3})


def test_two_processes_train_as_one_and_go_on_to_the_same_bits(recipe, tmp_path):
    accumulate = "train.gradient_accumulation_steps=2"
    single = run_recipe(recipe, f"run.out={tmp_path / 'single'}")
    launch(2, recipe, f"run.out={tmp_path / 'whole'}", accumulate)
    for steps in (17, 40):
        launch(2, recipe, f"run.out={tmp_path / 'parts'}", f"train.max_steps={steps}", accumulate)
    assert_same_bits(tmp_path / "whole/step-0000040", tmp_path / "parts/step-0000040")
    assert json.loads((tmp_path / "whole/step-0000040/manifest.json").read_text())["processes"] == 2
    assert_same_run(log_rows(single.parent), log_rows(tmp_path / "whole"))


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing_not_even_on_the_way(recipe, tmp_path):
    single = log_rows(run_recipe(recipe, f"run.out={tmp_path / 'single'}").parent)
    for processes in (2, 4):
        launch(processes, recipe, f"run.out={tmp_path / str(processes)}")
        assert_same_run(single, log_rows(tmp_path / str(processes)))
    changing = f"run.out={tmp_path / 'changing'}"
    launch(2, recipe, changing, kill_at=11)
    launch(4, recipe, changing, kill_at=25)
    run_recipe(recipe, changing)
    assert_same_run(single, log_rows(tmp_path / "changing"))
