"""REPA in the loop: its loss, its gradient, its projectors in the checkpoint, its encoder in the manifest."""

import json

import pytest
import torch
from conftest import assert_same_bits, log_rows, run_recipe
from sampled import sampled
from tiny_vit import save_vit

from sit_atconv.config import load_recipe
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import in_range
from sit_atconv.layers.projectors import Projectors
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import build_model
from sit_atconv.training.objectives.repa import ImageEncoder, align, repa_loss
from sit_atconv.training.optimizer import make_optimizer


@pytest.fixture
def recipe(recipe_file, encoder_folder, image_folder):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "flip": True}
    repa = {"encoder": f"local-dir:{encoder_folder}", "depth": 1, "projector_dim": 12, "weight": 0.7}
    return recipe_file(data=data, repa=repa, model={"class_dropout_prob": 0.0})


def test_two_steps_equal_a_loop_written_out(recipe, image_folder):
    settings = load_recipe(recipe)
    model = build_model(settings, Facts((3, 8, 8), 3, 12))
    encoder = ImageEncoder(settings.repa.encoder)
    aligned = align(model, encoder, settings.repa, settings.run.seed)
    optimizer = make_optimizer(aligned, settings.train)
    samples = sampled(Folder(str(image_folder), 8), (3, 8, 8), 8, flip=True)
    expected = []
    for step in range(2):
        batch, _ = samples.fetch(range(8 * step, 8 * step + 8))
        t, images = batch["t"][:, None, None, None], in_range(batch["image"])
        velocity, z = aligned(t * images + (1 - t) * batch["noise"], batch["t"], batch["label"])
        flow = (velocity - (images - batch["noise"])).square().mean()
        alignment = repa_loss(z, encoder.features(images, (4, 4))).mean()
        (flow + 0.7 * alignment).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append((flow.item(), alignment.item()))
    last = run_recipe(recipe, "train.max_steps=2")
    rows = [(row["loss"], row["repa_loss"]) for row in log_rows(last.parent)]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    stored = Projectors.load(last / "model")
    assert stored.encoder_depth == 1
    for name, tensor in stored.state_dict().items():
        torch.testing.assert_close(tensor, aligned.projectors.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_restart_goes_on_to_the_same_bits_with_the_same_encoder_alone(recipe, tmp_path):
    whole = run_recipe(recipe, f"run.out={tmp_path / 'whole'}")
    run_recipe(recipe, "train.max_steps=5")
    parts = run_recipe(recipe)
    assert_same_bits(whole, parts)
    assert (whole / "model/projectors.safetensors").read_bytes() == (
        parts / "model/projectors.safetensors"
    ).read_bytes()
    encoder = json.loads((parts / "manifest.json").read_text())["encoder"]
    assert encoder["name"] == "vit_tiny_patch16_224.made_up"
    folder = tmp_path / "other" / "vit"
    folder.parent.mkdir()
    save_vit(folder, mean=(0.1, 0.2, 0.3))
    with pytest.raises(InputError, match=r"repa\.encoder=.*other weights"):
        run_recipe(recipe, f"repa.encoder=local-dir:{folder}", "train.max_steps=9")


def test_without_an_encoder_nothing_of_it_is_there(recipe):
    last = run_recipe(recipe, "repa.encoder=null")
    with pytest.raises(InputError, match=r"repa\.encoder=.*was begun without one; state repa\.encoder=null, or"):
        run_recipe(recipe)
    assert "repa_loss" not in log_rows(last.parent)[0]
    assert not (last / "model/projectors.safetensors").exists()


def test_a_block_that_is_not_there_is_named(recipe):
    with pytest.raises(InputError, match=r"repa.depth=3: the model has 2 blocks"):
        run_recipe(recipe, "repa.depth=3")


def test_alignment_from_a_cache_of_latents_reads_the_images_too(recipe_file, encoder_folder, image_folder, vae_folder):
    from sit_atconv.latents.encode import encode

    repa = {"encoder": f"local-dir:{encoder_folder}", "depth": 1, "projector_dim": 12}
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 16, "flip": True}
    online = recipe_file("online", data=data, latents={"codec": "vae", "vae": str(vae_folder)}, repa=repa)
    root = image_folder.parent / "cache"
    encode(load_recipe(online), root, "fp32")
    rows = []
    for name, overrides in (("a", []), ("b", ["data.kind=latents", f"data.root={root}"])):
        last = run_recipe(online, f"run.out={image_folder.parent / name}", *overrides)
        rows.append([[row["loss"], row["repa_loss"]] for row in log_rows(last.parent)])
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-5, atol=1e-6)
