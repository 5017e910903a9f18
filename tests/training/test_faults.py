"""Signals, data that goes bad, losses that are not finite, disks that are full: what the loop makes of them."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_bits, log_rows, reset_accelerate, run_recipe, slowly
from sampled import Scorer

import train_sit
from sit_atconv.config import load_recipe
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import agree
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.training import checkpoint, ema, loop
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.trainer import Trainer

DIES_OF_THE_SECOND = """
import os, signal
from sit_atconv.runtime.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == "SIGTERM"
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_the_first_signal_is_a_request_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_stops_at_once_unless_a_launcher_passes_the_first_on(launched):
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "x"} if launched else {}
    done = subprocess.run(
        [sys.executable, "-c", DIES_OF_THE_SECOND], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if launched else -signal.SIGINT), done.stderr
    assert (done.stdout == "still here\n") == launched
    assert done.stderr.count("SIGTERM: finishing the step") == 1


def test_one_process_agrees_with_itself():
    assert agree(3, False, True) == [3, 0, 1]


# A training that calls `stop` in its sixth step.
TRAIN = """
import os, signal, sys
import train_sit
from sit_atconv.training.trainer import Trainer
optimize = Trainer._optimize

def stopping(self, *arguments):
    if self.step == 5:
        stop()
    return optimize(self, *arguments)

Trainer._optimize = stopping
{}
train_sit.main(sys.argv[1:2])
"""


@pytest.mark.parametrize("workers", [1, *slowly([0])])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_run_goes_on(process_server, recipe_file, tmp_path, workers):
    path = recipe_file(
        train={"max_steps": 20, "lr_schedule": "linear"}, checkpoint={"every": 15}, data={"workers": workers}
    )
    # As a terminal or a scheduler does it: to the loader's workers as well.
    program = "os.setpgid(0, 0)\ndef stop():\n    os.killpg(0, getattr(signal, sys.argv[2]))"
    codes, said = process_server(TRAIN.format(program), tmp_path, [path, "SIGINT" if workers else "SIGTERM"])
    assert codes == [0], said
    last = checkpoint.step_folders(tmp_path / "run")[-1]
    assert checkpoint.step_of(last) == 6
    text = f"stopped at step 6, saved as {last}; the same command goes on from there\n"
    assert (tmp_path / "printed-0").read_text().endswith(text)
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    assert_same_bits(run_recipe(path), whole)
    assert [row["step"] for row in log_rows(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGINT, *slowly([signal.SIGHUP])])
def test_a_signal_that_took_the_terminal_with_it_saves_too(process_server, recipe_file, tmp_path, number):
    path = recipe_file(train={"max_steps": 30}, checkpoint={"every": 30})
    # Its stderr is a pipe, whose other end goes first, as `tee` ends by the same Ctrl-C.
    program = (
        "reading, writing = os.pipe()\nos.dup2(writing, 2)\nos.close(writing)\n"
        "def stop():\n    os.close(reading)\n    os.kill(os.getpid(), getattr(signal, sys.argv[2]))"
    )
    codes, said = process_server(TRAIN.format(program), tmp_path, [path, number.name])
    assert codes == [0], said
    assert [checkpoint.step_of(folder) for folder in checkpoint.step_folders(tmp_path / "run")] == [6]


def test_a_signal_before_the_first_step_of_a_start_writes_nothing_twice(recipe_file, monkeypatch):
    last = run_recipe(recipe_file(), "train.max_steps=4")
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: setattr(self, "received", "SIGTERM") or self)
    stamp = (last / "manifest.json").stat().st_mtime_ns
    assert run_recipe(recipe_file()) == last
    assert (last / "manifest.json").stat().st_mtime_ns == stamp


def poison_losses(monkeypatch, steps: set[int], value: float = float("nan")) -> None:
    """Make one loss of the batch `value` in the given steps (0-based), and leave the gradients finite."""
    losses = FlowObjective.losses

    def poisoned(self, batch, forward):
        found = losses(self, batch, forward)
        if forward.step in steps:
            found[0] = found[0] + torch.tensor([value] + [0.0] * (len(found[0]) - 1))
        return found

    monkeypatch.setattr(FlowObjective, "losses", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_whose_loss_alone_is_not_finite_is_skipped(recipe_file, monkeypatch, value):
    poison_losses(monkeypatch, {3}, value)
    begin, seen = FlowObjective.begin_step, []

    def beginning(self):
        models = self.model, self.averages.models["ema"]
        seen.append([value.clone() for model in models for value in model.state_dict().values()])
        begin(self)

    monkeypatch.setattr(FlowObjective, "begin_step", beginning)
    last = run_recipe(recipe_file())
    assert all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[5], strict=True))
    rows = log_rows(last.parent)
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["update_ratio"] == 0 for row in rows] == [False] * 3 + [True] + [False] * 4
    assert all(row["loss"] is not None for row in rows)


