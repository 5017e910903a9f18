"""train_attnet.py: what a step computes, that a run goes on to the same bits, and that timm loads what it leaves."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, log_rows, reset_accelerate, slowly
from PIL import Image
from safetensors.torch import load_file
from sampled import item
from timm.data import Mixup

import train_attnet
from sit_atconv.classification import objective
from sit_atconv.classification.loop import train
from sit_atconv.classification.objective import ClassificationObjective
from sit_atconv.classification.plan import dry_run, facts_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.samples import (
    ClassifierSamples,
    RepeatAugmented,
    open_datasets,
    open_held_out,
    preprocessing,
    transforms,
)
from sit_atconv.config import load_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.held_out import split
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.trainer import Trainer

TINY = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [2, 2], "stem_strides": [2, 1]}


@pytest.fixture
def classifier_file(tmp_path):
    """Writes a tiny recipe of digits, with sections overridden, and returns its path."""

    def write(**sections):
        recipe = {
            "run": {"out": str(tmp_path / "run"), "log_every": 1},
            "augment": {"hflip": 0.0, "scale": [0.5, 1.0], "mixup": 0.4, "cutmix": 1.0, "erasing": 0.3},
            "model": {"name": "attnet_xxs", "input_size": 16, "drop_path_rate": 0.3, "drop_rate": 0.1, "options": TINY},
            "train": {"epochs": 0.2, "warmup_epochs": 0.05, "batch_size": 32, "lr": 1e-3},  # 9 steps, 2 of warm-up
            "ema": {"decay": 0.9},
            "eval": {"every_epochs": 0.1},
            "checkpoint": {"every": 4},
        }
        for section, keys in sections.items():
            recipe[section] = {**recipe.get(section, {}), **keys}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


def run(path, *overrides, **options):
    reset_accelerate()
    return train(load_recipe(path, overrides, ClassifierRecipe), **options)


def tensors(checkpoint):
    return {which: load_file(checkpoint / which / "model.safetensors") for which in ("model", "ema")}


def assert_same_bits(a, b):
    for which, expected in tensors(a).items():
        found = tensors(b)[which]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), which


@pytest.mark.parametrize("workers", [2, *slowly([0])])
def test_a_run_goes_on_to_the_same_bits(classifier_file, tmp_path, monkeypatch, workers):
    path = classifier_file(data={"workers": workers})
    whole = run(path, f"run.out={tmp_path / 'whole'}", "data.workers=0")
    assert whole.name == "step-0000009"
    optimize = Trainer._optimize

    def stop(self, *arguments):
        if self.step == 6:
            raise KeyboardInterrupt
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # somebody else's draws change nothing
        return optimize(self, *arguments)

    monkeypatch.setattr(Trainer, "_optimize", stop)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    monkeypatch.undo()
    parts = run(path, must_resume=True)
    assert_same_bits(whole, parts)
    timeless = ("step", "images_seen", "loss", "grad_norm", "lr", "update_ratio")
    ours, theirs = ([{key: row[key] for key in timeless} for row in log_rows(each.parent)] for each in (whole, parts))
    assert ours == theirs
    assert [row["step"] for row in ours] == list(range(1, 10))
    evals = [(each.parent / "evals.jsonl").read_text() for each in (whole, parts)]
    assert evals[0] == evals[1]
    assert [json.loads(line)["step"] for line in evals[0].splitlines()] == [4, 8, 9]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(process_server, classifier_file, tmp_path):
    path = classifier_file()
    whole = run(path, f"run.out={tmp_path / 'whole'}")
    codes, said = process_server("train_attnet", tmp_path, [path], {"at": ["classify", 5, "TERM"]})
    assert codes == [0], said
    assert "stopped at step 4" in (tmp_path / "printed-0").read_text()
    assert "the same command goes on from there" in (tmp_path / "printed-0").read_text()
    assert_same_bits(whole, run(path))


def test_the_first_step_by_hand(classifier_file, monkeypatch):
    """Loss and gradient norm of step 0 against timm's parts called in a row."""
    path = classifier_file(model={"drop_path_rate": 0.0, "drop_rate": 0.0})
    recipe = load_recipe(path, (), ClassifierRecipe)
    dataset, held_out = open_datasets(recipe.data)
    facts = facts_of(recipe, dataset, held_out)
    transform, _ = transforms(recipe, preprocessing(recipe.model, facts.channels))
    order = draws.generator(0, Stream.ORDER, 0).permutation(len(dataset))[:32]

    def seed(*draw):
        number = int(draws.generator(0, *draw).integers(1 << 32))
        random.seed(number), np.random.seed(number), torch.manual_seed(number)

    images = []
    for sample, index in enumerate(order):
        seed(Stream.AUGMENT, 0, sample)
        pixels = (Digits("train").images[index, 0] + 1).mul(127.5).round().byte().numpy()
        images.append(transform(Image.fromarray(pixels)))
    seed(Stream.MIX, 0, 0)
    mix = Mixup(0.4, 1.0, label_smoothing=0.1, num_classes=10)
    image, target = mix(torch.stack(images), torch.tensor(dataset.labels[order]))
    torch.manual_seed(0)
    model = timm.create_model("attnet_xxs", num_classes=10, in_chans=1, **TINY)
    loss = -(target * model(image).log_softmax(1)).sum(1).mean()
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    row = log_rows(run(path).parent)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_every_option_of_augmentation_reaches_timm_and_every_draw_its_own_step(classifier_file, pictures, monkeypatch):
    """Two steps of two micro-batches, against timm's own functions with what the recipe states."""
    seen, losses = [], ClassificationObjective.losses

    def watched(self, batch, forward):
        states = []
        hook = self.model.register_forward_pre_hook(lambda _, args: states.append((args[0], torch.get_rng_state())))
        found = losses(self, batch, forward)
        hook.remove()
        seen.append((forward.step, forward.part, batch["image"].clone(), batch["label"], *states[0]))
        return found

    monkeypatch.setattr(ClassificationObjective, "losses", watched)
    monkeypatch.setattr(Mixup, "__call__", lambda self, x, y, call=Mixup.__call__: call(self, x.clone(), y))
    augment = {
        "scale": [0.3, 0.7], "ratio": [0.6, 1.5], "hflip": 0.3, "vflip": 0.4, "color_jitter": 0.2,
        "interpolation": "random", "erasing": 0.6, "erasing_mode": "rand", "mixup": 0.3, "cutmix": 0.7,
        "mix_prob": 0.8, "switch_prob": 0.3, "smoothing": 0.2,
    }  # fmt: skip
    folders = {"kind": "imagefolder", "root": str(pictures / "train"), "val_root": str(pictures / "val"), "repeats": 3}
    normalised = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    path = classifier_file(
        data=folders, augment=augment, model=normalised,
        train={"epochs": 0.7, "warmup_epochs": 0, "batch_size": 8, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    run(path)
    assert [(step, part) for step, part, *_ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    transform = timm.data.create_transform(
        (3, 16, 16), is_training=True, scale=(0.3, 0.7), ratio=(0.6, 1.5), hflip=0.3, vflip=0.4, color_jitter=0.2,
        interpolation="random", re_prob=0.6, re_mode="rand", mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7),
    )  # fmt: skip
    dataset, _ = open_datasets(load_recipe(path, (), ClassifierRecipe).data)
    order = RepeatAugmented(len(dataset), 3, 0)

    def seed(*draw):
        number = int(draws.generator(0, *draw).integers(1 << 32))
        random.seed(number), np.random.seed(number), torch.manual_seed(number)

    for step, part, image, label, mixed, state in seen:
        for place in range(4):
            sample = part * 4 + place
            picture, wanted = dataset.picture(order.index(step * 8 + sample))
            seed(Stream.AUGMENT, step, sample)
            assert torch.equal(image[place], transform(picture))
            assert label[place] == wanted
        seed(Stream.MIX, step, part)
        mix = Mixup(0.3, 0.7, prob=0.8, switch_prob=0.3, label_smoothing=0.2, num_classes=2)
        assert torch.equal(mixed, mix(image.clone(), label)[0])
        seed(Stream.DROP_PATH, step, part)
        assert torch.equal(state, torch.get_rng_state())


def test_the_average_warms_up_and_blocks_are_checkpointed(classifier_file, monkeypatch):
    decays, update = [], objective.TimmAverage.update

    def watched(self, model, updates):
        assert all(stage.grad_checkpointing for stage in model.stages)
        decays.append(self.ema.get_decay(updates))
        return update(self, model, updates)

    monkeypatch.setattr(objective.TimmAverage, "update", watched)
    last = run(classifier_file(ema={"decay": 0.6, "warmup": True}, train={"gradient_checkpointing": True}))
    assert decays == pytest.approx([0.0, *(min(0.6, 1 - (1 + step) ** (-2 / 3)) for step in range(1, 9))])
    assert len(log_rows(last.parent)) == 9


def test_schedule_weight_decay_and_averages(classifier_file, monkeypatch):
    seen, optimize = [], Trainer._optimize

    def watched(self, *arguments):
        average = self.objective.averages.models["ema"]
        seen.append({name: tensor.clone() for name, tensor in average.state_dict().items()})
        for group in self.optimizer.param_groups:
            shapes = {p.ndim for p in group["params"]}
            assert (group["weight_decay"] == 0.05) == (min(shapes) > 1)
        return optimize(self, *arguments)

    monkeypatch.setattr(Trainer, "_optimize", watched)
    last = run(classifier_file(train={"min_lr": 1e-5, "warmup_lr": 1e-4}))
    rates = [row["lr"] for row in log_rows(last.parent)]
    assert rates[:3] == pytest.approx([1e-4, (1e-4 + 1e-3) / 2, 1e-5 + 0.99e-3 * (1 + np.cos(np.pi * 2 / 9)) / 2])
    assert rates[8] == pytest.approx(1e-5 + 0.99e-3 * (1 + np.cos(np.pi * 8 / 9)) / 2)
    before = seen[-1]
    for name in ("head.fc.weight", "stem.0.bn.running_mean", "stages.0.blocks.0.token_mixer.difference_control"):
        now = tensors(last)["model"][name]
        torch.testing.assert_close(tensors(last)["ema"][name], 0.9 * before[name] + 0.1 * now)
        assert not torch.equal(now, tensors(last)["ema"][name])


def test_timm_loads_it_and_finds_the_accuracy_that_was_written(classifier_file):
    shown = {"crop_pct": 0.7, "mean": [0.2], "std": [0.6]}
    last = run(classifier_file(train={"epochs": 1}, eval={"every_epochs": 1}, model=shown))
    written = json.loads((last.parent / "evals.jsonl").read_text().splitlines()[-1])
    assert written["num"] == 360
    digits = Digits("test")
    for which, name in (("ema", "ema"), ("model", "model")):
        model = timm.create_model(f"local-dir:{last / which}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        images = torch.stack([transform(digits.picture(index)[0]) for index in range(360)])
        with torch.no_grad():
            logits, labels = model(images), torch.tensor(digits.labels)
        assert 100 * (logits.argmax(1) == labels).double().mean().item() == pytest.approx(written[f"{name}_top1"])
        within = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
        assert 100 * within.double().mean().item() == pytest.approx(written[f"{name}_top5"])
        assert F.cross_entropy(logits, labels).item() == pytest.approx(written[f"{name}_loss"], rel=1e-4)
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["recipe"]["model"]["options"] == {
        "global_pool": "avg", "glu_norm": False, "layer_scale": None, "pos_embed": False, "kernel_size": 3,
        "pool": "raster", "routing": "adaptive", "inhibition": "learned", **TINY,
    }  # fmt: skip


def test_what_is_drawn_for_a_sample_is_its_own(classifier_file):
    recipe = load_recipe(classifier_file(), (), ClassifierRecipe)
    dataset, _ = open_datasets(recipe.data)
    transform, _ = transforms(recipe, preprocessing(replace(recipe.model, mean=[0.3], std=[0.4]), 1))
    samples = ClassifierSamples(dataset, transform, 32, 5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    whole, _ = samples.fetch(range(32, 64))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]
    for position in (40, 33):
        alone = item(samples, position)
        assert torch.equal(alone["image"], whole["image"][position - 32])
        assert alone["label"] == whole["label"][position - 32]
    other, _ = ClassifierSamples(dataset, transform, 32, 6).fetch(range(32, 64))
    assert not torch.equal(other["image"], whole["image"])


def test_repeats_are_the_same_image_augmented_anew():
    order = RepeatAugmented(100, 3, 7)
    first, second = ([order.index(epoch * 100 + place) for place in range(100)] for epoch in (0, 1))
    for epoch in (first, second):
        assert [epoch[place] for place in range(0, 99, 3)] == [epoch[place] for place in range(2, 99, 3)]
        assert len(set(epoch)) == 34
    assert first != second
    other_seed = RepeatAugmented(100, 3, 8)
    assert first != [other_seed.index(place) for place in range(100)]
    samples = ClassifierSamples(Digits("train"), lambda picture: torch.rand(1), 8, 0, repeats=3)
    batch, _ = samples.fetch(range(3))
    assert len(set(batch["label"].tolist())) == 1
    assert len(set(batch["image"].flatten().tolist())) == 3


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "original", "augmix-m10"])
def test_the_strongest_level_is_no_error(classifier_file, policy):
    path = classifier_file(augment={"auto_augment": policy})
    recipe = load_recipe(path, (), ClassifierRecipe)
    training, _ = transforms(recipe, preprocessing(replace(recipe.model, mean=[0.5] * 3, std=[0.5] * 3), 3))
    picture = Image.new("RGB", (24, 24), (200, 100, 50))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert all(training(picture).isfinite().all() for _ in range(100))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of two classes, red and blue, to train on and held out."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, number in (("train", 24), ("val", 10)):
        for label, name in enumerate(("blue", "red")):
            (root / part / name).mkdir(parents=True)
            for index in range(number // 2):
                pixels = generator.integers(0, 120, (20, 30, 3), np.uint8)
                pixels[..., 0 if label else 2] += 120
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def test_folders_of_pictures_with_all_augmentation(classifier_file, pictures):
    path = classifier_file(
        data={"kind": "imagefolder", "root": str(pictures / "train"), "val_root": str(pictures / "val")},
        augment={"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random", "mixup": 0.1},
        train={"epochs": 20, "warmup_epochs": 1, "batch_size": 24},
    )
    last = run(path)
    row = json.loads((last.parent / "evals.jsonl").read_text().splitlines()[-1])
    assert row["num"] == 10
    assert row["model_top5"] == 100  # of two classes
    config = json.loads((last / "ema" / "config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_held_out_images_of_one_folder_are_those_of_a_sit_of_it(classifier_file, recipe_file, pictures, tmp_path):
    data = {"kind": "imagefolder", "root": str(pictures / "train"), "held_out": 0.25}
    path = classifier_file(data=data)
    recipe = load_recipe(path, (), ClassifierRecipe)
    learnt, shown = open_datasets(recipe.data)
    same = split(open_dataset(load_recipe(recipe_file("sit", data=data | {"image_size": 16})).data), 0.25)
    for part, other, indices in (
        (shown, same[1], [3, 7, 11, 15, 19, 23]),
        (learnt, same[0], [index for index in range(24) if index % 4 != 3]),
    ):
        assert part.indices.tolist() == other.indices.tolist() == indices
        assert [part.name(place) for place in range(len(part))] == [other.name(place) for place in range(len(part))]
    samples = ClassifierSamples(learnt, lambda picture: torch.zeros(1), 8, seed=0)
    assert {samples.order.index(position) for position in range(72)} == set(range(18))
    plan = dry_run(recipe)
    assert "18 images of 2 classes, 6 held out" in plan
    last = run(path)
    assert json.loads((last / "manifest.json").read_text())["data"] == {
        "num_images": 18, "classes": ["blue", "red"], "held_out": 6,
    }  # fmt: skip
    assert json.loads((last.parent / "evals.jsonl").read_text().splitlines()[-1])["num"] == 6
    assert open_held_out(recipe.data).indices.tolist() == shown.indices.tolist()
    digits = load_recipe(classifier_file(data={"held_out": 0.1}), (), ClassifierRecipe)
    assert [len(part) for part in open_datasets(digits.data)] == [1437 - 139, 139]


def test_a_hub_dataset_with_columns_of_its_own(classifier_file, pictures, tmp_path, fails, capsys):
    datasets = pytest.importorskip("datasets")

    def table(part: str) -> datasets.Dataset:
        files = sorted((pictures / part).rglob("*.png"))
        features = datasets.Features(img=datasets.Image(), fine=datasets.ClassLabel(names=["blue", "red"]))
        labels = [file.parent.name for file in files]
        return datasets.Dataset.from_dict({"img": [str(file) for file in files], "fine": labels}, features)

    datasets.DatasetDict(train=table("train"), test=table("val")).save_to_disk(tmp_path / "saved")
    columns = {"kind": "hf", "root": str(tmp_path / "saved"), "image_key": "img", "label_key": "fine"}
    path = classifier_file(data=columns, train={"epochs": 1, "warmup_epochs": 0, "batch_size": 8})
    capsys.readouterr()  # of `datasets`
    line = fails(train_attnet.main, path)
    assert "the held-out images (data.val_root, data.val_split): data.split='validation'" in line
    reset_accelerate()
    last = run(path, "data.val_split=test")
    assert json.loads((last.parent / "evals.jsonl").read_text().splitlines()[-1])["num"] == 10
    assert json.loads((last / "ema" / "config.json").read_text())["label_names"] == ["blue", "red"]
    reset_accelerate()
    capsys.readouterr()
    assert "did you mean 'fine'" in fails(train_attnet.main, path, "data.label_key=fin", f"run.out={tmp_path / 'new'}")


def test_a_damaged_picture_costs_a_line_and_no_more(classifier_file, pictures, tmp_path, capsys):
    root = tmp_path / "copy"
    shutil.copytree(pictures / "train", root)
    (root / "red" / "0.png").write_bytes(b"no picture")
    sections = {
        "data": {"kind": "imagefolder", "root": str(root), "val_root": str(pictures / "val"), "max_bad_share": 0.05},
        "train": {"epochs": 2, "warmup_epochs": 0, "batch_size": 24},
    }
    last = run(classifier_file(**sections))
    assert log_rows(last.parent)[-1]["bad_images"] == 1
    assert "0.png' does not decode" in capsys.readouterr().err
    with pytest.raises(InputError, match="1 of 24 images cannot be read"):
        run(classifier_file(**sections), "data.max_bad_share=0", f"run.out={tmp_path / 'strict'}")
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_held_out_picture_is_named_and_the_training_is_kept(classifier_file, pictures, tmp_path, workers):
    shutil.copytree(pictures / "val", tmp_path / "val")
    broken = tmp_path / "val" / "red" / "3.png"
    good = broken.read_bytes()
    broken.write_bytes(b"no picture")
    path = classifier_file(
        data={
            "kind": "imagefolder",
            "root": str(pictures / "train"),
            "val_root": str(tmp_path / "val"),
            "workers": workers,
        },
        train={"epochs": 4, "warmup_epochs": 0, "batch_size": 24},
        eval={"every_epochs": 3},
        checkpoint={"every": 2},
    )
    with pytest.raises(InputError, match=r"held out: image '.*3\.png' does not decode") as caught:
        run(path)
    assert "Traceback" not in str(caught.value)
    broken.write_bytes(good)
    assert run(path, must_resume=True).name == "step-0000004"


def test_bad_input_costs_one_line_and_nothing_else(classifier_file, fails, tmp_path, pictures, capsys):
    path = classifier_file()
    other = str(tmp_path / "new")
    (tmp_path / "one" / "green").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "green" / "0.png")
    folders = ["data.kind=imagefolder", f"data.root={pictures / 'train'}"]
    for overrides, said in (
        (["model.name=attnet_t9"], "did you mean 'attnet_t"),
        (["model.options.depth=3"], "attnet_xxs refuses its options"),
        (["model.options.pretrained=true"], "begins with new weights"),
        (["model.options={dims: [1, 8]}"], "give at least 2"),
        (["model.options.kernel_size=5"], "model.options.kernel_size=5: must be at most 4, since the grid has 4 x 4"),
        (["model.std=[0.0]"], "model.std=[0.0]: must be at least 0.0001"),
        (["model.mean=[.nan]"], "model.mean=[nan]: must be at least -100"),
        (["augment.erasing=0", "augment.erasing_mode=rand"], "goes with augment.erasing"),
        (["augment.mixup=0", "augment.cutmix=0", "augment.mix_prob=0.5"], "goes with augment.mixup"),
        (["augment.mixup=0", "augment.switch_prob=0.5"], "goes with both"),
        (["train.warmup_epochs=0", "train.warmup_lr=1e-5"], "goes with train.warmup_epochs"),
        (["train.min_lr=1.0"], "train.min_lr=1.0: must be at least 0 and at most lr=0.001"),
        (["data.image_key=img"], "goes with data.kind=hf"),
        (["eval.every_epochs=.inf"], "eval.every_epochs=inf: must be over 0"),
        (
            [*folders, "data.val_root=/nowhere"],
            "the held-out images (data.val_root, data.val_split): data.root='/nowhere'",
        ),
        (["model.options={dims: [8, 12, 16]}"], "one per stage"),
        (["model.options.in_chans=3"], "follows from the data"),
        (["model.mean=[0.1, 0.2, 0.3]"], "1 channels"),
        (["augment.mixups=1"], "did you mean 'augment.mixup'"),
        (["augment.erasing=1.5"], "since it is a probability"),
        (["augment.scale=[1.0, 0.5]"], "two rising numbers"),
        (["augment.auto_augment=rand-m9"], "leave it out for grey images"),
        (["augment.auto_augment=rand-m9", "augment.color_jitter=0.4"], "leave one out"),
        (["train.batch_size=31"], "choose a multiple of 2"),
        (["train.gradient_accumulation_steps=32"], "choose a multiple of 64"),
        (["train.epochs=0.01"], "and under epochs=0.01, since"),
        (["ema.decay=1.0"], "ema.decay=1.0: must be at least 0 and under 1"),
        (["eval.every_epochs=0"], "must be over 0"),
        (["data.repeats=0"], "at least 1"),
        (["data.root=/nowhere"], "has its own; leave it out"),
        (folders, "data.val_root is missing"),
        (
            [*folders, "data.val_root=x", "data.held_out=0.1"],
            "data.val_root=x beside data.held_out=0.1, which holds out images of data.root; leave one out",
        ),
        (
            ["data.kind=hf", "data.root=x", "data.held_out=0.1", "data.val_split=test"],
            "data.val_split=test goes with data.kind=hf and no data.held_out",
        ),
        ([*folders, f"data.val_root={tmp_path / 'one'}"], "of different classes: ['blue', 'green', 'red']"),
        (["--resume"], "there is no checkpoint"),
    ):
        line = fails(train_attnet.main, path, f"run.out={other}", *overrides)
        assert said in line, line
        assert not (tmp_path / "new").exists()
        reset_accelerate()
    last = run(path)
    capsys.readouterr()
    line = fails(train_attnet.main, path, "train.lr=0.5")
    assert "holds a run of another recipe (train.lr: 0.001 -> 0.5)" in line
    assert last.exists()


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        (
            {"name": "vgg11"},
            (),
            "vgg11 refuses its options {'num_classes': 10, 'in_chans': 1, 'drop_rate': 0.1, 'drop_",
        ),
        ({"name": "vit_tiny_patch16_224"}, (), "input_size=16: vit_tiny_patch16_224 does not take such images"),
        (
            {"name": "vgg11", "input_size": 32, "drop_path_rate": None},
            ("train.gradient_checkpointing=true",),
            "train.gradient_checkpointing: vgg11 cannot",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_a_model_of_timm_does_not_take_is_one_line(classifier_file, fails, tmp_path, model, overrides, said, dry):
    path = classifier_file(model={"options": {}, **model})
    assert said in fails(train_attnet.main, path, *overrides, *(["--dry-run"] if dry else []))
    assert not (tmp_path / "run").exists()


def test_a_model_of_timm_without_drop_path(classifier_file, capsys):
    bare = {"name": "vgg11", "input_size": 32, "options": {}, "drop_path_rate": None}
    train_attnet.main([str(classifier_file(model=bare)), "--dry-run"])
    assert "vgg11" in capsys.readouterr().out


def test_dry_run_says_what_it_would_cost(classifier_file, capsys):
    train_attnet.main(
        [str(classifier_file(model={"name": "attnet_t2", "input_size": 224, "options": {}})), "--dry-run"]
    )
    said = capsys.readouterr().out
    assert "attnet_t2, 26.50 M parameters, 4.73 GMACs at 224 px" in said  # 27.01 M with 1,000 classes and 3 channels
    assert "1,437 images of 10 classes, 360 held out" in said
    assert "9 steps of 32 = 0.2 epochs" in said


def test_the_printed_code_loads_the_average(classifier_file, tmp_path, capsys):
    out = tmp_path / "it's a run"
    train_attnet.main([str(classifier_file()), f"run.out={out}"])
    code, names = capsys.readouterr().out.partition("load it in Python by: ")[2], {}
    exec(code, names)
    stored = load_file(max(out.glob("step-*/ema/model.safetensors")))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in names["model"].state_dict().items())


def test_training_begins_with_the_plan_and_a_dry_run_looks_at_the_run(classifier_file, capsys):
    def plan(*words: str) -> list[str]:
        reset_accelerate()
        train_attnet.main([str(classifier_file()), *words])
        return [line for line in capsys.readouterr().out.splitlines() if re.match("[a-z]+  +", line)]

    planned = plan("--dry-run")
    assert planned[-1].startswith("run       a new run begins in ")
    assert plan() == planned
    assert "is at its last step, " in plan("--dry-run")[-1]
    refused = plan("--dry-run", "train.lr=0.5")[-1]
    assert "a start would be refused: run.out=" in refused
    assert "(train.lr: " in refused


def test_one_process_of_a_launch_prints_the_plan(classifier_file, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train_attnet.main([str(classifier_file()), "--dry-run"])
    assert capsys.readouterr().out == ""


def test_every_group_of_the_optimiser_keeps_its_own_rate(classifier_file, monkeypatch):
    seen, create = [], objective.create_optimizer_v2

    def two_rates(*arguments, **options):
        optimizer = create(*arguments, **options)
        assert len(optimizer.param_groups) == 2
        optimizer.param_groups[1]["lr"] *= 0.1
        optimizer.register_step_pre_hook(lambda it, *_: seen.append([group["lr"] for group in it.param_groups]))
        return optimizer

    monkeypatch.setattr(objective, "create_optimizer_v2", two_rates)
    train(load_recipe(classifier_file(train={"warmup_epochs": 0, "min_lr": 0.0}), schema=ClassifierRecipe))
    cosine = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]  # from the recipe's rate to 0
    assert seen == [pytest.approx([1e-3 * share, 1e-4 * share]) for share in cosine]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bits_and_evaluate_every_image_once(classifier_file, tmp_path):
    path = classifier_file(augment={"mixup": 0.0, "cutmix": 0.0})
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def launch(*overrides):
        command = [*TORCHRUN, "train_attnet.py", str(path), *overrides]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    launch(f"run.out={tmp_path / 'whole'}")
    launch()
    run_folder = tmp_path / "run"
    for later in ("step-0000009", "step-0000008"):
        shutil.rmtree(run_folder / later)
    launch("--resume")
    assert_same_bits(tmp_path / "whole" / "step-0000009", run_folder / "step-0000009")
    row = json.loads((run_folder / "evals.jsonl").read_text().splitlines()[-1])
    assert row["num"] == 360
    model = timm.create_model(f"local-dir:{run_folder / 'step-0000009' / 'model'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    digits = Digits("test")
    with torch.no_grad():
        logits = model(torch.stack([transform(digits.picture(index)[0]) for index in range(360)]))
    found = 100 * (logits.argmax(1) == torch.tensor(digits.labels)).double().mean().item()
    assert row["model_top1"] == pytest.approx(found)
