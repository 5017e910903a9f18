"""References from everything that is one; and those that do not go with the samples or the extractor."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.__main__ import main as evaluate
from sit_atconv.data.digits import Digits
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.scoring import digits
from sit_atconv.scoring.extract import features_of
from sit_atconv.scoring.extractor import Extractor, load_extractor
from sit_atconv.scoring.refs import build_reference, read_moments, read_reference, reference_spec, spread
from sit_atconv.scoring.sources import Source, open_source

N = 37
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(48, 7, generator=generator) / 255)

    def forward(self, pixels):
        x = pixels.float().flatten(1)
        return {"pool": x @ self.weight, "spatial": x[:, 1:6].sqrt(), "logits": x[:, :2]}

class Other(Own):
    def __init__(self):
        super().__init__(1)

class Pool(Own):
    def forward(self, pixels):
        return super().forward(pixels)["pool"]
"""


@pytest.fixture
def own(own_module):
    return own_module(OWN)


@pytest.fixture
def extractor(own):
    return load_extractor(f"{own}:Own")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path, pixels):
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(N) % 4)
    return tmp_path / "images.npz"


@pytest.fixture
def wanted(extractor, pixels):
    """Streams of all images, at once."""
    return {name: rows.numpy() for name, rows in extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2)).items()}


