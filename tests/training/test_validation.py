"""The loss on held-out images: against one written out, the same on two processes, and no part of the training."""

import json
import random

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same_bits, log_rows, run_recipe, slowly, weights
from PIL import Image

from sit_atconv import SiTTransformer2DModel
from sit_atconv.config import differences, load_recipe, to_dict
from sit_atconv.data.digits import Digits
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import in_range
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.training import activities, trainer
from sit_atconv.training.checkpoint import load_trained
from sit_atconv.training.log import for_trackers


def rows_of(run):
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def losses_by_hand(model, dataset, held_out, left_out=()):
    """Losses and times of the images `held_out`, one image at a time, without those left out."""
    count = len(held_out)
    order = draws.generator(0, Stream.VALIDATION, 0, count).permutation(count)
    losses, times = [], []
    for place, index in enumerate(held_out):
        if place in left_out:
            continue
        image, label = dataset[index, False]
        t = torch.tensor((order[place] + float(draws.uniforms((), 0, Stream.VALIDATION, 1, place))) / count).float()
        image = in_range(image)
        noise = draws.normal(tuple(image.shape), 0, Stream.VALIDATION, 2, place)
        with torch.no_grad():
            velocity = model((t * image + (1 - t) * noise)[None], t[None], torch.tensor([label])).sample[0]
        losses.append((velocity - (image - noise)).square().mean().item())
        times.append(t.item())
    return np.array(losses), np.array(times)


def by_class(labels, share):
    """The held-out indices, written out."""
    kept, seen = [], {}
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if int(seen[label] * share + 1e-9) > int((seen[label] - 1) * share + 1e-9):
            kept.append(index)
    return kept