def test_the_run_of_skipped_steps_that_stops_is_the_recipes(recipe_file, monkeypatch):
    poison_losses(monkeypatch, set(range(2, 99)))
    with pytest.raises(InputError, match=r"for 3 steps, up to step 5"):
        run_recipe(recipe_file(), "train.max_skipped=3")


def steps_kept(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.step_folders(run)]


def test_no_checkpoint_is_of_skipped_steps_and_one_that_falls_due_among_them_waits(recipe_file, tmp_path, monkeypatch):
    poison_losses(monkeypatch, {3, 4, 5, 8})  # of steps 4 to 6, and 9
    path = recipe_file(ema={"kind": "power", "snapshot_every": 3}, checkpoint={"every": 2, "keep_last": 9})
    path.write_text(path.read_text().replace("decay: 0.9", "decay: null"))
    last = run_recipe(path, "train.max_steps=11")
    assert steps_kept(last.parent) == [2, 7, 8, 10, 11]
    assert sorted({snapshot.step for snapshot in ema.read_snapshots(last.parent)}) == [3, 7, 10]
    trainers = [json.loads((folder / "trainer.json").read_text()) for folder in checkpoint.step_folders(last.parent)]
    assert [(each["skipped"], each["skipped_in_a_row"]) for each in trainers] == [(0, 0), *[(3, 0)] * 2, *[(4, 0)] * 2]
    rare = run_recipe(path, "train.max_steps=11", "checkpoint.every=99", f"run.out={tmp_path / 'rare'}")
    assert_same_bits(last, rare)


def test_what_is_kept_for_good_is_kept_where_its_step_was_skipped(recipe_file, monkeypatch):
    poison_losses(monkeypatch, {3})  # of step 4, whose checkpoint is of step 5
    last = run_recipe(recipe_file(checkpoint={"every": 2, "keep_last": 1, "keep_every": 4}), "train.max_steps=10")
    assert steps_kept(last.parent) == [5, 8, 10]


def test_skipped_steps_do_not_push_the_last_good_checkpoint_out(recipe_file, tmp_path):
    settings = {"train": {"lr": 1e20, "max_steps": 100, "max_skipped": 9}, "checkpoint": {"every": 1, "keep_last": 1}}
    with pytest.raises(InputError, match="no finite loss and gradient for 9 steps, up to step 10"):
        run_recipe(recipe_file(**settings))  # the first step has a finite loss, and its weights give no other
    assert steps_kept(tmp_path / "run") == [1]


def test_a_snapshot_of_weights_that_are_not_finite_is_not_written(recipe_file, tmp_path, monkeypatch):
    def overflow(self, model, updates):
        with torch.no_grad():
            next(self.models["ema"].parameters()).fill_(float("inf"))

    monkeypatch.setattr(ema.Averages, "update", overflow)
    path = recipe_file(ema={"kind": "power", "snapshot_every": 1})
    path.write_text(path.read_text().replace("decay: 0.9", "decay: null"))
    with pytest.raises(InputError, match=r"step 1: .* is not finite, no checkpoint written"):
        run_recipe(path)
    assert not (tmp_path / "run/snapshots").exists()


@pytest.mark.parametrize("poisoned", [{6, 7}, {3, 5, 6, 7}], ids=str)
def test_a_run_does_not_end_as_trained_among_skipped_steps(recipe_file, tmp_path, monkeypatch, poisoned):
    poison_losses(monkeypatch, poisoned)
    last = 5 if 3 in poisoned else 4  # where step 4 is skipped, its checkpoint is of step 5
    said = rf"the last {8 - min(poisoned - {3})} of 8 steps were skipped.*no checkpoint is written.*step-000000{last}'"
    for _ in range(2):  # at once, and where it is asked to go on
        with pytest.raises(InputError, match=said):
            run_recipe(recipe_file())
    assert steps_kept(tmp_path / "run") == [last]


