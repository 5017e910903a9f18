"""verify with stand-ins: a file that counts as the published one, a small network, files of ADM's names."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

import sit_atconv.scoring.score as scoring
from eval.__main__ import main as evaluate
from sit_atconv.scoring import verify
from sit_atconv.scoring.extractor import INCEPTION_PROTOCOL, Extractor
from sit_atconv.scoring.moments import moments
from sit_atconv.scoring.verify import PUBLISHED, REFERENCE, SAMPLES, check_published, synthetic_images


class Small(nn.Module):
    def forward(self, pixels):
        rows = pixels.float().unflatten(2, (4, -1)).unflatten(-1, (4, -1)).mean((3, 5)).flatten(1)
        return {"pool": rows[:, :8], "logits": rows[:, 8:20] / 9, "spatial": rows[:, 20:26]}


def load(spec, weights=None, device=None):
    streams = {"pool": 8, "logits": 12, "spatial": 6}
    return Extractor("inception", INCEPTION_PROTOCOL, Small(), streams, torch.device("cpu"))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that counts as the published one, behind it a network of a few features."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(verify, "DIGEST", hashlib.sha256(b"weights").hexdigest()[:8])
    monkeypatch.setattr(verify, "load_extractor", load)
    monkeypatch.setattr(scoring, "load_extractor", load)
    return path


@pytest.fixture
def adm(tmp_path, weights):
    folder = tmp_path / "adm"
    folder.mkdir()
    made, real = np.random.default_rng(0).integers(0, 256, (2, 40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / SAMPLES, arr_0=made, arr_1=np.arange(40))
    streams = load("")(torch.from_numpy(real).permute(0, 3, 1, 2))
    (mu, sigma), (mu_s, sigma_s) = (moments(streams[name]) for name in ("pool", "spatial"))
    np.savez(folder / REFERENCE, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=real)
    return folder


def test_the_weights_and_this_machines_features_are_reported(weights, capsys):
    evaluate(["verify", "--weights", str(weights)])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["weights"] == f"SHA-256 {hashlib.sha256(b'weights').hexdigest()}"
    pool = load("")(synthetic_images())["pool"].double()
    assert lines["pool"].startswith(f"mean {pool.mean():.5e}, rms {pool.square().mean().sqrt():.5e}, bits ")
    assert lines.keys() == {"weights", "pool", "logits", "spatial"}


def test_the_images_are_the_same_everywhere():
    images = synthetic_images()
    assert (images.shape, images.dtype) == ((8, 3, 64, 64), torch.uint8)
    assert images[3, 1, 5, 7] == (7 * 4 + 5 * 3 + (((10 * 4096 + 5 * 64 + 7) * 2654435761) >> 16) % 64) % 256
    assert len({bytes(image.numpy().tobytes()) for image in images}) == 8
    assert len(images.unique()) == 256


def test_the_published_digest_is_that_of_the_files_name(tmp_path, fails):
    assert verify.DIGEST == "6726825d"
    (tmp_path / "w.pth").write_bytes(b"others")
    message = fails(evaluate, "verify", "--weights", tmp_path / "w.pth")
    assert f"begins with {hashlib.sha256(b'others').hexdigest()[:8]}, and that of the published file with" in message
    message = fails(evaluate, "verify", "--weights", tmp_path / "nowhere.pth")
    assert "are not there; download https://" in message


def test_what_has_the_digest_and_is_no_state_dict_is_refused(tmp_path, monkeypatch, fails):
    (tmp_path / "w.pth").write_bytes(b"others")
    monkeypatch.setattr(verify, "DIGEST", hashlib.sha256(b"others").hexdigest()[:8])
    assert "cannot be read" in fails(evaluate, "verify", "--weights", tmp_path / "w.pth")


def test_adms_files_are_scored_and_compared(weights, adm, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_info:
        evaluate(["verify", "--weights", str(weights), "--adm", str(adm)])
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "fid " in line
    assert "is not 3.94 ± 0.02" in line
    # The same numbers as published: then all is well.
    scored, _ = scoring.score(str(adm / SAMPLES), str(adm / REFERENCE))
    found = {name: scored["metrics"][name]["value"] for name in PUBLISHED}
    monkeypatch.setattr(verify, "PUBLISHED", {name: (value, 1e-3) for name, value in found.items()})
    evaluate(["verify", "--weights", str(weights), "--adm", str(adm)])
    assert "all as published" in capsys.readouterr().out


def test_options_reach_what_they_are_for(weights, adm, monkeypatch, tmp_path):
    loaded, scored = [], []
    monkeypatch.setattr(verify, "load_extractor", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(verify, "score", lambda *args, **options: scored.append((args, options)))
    options = ["--device", "cpu", "--batch", "9", "--features", str(tmp_path / "f")]
    evaluate(["verify", "--weights", str(weights), "--adm", str(adm), *options])
    assert loaded == [("inception", str(weights), "cpu")]
    ((args, given),) = scored
    assert args == (str(adm / SAMPLES), str(adm / REFERENCE), "fid,sfid,is,pr")
    assert given == {"weights": str(weights), "device": "cpu", "batch": 9, "root": str(tmp_path / "f")}


def test_what_is_missing_is_named_before_anything_runs(weights, adm, fails):
    (adm / REFERENCE).unlink()
    message = fails(evaluate, "verify", "--weights", weights, "--adm", adm)
    assert f"{REFERENCE} is not there" in message
    assert "github.com/openai/guided-diffusion" in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_score_has_its_tolerance(name):
    assert {name: value for name, (value, _) in PUBLISHED.items()} == {
        "is": 215.84, "fid": 3.94, "sfid": 6.14, "precision": 0.827, "recall": 0.531,
    }  # fmt: skip
    metrics = {each: {"value": value} for each, (value, _) in PUBLISHED.items()}
    check_published(metrics)
    value, tolerance = PUBLISHED[name]
    for side in (-1, 1):
        metrics[name] = {"value": value + side * tolerance * 0.9}
        check_published(metrics)
        metrics[name] = {"value": value + side * tolerance * 1.1}
        with pytest.raises(ValueError, match=f"not as published: {name} "):
            check_published(metrics)
    metrics[name] = {"value": float("nan")}
    with pytest.raises(ValueError, match="not as published"):
        check_published(metrics)
