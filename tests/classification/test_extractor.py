"""attnet:RUN: features are those of the run's evaluation, by its averaged weights; what it knows is compared."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import reset_accelerate
from PIL import Image
from timm.models import save_for_hf

from sit_atconv.__main__ import main
from sit_atconv.classification.extractor import ATTNET
from sit_atconv.classification.loop import train
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.samples import preprocessing, transforms
from sit_atconv.config import load_recipe
from sit_atconv.data.digits import Digits
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.scoring.extractor import load_extractor, recorded_spec, register
from sit_atconv.scoring.score import TrainingScorer, score

TINY = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [2, 2], "stem_strides": [2, 1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny classifier of digits, whose EMA is far from the live weights."""
    register(ATTNET)
    folder = tmp_path_factory.mktemp("classifier")
    recipe = {
        "run": {"out": str(folder / "run")},
        "augment": {"hflip": 0.0},
        "model": {
            "name": "attnet_xxs", "input_size": 20, "crop_pct": 0.8, "mean": [0.3], "std": [0.38], "options": TINY,
        },
        "train": {"epochs": 0.4, "warmup_epochs": 0.0, "batch_size": 32, "lr": 5e-3},
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 9},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    reset_accelerate()
    train(load_recipe(folder / "recipe.yaml", (), ClassifierRecipe))
    return folder / "run"


@pytest.fixture(scope="module")
def digits():
    """uint8 (60, 1, 8, 8) held-out digits, and their labels."""
    test = Digits("test")
    return to_uint8(test.images)[:60], np.array(test.labels)[:60]


def evaluated(run, pixels):
    """What the evaluation of the run makes of images, by timm on PIL images."""
    recipe = load_recipe(run / "recipe.yaml", (), ClassifierRecipe)
    transform = transforms(recipe, preprocessing(recipe.model, 1))[1]
    return torch.stack([transform(Image.fromarray(image[0].numpy())) for image in pixels])


def features_of(model, images):
    with torch.no_grad():
        maps = model.eval().forward_features(images)
        return {"pool": model.forward_head(maps, pre_logits=True), "logits": model(images)}


