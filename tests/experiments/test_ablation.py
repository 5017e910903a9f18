"""The grid of the ablation, what its runs are compared by, and the table."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from conftest import run_recipe

from experiments import ablation
from experiments.ablation import SYSTEMS, Arm, arms, flow_figures, table
from sit_atconv import config
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe, load_recipe
from sit_atconv.data.digits import Digits
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.training import checkpoint


def test_the_grid_has_every_cell_once_and_static_kernels_no_pool():
    grid = arms()
    assert len(grid) == len(set(grid)) == 18
    assert {(arm.routing, arm.inhibition, arm.pool) for arm in grid} == {
        *(("adaptive", inhibition, pool) for inhibition in ("learned", "full", "none") for pool in ("raster", "grid")),
        *(("static", inhibition, None) for inhibition in ("learned", "full", "none")),
    }
    assert "pool" not in Arm("static", "none", None, True).options()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_every_command_is_a_recipe_of_that_arm(system, tmp_path):
    schema = {"train_sit.py": Recipe, "train_attnet.py": ClassifierRecipe}[system.script]
    for arm in arms():
        script, path, *overrides = system.command(tmp_path, arm, 2)
        assert script == system.script
        recipe = load_recipe(path, overrides, schema)
        assert recipe.run.seed == 2
        options = recipe.model.options
        options = options() if callable(options) else options
        assert (options["routing"], options["inhibition"], options.get("pool")) == (
            arm.routing, arm.inhibition, arm.pool,
        )  # fmt: skip
        assert options["pos_embed"] is arm.pos_embed


def test_the_flow_figure_is_the_mean_squared_error_of_the_ema_on_held_out_digits(recipe_file):
    last = run_recipe(recipe_file())
    found = flow_figures(last.parent)["loss"]
    model, digits = checkpoint.load_trained(last).model, Digits("test")
    errors = []
    with torch.no_grad():
        for part in range(16):
            for first in range(0, 360, 90):
                indices = np.array([[image, part] for image in range(first, first + 90)])
                noise = draws.normal_batch((1, 8, 8), 0, Stream.NOISE, indices)
                t = ((part + torch.tensor(draws.uniform_batch(0, Stream.TIME, indices))) / 16).float()
                images, labels = digits.images[first : first + 90], torch.tensor(digits.labels[first : first + 90])
                mixed = t[:, None, None, None] * images + (1 - t[:, None, None, None]) * noise
                velocity = model(mixed, t, labels).sample
                errors += (velocity - (images - noise)).square().mean((1, 2, 3)).tolist()
    assert found == pytest.approx(statistics.fmean(errors), rel=1e-5)


def fabricated() -> list[dict]:
    found = []
    for number, arm in enumerate(arms()):
        for seed in (0, 1):
            found.append(
                {"arm": arm.name, **arm.options(), "seed": seed, "loss": 0.1 * number + 0.02 * seed, "top1": 90.0}
            )
    return found


def test_the_table_has_means_and_spreads_of_arms_and_of_settings():
    text = table(SYSTEMS[1], fabricated())
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert lines[2] == ["adaptive", "learned", "raster", "no", "0.0100 ± 0.0141", "90.00 ± 0.00"]
    names = [arm.name for arm in arms()]
    grid = [number for number, name in enumerate(names) if "-grid-" in name]
    raster = [number for number, name in enumerate(names) if "-raster-" in name]
    row = next(line for line in lines if line[0] == "pool grid")
    assert row[1:3] == ["6", f"{0.1 * statistics.fmean(grid) + 0.01:.4f} ± 0.0141"]
    assert row[4] == f"{0.1 * (statistics.fmean(grid) - statistics.fmean(raster)):.4f} ± 0.0000"
    assert len(next(line for line in lines if line[0] == "pool raster")) == 4
    assert next(line for line in lines if line[0] == "routing static")[1] == "6"
    assert next(line for line in lines if line[0] == "pos_embed true")[1] == "9"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The commands of runs that leave a manifest and nothing else, stopped at `steps` of 135."""
    commands, manifests, steps = [], {}, [135]

    def run(command, **_):
        commands.append(command)
        folder = tmp_path / next(word for word in command if word.startswith("run.out=")).removeprefix("run.out=")
        folder.mkdir(parents=True, exist_ok=True)
        recipe = config.to_dict(load_recipe(command[2], command[3:], ClassifierRecipe))
        manifests[folder] = {"step": steps[0], "files": {}, "versions": {}, "recipe": recipe}
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(ablation.subprocess, "run", run)
    monkeypatch.setattr(ablation.checkpoint, "newest_valid", lambda folder: (None, manifests[folder]))
    monkeypatch.setattr(ablation, "classifier_figures", lambda run: {"loss": len(run.name) / 10, "top1": 98.0})
    return commands, manifests, steps


def options(tmp_path) -> list[str]:
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    return ["--systems", "attnet", "--seeds", "0", "1", *where]


@pytest.mark.slow
def test_it_trains_what_is_left_and_writes_all(tmp_path, made, monkeypatch, capsys, fails):
    commands, manifests, _ = made
    some = arms()[::5]
    monkeypatch.setattr(ablation, "arms", lambda: some)
    ablation.main(options(tmp_path))
    assert len(commands) == 8
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attnet.md", "attnet.json", "attnet.png"}
    assert len(json.loads((tmp_path / "out" / "attnet.json").read_text())["results"]) == 8
    ablation.main(options(tmp_path))
    assert len(commands) == 8
    next(iter(manifests.values()))["recipe"]["train"]["lr"] = 0.5  # of another recipe: the trainer is to say so
    ablation.main(options(tmp_path))
    assert len(commands) == 9
    ablation.main([*options(tmp_path), "--dry-run", "--seeds", "0", "5"])
    assert capsys.readouterr().out.count("$ python train_attnet.py") == 4
    monkeypatch.setattr(
        ablation.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 2, "stderr": "error: no room"})()
    )
    assert "ended with status 2: no room" in fails(ablation.main, *options(tmp_path), "--seeds", "7")


def test_a_run_that_was_stopped_is_no_result(tmp_path, made, fails):
    """A trainer that is told to stop saves, and ends with status 0."""
    _, _, steps = made
    steps[0] = 134
    assert "was stopped at step 134; the same command goes on" in fails(ablation.main, *options(tmp_path))
    assert not list((tmp_path / "runs").rglob("result.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_figure_that_is_not_finite_is_no_result(tmp_path, made, monkeypatch, fails, loss):
    monkeypatch.setattr(ablation, "classifier_figures", lambda run: {"loss": loss, "top1": 10.0})
    assert "loss of its EMA is not finite" in fails(ablation.main, *options(tmp_path))
    assert not list((tmp_path / "runs").rglob("result.json"))


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, made, fails):
    (tmp_path / "out").write_text("")
    assert "cannot be written" in fails(ablation.main, *options(tmp_path))
    assert not made[0]


@pytest.mark.slow
def test_a_real_run_is_known_again(tmp_path, monkeypatch):
    system, arm = SYSTEMS[1], arms()[0]
    short = ("train.epochs=0.1", "train.warmup_epochs=0", "eval.every_epochs=6", "checkpoint.every=1000")
    system = dataclasses.replace(system, overrides=short)
    first = ablation.make(system, tmp_path, arm, 0, False)
    assert first["step"] == 2
    monkeypatch.setattr(ablation.subprocess, "run", None)
    assert ablation.make(system, tmp_path, arm, 0, False) == first
