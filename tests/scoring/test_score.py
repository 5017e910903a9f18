"""The score command: its numbers against computations from all features at once, and what it refuses."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

import sit_atconv.scoring.score as scoring
from eval.__main__ import main as evaluate
from sit_atconv.data.digits import Digits
from sit_atconv.runtime import processes
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.scoring import digits
from sit_atconv.scoring.copying import copying_scores
from sit_atconv.scoring.extractor import INCEPTION_PROTOCOL, KINDS, Extractor, load_extractor
from sit_atconv.scoring.features import Features
from sit_atconv.scoring.frechet import frechet_distance
from sit_atconv.scoring.inception_score import inception_scores
from sit_atconv.scoring.jackknife import counted_off, jackknife
from sit_atconv.scoring.kernel import kernel_distance
from sit_atconv.scoring.manifold import NEAREST, manifold_scores
from sit_atconv.scoring.moments import moments
from sit_atconv.scoring.score import TrainingScorer, table

N, M = 63, 50
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 7, generator=torch.Generator().manual_seed(0)) / 255)

    def forward(self, pixels):
        x = pixels.float().flatten(1)
        return {"pool": (x @ self.weight).relu(), "logits": x @ self.weight[:, 2:], "spatial": x[:, 1:6].sqrt()}

class Pool(Own):
    def forward(self, pixels):
        return super().forward(pixels)["pool"]

class Logits(Own):
    def forward(self, pixels):
        return {"logits": super().forward(pixels)["logits"]}
"""
NAMES = {}
exec(OWN, NAMES)


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch):
    monkeypatch.setattr("sit_atconv.scoring.kernel.SUBSETS", 3)


def small(name, protocol, **about):
    """An extractor of a few features that answers to another's name."""
    streams = {"pool": 7, "logits": 5, "spatial": 5}
    return Extractor(name, protocol, NAMES["Own"](), streams, torch.device("cpu"), weights_sha256="0", **about)


@pytest.fixture
def inception(monkeypatch):
    """A small network in Inception's place, and another in DINOv2's; says what was loaded."""
    loaded = []

    def load(spec, weights=None, device=None):
        loaded.append((spec, weights))
        if spec == "inception":
            return small("inception", INCEPTION_PROTOCOL)
        assert spec.partition(":")[0] == "dinov2"
        return Extractor("dinov2-small", "dinov2-small-1", NAMES["Pool"](), {"pool": 7}, torch.device("cpu"))

    monkeypatch.setattr(scoring, "load_extractor", load)
    return loaded


@pytest.fixture
def own(own_module):
    return own_module(OWN)


def made(n, seed, shape=(4, 4, 3)):
    return np.random.default_rng(seed).integers(0, 200 + 55 * (seed % 2), (n, *shape), dtype=np.uint8)


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=made(N, 1), arr_1=np.arange(N) % 4)
    return tmp_path / "samples.npz"


@pytest.fixture
def images(tmp_path):
    """Real images."""
    np.savez(tmp_path / "real.npz", arr_0=made(M, 2))
    return tmp_path / "real.npz"


def streams_of(array):
    streams = small("x", "x")(torch.from_numpy(array).permute(0, 3, 1, 2))
    return {name: rows.numpy() for name, rows in streams.items()}


