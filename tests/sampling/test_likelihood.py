"""The likelihood command: whose images, whose probes, and its number against the library."""

import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image

import train_sit
from sampling.__main__ import main as sampling
from sit_atconv import SiTTransformer2DModel
from sit_atconv.config import Data, load_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.images import in_range
from sit_atconv.flow.likelihood import log_likelihood
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.times import time_grid
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.sampling.likelihood import real_images
from sit_atconv.training.checkpoint import load_trained


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps on digits, with the weights shaken so that the model is not zero."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {{out: {folder}/run}}\n"
        "model: {patch_size: 2, hidden_size: 16, depth: 1, num_heads: 2, token_mixer: atconv}\n"
        "train: {max_steps: 2, batch_size: 4, lr: 0.1}\nema: {decay: 0}\npreview: {every: 0}\n"
    )
    train_sit.main([str(recipe)])
    return folder / "run"


def likelihood(run_folder, tmp_path, *options) -> dict:
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"  # what exists is not written over
    base = ["likelihood", "--ckpt", run_folder, "--sampler", "heun", "--steps", 3, "--out", out]
    sampling([str(option) for option in [*base, *options]])
    return json.loads(out.read_text())


def vp_noise_velocity(output, x, t):
    """beta / 2 (x + score), with score = -noise / sigma."""
    sigma = (-torch.expm1(-((1 - t) ** 2) * 19.9 / 2 - (1 - t) * 0.1)).sqrt()
    return (0.1 + 19.9 * (1 - t)) / 2 * (x - output / sigma)


@pytest.mark.parametrize("flow", ["linear velocity", "vp noise"])
def test_it_is_the_change_of_variables_on_held_out_images(run_folder, tmp_path, recipe_file, flow):
    end = 1.0
    if flow == "vp noise":
        train = {"max_steps": 2, "batch_size": 4, "lr": 0.1}
        model, flow_section = {"token_mixer": "atconv", "depth": 1}, {"path": "vp", "prediction": "noise"}
        recipe = recipe_file(model=model, train=train, ema={"decay": 0}, flow=flow_section)
        train_sit.main([str(recipe)])
        run_folder, end = tmp_path / "run", 1 - 1e-3
    result = likelihood(run_folder, tmp_path, "--num", 3, "--probes", 2, "--seed", 5)
    assert result["time_interval"] == [0, end]
    model, dataset = load_trained(run_folder).model, Digits("test")
    for index in range(3):
        image, label = dataset[index, False]
        noise = draws.generator(5, Stream.DEQUANTIZE, index).random((1, 8, 8), dtype="float32")
        start = image[None] + (torch.from_numpy(noise) - 0.5) / 8
        probes = [draws.signs((1, 8, 8), 5, Stream.PROBE, index, probe) for probe in range(2)]
        assert all(set(p.unique().tolist()) == {-1.0, 1.0} for p in probes)

        def joint(state, t, label=label, probes=probes):
            def velocity(x, t=t, label=label):
                output = model(x, t, torch.tensor([label])).sample
                return output if flow == "linear velocity" else vp_noise_velocity(output, x, t)

            products = [torch.autograd.functional.jvp(velocity, state[:1], p[None])[1] * p for p in probes]
            return torch.cat([velocity(state[:1]), torch.full((1, 1, 8, 8), sum(products).sum().item() / 2 / 64)])

        final = SAMPLERS["heun"](joint, torch.cat([start, torch.zeros(1, 1, 8, 8)]), time_grid(end, 0, 3)).detach()
        nats = -(final[0].square().sum() / 2 + 32 * math.log(2 * math.pi)) + final[1].sum()
        expected = -nats / 64 / math.log(2) + 3  # levels are 1/8 apart
        assert result["each"][index] == pytest.approx(expected.item(), rel=1e-4)
    mean = sum(result["each"]) / 3
    assert result["bits_per_dim"] == pytest.approx(mean)
    variance = sum((value - mean) ** 2 for value in result["each"]) / 2
    assert result["standard_error"] == pytest.approx((variance / 3) ** 0.5)
    assert (result["nfe"], result["level"], result["split"]) == (6, 0.125, "test")


def test_an_image_has_its_own_number_whatever_the_batch(run_folder, tmp_path):
    together = likelihood(run_folder, tmp_path, "--num", 5, "--split", "train")["each"]
    apart = likelihood(run_folder, tmp_path, "--num", 4, "--split", "train", "--batch", 3)["each"]
    assert apart == pytest.approx(together[:4], rel=1e-5)
    assert likelihood(run_folder, tmp_path, "--num", 4)["each"] != pytest.approx(together[:4], rel=1e-5)


def test_an_adaptive_run_records_its_tolerances_and_the_evaluations_of_each_batch(run_folder, tmp_path, monkeypatch):
    batches = []

    def counting(velocity, data, *others):
        calls = []
        result = log_likelihood(lambda x, t: calls.append(t) or velocity(x, t), data, *others)
        if batches:  # the second batch asks once more, so that the mean over images is not that over batches
            calls.append(velocity(data, torch.tensor(0.5)))
        batches.append((len(data), len(calls)))
        return result

    monkeypatch.setattr("sit_atconv.sampling.likelihood.log_likelihood", counting)
    result = likelihood(run_folder, tmp_path, "--num", 4, "--batch", 3, "--sampler", "dopri5")
    assert [images for images, _ in batches] == [3, 1]
    assert batches[0][1] != batches[1][1]
    assert result["nfe"] == sum(images * calls for images, calls in batches) / 4
    assert (result["rtol"], result["atol"], result["steps"]) == (1e-3, 1e-6, None)
    fixed = likelihood(run_folder, tmp_path, "--num", 1)
    assert (fixed["rtol"], fixed["atol"], fixed["steps"]) == (None, None, 3)


