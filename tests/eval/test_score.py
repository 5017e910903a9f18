"""Scoring: digits through their classifier, anything else through Inception with weights that the test makes."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eval import digits, extractor
from eval.__main__ import main as evaluate
from eval.frechet import frechet_distance, moments
from eval.sources import read_images
from sit_atconv.data.digits import Digits
from sit_atconv.images import to_uint8


def write_folder(path, pixels, labels):
    path.mkdir()
    for index, image in enumerate(pixels):
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path / f"{index:06d}.png")
    (path / "manifest.json").write_text(json.dumps({"num": len(pixels), "labels": labels}))


def score(*arguments) -> None:
    evaluate(["score", *map(str, arguments)])


@pytest.fixture(scope="module")
def held_out():
    test = Digits("test")
    return to_uint8(test.images), test.labels.tolist()


@pytest.fixture(scope="module")
def classifier():
    return digits.train_classifier()


def test_the_classifier_is_deterministic_and_good(classifier):
    torch.manual_seed(123)
    again, accuracy = digits.train_classifier()
    assert accuracy == classifier[1] >= 0.97
    state = classifier[0].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_real_digits_score_well_and_mislabelled_or_noisy_ones_do_not(held_out, tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(digits, "train_classifier", lambda: classifier)
    pixels, labels = held_out
    noise = torch.randint(0, 256, pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    results = {}
    for name, images, stated in (
        ("real", pixels, labels),
        ("shifted", pixels, [(label + 1) % 10 for label in labels]),
        ("noise", noise, labels),
    ):
        write_folder(tmp_path / name, images, stated)
        score(tmp_path / name, "--ref", "digits")
        results[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert results["real"]["metrics"]["recognised"] == results["real"]["metrics"]["classifier_heldout_accuracy"]
    assert results["shifted"]["metrics"]["recognised"] < 0.05
    assert results["noise"]["metrics"]["recognised"] < 0.3
    assert results["shifted"]["metrics"]["frechet_distance"] == results["real"]["metrics"]["frechet_distance"]
    assert results["noise"]["metrics"]["frechet_distance"] > 20 * results["real"]["metrics"]["frechet_distance"]
    assert results["real"]["n"] == 360
    assert results["real"]["reference"]["n"] == 1437


def test_the_frechet_reference_is_the_train_split(classifier, held_out):
    train = to_uint8(Digits("train").images)
    real = moments(digits.extract(classifier[0], train)[0])
    assert frechet_distance(real, moments(digits.extract(classifier[0], train)[0])) == pytest.approx(0, abs=1e-4)


def test_npz_samples_score_like_their_folder(held_out, tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(digits, "train_classifier", lambda: classifier)
    pixels, labels = held_out
    write_folder(tmp_path / "folder", pixels, labels)
    np.savez(tmp_path / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=np.array(labels))
    score(tmp_path / "folder", "--ref", "digits")
    score(tmp_path / "samples.npz", "--ref", "digits")
    a, b = (
        json.loads(path.read_text()) for path in (tmp_path / "folder/metrics.json", tmp_path / "samples.metrics.json")
    )
    assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-5)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights in the published file's layout."""
    from unittest.mock import patch

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with (
        patch("torch.load", return_value={}),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None),
    ):
        model = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="unused")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def rgb_folders(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, low in (("a", 0), ("b", 120)):
        pixels = torch.randint(low, 256, (4, 3, 24, 24), generator=generator, dtype=torch.uint8)
        write_folder(tmp_path / name, pixels, None)
    return tmp_path / "a", tmp_path / "b"


def test_inception_scores_against_images_and_against_statistics(rgb_folders, inception_weights, tmp_path):
    a, b = rgb_folders
    score(a, "--ref", b, "--weights", inception_weights)
    against_images = json.loads((a / "metrics.json").read_text())
    model = extractor.load_inception(inception_weights, torch.device("cpu"))
    features = {path: extractor.extract(model, read_images(path).pixels, batch_size=3) for path in (a, b)}
    assert features[a].shape == (4, 2048)
    expected = frechet_distance(moments(features[a]), moments(features[b]))
    assert against_images["metrics"]["fid"] == pytest.approx(expected, rel=1e-4)
    statistics = moments(features[b])
    np.savez(tmp_path / "ref.npz", mu=statistics.mu, sigma=statistics.sigma)
    score(a, "--ref", tmp_path / "ref.npz", "--weights", inception_weights)
    against_statistics = json.loads((a / "metrics.json").read_text())
    assert against_statistics["metrics"]["fid"] == pytest.approx(expected, rel=1e-4)
    assert against_images["weights_sha256"] == against_statistics["weights_sha256"]
    assert against_images["protocol"] == "inception-2015-12-05-pool3"


def test_grey_images_enter_inception_as_three_equal_channels(inception_weights):
    model = extractor.load_inception(inception_weights, torch.device("cpu"))
    grey = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = extractor.extract(model, grey)
    np.testing.assert_array_equal(features, extractor.extract(model, grey.repeat(1, 3, 1, 1)))


class Boom:
    def __reduce__(self):
        return sys.exit, (99,)


def test_weights_that_want_to_run_code_are_refused(fails, rgb_folders, tmp_path):
    torch.save({"fc.weight": Boom()}, tmp_path / "evil.pth")
    a, b = rgb_folders
    assert "cannot be read" in fails(evaluate, "score", a, "--ref", b, "--weights", tmp_path / "evil.pth")


def test_missing_weights_name_the_file_and_where_it_comes_from(fails, rgb_folders, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    a, b = rgb_folders
    message = fails(evaluate, "score", a, "--ref", b)
    assert "weights-inception-2015-12-05-6726825d.pth" in message
    assert "download https://" in message
    assert not (a / "metrics.json").exists()


def test_what_cannot_be_scored_is_refused(fails, rgb_folders, inception_weights, tmp_path, held_out):
    a, b = rgb_folders
    assert "(3, 24, 24), the embedded digits (1, 8, 8)" in fails(evaluate, "score", a, "--ref", "digits")
    message = fails(evaluate, "score", a, "--ref", "digits", "--weights", inception_weights)
    assert "--weights and --device belong to Inception" in message
    assert "--device tpu9" in fails(
        evaluate, "score", a, "--ref", b, "--weights", inception_weights, "--device", "tpu9"
    )
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    for name, arrays, says in (
        ("float", {"arr_0": pixels / 255, "arr_1": np.zeros(3)}, "float64"),
        ("flat", {"arr_0": pixels[..., 0]}, "(3, 8, 8)"),
        ("labels", {"arr_0": pixels, "arr_1": np.zeros(2, np.int64)}, "3 images but labels of shape (2,)"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert says in fails(evaluate, "score", tmp_path / f"{name}.npz", "--ref", "digits")
    np.save(tmp_path / "array.npy", pixels)
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "words.npz", arr_0=pixels, arr_1=np.array(["a", "b", "c"]))
    for name, says in (("array.npy", "give an npz"), ("empty.npz", "give an npz"), ("words.npz", "must be integers")):
        assert says in fails(evaluate, "score", tmp_path / name, "--ref", "digits")
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    assert "not finite" in fails(evaluate, "score", a, "--ref", tmp_path / "nan.npz", "--weights", inception_weights)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.zeros(2048))
    assert "sigma (2048,)" in fails(evaluate, "score", a, "--ref", tmp_path / "ref.npz", "--weights", inception_weights)
    write_folder(tmp_path / "lone", torch.zeros(1, 3, 24, 24, dtype=torch.uint8), None)
    assert "give at least 2" in fails(evaluate, "score", a, "--ref", tmp_path / "lone", "--weights", inception_weights)
    assert "no such file" in fails(evaluate, "score", a, "--ref", tmp_path / "nowhere")
    (a / "000002.png").unlink()
    assert "3 images, but its manifest says 4" in fails(evaluate, "score", a, "--ref", b)
    (b / "000001.png").write_bytes(b"no image")
    assert "000001.png' does not decode" in fails(evaluate, "score", b, "--ref", a)
    write_folder(tmp_path / "bare", held_out[0][:2], None)
    assert "without labels" in fails(evaluate, "score", tmp_path / "bare", "--ref", "digits")
    write_folder(tmp_path / "single", held_out[0][:1], [0])
    assert "at least 2" in fails(evaluate, "score", tmp_path / "single", "--ref", "digits")
    write_folder(tmp_path / "mixed", held_out[0][:2], [0, 1])
    Image.new("L", (9, 8)).save(tmp_path / "mixed/000001.png")
    assert "000001.png" in fails(evaluate, "score", tmp_path / "mixed", "--ref", "digits")