def test_a_run_of_mostly_skipped_steps_does_not_end_as_trained(recipe_file, tmp_path, monkeypatch, capsys):
    poison_losses(monkeypatch, {0, 1, 3, 4, 6})
    for _ in range(2):  # its last step is not skipped, and is kept; it is no trained model the next time either
        reset_accelerate()
        with pytest.raises(SystemExit) as stop:
            train_sit.main([str(recipe_file()), "checkpoint.every=99"])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert "trained" not in captured.out
        assert "error: 5 of 8 steps were skipped, since loss or gradient was not finite: this is no" in captured.err
        assert steps_kept(tmp_path / "run") == [8]
    monkeypatch.undo()
    reset_accelerate()
    train_sit.main([str(recipe_file()), "train.max_steps=12"])  # of which five are not most
    assert "trained to step 12" in capsys.readouterr().out


def scale_losses(monkeypatch, scale: float, overflows: set[int]) -> None:
    """Train with a gradient scaler, as in fp16, and let the gradients of these steps (0-based) overflow."""
    make, losses = loop.make_accelerator, FlowObjective.losses

    def making(recipe):
        accelerator = make(recipe)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
        return accelerator

    def overflowing(self, batch, forward):
        found = losses(self, batch, forward)
        if forward.step in overflows:
            found[0].register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(loop, "make_accelerator", making)
    monkeypatch.setattr(FlowObjective, "losses", overflowing)


def test_what_the_gradient_scaler_loses_delays_no_checkpoint_and_ends_no_run(recipe_file, monkeypatch):
    scale_losses(monkeypatch, 2.0**4, {0, 1, 4, 7})
    path = recipe_file(train={"max_skipped": 1}, checkpoint={"every": 1, "keep_last": 9})
    last = run_recipe(path)
    assert [row["skipped"] for row in log_rows(last.parent)] == [1, 2, 2, 2, 3, 3, 3, 4]
    assert steps_kept(last.parent) == list(range(1, 9))
    trainer = json.loads((last / "trainer.json").read_text())
    assert (trainer["skipped_in_a_row"], trainer["scaler"]["scale"]) == (0, 1.0)
    assert run_recipe(path) == last  # which is trained


@pytest.mark.parametrize("what", ["loss", "gradient", "both"])
def test_a_scale_that_is_not_why_excuses_no_step(recipe_file, tmp_path, monkeypatch, what):
    """A loss that is not finite, and a gradient that overflows even where the scale has come down to 1."""
    if what != "gradient":
        poison_losses(monkeypatch, {3} if what == "both" else set(range(3, 99)))
    scale_losses(monkeypatch, 2.0, set() if what == "loss" else set(range(4 if what == "both" else 3, 99)))
    settings = {"train": {"max_skipped": 3, "max_steps": 99}, "checkpoint": {"every": 1, "keep_last": 99}}
    first = 5 if what == "gradient" else 4  # that counts: with a scale of 2, a fourth is the scaler's
    with pytest.raises(InputError, match=f"for 3 steps, up to step {first + 2};"):
        run_recipe(recipe_file(**settings))
    assert steps_kept(tmp_path / "run") == list(range(1, first))


@pytest.mark.parametrize("every", [2, 99])
def test_a_signal_among_skipped_steps_saves_none_of_them(recipe_file, tmp_path, monkeypatch, capsys, every):
    poison_losses(monkeypatch, {2, 3, 4, 5})
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    overrides = "train.max_steps=10", f"checkpoint.every={every}"
    if every == 99:
        with pytest.raises(InputError, match=r"the last 3 of 5 steps.* of them, and there is none before;"):
            run_recipe(recipe_file(), *overrides)
        assert steps_kept(tmp_path / "run") == []
    else:
        assert run_recipe(recipe_file(), *overrides).name == "step-0000002"
        assert "warning: the last 3 steps, up to 5, were skipped and are not saved" in capsys.readouterr().err
        assert steps_kept(tmp_path / "run") == [2]
    monkeypatch.undo()
    poison_losses(monkeypatch, {2, 3, 4, 5})
    whole = run_recipe(recipe_file(), *overrides, f"run.out={tmp_path / 'whole'}")
    assert_same_bits(run_recipe(recipe_file(), *overrides), whole)