def score(*arguments) -> None:
    evaluate(["score", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text())


def values(result):
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def by_hand(fake, real, groups):
    """Fréchet distance of features, with error and correction, from scratch."""
    reference = moments(real)
    deleted = [frechet_distance(*moments(fake[groups != group]), *reference) for group in range(max(groups) + 1)]
    return jackknife(frechet_distance(*moments(fake), *reference), deleted)


def test_every_number_is_that_of_all_features_at_once(inception, samples, images):
    score(samples, "--ref", images, "--batch", 13)
    result = read(samples.with_suffix(".metrics.json"))
    fake, real, groups = streams_of(made(N, 1)), streams_of(made(M, 2)), counted_off(np.arange(N) % 4, N, 16)
    found = {name: (metric["value"], metric["se"], metric["corrected"]) for name, metric in result["metrics"].items()}
    assert list(found) == [
        "fid", "sfid", "is", "precision", "recall", "density", "coverage", "kid", "nearest", "copies",
    ]  # fmt: skip
    for name, stream in (("fid", "pool"), ("sfid", "spatial")):
        expected = by_hand(fake[stream], real[stream], groups)
        assert found[name][:2] == pytest.approx(expected[:2], rel=1e-4)
        needs = 10 * fake[stream].shape[1]  # images of a corrected distance
        assert found[name][2] == (None if needs > N else pytest.approx(expected.corrected, rel=1e-4))
    value, deleted = inception_scores([(0, fake["logits"])], groups)
    assert found["is"][:2] == pytest.approx((value, jackknife(value, deleted).se), rel=1e-4)
    for name, (value, deleted) in manifold_scores(real["pool"], fake["pool"], groups).items():
        assert found[name][:2] == pytest.approx((value, jackknife(value, deleted).se), rel=1e-4)
    kid = kernel_distance(real["pool"], fake["pool"], groups)
    for name, (value, deleted) in copying_scores(real["pool"], fake["pool"], groups).items():
        assert found[name][:2] == pytest.approx((value, jackknife(value, deleted).se), rel=1e-4)
    error = np.hypot(jackknife(kid.full, kid.deleted).se, kid.subset_se)
    assert error > kid.subset_se > 0
    assert found["kid"][:2] == pytest.approx((kid.value, error), rel=1e-4)
    assert {name for name in found if found[name][2] is not None} == {"sfid"}
    assert inception == [("inception", None)]


def test_a_result_says_all_that_repeats_it(inception, samples, images, tmp_path):
    manifest = {"num": N, "labels": [0] * N, "sampler": "euler", "nfe": 20}
    (tmp_path / "folder").mkdir()
    for index, array in enumerate(made(N, 1)):
        Image.fromarray(array).save(tmp_path / f"folder/{index:06d}.png")
    (tmp_path / "folder/manifest.json").write_text(json.dumps(manifest))
    score(tmp_path / "folder", "--ref", images)
    result = read(tmp_path / "folder/metrics.json")
    assert result["protocol"] == "adm-inception-1"
    assert (result["n"], result["groups"], result["image_shape"]) == (N, 10, [3, 4, 4])
    assert result["class_histogram"] == {"0": N}
    assert result["reference"]["n"] == M
    assert result["reference"]["sha256"] == hashlib.sha256(made(M, 2).tobytes()).hexdigest()
    assert result["extractors"] == [small("inception", INCEPTION_PROTOCOL).describe()]
    assert result["samples"] == str(tmp_path / "folder")
    assert result["samples_manifest"] == {"num": N, "sampler": "euler", "nfe": 20}
    assert result["samples_manifest_sha256"] == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    assert result["pixels_sha256"] == hashlib.sha256(made(N, 1).tobytes()).hexdigest()
    assert result["labels_sha256"] == hashlib.sha256(np.zeros(N, np.int64).tobytes()).hexdigest()
    assert (result["device"], result["batch"], result["samples_lossy"]) == ("cpu", 64, False)
    assert {"torch", "torch-fidelity", "timm", "sit_atconv"} <= result["versions"].keys()
    # An npz of the same images: other groups, for it has other labels, but the same values.
    score(samples, "--ref", images, "--out", tmp_path / "deep/other.json")
    other = read(tmp_path / "deep/other.json")
    assert values(other) == pytest.approx(values(result), rel=1e-5)
    assert other["metrics"]["fid"]["se"] != pytest.approx(result["metrics"]["fid"]["se"], rel=1e-3)
    assert (other["class_histogram"]["3"], other["samples_manifest"]) == (15, {})
    assert other["samples_manifest_sha256"] is None


def test_features_score_like_their_images_without_the_network(
    inception, samples, images, tmp_path, monkeypatch, capsys
):
    score(samples, "--ref", images, "--out", tmp_path / "a.json")
    monkeypatch.setattr(scoring, "load_extractor", lambda *args: pytest.fail("loaded"))
    features = tmp_path / "samples.features/inception"
    score(features, "--ref", images)
    assert read(features / "metrics.json")["metrics"] == read(tmp_path / "a.json")["metrics"]
    assert read(features / "metrics.json")["pixels_sha256"] == read(tmp_path / "a.json")["pixels_sha256"]
    score(features, "--ref", features, "--metrics", "fid", "--out", tmp_path / "self.json")
    assert values(read(tmp_path / "self.json"))["fid"] == pytest.approx(0, abs=1e-6)
    np.savez(tmp_path / "new.npz", arr_0=made(30, 4))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        score(features, "--ref", tmp_path / "new.npz")
    assert "state their extractor again" in capsys.readouterr().err


def test_features_of_another_extractor_are_refused(inception, samples, images, tmp_path, monkeypatch, fails, capsys):
    score(samples, "--ref", images, "--out", tmp_path / "a.json")
    capsys.readouterr()
    features = tmp_path / "samples.features/inception"
    other = small("inception", INCEPTION_PROTOCOL, input="other")
    monkeypatch.setattr(scoring, "load_extractor", lambda *args: other)
    message = fails(evaluate, "score", features, "--ref", images, "--extractor", "inception")
    assert "is of features with input None, the extractor has 'other'" in message


def test_only_a_result_is_overwritten_and_the_place_is_tried_first(inception, samples, images, tmp_path, fails, capsys):
    (tmp_path / "own.json").write_text('{"some": "thing"}')
    (tmp_path / "list.json").write_text("[]")
    there = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for out, says in (
        (samples, "exists already"), (images, "exists already"),
        (tmp_path / "own.json", "exists already"), (tmp_path / "list.json", "exists already"),
        (samples / "a.json", "cannot be written"), ("/proc/a.json", "cannot be written"),
    ):  # fmt: skip
        assert says in fails(evaluate, "score", samples, "--ref", images, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there
    score(samples, "--ref", images, "--metrics", "is", "--out", tmp_path / "a.json")
    score(samples, "--ref", images, "--metrics", "fid", "--out", tmp_path / "a.json")
    assert list(read(tmp_path / "a.json")["metrics"]) == ["fid"]


def test_lossy_images_leave_a_trace(inception, samples, images, tmp_path):
    (tmp_path / "jpg").mkdir()
    for index, array in enumerate(made(30, 1)):
        Image.fromarray(array).save(tmp_path / f"jpg/{index}.jpg")
    for name, arguments, lossy in (
        ("none", (samples, "--ref", images), (False, False)),
        ("samples", (tmp_path / "jpg", "--ref", images), (True, False)),
        ("ref", (samples, "--ref", tmp_path / "jpg"), (False, True)),
    ):
        score(*arguments, "--allow-lossy", "--metrics", "fid", "--out", tmp_path / f"{name}.json")
        result = read(tmp_path / f"{name}.json")
        assert (result["samples_lossy"], result["reference"]["lossy"]) == lossy


def test_features_of_both_go_where_they_are_told_to(inception, samples, images, tmp_path):
    root = tmp_path / "features"
    score(samples, "--ref", images, "--features", root, "--metrics", "fid,fdd")
    for name in ("samples", "real"):
        assert not (tmp_path / f"{name}.features").exists()
        for extractor in ("inception", "dinov2-small"):
            assert len(list(root.glob(f"{name}.npz-*/{extractor}/features.json"))) == 1
    before = read(samples.with_suffix(".metrics.json"))
    np.savez(samples, arr_0=made(N, 3))
    with pytest.raises(SystemExit):
        score(samples, "--ref", images, "--features", root)
    assert read(samples.with_suffix(".metrics.json")) == before


def test_samples_made_anew_say_whose_features_are_in_the_way(inception, samples, images, tmp_path, fails, capsys):
    score(samples, "--ref", images)
    np.savez(samples, arr_0=made(N, 3))
    capsys.readouterr()
    message = fails(evaluate, "score", samples, "--ref", images)
    assert message.startswith(f"error: features folder '{tmp_path}/samples.features/inception' holds features with ")
    assert "delete it, or choose another folder for the features" in message


def test_damaged_features_are_not_scored(inception, samples, images, tmp_path, fails, capsys):
    score(samples, "--ref", images)
    shard = tmp_path / "samples.features/inception/shard-000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert "its SHA-256 is not that of features.json" in fails(evaluate, "score", shard.parent, "--ref", images)


def test_unfinished_samples_are_called_that(inception, samples, images, tmp_path, fails):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/settings.json").write_text('{"num": 5}')
    for arguments in ((tmp_path / "s", "--ref", images), (samples, "--ref", tmp_path / "s")):
        assert "holds unfinished samples" in fails(evaluate, "score", *arguments)


def test_metrics_by_their_parts_and_with_blanks(inception, samples, images, tmp_path):
    score(samples, "--ref", images, "--metrics", "is, recall,precision", "--out", tmp_path / "a.json")
    assert list(read(tmp_path / "a.json")["metrics"]) == ["is", "precision", "recall", "density", "coverage"]


def test_a_score_against_itself_is_warned_of(inception, samples, images, tmp_path, capsys):
    warning = "warning: samples and reference are the same images"
    score(samples, "--ref", images, "--metrics", "fid")
    assert warning not in capsys.readouterr().out
    score(samples, "--ref", samples, "--metrics", "fid")
    assert warning in capsys.readouterr().out


def test_what_the_reference_does_not_allow_is_left_out_and_said(inception, samples, tmp_path, capsys, fails):
    real = streams_of(made(M, 2))
    mu, sigma = moments(real["pool"])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    score(samples, "--ref", tmp_path / "ref.npz")
    out = capsys.readouterr().out
    result = read(samples.with_suffix(".metrics.json"))
    assert list(result["metrics"]) == ["fid", "is"]
    assert result["reference"]["n"] is None
    assert [line.split(":")[1].strip() for line in out.splitlines() if line.startswith("left out")] == [
        "sfid",
        "pr",
        "kid",
        "nearest",
    ]
    assert "has no mu_s and sigma_s" in out
    assert (
        f"fid {result['metrics']['fid']['value']:.5g} ± {result['metrics']['fid']['se']:.2g}, corrected "
        in " ".join(out.split())
    )
    samples.with_suffix(".metrics.json").unlink()
    capsys.readouterr()
    for metric, says in (
        ("sfid", "no mu_s and sigma_s"),
        ("pr", "neither images nor"),
        ("fid,kid", "neither images nor"),
    ):
        assert says in fails(evaluate, "score", samples, "--ref", tmp_path / "ref.npz", "--metrics", metric)
    assert not samples.with_suffix(".metrics.json").exists()
    # What is asked for and there does not mind what is not.
    score(samples, "--ref", tmp_path / "ref.npz", "--metrics", "is,fid,is")
    assert list(read(samples.with_suffix(".metrics.json"))["metrics"]) == ["fid", "is"]


def test_fid_and_fdd_are_of_two_extractors_in_one_result(inception, samples, images, tmp_path):
    score(samples, "--ref", images, "--metrics", "fid,fdd", "--dinov2", "a_vit", "--out", tmp_path / "both.json")
    both = read(tmp_path / "both.json")
    assert inception == [("inception", None), ("dinov2:a_vit", None)]
    assert list(both["metrics"]) == ["fid", "fdd"]
    assert both["protocol"] == "adm-inception-1"
    assert [each["protocol"] for each in both["extractors"]] == ["adm-inception-1", "dinov2-small-1"]
    for key in ("value", "se"):  # of the same small network
        assert both["metrics"]["fid"][key] == pytest.approx(both["metrics"]["fdd"][key], rel=1e-6)
    inception.clear()
    score(samples, "--ref", images, "--metrics", "fdd", "--out", tmp_path / "one.json")
    one = read(tmp_path / "one.json")
    assert inception == [("dinov2", None)]
    assert (one["protocol"], list(one["metrics"]), len(one["extractors"])) == ("dinov2-small-1", ["fdd"], 1)
    assert one["metrics"]["fdd"]["value"] == pytest.approx(both["metrics"]["fdd"]["value"], rel=1e-6)
    score(samples, "--ref", images, "--extractor", "dinov2", "--out", tmp_path / "all.json")
    assert list(read(tmp_path / "all.json")["metrics"]) == [
        "fdd", "precision", "recall", "density", "coverage", "kid", "nearest", "copies",
    ]  # fmt: skip
    score(samples, "--ref", images, "--extractor", "inception", "--metrics", "fdd", "--out", tmp_path / "again.json")
    assert list(read(tmp_path / "again.json")["metrics"]) == ["fdd"]


def test_a_module_of_ones_own(own, samples, images, capsys):
    score(samples, "--ref", images, "--extractor", f"{own}:Own")
    result = read(samples.with_suffix(".metrics.json"))
    assert result["protocol"] == f"module-{own}:Own"
    fake, real = streams_of(made(N, 1))["pool"], streams_of(made(M, 2))["pool"]
    expected = by_hand(fake, real, counted_off(np.arange(N) % 4, N, 16))
    found = result["metrics"]["frechet_distance"]
    assert (found["value"], found["se"]) == pytest.approx(expected[:2], rel=1e-4)
    assert {"is", "precision", "kid"} <= result["metrics"].keys()
    capsys.readouterr()
    score(samples, "--ref", images, "--extractor", f"{own}:Pool")
    assert "is" not in read(samples.with_suffix(".metrics.json"))["metrics"]
    assert "left out: is: " in capsys.readouterr().out


@pytest.mark.parametrize("ref", ["npz", "images", "features"])
def test_metrics_are_those_of_the_streams_that_ones_own_module_gives(own, samples, images, tmp_path, capsys, ref):
    """Whatever is there already: no image of theirs may have been through the module when the metrics are chosen."""
    for name, wanted in (("Pool", ["frechet_distance", *NEAREST, "kid", "nearest", "copies"]), ("Logits", ["is"])):
        spec, place = ("--extractor", f"{own}:{name}"), images
        if ref == "npz" and name == "Pool":
            place = tmp_path / "ref.npz"
            evaluate(["build-ref", str(images), "--out", str(place), *spec])
        elif ref == "features":
            evaluate(["extract", str(images), "--out", str(tmp_path / name), *spec])
            place = tmp_path / name
        capsys.readouterr()
        score(samples, "--ref", place, *spec)
        assert list(read(samples.with_suffix(".metrics.json"))["metrics"]) == wanted
        said = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
        assert said == [each for each in KINDS["module"].offered if each not in [*wanted, *["pr"] * (name == "Pool")]]


def test_a_reference_says_whose_features_it_is_of(own, samples, images, tmp_path, capsys, fails):
    spec, ref, folder = f"{own}:Own", tmp_path / "ref.npz", tmp_path / "real"
    evaluate(["build-ref", str(images), "--out", str(ref), "--extractor", spec])
    evaluate(["extract", str(images), "--out", str(folder), "--extractor", spec])
    score(samples, "--ref", images, "--extractor", spec, "--metrics", "frechet_distance,is")
    expected = values(read(samples.with_suffix(".metrics.json")))
    evaluate(["build-ref", str(folder), "--out", str(tmp_path / "again.npz")])
    for each in (ref, folder, tmp_path / "again.npz"):
        score(samples, "--ref", each, "--metrics", "frechet_distance,is")
        found = read(samples.with_suffix(".metrics.json"))
        assert found["protocol"] == f"module-{spec}"
        assert values(found) == pytest.approx(expected, rel=1e-6)
        pixels = torch.from_numpy(made(N, 1)).permute(0, 3, 1, 2)
        trained = TrainingScorer(str(each), None)(pixels, [0] * N)
        assert trained == {"frechet_distance": pytest.approx(expected["frechet_distance"], rel=1e-5)}
        with pytest.raises(InputError, match=f"belongs to Inception, and score.ref={each} is of {spec}"):
            TrainingScorer(str(each), "weights.pth")
        capsys.readouterr()
        for other in ("inception", "digits", "dinov2"):
            says = fails(evaluate, "score", samples, "--ref", each, "--extractor", other)
            assert f"--extractor {other}: reference '{each}' is of features with name '{own}-Own'" in says


def test_a_reference_does_not_choose_what_code_is_run(own, samples, images, tmp_path, fails, capsys, monkeypatch):
    """The module of a reference is run where its file is the recorded one; a library's, or a changed one, never."""
    ref = tmp_path / "ref.npz"
    evaluate(["build-ref", str(images), "--out", str(ref), "--extractor", f"{own}:Own"])
    arrays = dict(np.load(ref))
    meta = json.loads(str(arrays["meta"]))
    capsys.readouterr()
    called = []
    monkeypatch.setattr("sit_atconv.scoring.extractor.importlib", SimpleNamespace(import_module=called.append))
    for module, source in (("os:abort", inspect.getsourcefile(os)), ("timm:list_models", None), ("no/../x:y", None)):
        meta["extractor"] |= {"protocol": f"module-{module}", "source_sha256": source and sha256(source)}
        np.savez(ref, **arrays | {"meta": np.array(json.dumps(meta))})
        assert f"by the module {module!r}, whose file " in fails(evaluate, "score", samples, "--ref", ref)
    meta["extractor"] |= {"protocol": f"module-{own}:Own", "source_sha256": sha256(tmp_path / f"{own}.py")}
    np.savez(ref, **arrays | {"meta": np.array(json.dumps(meta))})
    (tmp_path / f"{own}.py").write_text(OWN + "\n")
    says = fails(evaluate, "score", samples, "--ref", ref)
    assert "was changed since, or is a library's; name one with --extractor" in says
    assert called == []


def test_how_features_are_split_into_files_changes_nothing(own, samples, images, tmp_path):
    extractor = ("--extractor", f"{own}:Own")
    score(samples, "--ref", images, *extractor)
    whole = read(samples.with_suffix(".metrics.json"))
    for shard in (1, 10, 62):
        folder = str(tmp_path / f"by_{shard}")
        evaluate(["extract", str(samples), "--out", folder, "--shard", str(shard), *extractor])
        score(folder, "--ref", images)
        split = read(tmp_path / f"by_{shard}/metrics.json")
        for name, metric in whole["metrics"].items():
            found = split["metrics"][name]
            assert (found["value"], found["se"]) == pytest.approx((metric["value"], metric["se"]), rel=1e-5), name


def test_images_whose_classes_take_turns_have_the_errors_of_their_draw(own, tmp_path, capsys):
    """The same images with labels, without, and sorted by class: what is known of them sets the groups."""
    base = np.random.default_rng(0).integers(40, 215, (10, 4, 4, 3))

    def images(seed, labels):
        noise = np.random.default_rng(seed).normal(size=(len(labels), 4, 4, 3)) * 15
        return (base[labels] + noise).clip(0, 255).astype(np.uint8)

    labels = np.arange(400) % 10
    pixels, order = images(1, labels), np.argsort(labels, kind="stable")
    np.savez(tmp_path / "ref.npz", arr_0=images(2, labels))
    np.savez(tmp_path / "labelled.npz", arr_0=pixels, arr_1=labels)
    np.savez(tmp_path / "sorted.npz", arr_0=pixels[order], arr_1=labels[order])
    np.savez(tmp_path / "unlabelled.npz", arr_0=pixels)
    np.savez(tmp_path / "one.npz", arr_0=pixels, arr_1=np.zeros(400, int))
    found, says = {}, {}
    for name in ("labelled", "sorted", "unlabelled", "one"):
        score(
            tmp_path / f"{name}.npz", "--ref", tmp_path / "ref.npz", "--extractor", f"{own}:Own", "--metrics",
            "frechet_distance,pr,kid",
        )  # fmt: skip
        found[name], says[name] = read(tmp_path / f"{name}.metrics.json"), capsys.readouterr().out
    bars = {name: (each["error_bars"]["design"], each["error_bars"]["upper_bound"]) for name, each in found.items()}
    assert bars == {
        "labelled": ("stratified", False), "sorted": ("stratified", False), "unlabelled": ("random", True),
        "one": ("random", False),
    }  # fmt: skip
    errors = {name: {metric: one["se"] for metric, one in each["metrics"].items()} for name, each in found.items()}
    by_class = errors["labelled"]
    assert {metric: 0.2 < errors["sorted"][metric] / by_class[metric] < 5 for metric in by_class} == dict.fromkeys(
        by_class, True
    )
    by_turns = jackknife(*_by_turns(streams_of(pixels)["pool"], streams_of(images(2, labels))["pool"])).se
    for name in ("unlabelled", "one"):
        assert errors[name]["frechet_distance"] < by_turns / 10
    assert "error bars: 10 random groups; classes are unknown" in says["unlabelled"]
    assert "± at most" in says["unlabelled"]
    assert "corrected at least" in says["unlabelled"]
    assert "error bars: 10 stratified groups; classes are balanced, 40 images each" in says["labelled"]
    assert "at most" not in says["labelled"]


def _by_turns(fake, real):
    ids = np.arange(len(fake)) % 10
    deleted = [frechet_distance(*moments(fake[ids != group]), *moments(real)) for group in range(10)]
    return frechet_distance(*moments(fake), *moments(real)), deleted


def test_the_manifests_rule_decides_the_groups(inception, images, tmp_path, capsys):
    """Labels that were drawn at random and came out even."""
    for rule, design in (("random", "random"), ("balanced", "stratified"), ("file", "stratified")):
        folder = tmp_path / rule
        folder.mkdir()
        np.savez(folder / "samples.npz", arr_0=made(60, 1), arr_1=np.arange(60) % 3)
        manifest = {"num": 60, "labels": (np.arange(60) % 3).tolist(), "labels_rule": rule}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        score(folder, "--ref", images, "--metrics", "fid,is")
        result = read(folder / "metrics.json")
        assert result["error_bars"]["design"] == design
        assert result["groups"] == result["error_bars"]["groups"] == 10
        ids = counted_off(None if design == "random" else np.arange(60) % 3, 60)
        value, deleted = inception_scores([(0, streams_of(made(60, 1))["logits"])], ids)
        assert result["metrics"]["is"]["se"] == pytest.approx(jackknife(value, deleted).se, rel=1e-4)
    assert (
        "labels were drawn at random, and so are the groups"
        in read(tmp_path / "random/metrics.json")["error_bars"]["why"]
    )


def test_a_corrected_distance_takes_ten_images_a_feature(own, images, tmp_path, capsys):
    for n in (69, 70):  # of 7 features
        np.savez(tmp_path / f"{n}.npz", arr_0=made(n, 1), arr_1=np.zeros(n, int))
        score(tmp_path / f"{n}.npz", "--ref", images, "--extractor", f"{own}:Own", "--metrics", "frechet_distance")
        metric, out = read(tmp_path / f"{n}.metrics.json")["metrics"]["frechet_distance"], capsys.readouterr().out
        if n == 69:
            assert (metric["corrected"], metric["corrected_needs"]) == (None, 70)
            assert "corrected needs N >= 70 images for 7 features" in out
        else:
            fake, real = streams_of(made(n, 1))["pool"], streams_of(made(M, 2))["pool"]
            assert metric["corrected"] == pytest.approx(by_hand(fake, real, counted_off(None, n)).corrected, rel=1e-4)
            assert "corrected_needs" not in metric


def test_a_few_images_have_no_error_bar(inception, images, tmp_path, capsys):
    for n, groups in ((4, None), (19, None), (20, 10)):
        np.savez(tmp_path / f"{n}.npz", arr_0=made(n, 1))
        score(tmp_path / f"{n}.npz", "--ref", images)
        result = read(tmp_path / f"{n}.metrics.json")
        assert result["groups"] == groups
        assert {metric["se"] is None for metric in result["metrics"].values()} == {groups is None}
        out = capsys.readouterr().out
        assert ("no error bars" in out) == (groups is None)
        assert ("precision" in result["metrics"]) == (n > 5)
        assert ("left out: pr: 4 images" in out) == (n == 4)


def test_what_cannot_be_scored_is_refused_and_nothing_is_written(inception, own, samples, images, tmp_path, fails):
    np.savez(tmp_path / "large.npz", arr_0=made(30, 1, (8, 8, 3)))
    np.savez(tmp_path / "one.npz", arr_0=made(1, 1))
    np.savez(tmp_path / "float.npz", arr_0=made(30, 1) / 255)
    there = sorted(tmp_path.rglob("*"))
    for arguments, says in (
        ((samples, "--ref", images, "--metrics", "fdi"), "--metrics='fdi': did you mean 'fid'?"),
        ((samples, "--ref", images, "--metrics", ""), "--metrics=''"),
        ((samples, "--ref", images, "--metrics", "recognised"), "'recognised' is none of extractor inception"),
        (
            (samples, "--ref", images, "--extractor", "dinov2", "--metrics", "fid"),
            "; its Fréchet distance is fdd; choose from ['fdd', 'pr', 'kid', 'nearest']",
        ),
        ((samples, "--ref", images, "--dinov2", "a_vit"), "--dinov2 a_vit: nothing asks for it"),
        ((samples, "--ref", tmp_path / "nowhere"), "no such file"),
        ((tmp_path / "nowhere", "--ref", images), "no such file"),
        ((samples, "--ref", tmp_path / "large.npz"), "8 px images, the samples 4"),
        ((tmp_path / "one.npz", "--ref", images), "at least 2"),
        ((samples, "--ref", tmp_path / "one.npz"), "at least 2"),
        ((tmp_path / "float.npz", "--ref", images), "float64"),
        ((samples, "--ref", images, "--out", tmp_path), "is a folder"),
    ):
        assert says in fails(evaluate, "score", *arguments), arguments
    assert sorted(tmp_path.rglob("*")) == there


def test_neighbours_take_an_image_more_than_they_are(own, samples, tmp_path):
    def scored(number):
        file = tmp_path / f"{number}.npz"
        np.savez(file, arr_0=made(number, 1))
        return scoring.score(str(samples), str(file), "pr", f"{own}:Own")

    with pytest.raises(InputError, match="pr: 5 images, and it takes 6; leave pr out"):
        scored(5)  # density and coverage ask for the fifth neighbour
    assert scored(6)[0]["metrics"].keys() == set(NEAREST)


@pytest.fixture(scope="module")
def classifier():
    """Trained once, and handed to all that train it."""
    made = digits.train_classifier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_classifier", lambda: made)
        yield made


@pytest.fixture(scope="module")
def held_out():
    test = Digits("test")
    return to_uint8(test.images), np.array(test.labels)


def write_npz(path, pixels, labels):
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=labels)
    return path


def test_real_digits_score_well_and_mislabelled_or_noisy_ones_do_not(held_out, tmp_path, classifier):
    pixels, labels = held_out
    noise = torch.randint(0, 256, pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    results = {}
    for name, images, stated in (
        ("real", pixels, labels),
        ("shifted", pixels, (labels + 1) % 10),
        ("noise", noise, labels),
    ):
        score(write_npz(tmp_path / f"{name}.npz", images, stated), "--ref", "digits")
        results[name] = read(tmp_path / f"{name}.metrics.json")
    found = {name: values(result) for name, result in results.items()}
    assert found["real"]["recognised"] == found["real"]["classifier_heldout_accuracy"] == classifier[1]
    assert found["shifted"]["recognised"] < 0.05
    assert found["noise"]["recognised"] < 0.3
    assert found["shifted"]["frechet_distance"] == pytest.approx(found["real"]["frechet_distance"], rel=1e-5)
    assert found["noise"]["frechet_distance"] > 20 * found["real"]["frechet_distance"]
    assert found["real"]["precision"] > 0.8 > 0.2 > found["noise"]["precision"]
    assert found["real"]["is"] > 8
    real = results["real"]
    assert (real["n"], real["reference"]["n"], real["protocol"]) == (360, 1437, "digits-classifier-2")
    # The error of a share of independent hits is the binomial one.
    share = found["noise"]["recognised"]
    assert results["noise"]["metrics"]["recognised"]["se"] == pytest.approx(np.sqrt(share * (1 - share) / 360), rel=0.5)
    assert real["metrics"]["classifier_heldout_accuracy"]["se"] is None
    assert real["metrics"]["recognised"]["corrected"] is None
    # The train split against itself is at zero, so the reference is that.
    train = Digits("train")
    score(write_npz(tmp_path / "train.npz", to_uint8(train.images), train.labels), "--ref", "digits")
    assert values(read(tmp_path / "train.metrics.json"))["frechet_distance"] == pytest.approx(0, abs=1e-4)


def test_digits_without_labels_have_no_class_to_recognise(held_out, tmp_path, classifier, capsys, fails):
    np.savez(tmp_path / "bare.npz", arr_0=held_out[0].permute(0, 2, 3, 1).numpy())
    score(tmp_path / "bare.npz", "--ref", "digits")
    assert not {"recognised", "classifier_heldout_accuracy"} & read(tmp_path / "bare.metrics.json")["metrics"].keys()
    assert "left out: recognised: samples without labels" in capsys.readouterr().out
    message = fails(evaluate, "score", tmp_path / "bare.npz", "--ref", "digits", "--metrics", "recognised")
    assert "give them in manifest.json" in message
    message = fails(evaluate, "score", tmp_path / "bare.npz", "--ref", "digits", "--weights", "x")
    assert "--weights belongs to Inception" in message
    beyond = write_npz(tmp_path / "beyond.npz", held_out[0], np.arange(360) % 11)
    message = fails(evaluate, "score", beyond, "--ref", "digits")
    assert "has the label 10, and extractor digits knows 10 classes" in message
    np.savez(tmp_path / "rgb.npz", arr_0=made(30, 1))
    message = fails(evaluate, "score", tmp_path / "rgb.npz", "--ref", "digits")
    assert "(3, 4, 4), digits takes (1, 8, 8)" in message


@pytest.fixture
def alone(monkeypatch):
    """One process of two that are under way: whatever asks the other for something would wait for ever."""

    def never(*args, **kwargs):
        pytest.fail("asked the other process")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, never)
    monkeypatch.setattr(processes, "join", never)


def test_training_scores_digits_as_the_command_does(held_out, tmp_path, classifier, request):
    pixels, labels = held_out
    score(write_npz(tmp_path / "real.npz", pixels, labels), "--ref", "digits")
    expected = values(read(tmp_path / "real.metrics.json"))
    there = sorted(tmp_path.rglob("*"))
    request.getfixturevalue("alone")
    found = TrainingScorer("digits", None)(pixels, labels.tolist())
    assert found == pytest.approx({name: expected[name] for name in ("frechet_distance", "recognised")}, rel=1e-6)
    assert {type(value) for value in found.values()} == {float}
    assert sorted(tmp_path.rglob("*")) == there


def test_nan_is_recognised_as_no_class_and_no_score_is_infinite(monkeypatch, images, inception, tmp_path):
    class Held:
        n, labels = 2, np.array([0, 1])

        def batches(self, stream):
            yield 0, np.array([[np.nan, 0.0], [0.0, 1.0]], np.float32)

    with pytest.raises(InputError, match="logits are not finite"):
        scoring._recognised(Held(), np.zeros(2, np.int64))
    monkeypatch.setattr(scoring, "frechet_distances", lambda *_: iter([float("inf")]))
    with pytest.raises(InputError, match="fid is not finite"):
        scoring.score(str(images), str(images), "fid", root=str(tmp_path / "features"))


def test_training_scores_in_inceptions_features_in_memory(inception, images, tmp_path, alone):
    pixels = torch.from_numpy(made(N, 1)).permute(0, 3, 1, 2)
    fake, real = streams_of(made(N, 1))["pool"], streams_of(made(M, 2))["pool"]
    expected = {"fid": pytest.approx(frechet_distance(*moments(fake), *moments(real)), rel=1e-5)}
    mu, sigma = moments(real)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma, arr_0=made(9, 5))
    there = sorted(tmp_path.rglob("*"))
    for ref in (images, tmp_path / "ref.npz"):
        assert TrainingScorer(str(ref), None)(pixels, [0] * N) == expected
    assert sorted(tmp_path.rglob("*")) == there
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez(tmp_path / "flat.npz", mu=mu, sigma=mu)
    np.savez(tmp_path / "half.npz", mu=mu)
    np.savez(tmp_path / "skew.npz", mu=mu, sigma=sigma + np.triu(sigma, 1))
    for ref, says in (
        ("nan.npz", "not finite"),
        ("flat.npz", r"sigma \(7,\); inception's pool has 7"),
        ("half.npz", "has mu alone"),
        ("skew.npz", "not symmetric"),
        ("no", "no such"),
    ):
        with pytest.raises(InputError, match=says):
            TrainingScorer(str(tmp_path / ref), None)
    with pytest.raises(InputError, match=r"score\.weights belongs to Inception"):
        TrainingScorer("digits", "weights.pth")