LOUD = {  # all that training draws and validation must not: flips, dropped labels, a seed of its own
    "run": {"seed": 3}, "data": {"held_out": 0.02, "flip": True}, "model": {"class_dropout_prob": 0.5},
    "train": {"max_steps": 6, "lr": 0.05}, "validation": {"every": 4, "batch_size": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_a_row_is_the_mean_of_the_averages_losses_one_by_one(recipe_file, digits):
    last = run_recipe(recipe_file(**LOUD))
    rows = rows_of(last.parent)
    assert [row["step"] for row in rows] == [4, 6]  # and after the last step
    held_out = by_class(digits.labels, 0.02)
    for row in rows:
        checkpoint = last.parent / f"step-000000{row['step']}"
        model = SiTTransformer2DModel.from_pretrained(checkpoint / "ema").eval()
        losses, times = losses_by_hand(model, digits, held_out)
        assert (row["num"], row["bad_images"]) == (len(held_out), 0) == (20, 0)
        assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert row["loss_se"] == pytest.approx(losses.std(ddof=1) / 20**0.5, rel=1e-4)
        means = [losses[np.floor(times * 10) == tenth].mean() for tenth in range(10)]  # two images in each
        assert row["loss_by_time"] == pytest.approx(means, rel=1e-4)
        live = SiTTransformer2DModel.from_pretrained(checkpoint / "model").eval()
        assert abs(losses_by_hand(live, digits, held_out)[0].mean() - losses.mean()) > 1e-3  # which is another model


def test_training_is_the_same_to_the_bit_with_it_and_no_global_generator_moves(recipe_file, tmp_path, monkeypatch):
    without = run_recipe(recipe_file(**LOUD), "validation.every=0", f"run.out={tmp_path / 'without'}")
    kept, after_step = [], activities.Validations.after_step

    def watched(self, trainer):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        after_step(self, trainer)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        kept.append(torch.equal(before[0], after[0]) and before[1:] == after[1:])

    monkeypatch.setattr(activities.Validations, "after_step", watched)
    for steps in (3, 6):  # also over a stop
        options = (f"train.max_steps={steps}", "validation.every=1", f"run.out={tmp_path / 'with'}")
        last = run_recipe(recipe_file(**LOUD), *options)
    assert kept == [True] * 6
    assert_same_bits(without, last)
    for one, other in zip(log_rows(without.parent), log_rows(last.parent), strict=True):
        assert {key: one[key] for key in ("loss", "grad_norm")} == {key: other[key] for key in ("loss", "grad_norm")}
    assert not (tmp_path / "without" / "validation.jsonl").exists()


def test_the_loss_is_computed_in_the_precision_of_the_run_and_of_what_loader_processes_read(recipe_file, digits):
    """One image at a time, so that bf16 rounds alike."""
    options = ("train.precision=bf16", "validation.batch_size=1", "data.workers=1", "train.max_steps=4")
    last = run_recipe(recipe_file(**LOUD), *options)
    model = SiTTransformer2DModel.from_pretrained(last / "ema").eval()
    exact = losses_by_hand(model, digits, by_class(digits.labels, 0.02))[0].mean()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses_by_hand(model, digits, by_class(digits.labels, 0.02))[0].mean()
    (row,) = rows_of(last.parent)
    assert abs(rounded - exact) > 1e-5 * exact
    assert row["loss"] == pytest.approx(rounded, rel=1e-6)


def test_runs_of_other_seeds_hold_out_and_validate_the_same(recipe_file, tmp_path, monkeypatch):
    seen = []

    class Watched(activities.Validations):
        def __init__(self, samples):
            super().__init__(samples)
            seen.append((samples.dataset.indices.tolist(), samples.__getitems__(range(20))[0]))

    monkeypatch.setattr("sit_atconv.training.loop.Validations", Watched)
    for seed in (0, 1):
        run_recipe(recipe_file(**LOUD), f"run.seed={seed}", "train.max_steps=1", f"run.out={tmp_path / str(seed)}")
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(seen[0][1][key], seen[1][1][key]) for key in seen[0][1])


@pytest.mark.slow
def test_two_processes_validate_as_one(process_server, recipe_file, tmp_path):
    """19 images in batches of 4: 10 in one process, and 9 and one of them again in the other."""
    sections = {"data": {"held_out": 0.02}, "validation": {"every": 1, "num": 19, "batch_size": 4}}
    recipe = recipe_file(train={"max_steps": 2, "lr": 1e-4}, **sections)
    single = run_recipe(recipe, f"run.out={tmp_path / 'one'}").parent
    codes, said = process_server("train_sit", tmp_path, [recipe, f"run.out={tmp_path / 'two'}"], {}, {})
    assert codes == [0, 0], said
    for one, two in zip(rows_of(single), rows_of(tmp_path / "two"), strict=True):
        assert (one["step"], one["num"]) == (two["step"], two["num"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["loss_se"] == pytest.approx(one["loss_se"], rel=1e-5)
        assert [each or 0.0 for each in two["loss_by_time"]] == pytest.approx(
            [each or 0.0 for each in one["loss_by_time"]], rel=1e-6
        )


def test_an_unreadable_held_out_image_is_left_out_counted_and_said_once(recipe_file, image_folder, capsys):
    dataset = Folder(str(image_folder), 8)
    held_out = by_class(dataset.labels, 0.5)
    broken = dataset.name(held_out[2])
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.5, "flip": True}
    path = recipe_file(data=data, train={"max_steps": 2}, validation={"every": 1}, checkpoint={"every": 1})
    with open(broken, "wb") as file:
        file.write(b"no image")
    last = run_recipe(path)
    said = capsys.readouterr().err
    assert said.count("held-out images are left out of the validation loss") == 1
    assert f"1 of 6 held-out images are left out of the validation loss, at first: image {broken!r} does not" in said
    rows = rows_of(last.parent)
    assert [(row["num"], row["bad_images"]) for row in rows] == [(5, 1)] * 2
    assert [row["bad_images"] for row in log_rows(last.parent)] == [0, 0]  # training has not met it
    model = SiTTransformer2DModel.from_pretrained(last / "ema").eval()
    losses, _ = losses_by_hand(model, dataset, held_out, left_out=[2])
    assert rows[-1]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert json.loads((last / "manifest.json").read_text())["data"] == {
        "num_images": 6, "classes": ["a", "b", "c"], "held_out": 6,
    }  # fmt: skip


@pytest.mark.slow
def test_held_out_images_that_are_gone_end_the_run_after_a_checkpoint(recipe_file, image_folder, monkeypatch):
    """And the next start makes up for the validation, also after the last step."""
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.5}
    path = recipe_file(data=data, validation={"every": 3}, checkpoint={"every": 100}, train={"max_steps": 4})
    whole, elsewhere = run_recipe(path, f"run.out={path.parent / 'whole'}").parent, image_folder.with_name("elsewhere")
    encoded, run, times = Folder.encoded, path.parent / "run", []

    def gone(self, index):
        if index in by_class(self.labels, 0.5):
            times.append(index)
            if len(times) in (1, 8):  # the first of six images, and after these and a step the first again
                image_folder.rename(elsewhere)
        return encoded(self, index)

    monkeypatch.setattr(Folder, "encoded", gone)
    for step, found in ((3, []), (4, [3])):
        with pytest.raises(InputError, match=r"held out: data.root=.* is no longer there; bring it back"):
            run_recipe(path)
        elsewhere.rename(image_folder)
        assert (run / f"step-000000{step}" / "manifest.json").is_file()
        assert [row["step"] for row in rows_of(run)] == found
    for _ in range(2):  # once is enough
        run_recipe(path)
        for one, other in zip(rows_of(run), rows_of(whole), strict=True):
            assert {**one, "seconds": None} == {**other, "seconds": None}
    assert len(times) == 1 + 6 + 1 + 6


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_none_and_said(recipe_file, monkeypatch, capsys):
    from sit_atconv.training.objectives.flow import FlowObjective

    held_out_loss = FlowObjective.held_out_loss

    def broken(self, batch, forward):
        losses = held_out_loss(self, batch, forward)
        return losses if forward.network.training else losses * float("nan")

    monkeypatch.setattr(FlowObjective, "held_out_loss", broken)
    last = run_recipe(recipe_file(**LOUD), "train.max_steps=4")
    (row,) = rows_of(last.parent)
    assert (row["loss"], row["loss_se"], row["loss_by_time"], row["num"]) == (None, None, [None] * 10, 20)
    assert "step 4: the loss of held-out images is not finite" in capsys.readouterr().err


def test_seconds_and_rows_go_on_over_starts(recipe_file, tmp_path, monkeypatch):
    clock = iter(np.arange(0, 1e6, 0.25))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: float(next(clock)))
    path = recipe_file(data={"held_out": 0.02}, validation={"every": 2}, train={"max_steps": 8})
    run_recipe(path, "train.max_steps=5")
    last = run_recipe(path)
    seconds = [row["seconds"] for row in log_rows(last.parent)]
    assert seconds == pytest.approx(np.arange(1, 9) * seconds[0])  # each step has looked at the clock equally often
    rows = rows_of(last.parent)
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8]
    assert [row["seconds"] for row in rows] == [seconds[row["step"] - 1] for row in rows]
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["seconds"] == seconds[-1]
    # A run of an earlier version has not counted them, and no later start can tell.
    before = last.parent / "step-0000004"
    manifest = json.loads((before / "manifest.json").read_text())
    del manifest["seconds"]
    (before / "manifest.json").write_text(json.dumps(manifest))
    for later in ("step-0000005", "step-0000008"):
        (last.parent / later / "manifest.json").unlink()
    again = run_recipe(path)
    assert [row["seconds"] for row in log_rows(again.parent)] == [*seconds[:4], None, None, None, None]


