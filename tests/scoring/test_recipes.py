"""A recipe as a source of images: what is scored, or compared with, is what it trains on."""

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from eval.__main__ import main as evaluate
from sit_atconv.config import Data
from sit_atconv.data import open_dataset
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring import digits
from sit_atconv.scoring.extract import default_folder, features_of
from sit_atconv.scoring.extractor import load_extractor
from sit_atconv.scoring.refs import read_reference, reference_spec
from sit_atconv.scoring.score import TrainingScorer, score
from sit_atconv.scoring.sources import open_source

SIZE, N = 8, 12
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 64, 5, generator=generator) / 255)

    def forward(self, pixels):
        return pixels.float().flatten(1) @ self.weight
"""


@pytest.fixture
def own(own_module):
    return f"{own_module(OWN)}:Own"


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes, two of them transparent."""
    rng = np.random.default_rng(0)
    for index in range(N):
        file = tmp_path / "images" / "ab"[index % 2] / f"{index:02d}.{'jpg' if index == 5 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIZE + 3 * index, SIZE + 1, 4 if index in (2, 3) else 3), np.uint8)
        Image.fromarray(pixels).save(file)
    return tmp_path / "images"


@pytest.fixture
def recipe(folder, tmp_path):
    """It mirrors what it trains on, and has the sections of a model and an autoencoder that is not there."""
    path = tmp_path / "recipe.yaml"
    data = {"kind": "imagefolder", "root": str(folder), "image_size": 16, "flip": True}
    path.write_text(yaml.safe_dump({"data": data, "latents": {"codec": "vae", "vae": "nowhere"}}))
    return path


def trained_on(folder, **options) -> np.ndarray:
    """(N, H, W, C) uint8."""
    dataset = open_dataset(Data("imagefolder", str(folder), **{"image_size": SIZE, **options}))
    images = torch.stack([dataset[index, False][0] for index in range(len(dataset))])
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def test_it_is_what_training_sees_at_its_size_and_not_mirrored(recipe, folder):
    for overrides, options in (
        ([], {"image_size": 16}),
        ([f"data.image_size={SIZE}"], {}),
        ([f"data.image_size={SIZE}", "data.channels=1"], {"channels": 1}),
        ([f"data.image_size={SIZE}", "data.background=black"], {"background": "black"}),
    ):
        source, pixels = open_source(recipe, overrides=overrides), trained_on(folder, **options)
        assert (source.n, source.image_shape) == (N, (pixels.shape[3], *pixels.shape[1:3]))
        assert source.labels.tolist() == [0] * 6 + [1] * 6
        assert source.digest() == hashlib.sha256(pixels.tobytes()).hexdigest()
        parts = list(source.batches(3, 8, 2))
        assert torch.equal(torch.cat(parts), torch.from_numpy(pixels[3:8]).permute(0, 3, 1, 2))


def test_it_lacks_what_the_recipe_holds_out(recipe, folder):
    source = open_source(recipe, overrides=[f"data.image_size={SIZE}", "data.held_out=0.34"])
    pixels = np.delete(trained_on(folder), [2, 5, 8, 11], 0)  # every third of six and six
    assert (source.n, source.labels.tolist(), source.data["held_out"]) == (8, [0] * 4 + [1] * 4, 0.34)
    assert source.digest() == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert source.place != open_source(recipe, overrides=[f"data.image_size={SIZE}"]).place  # of its features


