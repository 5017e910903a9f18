"""A call of the library leaves the process as it found it, also where it raises."""

import contextlib
import logging
import os
import random
import signal
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401 (as it is imported, it sets variables and draws a number)
import torch
import yaml
from conftest import reset_accelerate
from PIL import Image, ImageFile
from sampled import Scorer

from sit_atconv import create_model
from sit_atconv.classification import train as train_classifier
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe
from sit_atconv.latents.encode import encode
from sit_atconv.runtime.devices import FP32_SWITCHES
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.scoring.score import score
from sit_atconv.training import train
from sit_atconv.training.objectives.flow import FlowObjective


def state() -> dict:
    """What belongs to the whole process, by name."""
    os.umask(umask := os.umask(0o77))
    kind, keys, *place = np.random.get_state()
    return {
        "streams": (sys.stdout, sys.stderr, sys.stdin, sys.excepthook),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": (os.getcwd(), umask),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.raiseExceptions),
        "generators": (random.getstate(), kind, keys.tolist(), place, torch.get_rng_state().tolist()),
        "switches": [
            *(switch.fp32_precision for switch in FP32_SWITCHES), torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
        ],
        "torch": (
            torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
        "pictures": (matplotlib.get_backend(), Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
    }  # fmt: skip


class Pixels(torch.nn.Module):
    """The pixels themselves as features."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().flatten(1)


@pytest.fixture
def same():
    """A context within which nothing of the state may be left changed."""

    @contextlib.contextmanager
    def watched(*raises):
        reset_accelerate()
        before = state()
        with pytest.raises(raises) if raises else contextlib.nullcontext():
            yield before
        after = state()
        assert [name for name in before if before[name] != after[name]] == []

    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = True, True  # as a user may have it
    yield watched
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = False, False


def test_training(same, recipe_file):
    seen = []

    def scorer(images, labels):
        seen.append((sys.stdout, sys.stderr))
        return {"mean": 1.0}

    path = recipe_file(preview={"every": 4, "steps": 1, "num": 2}, score={"every": 4, "num": 2})
    with same() as before:
        train(load_recipe(path), scorer=Scorer(scorer))
    assert seen == [before["streams"][:2]] * 2
    with same(InputError):
        train(load_recipe(path, ["train.max_steps=9", "train.lr=1e-2"]), scorer=Scorer(scorer))


def test_training_that_stops(same, recipe_file, monkeypatch):
    def fault(self, batch, forward):
        raise ZeroDivisionError

    monkeypatch.setattr(FlowObjective, "losses", fault)
    with same(ZeroDivisionError):
        train(load_recipe(recipe_file()))


def test_a_stream_that_is_changed_within_stays_so(recipe_file, monkeypatch):
    other = open(os.devnull, "w")  # noqa: SIM115
    losses = FlowObjective.losses

    def changing(self, batch, forward):
        monkeypatch.setattr(sys, "stdout", other)
        return losses(self, batch, forward)

    monkeypatch.setattr(FlowObjective, "losses", changing)
    train(load_recipe(recipe_file(), ["train.max_steps=1"]))
    assert sys.stdout is other
    other.close()


def test_handlers_that_python_could_not_put_back_are_left(monkeypatch):
    known, taken = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else known(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: taken.append(number))
    with StopSignals():
        pass
    assert set(taken) == {signal.SIGTERM, signal.SIGINT}


def test_training_a_classifier(same, tmp_path):
    for part in ("train", "val"):
        for grey, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (40 + 120 * grey,) * 3).save(tmp_path / part / name / "0.png")
    sections = {
        "run": {"out": str(tmp_path / "run")},
        "data": {"kind": "imagefolder", "root": str(tmp_path / "train"), "val_root": str(tmp_path / "val")},
        "model": {
            "name": "attnet_xxs", "input_size": 16,
            "options": {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [1, 1], "stem_strides": [2, 2]},
        },
        "train": {"epochs": 2, "warmup_epochs": 0, "batch_size": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    with same():
        train_classifier(load_recipe(tmp_path / "recipe.yaml", (), ClassifierRecipe))


def test_encoding(same, recipe_file, image_folder, vae_folder, tmp_path):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8}
    recipe = load_recipe(recipe_file(data=data, latents={"codec": "vae", "vae": str(vae_folder)}))
    with same():
        encode(recipe, tmp_path / "cache")
    with same(InputError):
        encode(recipe, image_folder)


def test_scoring_and_sampling(same, tmp_path, image_folder):
    import sample
    from sampling.__main__ import main as sampling

    model = {"patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    create_model(None, sample_size=8, num_classes=10, **model).save_pretrained(tmp_path / "model")
    ckpt = ["--ckpt", str(tmp_path / "model"), "--steps", "1", "--device", "cpu"]
    with same():
        sampling(["generate", *ckpt, "--num", "20", "--out", str(tmp_path / "out")])
    with same():
        sample.main([*ckpt, "--num", "2", "--out", str(tmp_path / "grid.png")])
    samples = str(tmp_path / "out")
    with same():
        score(samples, samples, "frechet_distance", f"{__name__}:Pixels", root=str(tmp_path / "features"))
    with same(InputError):
        score(samples, str(image_folder), "frechet_distance", f"{__name__}:Pixels")