def test_another_share_is_another_run_and_another_way_of_validating_is_not(recipe_file):
    path = recipe_file(data={"held_out": 0.02}, validation={"every": 2}, train={"max_steps": 2})
    first = run_recipe(path)
    with pytest.raises(InputError, match=r"another recipe \(data.held_out: 0.02 -> 0.1\)"):
        run_recipe(path, "data.held_out=0.1")
    assert run_recipe(path, "validation.every=0", "train.max_steps=3").parent == first.parent
    old = json.loads((first / "manifest.json").read_text())["recipe"]
    del old["validation"], old["data"]["held_out"]  # as an earlier version stored it
    now = to_dict(load_recipe(path, ["data.held_out=null", "validation.every=0"]))
    assert not [text for text in differences(old, now) if "held_out" in text or "validation" in text]


def test_trackers_get_the_figures():
    row = {"loss": 0.5, "loss_by_time": [1.0, None], "num": 3, "seconds": None}
    assert for_trackers({f"validation/{key}": value for key, value in row.items()}) == {
        "validation/loss": 0.5, "validation/loss_by_time/0.25": 1.0, "validation/num": 3,
    }  # fmt: skip


@pytest.mark.parametrize("kind", slowly(["repa", "lora", "distill"]))
def test_other_objectives_validate_the_flow_loss_of_their_average(
    kind, recipe_file, image_folder, encoder_folder, tmp_path
):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.5, "flip": True}
    sections = {"data": data, "train": {"max_steps": 3}, "validation": {"every": 2}, "checkpoint": {"every": 3}}
    if kind == "repa":
        sections["repa"] = {"encoder": f"local-dir:{encoder_folder}", "depth": 1, "projector_dim": 12}
        path = recipe_file(**sections)
    elif kind == "lora":
        base = run_recipe(recipe_file("base", **sections), f"run.out={tmp_path / 'base'}")
        sections["train"] = {"max_steps": 3, "init": str(base)}
        path = recipe_file(**sections, lora={"rank": 2})
    else:
        teacher = run_recipe(recipe_file("teacher", **sections), f"run.out={tmp_path / 'teacher'}")
        path = recipe_file(**sections)
        settings = {"teacher": str(teacher), "init": "random", "blockwise_steps": 1, "share_steps": 1}
        stated = yaml.safe_load(path.read_text()) | {"distill": settings}
        del stated["model"]
        path.write_text(yaml.safe_dump(stated))
    last = run_recipe(path)
    dataset = Folder(str(image_folder), 8)
    model = load_trained(last).model
    losses, _ = losses_by_hand(model, dataset, by_class(dataset.labels, 0.5))
    row = rows_of(last.parent)[-1]
    assert row["step"] == 3
    assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_a_picture_of_the_training_part_is_never_a_held_out_one(recipe_file, image_folder, monkeypatch):
    """Through the whole loop: every file that is read for a step is one that is not held out."""
    dataset = Folder(str(image_folder), 8)
    held_out = {dataset.name(index) for index in by_class(dataset.labels, 0.25)}
    victim = next(dataset.name(index) for index in range(12) if dataset.name(index) not in held_out)
    Image.new("1", (1, 1)).save(victim, "gif")  # it decodes; the next one does not
    open(victim, "wb").close()
    read, encoded = [], Folder.encoded
    monkeypatch.setattr(Folder, "encoded", lambda self, index: (read.append(self.name(index)), encoded(self, index))[1])
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.25, "max_bad_share": 0.5}
    last = run_recipe(recipe_file(data=data))
    assert log_rows(last.parent)[-1]["bad_images"] == 1
    assert len(held_out) == 3
    assert set(read) == {dataset.name(index) for index in range(12)} - held_out
    assert weights(last)