@pytest.fixture
def image_recipe(recipe_file, image_folder):
    """Writes a recipe on twelve images of three classes, in pixels; also its data, and the files."""
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8}
    return recipe_file, data, sorted(image_folder.rglob("*.png"))


def at_step(monkeypatch, step: int, action) -> None:
    """Do something in the middle of a run, when that many steps are taken."""
    optimize = Trainer._optimize

    def acting(self, *arguments):
        if self.step == step:
            action()
        return optimize(self, *arguments)

    monkeypatch.setattr(Trainer, "_optimize", acting)


def test_images_that_vanish_are_named_replaced_and_counted(image_recipe, tmp_path, monkeypatch, capsys):
    write, data, files = image_recipe
    path = write(data={**data, "max_bad_share": 0.2}, train={"max_steps": 20})

    def spoil():
        files[2].unlink()
        files[7].write_bytes(files[7].read_bytes()[:40])

    at_step(monkeypatch, 4, spoil)
    last = run_recipe(path)
    err = capsys.readouterr().err
    assert [err.count(files[index].name) for index in (2, 7)] == [1, 1]
    assert err.count("another image takes its place") == 2
    assert [row["bad_images"] for row in log_rows(tmp_path / "run")][::19] == [0, 2]
    assert set(json.loads((last / "trainer.json").read_text())["bad"]) == {"2", "7"}


def test_images_that_are_whole_again_no_longer_count(image_recipe, tmp_path, monkeypatch):
    write, data, files = image_recipe
    path, good = write(data={**data, "max_bad_share": 0.1}, train={"max_steps": 20}), files[2].read_bytes()
    at_step(monkeypatch, 4, files[2].unlink)
    run_recipe(path)
    monkeypatch.undo()
    files[2].write_bytes(good)
    at_step(monkeypatch, 24, files[7].unlink)  # with the other, more than the share
    last = run_recipe(path, "train.max_steps=40")
    assert set(json.loads((last / "trainer.json").read_text())["bad"]) == {"7"}
    assert [row["bad_images"] for row in log_rows(tmp_path / "run")][19:25:5] == [1, 0]


def test_too_many_bad_images_stop_the_run_and_keep_its_checkpoint(image_recipe, tmp_path, monkeypatch):
    write, data, files = image_recipe
    at_step(monkeypatch, 5, lambda: [file.unlink() for file in files[:3]])
    with pytest.raises(InputError, match=r"3 of 12"):
        run_recipe(write(data={**data, "max_bad_share": 0.2}, train={"max_steps": 20}))
    assert checkpoint.newest_valid(tmp_path / "run")[0].name == "step-0000007"  # where it stopped


def test_bad_images_among_skipped_steps_leave_the_checkpoint_before(image_recipe, tmp_path, monkeypatch):
    write, data, files = image_recipe
    poison_losses(monkeypatch, {4, 5, 6, 7, 8})
    at_step(monkeypatch, 5, lambda: [file.unlink() for file in files[:3]])
    with pytest.raises(InputError, match=r"3 of 12"):
        run_recipe(write(data={**data, "max_bad_share": 0.2}, train={"max_steps": 20}))
    assert steps_kept(tmp_path / "run") == [4]


def test_too_many_bad_images_from_the_start_leave_nothing_behind(image_recipe, tmp_path):
    write, data, files = image_recipe
    files[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=files[0].name):
        run_recipe(write(data=data))
    assert not (tmp_path / "run").exists()


def full_disk_at(monkeypatch, steps: set[int]) -> None:
    save = checkpoint.save

    def saving(run, step, *rest):
        if step in steps:
            raise checkpoint.DiskFull(f"step {step}: no room")
        return save(run, step, *rest)

    monkeypatch.setattr(checkpoint, "save", saving)


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(recipe_file, tmp_path, monkeypatch):
    full_disk_at(monkeypatch, {8})
    with pytest.raises(InputError, match="no room"):
        run_recipe(recipe_file(), "train.max_steps=12")
    monkeypatch.undo()
    whole = run_recipe(recipe_file(), f"run.out={tmp_path / 'whole'}")
    assert checkpoint.newest_valid(tmp_path / "run")[0].name == "step-0000004"
    assert_same_bits(run_recipe(recipe_file()), whole)