def test_a_reference_says_what_it_was_made_from(recipe, folder, own, tmp_path, capsys):
    build = ["build-ref", recipe, "--out", tmp_path / "ref.npz", "data.image_size=8", "--extractor", own, "--batch", 5]
    evaluate([str(part) for part in [*build, "data.background=#102030"]])
    assert "transparent images were composited on #102030" in capsys.readouterr().out
    pixels = trained_on(folder, background="#102030")
    np.savez(tmp_path / "same.npz", arr_0=pixels)
    extractor = load_extractor(own)
    found, same = (read_reference(str(tmp_path / name), extractor) for name in ("ref.npz", "same.npz"))
    for ours, theirs in zip(found.moments["pool"], same.moments["pool"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as arrays:
        meta = json.loads(str(arrays["meta"]))
    assert (meta["n"], meta["image_shape"], meta["class_histogram"]) == (N, [3, 8, 8], {"0": 6, "1": 6})
    source = meta["source"]
    assert source["data"] == {
        "kind": "imagefolder", "root": str(folder), "image_size": 8, "background": "#102030",
    }  # fmt: skip
    assert (source["background"], source["lossy"], source["pixels_sha256"]) == ("#102030", True, same.sha256)
    described = found.describe()
    assert (described["data"], described["background"]) == (source["data"], "#102030")


def test_samples_are_compared_with_it(recipe, folder, own, tmp_path, capsys):
    """By the command, with overrides anywhere behind it, as with an npz of the same pixels."""
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "samples.npz", arr_0=rng.integers(0, 256, (N, SIZE, SIZE, 3), np.uint8))
    np.savez(tmp_path / "same.npz", arr_0=trained_on(folder))
    common = ["--extractor", own, "--metrics", "frechet_distance,kid"]
    out = tmp_path / "metrics.json"
    for overrides in ((["data.image_size=8"], []), ([], ["data.image_size=8"])):
        before, after = overrides
        base = ["score", tmp_path / "samples.npz", *before, "--ref", recipe, *after, *common, "--out", out]
        evaluate([str(part) for part in base])
        said = capsys.readouterr().out
        assert "reference: transparent images were composited on white" in said
        assert "samples: transparent" not in said
        result = json.loads(out.read_text())
        expected, _ = score(
            str(tmp_path / "samples.npz"), str(tmp_path / "same.npz"), "frechet_distance,kid", extractor=own
        )
        assert result["metrics"] == expected["metrics"]
        assert result["reference"]["sha256"] == expected["reference"]["sha256"]
        assert result["reference"]["data"]["image_size"] == 8
        assert not result["samples_lossy"]
        assert result["reference"]["lossy"]


def test_other_settings_have_features_of_their_own(recipe, own, tmp_path):
    extractor, found = load_extractor(own), {}
    for overrides in ([], ["data.background=black"], ["data.background=null"]):
        source = open_source(recipe, overrides=["data.image_size=8", *overrides])
        features = features_of(source, extractor)
        assert features.path == default_folder(source.place, extractor)
        assert features.path.parent.parent == tmp_path
        assert features.info["source"].get("background") == {0: "white", 1: "black", 2: None}[len(found)]
        found[features.path] = features.load("pool")
    assert len(found) == 3
    calls = []
    extractor._module.register_forward_hook(lambda *_: calls.append(1))
    again = features_of(open_source(recipe, overrides=["data.image_size=8"]), extractor)
    assert (again.path, calls) == (next(iter(found)), [])
    # A folder that was begun with other images, or another colour under them, does not become these.
    for overrides, key in ((["data.background=black"], "background"), (["data.image_size=9"], "image_size")):
        source = open_source(recipe, overrides=["data.image_size=8", *overrides])
        with pytest.raises(InputError, match=rf"source\.data\.{key}: "):
            features_of(source, extractor, out=again.path)


def test_images_that_moved_keep_their_features(recipe, folder, own, tmp_path):
    extractor, sizes = load_extractor(own), ["data.image_size=8"]
    first = features_of(open_source(recipe, overrides=sizes), extractor, out=tmp_path / "f")
    folder.rename(tmp_path / "moved")
    calls = []
    extractor._module.register_forward_hook(lambda *_: calls.append(1))
    moved = open_source(recipe, overrides=[*sizes, f"data.root={tmp_path / 'moved'}"])
    assert features_of(moved, extractor, out=tmp_path / "f").info == first.info
    assert calls == []


def test_a_recipe_of_digits_is_the_digits(tmp_path, monkeypatch):
    classifier = digits.DigitsClassifier().eval()
    monkeypatch.setattr(digits, "train_classifier", lambda: (classifier, 0.5))
    recipe = tmp_path / "digits.yaml"
    recipe.write_text("data: {kind: digits, flip: true}\n")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", arr_0=rng.integers(0, 256, (40, 8, 8, 1), np.uint8))
    results = [score(str(tmp_path / "samples.npz"), str(ref))[0] for ref in (recipe, "digits")]
    for metric, value in results[1]["metrics"].items():
        assert results[0]["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-5), metric
    assert results[0]["reference"]["sha256"] == results[1]["reference"]["sha256"]
    scorers = [TrainingScorer(str(ref), None) for ref in (recipe, "digits")]
    images = torch.from_numpy(rng.integers(0, 256, (40, 1, 8, 8), np.uint8))
    values = [scorer(images, [0] * 40)["frechet_distance"] for scorer in scorers]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_what_cannot_be_scored_is_refused(recipe, folder, own, tmp_path, fails, capsys):
    def refusal(*overrides: str, path=recipe) -> str:
        with pytest.raises(InputError) as error:
            open_source(path, overrides=overrides).digest()
        return str(error.value)

    assert "no such folder" in refusal("data.root=nowhere")
    assert "nowhere.yaml': No such file" in refusal(path=tmp_path / "nowhere.yaml")
    assert "did you mean 'data.image_size'" in refusal("data.image_sice=8")
    assert "data.channels=2" in refusal("data.channels=2")
    assert "data.streaming=true" in refusal("data.kind=hf", "data.streaming=true")
    (folder / "b" / "03.png").write_bytes(b"no image")
    assert "b/03.png' does not decode (no known format" in refusal()
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    ref, out = ("--ref", tmp_path / "samples.npz", "--extractor", own), ("--out", tmp_path / "x")
    for command, *arguments in (
        ("score", tmp_path / "samples.npz", *ref, "data.image_size=8"),
        ("score", tmp_path / "samples.npz", "data.image_size=8", *ref),
        ("build-ref", tmp_path / "samples.npz", "data.image_size=8", *out, "--extractor", own),
        ("extract", tmp_path / "samples.npz", *out, "data.image_size=8", "--extractor", own),
    ):
        assert "data.image_size=8: " in (said := fails(evaluate, command, *arguments)), command
        assert "is no recipe" in said
    assert "give either CACHE, or --weights FILE" in fails(evaluate, "verify", "--weights", "x", "data.x=1")
    assert "unrecognized arguments: --channels=1" in fails(evaluate, "extract", recipe, *out, "--channels=1")
    assert not (tmp_path / "x").exists()


def test_a_classifiers_recipe_is_called_one(folder, tmp_path):
    path = tmp_path / "classifier.yaml"
    data = {"kind": "imagefolder", "root": str(folder), "val_root": str(folder)}
    path.write_text(yaml.safe_dump({"data": data, "augment": {"hflip": 0.0}}))
    for read in (open_source, reference_spec):
        with pytest.raises(InputError, match=r"is the recipe of a classifier.*give the folder of its images"):
            read(str(path))
    path.write_text(yaml.safe_dump({"data": data}))  # of which nothing tells that it is one
    with pytest.raises(InputError, match=r"recipe key='data.val_root'"):
        open_source(path)
