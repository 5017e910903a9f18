"""What a fault leaves of a classifier: the statistics of batches that were skipped, and an evaluation made up for."""

import json

import pytest
import torch
import yaml
from conftest import reset_accelerate
from PIL import Image

from sit_atconv.classification.evaluation import Evaluation
from sit_atconv.classification.loop import train
from sit_atconv.classification.objective import ClassificationObjective
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.commands.classify import report
from sit_atconv.config import load_recipe
from sit_atconv.runtime.errors import InputError
from sit_atconv.training import checkpoint
from sit_atconv.training.trainer import Trainer

TINY = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [1, 1], "stem_strides": [2, 2]}


@pytest.fixture
def recipe(tmp_path):
    """Five steps on eight pictures of two classes, evaluated after three of them and at the end, on two."""
    for part, number in (("train", 4), ("val", 1)):
        for grey, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (16, 16), (40 + 120 * grey + index,) * 3).save(tmp_path / part / name / f"{index}.png")
    sections = {
        "run": {"out": str(tmp_path / "run"), "log_every": 1},
        "data": {"kind": "imagefolder", "root": str(tmp_path / "train"), "val_root": str(tmp_path / "val")},
        "model": {"name": "attnet_xxs", "input_size": 16, "options": TINY},
        "train": {"epochs": 5, "warmup_epochs": 0, "batch_size": 8, "lr": 1e-3},
        "eval": {"every_epochs": 3},
        "checkpoint": {"every": 100},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return load_recipe(tmp_path / "recipe.yaml", (), ClassifierRecipe)


def test_a_skipped_step_leaves_the_statistics_as_they_were(recipe, monkeypatch):
    losses, optimize, statistics = ClassificationObjective.losses, Trainer._optimize, []

    def poisoned(self, batch, forward):
        if forward.step == 2:
            batch = {**batch, "image": batch["image"] * float("nan")}
        return losses(self, batch, forward)

    def watched(self, *arguments):
        statistics.append([buffer.clone() for buffer in self.objective.model.buffers()])
        return optimize(self, *arguments)

    monkeypatch.setattr(ClassificationObjective, "losses", poisoned)
    monkeypatch.setattr(Trainer, "_optimize", watched)
    assert json.loads((train(recipe) / "trainer.json").read_text())["skipped"] == 1
    assert len(statistics[2]) > 3
    assert all(torch.equal(a, b) for a, b in zip(statistics[2], statistics[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(statistics[1], statistics[2], strict=True))


def test_no_checkpoint_is_of_skipped_steps(recipe, tmp_path, monkeypatch):
    losses = ClassificationObjective.losses

    def poisoned(self, batch, forward):
        return [loss * (float("nan") if forward.step in (1, 3, 4) else 1) for loss in losses(self, batch, forward)]

    monkeypatch.setattr(ClassificationObjective, "losses", poisoned)
    recipe.checkpoint.every, recipe.checkpoint.keep_last = 1, 9
    with pytest.raises(InputError, match="the last 2 of 5 steps were skipped"):
        train(recipe)
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == ["step-0000001", "step-0000003"]


def test_an_accuracy_is_not_of_logits_that_are_not_finite(recipe, monkeypatch, capsys):
    evaluate = Evaluation.after_step

    def broken(self, trainer):
        model = trainer.objective.model
        if trainer.step == 5:
            monkeypatch.setattr(model, "forward", lambda image: image.new_full((len(image), 2), float("nan")))
        evaluate(self, trainer)

    monkeypatch.setattr(Evaluation, "after_step", broken)
    last = train(recipe)
    rows = [json.loads(line) for line in (last.parent / "evals.jsonl").read_text().splitlines()]
    assert None not in rows[0].values()
    assert {key for key, value in rows[1].items() if value is None} == {"model_loss", "model_top1", "model_top5"}
    assert "warning: step 5, model/: the loss of held-out images is not finite" in capsys.readouterr().err
    assert "raw not finite;" in report(last, recipe)


def test_an_evaluation_without_its_figures_is_told(recipe):
    last = train(recipe)
    (last.parent / "evals.jsonl").write_text('{"step": 3, "num": 2}\n')
    with pytest.raises(InputError, match=r"evals\.jsonl.*ema_loss is missing; take that line away"):
        report(last, recipe)


def test_an_evaluation_that_failed_is_kept_for_and_made_up_for(recipe, tmp_path):
    run = tmp_path / "run"
    whole = train(recipe)
    evals = (run / "evals.jsonl").read_text()
    whole = (whole / "ema" / "model.safetensors").read_bytes()
    run.rename(tmp_path / "whole")
    dark = tmp_path / "val" / "dark" / "0.png"
    good = dark.read_bytes()
    dark.write_bytes(b"gone")
    for _ in range(2):  # at the end of step 3, and at once where it is still bad
        reset_accelerate()
        with pytest.raises(InputError, match=r"held out: image '.*dark/0\.png' does not decode"):
            train(recipe)
        assert checkpoint.step_folders(run) == [run / "step-0000003"]
        assert (run / "evals.jsonl").read_text() == ""
    dark.write_bytes(good)
    reset_accelerate()
    last = train(recipe)
    assert (run / "evals.jsonl").read_text() == evals
    assert [json.loads(line)["step"] for line in evals.splitlines()] == [3, 5]
    assert (last / "ema" / "model.safetensors").read_bytes() == whole
    assert "top-1 on 2 held-out" in report(last, recipe)
    (run / "evals.jsonl").write_text(evals.splitlines(keepends=True)[0])  # as if it had been stopped after that
    assert "stopped at step 3, saved as" in report(run / "step-0000003", recipe)