def check_moments(reference, wanted, streams):
    assert reference.moments.keys() == set(streams)
    for stream in streams:
        rows = wanted[stream].astype(np.float64)
        np.testing.assert_allclose(reference.moments[stream].mu, rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(reference.moments[stream].sigma, np.cov(rows, rowvar=False), rtol=1e-4, atol=1e-6)


def refusal(spec, extractor, **options):
    with pytest.raises(InputError) as caught:
        read_reference(str(spec), extractor, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_their_features_are_one_reference(images, extractor, wanted, pixels, tmp_path):
    of_images = read_reference(str(images), extractor, batch=5)
    folder = features_of(images, extractor, shard=10, out=tmp_path / "f").path
    of_features = read_reference(str(folder), extractor)
    for reference in (of_images, of_features):
        check_moments(reference, wanted, ("pool", "spatial"))
        assert (reference.n, reference.image_shape) == (N, (3, 4, 4))
        assert reference.source["labels_sha256"] == hashlib.sha256((np.arange(N) % 4).tobytes()).hexdigest()
        assert reference.is_of(hashlib.sha256(pixels.tobytes()).hexdigest())
        assert not reference.is_of("0" * 64)
        np.testing.assert_allclose(reference.features["pool"], wanted["pool"], rtol=1e-5, atol=1e-6)
        assert reference.extractor == extractor.describe()
    assert of_features.sha256 == sha256(folder / "features.json")
    assert of_images.sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert of_images.name == str(images)
    assert of_images.describe() == {
        "name": str(images), "n": N, "sha256": of_images.sha256, "image_shape": [3, 4, 4], "kept": N,
        "extractor": extractor.describe(), "lossy": False,
    }  # fmt: skip


def test_the_images_are_read_once_where_their_features_are_there(images, extractor, tmp_path, monkeypatch):
    """By the first process of many; the others take its word."""
    read_reference(str(images), extractor)
    calls, original = [], Source.digest
    monkeypatch.setattr(Source, "digest", lambda self: calls.append(1) or original(self))
    reference = read_reference(str(images), extractor)
    assert (len(calls), reference.sha256) == (1, original(open_source(images)))


def test_features_that_are_damaged_are_no_reference(images, extractor, tmp_path):
    folder = features_of(images, extractor, shard=10, out=tmp_path / "f").path
    content = bytearray((folder / "shard-000001.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "shard-000001.safetensors").write_bytes(content)
    assert "its SHA-256 is not that of features.json" in refusal(folder, extractor)
    with pytest.raises(InputError, match=r"its SHA-256 is not that of features\.json"):
        build_reference(str(folder), tmp_path / "ref.npz", extractor)


def test_lossy_images_are_let_in_where_asked_and_said(tmp_path, extractor, pixels, own):
    (tmp_path / "jpg").mkdir()
    for index, image in enumerate(pixels[:5]):
        Image.fromarray(image).save(tmp_path / f"jpg/{index}.jpg")
    assert "is JPEG, which moves the scores" in refusal(tmp_path / "jpg", extractor)
    with pytest.raises(InputError, match="is JPEG"):
        build_reference(str(tmp_path / "jpg"), tmp_path / "ref.npz", extractor)
    assert read_reference(str(tmp_path / "jpg"), extractor, allow_lossy=True).describe()["lossy"] is True
    arguments = ["build-ref", str(tmp_path / "jpg"), "--out", str(tmp_path / "ref.npz"), "--extractor", f"{own}:Own"]
    evaluate([*arguments, "--allow-lossy"])
    assert read_reference(str(tmp_path / "ref.npz"), extractor).describe()["lossy"] is True


def test_features_go_where_they_are_told_to(images, extractor, own, tmp_path, pixels):
    """Two files of one name do not meet there."""
    root = tmp_path / "features"
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b/images.npz", arr_0=pixels[::-1])
    for path in (images, tmp_path / "b/images.npz"):
        read_reference(str(path), extractor, root=str(root))
    build = ["build-ref", str(images), "--out", str(tmp_path / "ref.npz"), "--extractor", f"{own}:Own"]
    evaluate([*build, "--features", str(root)])
    assert len(list(root.glob(f"images.npz-*/{extractor.name}/features.json"))) == 2
    assert not list(tmp_path.rglob("images.features"))


def test_our_own_file_holds_the_same(images, own, extractor, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sit_atconv.scoring.refs.spread", lambda n: spread(n, 20))
    evaluate(["build-ref", str(images), "--out", str(tmp_path / "ref.npz"), "--extractor", f"{own}:Own"])
    assert "37 images" in capsys.readouterr().out
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"mu", "sigma", "mu_s", "sigma_s", "pool", "meta"}
        assert {arrays[name].dtype for name in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype(np.float64)}
        meta = json.loads(str(arrays["meta"]))
    assert (meta["n"], meta["kept"], meta["class_histogram"]["0"]) == (N, 20, 10)
    reference = read_reference(str(tmp_path / "ref.npz"), extractor)
    check_moments(reference, wanted, ("pool", "spatial"))
    assert (reference.n, reference.image_shape, reference.sha256) == (N, (3, 4, 4), sha256(tmp_path / "ref.npz"))
    rows = np.arange(20) * N // 20
    assert rows[-1] == 35
    np.testing.assert_allclose(reference.features["pool"], wanted["pool"][rows], rtol=1e-5, atol=1e-6)
    # The same from features that are there, to the byte.
    folder = features_of(images, extractor).path
    build_reference(str(folder), tmp_path / "again.npz", extractor)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "ref.npz").read_bytes()


def test_features_are_kept_evenly_over_all():
    np.testing.assert_array_equal(spread(7), np.arange(7))
    rows = spread(1_281_167)
    assert (len(rows), rows[0], rows[-1]) == (10_000, 0, 1_281_038)
    assert set(np.diff(rows)) == {128, 129}


def test_adms_statistics_are_of_all_and_its_images_are_for_the_rest(extractor, wanted, pixels, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    rows = {"pool": rng.normal(size=(90, 7)), "spatial": rng.normal(size=(90, 5))}
    arrays = {}
    for stream, (mu, sigma) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        arrays |= {mu: rows[stream].mean(0), sigma: np.cov(rows[stream], rowvar=False)}
    np.savez(tmp_path / "adm.npz", **arrays, arr_0=pixels)
    reference = read_reference(str(tmp_path / "adm.npz"), extractor)
    check_moments(reference, rows, ("pool", "spatial"))
    assert reference.features is None  # until a metric needs them
    np.testing.assert_allclose(reference.need_features("pool", "kid"), wanted["pool"], rtol=1e-5, atol=1e-6)
    assert (reference.n, reference.image_shape, reference.source) == (None, (3, 4, 4), None)
    assert (reference.describe()["kept"], reference.describe()["lossy"]) == (N, None)
    assert reference.sha256 == sha256(tmp_path / "adm.npz")
    monkeypatch.setattr(
        "sit_atconv.scoring.refs.spread", lambda n: np.arange(0, n, 4)
    )  # of a file with more images than are kept
    some = read_reference(str(tmp_path / "adm.npz"), extractor).need_features("pool", "kid")
    np.testing.assert_array_equal(some, reference.features["pool"][::4])
    # mu and sigma alone are a reference too, of what they are.
    np.savez(tmp_path / "bare.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    bare = read_reference(str(tmp_path / "bare.npz"), extractor)
    assert (bare.image_shape, bare.features, list(bare.moments)) == (None, None, ["pool"])
    assert bare.describe()["kept"] is None
    read_reference(str(tmp_path / "bare.npz"), extractor, samples=(3, 64, 64))
    assert bare.need("pool", "fid") is bare.moments["pool"]
    with pytest.raises(InputError, match=r"sfid: reference '.*bare\.npz' has no mu_s and sigma_s"):
        bare.need("spatial", "sfid")
    with pytest.raises(InputError, match=r"precision: reference '.*bare\.npz' has neither images nor"):
        bare.need_features("pool", "precision")
    assert reference.need_features("pool", "precision") is reference.features["pool"]


def test_the_digits_are_their_train_split(monkeypatch):
    monkeypatch.setattr(digits, "train_classifier", lambda: (digits.DigitsClassifier().eval(), 0.5))
    extractor = load_extractor("digits")
    reference = read_reference("digits", extractor)
    train = Digits("train")
    wanted = {name: rows.numpy() for name, rows in extractor(to_uint8(train.images)).items()}
    check_moments(reference, wanted, ("pool",))
    assert (reference.n, reference.image_shape) == (1437, (1, 8, 8))
    pixels = to_uint8(train.images).permute(0, 2, 3, 1).contiguous().numpy()
    assert reference.sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert reference.is_of(reference.sha256)
    with pytest.raises(InputError, match="'digits' is of 8 px images, the samples 4"):
        read_reference("digits", extractor, samples=(1, 4, 4))
    assert reference.features["pool"].shape == (1437, 64)


def test_another_resolution_is_refused_before_anything_is_extracted(images, own, extractor, tmp_path, monkeypatch):
    says = "is of 4 px images, the samples 32; compare what has one resolution"
    assert says in refusal(images, extractor, samples=(3, 32, 32))
    assert not (tmp_path / "images.features").exists()
    build_reference(str(images), tmp_path / "ref.npz", extractor)
    folder = tmp_path / "images.features" / extractor.name
    for path in (tmp_path / "ref.npz", folder):
        assert says in refusal(path, extractor, samples=(3, 32, 32))
        read_reference(str(path), extractor, samples=(1, 4, 4))
        assert "the samples 8 x 4" in refusal(path, extractor, samples=(3, 4, 8))
    # Of ADM's files, the images say it.
    with np.load(tmp_path / "ref.npz") as ours, np.load(images) as theirs:
        np.savez(tmp_path / "adm.npz", mu=ours["mu"], sigma=ours["sigma"], arr_0=theirs["arr_0"])
    assert says in refusal(tmp_path / "adm.npz", extractor, samples=(3, 32, 32))
    read_reference(str(tmp_path / "adm.npz"), extractor, samples=(3, 4, 4))


def test_another_extractors_are_refused(images, own, extractor, tmp_path, fails, capsys):
    build_reference(str(images), tmp_path / "ref.npz", extractor)
    other = load_extractor(f"{own}:Other")
    folder = tmp_path / "images.features" / extractor.name
    for path in (tmp_path / "ref.npz", folder):
        assert "is of features with name" in refusal(path, other)
    # Alike in all but the weights.
    other.name, other.protocol = extractor.name, extractor.protocol
    assert other.describe()["weights_sha256"] != extractor.describe()["weights_sha256"]
    for path in (tmp_path / "ref.npz", folder):
        assert "is of features with weights_sha256" in refusal(path, other)
    with pytest.raises(InputError, match="is of features with weights_sha256"):
        read_moments(tmp_path / "ref.npz", other)
    assert read_moments(tmp_path / "ref.npz", extractor)[0].mu.shape == (7,)
    capsys.readouterr()
    message = fails(evaluate, "build-ref", folder, "--out", tmp_path / "x.npz", "--extractor", f"{own}:Other")
    assert "is of features with name" in message
    assert not (tmp_path / "x.npz").exists()


def test_statistics_that_are_none(tmp_path):
    extractor = Extractor("tiny", "tiny-1", nn.Flatten(), {"pool": 3, "spatial": 2}, torch.device("cpu"))
    mu, sigma, mu_s, sigma_s = np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)
    whole = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    crooked, holed, negative = np.eye(3), np.eye(3), np.eye(3)
    indefinite = 2 * np.eye(3) - 1  # variances of 1, and an eigenvalue of -1
    crooked[0, 1], holed[0, 0], negative[2, 2] = 0.1, np.nan, -1
    source = {"pixels_sha256": "0", "lossy": False}
    meta = {"format_version": 1, "n": 3, "image_shape": [1, 2, 2], "source": source}
    for changed, says in (
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "mu (4,) and sigma (4, 4); tiny's pool has 3 features"),
        ({"sigma": np.eye(3)[:, :2]}, "sigma (3, 2)"),
        ({"sigma": np.ones(3)}, "sigma (3,)"),
        ({"mu_s": np.zeros(3)}, "mu_s (3,) and sigma_s (2, 2); tiny's spatial has 2 features"),
        ({"mu": mu + np.inf}, "mu or sigma is not finite"),
        ({"sigma": holed}, "mu or sigma is not finite"),
        ({"sigma_s": np.full((2, 2), np.inf)}, "mu_s or sigma_s is not finite"),
        ({"sigma": crooked}, "sigma is not symmetric"),
        ({"sigma": negative}, "a variance in it is negative"),
        ({"sigma": indefinite}, "sigma has the eigenvalues -1 to 2, so it is no covariance"),
        ({"sigma_s": np.array([[1, 1.01], [1.01, 1]])}, "sigma_s has the eigenvalues -0.01 to 2.01"),
        ({"mu": mu.astype(int)}, "mu is int64"),
        ({"mu_s": None}, "has sigma_s alone"),
        ({"sigma": None}, "has mu alone"),
        ({"meta": np.array("{")}, "its meta is damaged"),
        ({"meta": np.array('{"n": 3}')}, "its meta is damaged"),
        *(
            ({"meta": np.array(json.dumps(meta | {"extractor": about}))}, "its meta is damaged")
            for about in ({}, {"name": "tiny"}, {"name": "tiny", "protocol": 1})
        ),
        ({"meta": np.array(json.dumps({"format_version": 9, "extractor": {}, "n": 3, "image_shape": [1, 2, 2]}))},
         "of format 9, this version reads 1"),
        ({"mu": np.array([None, 1, 2])}, "cannot be read"),
    ):  # fmt: skip
        kept = {key: array for key, array in {**whole, **changed}.items() if array is not None}
        np.savez(tmp_path / "ref.npz", **kept)
        assert says in refusal(tmp_path / "ref.npz", extractor)
    # Of features of any scale.
    np.savez(tmp_path / "ref.npz", **{**whole, "sigma": 1e-4 * indefinite})
    assert "sigma has the eigenvalues -0.0001 to 0.0002" in refusal(tmp_path / "ref.npz", extractor)
    beside = np.array([[1e4, 0, 0], [0, 1, -0.1], [0, -0.1, 0]])  # with an eigenvalue of -0.01
    np.savez(tmp_path / "ref.npz", **{**whole, "sigma": beside})
    read_reference(str(tmp_path / "ref.npz"), extractor)
    # What rounds in fp32 is a covariance.
    rough = np.cov(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), rowvar=False).astype(np.float32)
    rough[0, 1] *= 1 + 1e-7
    np.savez(tmp_path / "ref.npz", **{**whole, "sigma": rough, "sigma_s": np.zeros((2, 2))})
    assert read_reference(str(tmp_path / "ref.npz"), extractor).moments["pool"].sigma.dtype == np.float64


def test_what_is_no_reference(tmp_path, extractor, pixels, images, fails, own, capsys):
    assert "no such file or folder" in refusal(tmp_path / "nowhere", extractor)
    content = images.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("mu")
    for name in ("cut.npz", "text.npz"):
        assert "cannot be read" in refusal(tmp_path / name, extractor)
    np.savez(tmp_path / "x.npz", x=pixels)
    assert "arr_0" in refusal(tmp_path / "x.npz", extractor)
    np.savez(tmp_path / "one.npz", arr_0=pixels[:1])
    assert "at least 2" in refusal(tmp_path / "one.npz", extractor)
    features = features_of(images, extractor).path
    (features / "features.json").unlink()
    assert "no features.json" in refusal(features, extractor)
    build = ("build-ref", images, "--extractor", f"{own}:Own", "--out")
    (tmp_path / "there.npz").touch()
    capsys.readouterr()
    assert "exists already" in fails(evaluate, *build, tmp_path / "there.npz")
    assert "is no folder" in fails(evaluate, *build, tmp_path / "there.npz/ref.npz")
    message = fails(
        evaluate, "build-ref", tmp_path / "one.npz", "--out", tmp_path / "r.npz", "--extractor", f"{own}:Own"
    )
    assert "at least 2" in message
    assert not (tmp_path / "r.npz").exists()


def test_kept_features_that_are_damaged(images, extractor, tmp_path):
    build_reference(str(images), tmp_path / "ref.npz", extractor)
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as arrays:
        arrays = {name: arrays[name] for name in arrays.files}
    for pool in (arrays["pool"][:, :3], arrays["pool"].astype(np.float64), np.full_like(arrays["pool"], np.nan)):
        np.savez(tmp_path / "bad.npz", **{**arrays, "pool": pool})
        assert "pool is no finite fp32 (M, 7)" in refusal(tmp_path / "bad.npz", extractor)


def test_a_folder_of_features_folders_names_them(images, extractor, tmp_path):
    build_reference(str(images), tmp_path / "ref.npz", extractor)
    parent = tmp_path / "images.features"
    with pytest.raises(InputError) as caught:
        reference_spec(str(parent))
    inner = str(parent / extractor.name)
    assert str(caught.value) == f"{str(parent)!r} holds folders of features; give one of them: {inner!r}"
    (parent / "00.png").touch()  # images beside them are what is meant
    assert reference_spec(str(parent)) == "inception"
