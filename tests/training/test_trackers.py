"""Trackers, for real: what they store, and that a restart goes on with the same run."""

import io
import json

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import assert_same_bits, log_rows, run_recipe
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sit_atconv.runtime.errors import InputError


def scalars(run, tag: str) -> dict[int, float]:
    """What tensorboard would show."""
    events = EventAccumulator(str(run / "sit_atconv"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_shows_the_log_also_after_steps_were_taken_twice(recipe_file, tmp_path, monkeypatch):
    trackers = "run.trackers=[tensorboard]"
    last = run_recipe(recipe_file(), trackers, "train.max_steps=7", "checkpoint.keep_last=9")
    # As if the run had been killed past its checkpoint of step 4: steps 5 to 7 are taken again.
    (last / "manifest.json").unlink()
    last = run_recipe(recipe_file(), trackers)
    rows = {row["step"]: row for row in log_rows(tmp_path / "run")}
    assert scalars(last.parent, "loss") == pytest.approx({step: row["loss"] for step, row in rows.items()}, rel=1e-6)
    bins = scalars(last.parent, "loss_by_time/0.55")
    expected = {step: row["loss_by_time"][5] for step, row in rows.items() if row["loss_by_time"][5] is not None}
    assert bins == pytest.approx(expected, rel=1e-6)


def test_previews_go_to_tensorboard_with_their_classes(recipe_file, tmp_path):
    run_recipe(recipe_file(preview={"every": 4, "num": 3, "steps": 2}), "run.trackers=[tensorboard]")
    events = EventAccumulator(str(tmp_path / "run" / "sit_atconv"))
    events.Reload()
    shown = events.Images("preview")
    assert [event.step for event in shown] == [4, 8]
    for event in shown:
        stored = Image.open(tmp_path / "run" / "previews" / f"step-000000{event.step}.png").convert("RGB")
        picture = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        assert np.array_equal(np.array(picture), np.array(stored))


@pytest.mark.slow
def test_wandb_goes_on_with_its_run(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in ("4", "8"):
        recipe = recipe_file(preview={"every": 4, "num": 3, "steps": 2})
        run_recipe(recipe, "run.trackers=[wandb]", f"train.max_steps={steps}")
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{run_id}") for folder in folders)
    for folder in folders:
        assert len(list(folder.glob("files/media/images/preview_*.png"))) == 1
        assert (folder / f"run-{run_id}.wandb").stat().st_size > 0


def test_a_tracker_that_does_not_start_is_one_line_and_leaves_nothing(recipe_file, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("no key")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(InputError, match=r"run.trackers=\['tensorboard'\]: RuntimeError: no key; mend it"):
        run_recipe(recipe_file(), "run.trackers=[tensorboard]")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    last = run_recipe(recipe_file(), "train.max_steps=4")
    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(InputError, match="no key"):
        run_recipe(recipe_file(), "run.trackers=[tensorboard]")
    assert last.is_dir()


def test_a_tracker_that_fails_later_costs_one_warning(recipe_file, tmp_path, monkeypatch, capsys):
    whole = run_recipe(recipe_file(), f"run.out={tmp_path / 'whole'}")
    log = Accelerator.log

    def fail(self, values, step, **options):
        if step >= 3:
            raise OSError("lost")
        log(self, values, step, **options)

    monkeypatch.setattr(Accelerator, "log", fail)
    last = run_recipe(recipe_file(), "run.trackers=[tensorboard]")
    assert capsys.readouterr().err.count("warning: a tracker failed at step 3: OSError: lost") == 1
    assert_same_bits(whole, last)
    assert set(scalars(last.parent, "loss")) == {1, 2}