def test_training_goes_on_over_a_full_disk_where_asked_but_does_not_end_on_one(recipe_file, monkeypatch, capsys):
    full_disk_at(monkeypatch, {4})
    last = run_recipe(recipe_file(), "checkpoint.on_full_disk=continue")
    assert last.name == "step-0000008"
    assert "no room; training goes on from step 4" in capsys.readouterr().err
    full_disk_at(monkeypatch, {12})
    with pytest.raises(InputError, match="no room"):
        run_recipe(recipe_file(), "train.max_steps=12", "checkpoint.on_full_disk=continue")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_snapshot_that_the_disk_does_not_take_is_as_a_checkpoint(recipe_file, tmp_path, monkeypatch, capsys, number):
    save_file = ema.save_file

    def failing(tensors, path, metadata):
        if "step-0000006" in str(path):
            raise OSError(number, os.strerror(number))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(ema, "save_file", failing)
    settings = {"ema": {"kind": "power", "snapshot_every": 3}, "checkpoint": {"on_full_disk": "continue"}}
    path = recipe_file(**settings)
    path.write_text(path.read_text().replace("decay: 0.9", "decay: null"))
    if number == errno.EIO:
        with pytest.raises(InputError, match=r"step-0000006' cannot be written: Input/output error"):
            run_recipe(path)
    else:
        assert run_recipe(path).name == "step-0000008"
        assert "No space left on device; make room" in (said := capsys.readouterr().err)
        assert "training goes on from step 6" in said
        with pytest.raises(InputError, match="No space left"):
            run_recipe(path, f"run.out={tmp_path / 'other'}", "checkpoint.on_full_disk=stop")
    assert [path.name for path in (tmp_path / "run/snapshots").iterdir()] == ["step-0000003"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_preview_or_score_that_is_not_finite_is_left_out_with_a_line(
    recipe_file, tmp_path, monkeypatch, capsys, value
):
    plain = run_recipe(recipe_file(), f"run.out={tmp_path / 'plain'}")
    capsys.readouterr()
    decode, decoded, scored = IdentityCodec.decode, [], []

    def broken(self, latents):  # the second preview, of step 4, and the score of that step
        decoded.append(len(latents))
        images = decode(self, latents).clone()
        images[-1, 0, 3, 3] = value if len(decoded) in (2, 3) else 0
        return images

    monkeypatch.setattr(IdentityCodec, "decode", broken)
    path = recipe_file(preview={"every": 2, "steps": 2, "num": 4}, score={"every": 4, "num": 12})
    reset_accelerate()
    scorer = Scorer(lambda images, labels: scored.append(len(images)) or {"mean": 1.0})
    drawn = loop.train(load_recipe(path), scorer=scorer)
    assert_same_bits(plain, drawn)
    assert sorted(file.name for file in (tmp_path / "run/previews").iterdir()) == [
        f"step-000000{step}.png" for step in (2, 6, 8)
    ]
    rows = [json.loads(line) for line in (tmp_path / "run/scores.jsonl").read_text().splitlines()]
    assert ([row["step"] for row in rows], scored, decoded) == ([8], [12], [4, 4, 12, 4, 4, 12])
    said = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "warning" in line]
    assert len(said) == 2
    for line, what, last in zip(said, ("preview", "score"), (3, 11), strict=True):
        assert f"warning: step 4, its {what} is left out: image {last} is not finite as it comes from the auto" in line


def test_previews_and_scores_do_not_touch_what_is_trained(recipe_file, tmp_path):
    plain = run_recipe(recipe_file(), f"run.out={tmp_path / 'plain'}")
    reset_accelerate()
    calls = []

    def scorer(images, labels):
        calls.append((images.shape, images.dtype, labels))
        torch.manual_seed(1)
        return {"mean": float(torch.rand(1))}

    path = recipe_file(preview={"every": 2, "steps": 2, "num": 4}, score={"every": 4, "num": 12})
    brought = Scorer(scorer)
    drawn = loop.train(load_recipe(path), scorer=brought)
    assert_same_bits(plain, drawn)
    assert brought.checked == [((1, 8, 8), tuple("0123456789"), 12)]
    assert calls == [((12, 1, 8, 8), torch.uint8, [index % 10 for index in range(12)])] * 2
    scores = [json.loads(line) for line in Path(drawn.parent, "scores.jsonl").read_text().splitlines()]
    assert [(row["step"], row["num"], row["extractor"]) for row in scores] == [
        (4, 12, {"name": "x"}), (8, 12, {"name": "x"}),
    ]  # fmt: skip
