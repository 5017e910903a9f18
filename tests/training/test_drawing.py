"""Previews and scores that a guide guides: opened at the start, and drawn as `generate` draws."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import log_rows, reset_accelerate, run_recipe
from PIL import Image
from sampled import Scorer

from sit_atconv import SiTTransformer2DModel, create_model
from sit_atconv.config import load_recipe
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling.sampling import generate, grid
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training import train
from sit_atconv.training.drawing import Drawing, open_drawing
from sit_atconv.training.plan import dry_run


@pytest.fixture
def weaker(tmp_path):
    """Writes a model and gives its folder."""

    def write(name="weaker", **options):
        torch.manual_seed(1)
        shape = {"patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 2, "num_classes": 10}
        model = create_model(None, **{"sample_size": 8, **shape, **options})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def drawing(guide: str) -> dict:
    return {"every": 8, "num": 4, "steps": 2, "guidance_scale": 2.0, "guide": guide}


def test_previews_and_scores_are_guided_by_the_recipes_guide(recipe_file, tmp_path, weaker, monkeypatch):
    guide, scored = weaker(), []

    def score(images, labels):
        scored.append(images)
        return {"mean": float(images.float().mean())}

    # Without class dropout: a guide needs none.
    recipe = recipe_file(
        preview=drawing(guide), score={"every": 8, "num": 4}, model={"class_dropout_prob": 0.0}, train={"lr": 0.01}
    )
    moved, move = [], Drawing.to
    monkeypatch.setattr(Drawing, "to", lambda own, device: (moved.append(device), move(own, device))[1])
    last = train(load_recipe(recipe), scorer=Scorer(score))
    assert moved == [torch.device("cpu")]
    model = SiTTransformer2DModel.from_pretrained(last / "ema").eval()
    other = SiTTransformer2DModel.from_pretrained(guide).eval()
    settings = Sampling(steps=2, guidance_scale=2.0, guide=other)
    images, _ = generate(model, IdentityCodec(), range(4), range(4), settings, 0)
    unguided, _ = generate(model, IdentityCodec(), range(4), range(4), Sampling(steps=2, guidance_scale=1.0), 0)
    assert not torch.equal(images, unguided)
    assert torch.equal(scored[0], images)
    drawn = np.array(Image.open(tmp_path / "run/previews/step-0000008.png"))
    assert np.array_equal(drawn[4:68], np.array(grid(images, 2))[4:68])
    row = json.loads((tmp_path / "run/scores.jsonl").read_text())
    assert row["sampling"]["guide"]["checkpoint"] == guide
    assert row["sampling"]["guide"]["checkpoint_sha256"].keys() == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert json.loads((last / "manifest.json").read_text())["recipe"]["preview"]["guide"] == guide


def test_a_run_goes_on_with_another_guide_or_none(recipe_file, tmp_path, weaker):
    reset_accelerate()
    run_recipe(recipe_file(preview=drawing(weaker())), "train.max_steps=4")
    last = run_recipe(recipe_file(preview=drawing(weaker("b"))))
    assert last.name == "step-0000008"
    assert len(log_rows(last.parent)) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sample_size": 4}, r"it has sample_size=\[4, 4\], the model that it is to guide sample_size=\[8, 8\]; give"),
        ({"num_classes": 9}, "it has num_classes=9, the model that it is to guide num_classes=10"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_before_the_first_step(recipe_file, tmp_path, weaker, options, says):
    guide = weaker(**options)
    for start in (run_recipe, lambda path: dry_run(load_recipe(path))):
        with pytest.raises(InputError, match=f"^preview.guide='{guide}': {says}"):
            start(recipe_file(preview=drawing(guide)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "facts", "says"),
    [
        ("data", {"classes": ["a", "b", "x"]}, "its class 2 is 'x', the model's 'c'; give a guide that was trained on"),
        (
            "codec",
            {"codec": "vae", "vae": "x", "sha256": "ab" * 32},
            "with codec=vae, the model's of one with codec=id",
        ),
    ],
)
def test_a_guide_of_other_classes_or_another_codec_is_refused(
    recipe_file, image_folder, tmp_path, section, facts, says
):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8}
    own = {"data": data, "latents": {"codec": "identity"}}
    last = run_recipe(recipe_file(**own), "train.max_steps=1")
    guide = shutil.move(last, tmp_path / "step-0000001")
    manifest = json.loads((guide / "manifest.json").read_text())
    manifest[section] |= facts
    (guide / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "run")
    recipe = recipe_file(**own, preview=drawing(str(guide)))
    for start in (run_recipe, lambda path: dry_run(load_recipe(path))):
        with pytest.raises(InputError, match=f"preview.guide='{guide}': .*{says}"):
            start(recipe)
    assert not (tmp_path / "run").exists()


def test_processes_that_found_different_guides_are_stopped(recipe_file, tmp_path, weaker, monkeypatch):
    monkeypatch.setattr("sit_atconv.training.drawing.gathered", lambda files: [files, files | {"config.json": "other"}])
    with pytest.raises(
        InputError, match=r"preview.guide: the processes found different weights in '.*weaker'; name one"
    ):
        run_recipe(recipe_file(preview=drawing(weaker())))
    assert not (tmp_path / "run").exists()


def test_a_guide_moves_to_a_device(recipe_file, weaker):
    recipe = load_recipe(recipe_file(preview=drawing(weaker())))
    model = create_model(None, 8, 10, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2)
    moved = open_drawing(recipe, model).to(torch.device("meta"))
    assert {each.device.type for each in moved.sampling.guide.parameters()} == {"meta"}


def test_a_guide_that_guides_nothing_is_refused(recipe_file, tmp_path, weaker):
    recipe = recipe_file(preview={**drawing(weaker()), "guidance_interval": [0.6, 0.9]})
    for start in (run_recipe, lambda path: dry_run(load_recipe(path))):
        with pytest.raises(InputError, match=r"^preview: guidance_interval=\[0.6, 0.9\]: no step evaluates the model"):
            start(recipe)
    assert not (tmp_path / "run").exists()
    path = recipe_file(preview={**drawing(weaker()), "guidance_scale": 1.0})
    with pytest.raises(InputError, match=r"preview: guide=.*weaker: with guidance_scale=1 nothing is guided"):
        load_recipe(path)