def far(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_features_are_those_of_the_averaged_weights_in_the_evaluation(run, digits):
    """Resized on tensors, a pixel is off by one level at most, 1 / (255 x 0.38); features by 0.3% of their scale.

    Other resizes, other pixels and other weights are off by ten times that and more.
    """
    extractor, pixels, last = load_extractor(f"attnet:{run}"), digits[0], sorted(run.glob("step-*"))[-1]
    images, module = evaluated(run, pixels), extractor._module
    found = pixels
    for step in module.steps:
        found = step(found)
    assert images.shape == (60, 1, 20, 20)
    assert (found - images).abs().max() <= 1.01 / 255 / 0.38
    ema, live = (timm.create_model(f"local-dir:{last / which}", pretrained=True) for which in ("ema", "model"))
    streams, expected = extractor(pixels), features_of(ema, images)
    assert extractor.streams == {"pool": 12, "logits": 10}
    for name, values in streams.items():
        assert values.shape == (60, {"pool": 12, "logits": 10}[name])
        assert far(values, expected[name]) < 0.003, name
        nearest = F.interpolate(pixels.float(), (25, 25))[..., 2:22, 2:22]
        for other in (
            features_of(live, images)[name],
            features_of(ema, 0.38 * images + 0.3)[name],  # not normalised
            features_of(ema, (nearest / 255 - 0.3) / 0.38)[name],
            features_of(ema, F.interpolate(images, (25, 25), mode="bicubic", antialias=True)[..., 2:22, 2:22])[name],
        ):
            assert far(other, expected[name]) > 0.03, name
    with torch.no_grad():
        torch.testing.assert_close(streams["logits"], ema.head.fc(streams["pool"]))
    of_live = load_extractor(f"attnet:{last / 'model'}")
    assert far(of_live(pixels)["pool"], features_of(live, images)["pool"]) < 0.01


def write_folder(place, channels=3, size=8, names=None, **options):
    """A classifier of images of `size` px in the form of timm's `save_for_hf`."""
    model = timm.create_model("attnet_xxs", in_chans=channels, num_classes=4, **{**TINY, **options})
    config = {
        "input_size": (channels, size, size), "mean": (0.4,) * channels, "std": (0.2,) * channels, "crop_pct": 1.0,
        "interpolation": "bicubic",
    }  # fmt: skip
    names = {} if names is None else {"label_names": names}
    save_for_hf(model, str(place), names, safe_serialization=True, data_config=config)
    return model, config


def test_a_folder_of_timms_form_and_pixels_that_are_not_resized_to_the_bit(tmp_path):
    model, config = write_folder(tmp_path / "m", names=["a", "b", "c", "d"])
    extractor = load_extractor(f"attnet:{tmp_path / 'm'}")
    pixels = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    for name, values in features_of(model, images).items():
        assert torch.equal(extractor(pixels)[name], values), name
    grey = pixels[:, :1]
    for name, values in extractor(grey.repeat(1, 3, 1, 1)).items():
        assert torch.equal(extractor(grey)[name], values), name
    about = extractor.describe()
    assert about["weights_sha256"] == sha256(tmp_path / "m/model.safetensors")
    assert (about["class_names"], about["heldout_accuracy"], about["image_size"]) == (["a", "b", "c", "d"], None, None)


def test_what_is_recorded_of_a_run_and_opened_again(run, tmp_path):
    last = sorted(run.glob("step-*"))[-1]
    row = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    assert row["image_size"] == [8, 8]
    extractor = load_extractor(f"attnet:{run}")
    about = extractor.describe()
    digest = sha256(last / "ema/model.safetensors")
    assert about | {
        "name": f"attnet-{digest[:8]}", "protocol": "attnet-1", "weights_sha256": digest, "channels": 1,
        "image_size": [8, 8], "class_names": [*"0123456789"], "heldout_accuracy": row["ema_top1"] / 100,
    } == about  # fmt: skip
    assert "to 20 x 20 px" in about["input"]
    assert "mean 0.3; std 0.38" in about["input"]
    assert extractor.spec == f"attnet:{last / 'ema'}"  # of that checkpoint, whatever the run goes on to
    assert recorded_spec("x", about, extractor.spec) == extractor.spec
    for spec in (f"attnet:{last}", extractor.spec):
        assert load_extractor(spec).describe() == about
    live = load_extractor(f"attnet:{last / 'model'}").describe()
    assert live["heldout_accuracy"] == row["model_top1"] / 100
    assert live["weights_sha256"] != digest
    # An earlier checkpoint has no evaluation, and a copy of a model lies beside none: by its weights it is the same.
    first = load_extractor(f"attnet:{sorted(run.glob('step-*'))[0]}").describe()
    assert (first["heldout_accuracy"], first["image_size"]) == (None, None)
    shutil.copytree(last / "ema", tmp_path / "copy")
    copy = load_extractor(f"attnet:{tmp_path / 'copy'}")
    copy.check_same("x", about)
    with pytest.raises(InputError, match="is of features with name"):
        copy.check_same("x", live)


def test_what_is_no_classifier_is_refused(run, tmp_path):
    sit, begun, empty, none = (tmp_path / name for name in ("sit", "begun", "empty", "none"))
    for folder in (sit / "step-0000001/ema", begun, empty):
        folder.mkdir(parents=True)
    (begun / "log.jsonl").write_text("")
    config = sit / "step-0000001/ema/config.json"
    config.write_text('{"_class_name": "SiTTransformer2DModel"}')
    manifest = {"step": 1, "files": {"ema/config.json": sha256(config)}}
    stored = json.loads((sorted(run.glob("step-*"))[-1] / "manifest.json").read_text())
    (sit / "step-0000001/manifest.json").write_text(json.dumps(stored | manifest))
    write_folder(tmp_path / "five", channels=5)
    shutil.copytree(run, tmp_path / "damaged")
    damaged = sorted((tmp_path / "damaged").glob("step-*"))[-1] / "ema/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    for place, says in (
        (none, "no such folder; give the folder of a run of `sit-atconv classify`"),
        (empty, "neither a run nor a model"),
        (begun, "a run without a checkpoint; go on with it"),
        (sit, "SiTTransformer2DModel, a generator of images and no classifier"),
        (config.parent, "SiTTransformer2DModel, a generator of images and no classifier"),
        (tmp_path / "five", "a model of images of 5 channels"),
        (tmp_path / "damaged", "ema/model.safetensors was changed or cut"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load_extractor(f"attnet:{place}")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="give attnet:RUN"):
        load_extractor("attnet")
    with pytest.raises(InputError, match="weights belongs to Inception"):
        load_extractor(f"attnet:{run}", weights="x.pth")


def test_images_that_it_was_not_trained_for_are_refused(run):
    extractor = load_extractor(f"attnet:{run}")
    names = [*"0123456789"]
    extractor.check_images("x", (1, 8, 8))
    extractor.check_classes("x", names, np.array([9]))
    extractor.check_classes("x", ["all"])  # which says that there are no classes
    for shape, says in (((3, 8, 8), "x have 3 channels"), ((1, 64, 64), r"x are of 64 px, .* images of 8 px")):
        with pytest.raises(InputError, match=says):
            extractor.check_images("x", shape)
    with pytest.raises(InputError, match=r"x are of 3 classes, .* 10 others, such as '3', '4', '5'"):
        extractor.check_classes("x", ["0", "1", "2"])
    with pytest.raises(InputError, match=r"label 10 is beyond the 10 classes"):
        extractor.check_classes("x", None, np.array([0, 10]))


def test_names_of_classes_are_compared_where_both_are_known(tmp_path):
    write_folder(tmp_path / "m", names=["a", "b", "c", "d"])
    extractor = load_extractor(f"attnet:{tmp_path / 'm'}")
    extractor.check_classes("x", ["a", "b", "c", "d"])
    extractor.check_classes("x", [*"0123"])  # numbers are no names
    for names, says in ((["a", "b", "c", "e"], "such as 'd', 'e'"), (["b", "a", "c", "d"], "in another order")):
        with pytest.raises(InputError, match=says):
            extractor.check_classes("x", names)


def write_npz(path, pixels, labels):
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=labels)
    return path