@pytest.mark.slow
def test_two_processes_score_as_one(own, samples, images, tmp_path, monkeypatch):
    monkeypatch.setattr("sit_atconv.scoring.kernel.SUBSETS", 100)  # as the processes have it
    arguments = ["score", samples, "--ref", images, "--extractor", f"{own}:Own", "--batch", 7, "--out"]
    score(*arguments[1:], tmp_path / "one.json")
    for folder in ("samples.features", "real.features"):
        (tmp_path / folder).rename(tmp_path / f"old_{folder}")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "eval",
         *map(str, arguments), str(tmp_path / "two.json")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    for name, metric in one["metrics"].items():
        assert two["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-9), name
        assert two["metrics"][name]["se"] == pytest.approx(metric["se"], rel=1e-6), name


@pytest.mark.slow
def test_inception_scores_equal_torch_fidelitys_on_the_same_images(tmp_path, inception_weights):
    """With random weights, from PNGs on both sides, everything between included."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric

    for name, n, seed in (("fake", 12, 1), ("real", 10, 2)):
        (tmp_path / name).mkdir()
        for index, array in enumerate(made(n, seed, (32, 32, 3))):
            Image.fromarray(array).save(tmp_path / name / f"{index:06d}.png")
    score(tmp_path / "fake", "--ref", tmp_path / "real", "--weights", inception_weights)
    found = values(read(tmp_path / "fake/metrics.json"))
    theirs = calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), fid=True, isc=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights),
        isc_splits=1, samples_shuffle=False, kid_subsets=3, kid_subset_size=10, cuda=False, cache=False,
        verbose=False, batch_size=8,
    )  # fmt: skip
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert found["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    # Theirs takes float32 differences of large kernels; in float64 on the same features it is the same.
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.02)
    fake, real = (
        torch.from_numpy(Features(tmp_path / name / "features/inception").load("pool")).double()
        for name in ("fake", "real")
    )
    exact = kid_features_to_metric(fake, real, kid_subsets=3, kid_subset_size=10, verbose=False)
    assert found["kid"] == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-9)
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-7)
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-7)
    assert load_extractor("inception", str(inception_weights)).describe()["weights_sha256"] == (
        hashlib.sha256((inception_weights).read_bytes()).hexdigest()
    )


def test_an_error_of_zero_is_no_error_bar():
    line = table({"recognised": {"value": 1.0, "se": 0.0, "corrected": None}}, upper_bound=True)
    assert line.endswith(" 1 (no error bar: leaving out any group changes nothing; more images may tell)")
