"""One run on one, two and four processes: the same samples and losses, also when their number changes on the way."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_bits, log_rows, run_recipe, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(processes: int, recipe: Path, *overrides: str, kill_at: int | None = None, script=("train_sit.py",)) -> None:
    """train_sit.py under torchrun; kill_at: SIGKILL for all of it once it tells of that step."""
    command = [
        *TORCHRUN,
        str(processes),
        *(() if kill_at is None else ("tests/telling.py",)),
        *script,
        str(recipe),
        *overrides,
    ]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    seen = b""
    while line := process.stderr.readline():
        seen += line
        found = re.search(rb"step (\d+) of 40", line)
        if kill_at is not None and found and int(found[1]) >= kill_at:
            # The launcher's children have a group of their own each.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, children)]:
                os.kill(pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), seen.decode()


def assert_same_run(one: list[dict], other: list[dict], steps: int = 40) -> None:
    assert len(one) == len(other) == steps
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


def test_two_processes_train_as_one_and_go_on_to_the_same_bits(process_server, recipe, tmp_path):
    def two(*overrides):
        arguments = [recipe, "train.max_steps=16", "train.gradient_accumulation_steps=2", *overrides]
        codes, said = process_server("train_sit", tmp_path, arguments, {}, {})
        assert codes == [0, 0], said

    single = run_recipe(recipe, "train.max_steps=16", f"run.out={tmp_path / 'single'}")
    two(f"run.out={tmp_path / 'whole'}")
    for steps in (8, 16):  # 8 is no step of a checkpoint, but for the end of that start
        two(f"run.out={tmp_path / 'parts'}", f"train.max_steps={steps}")
    assert_same_bits(tmp_path / "whole/step-0000016", tmp_path / "parts/step-0000016")
    assert json.loads((tmp_path / "whole/step-0000016/manifest.json").read_text())["processes"] == 2
    assert_same_run(log_rows(single.parent), log_rows(tmp_path / "whole"), steps=16)


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


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [False, True])
def test_a_sharded_run_is_the_same_run(recipe_file, tmp_path, aligned, encoder_folder, image_folder):
    """FSDP2 on two processes, then four, then none: losses, previews, snapshots and checkpoints of a plain run."""
    sections = {
        "train": {"max_steps": 40, "lr": 1e-4, "gradient_accumulation_steps": 2},
        "ema": {"kind": "power", "snapshot_every": 20, "decay": None},
        "preview": {"every": 20, "num": 5, "steps": 2},
        "checkpoint": {"every": 10},
        "data": {"held_out": 0.02},
        "validation": {"every": 10, "batch_size": 3},
    }
    if aligned:
        folder = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "flip": True}
        sections["data"] = folder | {"held_out": 0.25}
        sections["repa"] = {"encoder": f"local-dir:{encoder_folder}", "depth": 1, "projector_dim": 12}
    recipe = recipe_file(**sections)
    single = run_recipe(recipe, f"run.out={tmp_path / 'single'}")
    changing, sharded = f"run.out={tmp_path / 'changing'}", {"script": ("tests/fsdp_train_sit.py",)}
    launch(2, recipe, changing, kill_at=22, **sharded)
    first = (tmp_path / "changing/step-0000020").name
    assert sorted(path.name for path in (tmp_path / "changing" / first / "optimizer").iterdir())[1].startswith("shard")
    launch(4, recipe, changing, "train.max_steps=32", "train.gradient_accumulation_steps=1", **sharded)
    last = run_recipe(recipe, changing)
    assert_same_run(log_rows(single.parent), log_rows(tmp_path / "changing"))
    validated = [(run / "validation.jsonl").read_text().splitlines() for run in (single.parent, tmp_path / "changing")]
    one, other = ([json.loads(line) for line in lines] for lines in validated)
    assert [(row["step"], row["num"]) for row in other if row["step"] != 32] == [
        (row["step"], row["num"]) for row in one
    ]
    for a, b in zip(one, (row for row in other if row["step"] != 32), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for name in ("ema", "ema-0.100", "model"):
        whole, parts = weights(single, name), weights(last, name)
        assert all(torch.allclose(whole[key], parts[key], rtol=1e-4, atol=1e-6) for key in whole), name
    for folder in ("previews", "snapshots"):
        assert {path.name for path in (single.parent / folder).iterdir()} == {
            path.name for path in (last.parent / folder).iterdir()
        }
    if aligned:
        assert all("repa_loss" in row for row in log_rows(last.parent))
        assert (last / "model" / "projectors.safetensors").is_file()


@pytest.mark.slow
def test_a_sharded_run_in_bf16_is_near_the_plain_one(recipe_file, tmp_path):
    recipe = recipe_file(train={"max_steps": 6, "precision": "bf16", "lr": 1e-4})
    single = log_rows(run_recipe(recipe, f"run.out={tmp_path / 'single'}").parent)
    launch(2, recipe, f"run.out={tmp_path / 'sharded'}", script=("tests/fsdp_train_sit.py",))
    for a, b in zip(single, log_rows(tmp_path / "sharded"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    assert {value.dtype for value in weights(tmp_path / "sharded/step-0000006").values()} == {torch.float32}


BROKEN = """
import os
import train_sit
from sit_atconv.latents.codecs import IdentityCodec
decode = IdentityCodec.decode
IdentityCodec.decode = lambda self, latents: decode(self, latents) + (float("nan") if os.environ["RANK"] == "1" else 0)
train_sit.main()
"""


@pytest.mark.slow
def test_a_preview_that_is_not_finite_in_one_process_is_left_out_by_both(recipe_file, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    launch(2, recipe_file(preview={"every": 4, "steps": 1, "num": 4}), script=(str(tmp_path / "broken.py"),))
    assert [row["step"] for row in log_rows(tmp_path / "run")] == list(range(1, 9))
    assert not (tmp_path / "run/previews").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_both(recipe, tmp_path):
    for processes, rank in ((1, 0), (2, 1)):
        fault = ("-m", "experiments.drill.child", "sit", "nan", str(rank), "7")
        launch(processes, recipe, f"run.out={tmp_path / str(processes)}", script=fault)
    one, two = (log_rows(tmp_path / str(processes)) for processes in (1, 2))
    assert [row["skipped"] for row in two] == [0] * 6 + [1] * 34
    for a, b in zip(one, two, strict=True):
        if a["step"] != 7:  # where the half that the second process has is missing from the mean
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_a_process_that_is_left_says_so_in_one_line(process_server, recipe, tmp_path):
    codes, said = process_server("train_sit", tmp_path, [recipe], {"spared": True}, {"at": ["evaluate", 5, "KILL"]})
    assert codes == [2, -signal.SIGKILL]
    assert "Traceback" not in said[0]
    assert said[0].count("error: another process of the launch was killed") == 1