def test_samples_are_scored_in_its_features(run, digits, tmp_path, capsys, fails):
    pixels, labels = digits
    write_npz(tmp_path / "real.npz", pixels, labels)
    noisy = (pixels.float() + 20 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    samples = write_npz(tmp_path / "samples.npz", noisy.to(torch.uint8), labels)
    ref = tmp_path / "ref.npz"
    main(["build-ref", str(tmp_path / "real.npz"), "--out", str(ref), "--extractor", f"attnet:{run}"])
    capsys.readouterr()
    main(["score", str(samples), "--ref", str(ref)])  # which says whose features they are
    said, result = capsys.readouterr(), json.loads((tmp_path / "samples.metrics.json").read_text())
    about = load_extractor(f"attnet:{run}").describe()
    assert result["extractors"] == [about] == [result["reference"]["extractor"]]
    assert list(result["metrics"]) == [
        "frechet_distance", "is", "precision", "recall", "density", "coverage", "kid", "nearest", "copies",
        "recognised", "classifier_heldout_accuracy",
    ]  # fmt: skip
    logits = load_extractor(f"attnet:{run}")(noisy.to(torch.uint8))["logits"]
    assert result["metrics"]["recognised"]["value"] == np.mean(logits.argmax(1).numpy() == labels)
    assert result["metrics"]["classifier_heldout_accuracy"]["value"] == about["heldout_accuracy"]
    right = f"{about['heldout_accuracy']:.1%} right on held-out images"
    assert f"the Fréchet distance in features of {about['name']} ({right}) is not a FID" in said.out
    few = "12 features of 60 samples and 60 reference images: at least 120 are needed; the distance is biased"
    assert result["warnings"] == [f"frechet_distance: {few}"]
    assert f"warning: frechet_distance: {few}" in said.err
    # Other classes, by the names in the samples' manifest, and images of another size: before anything is written.
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    names = {"num": 60, "labels": labels.tolist(), "class_names": ["shoe", "bag"]}
    (folder / "manifest.json").write_text(json.dumps(names))
    large = write_npz(tmp_path / "large.npz", pixels.repeat(1, 1, 2, 2), labels)
    for arguments, says in (
        ((folder, "--ref", ref), "are of 2 classes, and"),
        ((large, "--ref", ref), "is a classifier of images of 8 px; train one on images of that size"),
        ((samples, "--ref", ref, "--extractor", "digits"), "--extractor digits: reference"),
    ):
        assert says in fails(main, "score", *arguments)
    assert not (folder / "features").exists()


def test_training_scores_in_its_features_and_checks_the_run_first(run, digits, tmp_path, capsys):
    pixels, labels = digits
    real = write_npz(tmp_path / "real.npz", pixels, labels)
    scorer = TrainingScorer(str(real), None, f"attnet:{run}")
    noisy = (pixels.float() * 0.8).to(torch.uint8)
    samples = write_npz(tmp_path / "samples.npz", noisy, labels)
    expected = score(str(samples), str(real), "frechet_distance,recognised", f"attnet:{run}")[0]
    found = scorer(noisy, labels.tolist())
    for name, value in found.items():
        assert value == pytest.approx(expected["metrics"][name]["value"], rel=1e-5), name
    assert found.keys() == {"frechet_distance", "recognised"}
    about = load_extractor(f"attnet:{run}").describe()
    assert scorer.about == {key: about[key] for key in ("name", "protocol", "weights_sha256", "heldout_accuracy")}
    capsys.readouterr()
    scorer.check((1, 8, 8), [*"0123456789"], 5000)
    assert "12 features of 60 reference images: at least 120 are needed" in capsys.readouterr().err
    for shape, names, says in (
        ((1, 16, 16), [*"0123456789"], "images of this run are of 16 px"),
        ((3, 8, 8), [*"0123456789"], "images of this run have 3 channels"),
        ((1, 8, 8), ["shoe", "bag"], "images of this run are of 2 classes"),
    ):
        with pytest.raises(InputError, match=says):
            scorer.check(shape, names, 5000)
    scorer.check((1, 8, 8), ["all"], 5000)  # images without classes: none is recognised
    assert scorer(noisy, labels.tolist()).keys() == {"frechet_distance"}
    with pytest.raises(InputError, match=r"score\.weights belongs to Inception, and score\.extractor is attnet"):
        TrainingScorer(str(real), "w.pth", f"attnet:{run}")