@pytest.mark.parametrize("sampler", ["heun", "dopri5"])
def test_a_likelihood_that_is_not_finite_is_refused(run_folder, tmp_path, monkeypatch, capsys, sampler):
    def broken(velocity, data, *others):
        return log_likelihood(lambda x, t: velocity(x, t) / (t < 0.9), data, *others)  # infinite where it begins

    monkeypatch.setattr("sit_atconv.sampling.likelihood.log_likelihood", broken)
    out = tmp_path / "out.json"
    base = ["likelihood", "--ckpt", run_folder, "--num", 2, "--steps", 2, "--sampler", sampler, "--out", out]
    with pytest.raises(SystemExit):
        sampling(list(map(str, base)))
    assert re.search("error: image 0: its likelihood is (nan|-?inf)", capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["imagefolder", "zip"])
def test_image_files_have_256_levels(tmp_path, recipe_file, monkeypatch, kind):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "cat" / "0.png")
    root = tmp_path / "images"
    root = root if kind == "imagefolder" else shutil.make_archive(str(root), "zip", root)
    recipe = recipe_file(data={"kind": kind, "root": str(root), "image_size": 8})
    train_sit.main([str(recipe), "train.max_steps=1", "train.lr=1e-12"])
    monkeypatch.chdir(tmp_path)
    result = likelihood(tmp_path / "run", tmp_path, "--num", 1, "--split", "train")
    assert result["checkpoint"] == "run/step-0000001"  # which means something on another machine
    assert (result["level"], result["split"]) == (1 / 127.5, "train")
    # A new model gives 0: the flow stays where it is, and the density is that of the normal.
    noise = draws.uniforms((3, 8, 8), 0, Stream.DEQUANTIZE, 0)
    image = in_range(open_dataset(load_recipe(recipe).data)[0, False][0]) + (noise - 0.5) / 127.5
    nats = torch.distributions.Normal(0, 1).log_prob(image.double()).mean().item()
    assert result["bits_per_dim"] == pytest.approx(-nats / math.log(2) + math.log2(127.5), rel=1e-6)


def test_it_runs_in_one_process_and_writes_over_nothing(fails, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("kept")
    base = ["likelihood", "--ckpt", tmp_path / "nowhere", "--num", 1, "--out"]  # told before anything is loaded
    for out, says in ((file, "exists already"), (tmp_path, "exists already"), (file / "x.json", "--out")):
        assert says in fails(sampling, *base, out)
    assert file.read_text() == "kept"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "runs in one process" in fails(sampling, *base, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--num", 0], "--num 0"),
        (["--num", 361], "--num 361: the split test has 360 images"),
        (["--num", 1, "--probes", 0], "--probes 0"),
        (["--num", 1, "--seed", -1], "--seed -1"),
        (["--num", 1, "--sampler", "euler-maruyama"], "euler-maruyama"),
    ],
)
def test_it_refuses(fails, run_folder, tmp_path, options, says):
    out = tmp_path / "likelihood.json"
    assert says in fails(sampling, "likelihood", "--ckpt", run_folder, "--out", out, *options)
    assert not out.exists()


def test_what_a_recipe_holds_out_is_its_test_split(tmp_path, recipe_file, image_folder):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "held_out": 0.25}
    train_sit.main([str(recipe_file(data=data)), "train.max_steps=1"])
    trained = load_trained(str(tmp_path / "run"))
    whole = open_dataset(Data("imagefolder", str(image_folder), 8))
    for which, indices in (("test", [3, 7, 11]), ("train", [0, 1, 2, 4, 5, 6, 8, 9, 10])):
        part, level = real_images(trained, which)
        assert level == 1 / 127.5
        images = torch.stack([part[place, False][0] for place in range(len(part))])
        assert torch.equal(images, torch.stack([whole[index, False][0] for index in indices]))


def test_it_refuses_where_there_are_no_such_images(fails, tmp_path, recipe_file, vae_folder, capsys):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "0.png")
    data = {"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 8}
    train_sit.main([str(recipe_file(data=data)), "train.max_steps=1"])
    latents = {"codec": "vae", "vae": str(vae_folder)}
    train_sit.main([str(recipe_file(data=data, latents=latents)), "train.max_steps=1", f"run.out={tmp_path / 'vae'}"])
    capsys.readouterr()
    base = ["likelihood", "--num", 1, "--out", tmp_path / "x.json", "--ckpt"]
    assert "holds no images back; use train" in fails(sampling, *base, tmp_path / "run")
    assert "not that of images; give the checkpoint of a pixel model" in fails(sampling, *base, tmp_path / "vae")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "1.png")
    assert "not those that the model was trained on" in fails(sampling, *base, tmp_path / "run", "--split", "train")


def test_it_refuses_a_model_that_does_not_say_what_its_images_are(fails, tmp_path):
    SiTTransformer2DModel(sample_size=8, in_channels=1, hidden_size=8, depth=1, num_heads=1).save_pretrained(tmp_path)
    out = tmp_path / "likelihood.json"
    assert "give a run" in fails(sampling, "likelihood", "--ckpt", tmp_path, "--num", 1, "--out", out)
    assert not out.exists()
