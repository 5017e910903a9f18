"""Post-hoc averages against sums written out over every update, and the command that makes a model of one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sample
from sit_atconv.config import Ema
from sit_atconv.models.sit import create_model
from sit_atconv.posthoc import main
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.training import checkpoint
from sit_atconv.training.ema import Averages, Snapshot, gamma_of, read_snapshots
from sit_atconv.training.posthoc import MAX_PROFILE_ERROR, combine, fit, inner_product

UPDATES, EVERY = 4000, 100
TRACKED = [0.05, 0.1]


def course(n: int) -> list[float]:
    """Weights after update n that drift, settle and swing."""
    u = n / UPDATES
    return [1 + 2 * u, math.exp(-3 * u), math.sin(12 * u) + 2, math.cos(40 * u) + 2, math.sqrt(u), 0.25]


def written_out(std: float, values: np.ndarray) -> np.ndarray:
    """The average of values (updates, ...) whose update i weighs (i/n)^(gamma+1) - ((i-1)/n)^(gamma+1), float64."""
    steps = np.arange(len(values) + 1) / len(values)
    return np.tensordot(np.diff(steps ** (gamma_of(std) + 1)), values, 1)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.course = nn.Parameter(torch.zeros(len(course(1))))
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("whole", torch.zeros((), dtype=torch.int64))

    def at(self, n: int) -> "Weights":
        with torch.no_grad():
            self.course.copy_(torch.tensor(course(n)))
            self.count.fill_(n)
            self.whole.fill_(n)
        return self


def follow(run: Path, stds: list[float], updates: int = UPDATES, every: int = EVERY) -> Averages:
    model = Weights()
    averages = Averages(model, Ema(kind="power", stds=stds, snapshot_every=every))
    for n in range(1, updates + 1):
        averages.update(model.at(n), n)
        if n % every == 0:
            tensors = {name: average.state_dict() for name, average in averages.models.items()}
            averages.write_snapshot(run, n, tensors, n)
    return averages


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posthoc")
    follow(folder, TRACKED)
    return folder


def reconstruct(run, std, step):
    found = fit(read_snapshots(run), std, step)
    return combine(found), found


@pytest.mark.parametrize(
    ("step", "std"),
    [*((UPDATES, std) for std in (0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)), (2000, 0.04), (2000, 0.07), (2000, 0.15)],
)
def test_post_hoc_equals_the_sum_over_every_update(run, step, std):
    tensors, found = reconstruct(run, std, step)
    values = np.array([course(n) for n in range(1, step + 1)])
    np.testing.assert_allclose(tensors["course"].numpy(), written_out(std, values), rtol=1e-3)
    assert tensors["course"][-1] == 0.25  # what never moves is left as it is
    assert sum(found.weights) == pytest.approx(1, abs=1e-12)
    assert (tensors["count"].item(), tensors["whole"].item()) == (step, step)  # the last one's, not averaged


def test_post_hoc_equals_the_average_tracked_directly(run, tmp_path):
    direct = follow(tmp_path, [0.07, 0.15], every=UPDATES)
    for std, average in zip((0.07, 0.15), direct.models.values(), strict=True):
        tensors, _ = reconstruct(run, std, UPDATES)
        torch.testing.assert_close(tensors["course"], average.course.data, rtol=1e-3, atol=0)


@pytest.mark.parametrize("std", TRACKED)
def test_a_width_that_was_tracked_comes_back_to_the_bit(run, std):
    tensors, found = reconstruct(run, std, 2000)
    stored = load_file(found.snapshots[0].path)
    assert [(one.step, one.std) for one in found.snapshots] == [(2000, std)]
    assert found.weights == (1.0,)
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_later_snapshots_are_left_out(run, tmp_path):
    follow(tmp_path, TRACKED, updates=1000)
    early, late = (reconstruct(folder, 0.08, 1000)[0] for folder in (tmp_path, run))
    assert all(torch.equal(early[name], late[name]) for name in early)


@pytest.mark.parametrize(
    ("t1", "std1", "t2", "std2"), [(10, 0.05, 10, 0.05), (10, 0.1, 40, 0.05), (40, 0.28, 10, 0.02), (30, 0.1, 31, 0.25)]
)
def test_inner_products_by_quadrature(t1, std1, t2, std2):
    t = (np.arange(1_000_000) + 0.5) / 1_000_000 * max(t1, t2)

    def values(end, std):
        return np.where(t <= end, (gamma_of(std) + 1) / end * (t / end) ** gamma_of(std), 0)

    expected = (values(t1, std1) * values(t2, std2)).mean() * max(t1, t2)
    assert inner_product(t1, gamma_of(std1), t2, gamma_of(std2)) == pytest.approx(expected, rel=1e-5)


def test_nothing_overflows_at_long_runs_and_narrow_widths():
    assert math.isfinite(inner_product(1e7, gamma_of(0.001), 1e7, gamma_of(0.002)))
    assert inner_product(1e3, gamma_of(0.001), 1e7, gamma_of(0.001)) == 0


def snapshots(*steps: int, stds=TRACKED, skipped: int = 0) -> list[Snapshot]:
    return [Snapshot(Path("none"), step, max(0, step - skipped), std, ()) for step in steps for std in stds]


def test_the_error_is_of_the_profile_and_the_weights_are_the_best():
    """Against the discrete profiles of 4000 updates; and no other weights of sum 1 do better."""
    steps = list(range(400, 4001, 400))
    found = fit(snapshots(*steps), 0.07, 4000)

    def profile(std, end):
        return np.diff(np.minimum(np.arange(4001) / end, 1) ** (gamma_of(std) + 1))

    basis = np.array([profile(one.std, one.updates) for one in found.snapshots])
    weights, wanted = np.array(found.weights), profile(0.07, 4000)

    def error(weights):
        return np.linalg.norm(weights @ basis - wanted) / np.linalg.norm(wanted)

    assert len(weights) == 20
    assert found.error == pytest.approx(error(weights), rel=1e-2)
    assert 1e-3 < found.error < 0.02
    generator = np.random.default_rng(0)
    for _ in range(100):
        change = generator.normal(size=20) * 10.0 ** generator.uniform(-5, -2)
        assert error(weights + change - change.mean()) > error(weights)


def test_profiles_follow_updates_and_steps_that_were_skipped_do_not_count():
    spaced = [400, *range(600, 2001, 100)]
    found = fit(snapshots(*spaced, skipped=400), 0.06, 2000)
    expected = fit(snapshots(*(step - 400 for step in spaced[1:])), 0.06, 1600)
    assert (found.step, found.updates) == (2000, 1600)
    assert found.weights == pytest.approx(expected.weights)
    with pytest.raises(InputError, match="no update had been made"):
        fit(snapshots(400, skipped=400), 0.05, 400)


def test_snapshots_with_no_update_between_them_share_their_weight():
    pairs = fit(snapshots(*range(200, 2001, 200)), 0.07, 2000)
    doubled = fit(
        [
            Snapshot(Path("none"), one.step + late, one.updates, one.std, ())
            for one in pairs.snapshots
            for late in (0, 1)
        ],
        0.07,
        2001,
    )
    assert doubled.error == pytest.approx(pairs.error, rel=1e-4)
    together = np.array(doubled.weights).reshape(-1, 2).sum(1)
    assert together == pytest.approx(np.array(pairs.weights), abs=1e-4)


def test_what_cannot_be_reconstructed_is_refused():
    some = snapshots(*range(100, 1001, 100))
    for std in (0.0, 0.3, -1.0, math.nan):
        with pytest.raises(InputError, match=r"1e-08 to 0\.2887"):
            fit(some, std, 1000)
    with pytest.raises(InputError, match=r"no snapshots: train with ema\.kind=power"):
        fit([], 0.07, 1000)
    with pytest.raises(InputError, match="step 250 has no snapshot; the nearest are of 200 and 300"):
        fit(some, 0.07, 250)
    for std in (0.02, 0.285):
        with pytest.raises(InputError, match=rf"std={std}: the 20 snapshots up to step 1000.*more than 1%"):
            fit(some, std, 1000)
    assert fit(some, 0.07, 1000).error < MAX_PROFILE_ERROR == 0.01
    with pytest.raises(InputError, match="miss its profile"):
        fit(snapshots(1000), 0.07, 1000)


# The command


@pytest.fixture
def trained(tmp_path):
    """A run with snapshots and a checkpoint of a model of pixels, and its weights after every update."""
    run = tmp_path / "run"
    model = create_model(
        None, sample_size=4, num_classes=3, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2,
        token_mixer="hybrid",
    )  # fmt: skip
    averages = Averages(model, Ema(kind="power", snapshot_every=10))
    generator, values = torch.Generator().manual_seed(0), []
    for n in range(1, 101):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        values.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        averages.update(model, n)
        if n % 10 == 0:
            tensors = {name: average.state_dict() for name, average in averages.models.items()}
            averages.write_snapshot(run, n, tensors, n)
    folder = run / "step-0000100"
    averages.models["ema"].save_pretrained(folder / "ema")
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}
    manifest = {"format_version": checkpoint.FORMAT_VERSION, "step": 100, "files": files}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return run, values


def test_the_command_writes_a_model_that_samples(trained, tmp_path, capsys):
    run, values = trained
    out, grid = tmp_path / "posthoc", tmp_path / "grid.png"
    main([str(run), "--std", "0.08", "--out", str(out)])
    said = capsys.readouterr().out
    record = json.loads((out / "conversion.json").read_text())
    assert f"relative error of the profile {record['profile_error']:.1e}" in said
    assert "std 0.08 at step 100 out of 20 snapshots" in said
    assert {key: record[key] for key in ("std", "gamma", "step", "updates", "weights")} == {
        "std": 0.08, "gamma": gamma_of(0.08), "step": 100, "updates": 100, "weights": "ema",
    }  # fmt: skip
    assert 0 < record["profile_error"] < 0.02
    assert all((run / one["file"]).is_file() for one in record["snapshots"])
    assert sum(one["weight"] for one in record["snapshots"]) == pytest.approx(1)
    found = checkpoint.load_trained(out)
    assert found.which == "ema"
    assert found.files == {path.name: sha256(path) for path in out.iterdir() if path.name != "conversion.json"}
    state = found.model.state_dict()
    for name in values[0]:
        expected = written_out(0.08, np.stack([value[name].numpy() for value in values]))
        spread = np.std([value[name].numpy() for value in values])
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=0, atol=0.02 * spread)
    assert torch.equal(found.model.pos_embed, checkpoint.load_trained(run).model.pos_embed)
    sample.main(["--ckpt", str(out), "--num", "1", "--steps", "1", "--out", str(grid)])
    assert grid.is_file()
    (out / "diffusion_pytorch_model.safetensors").open("ab").write(b"0")
    with pytest.raises(InputError, match="was changed or cut"):
        checkpoint.load_trained(out)


def test_the_step_is_the_newest_or_the_one_said(trained, tmp_path):
    run, _ = trained
    for step, arguments in ((100, ()), (60, ("--step", "60"))):
        out = tmp_path / str(step)
        main([str(run), "--std", "0.1", "--out", str(out), *arguments])
        stored = load_file(run / f"snapshots/step-{step:07d}/ema-0.100.safetensors")
        state = checkpoint.load_trained(out).model.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_what_the_command_refuses_leaves_nothing(trained, tmp_path, fails):
    run, _ = trained
    out = tmp_path / "out"
    assert "no such folder" in fails(main, tmp_path / "other", "--std", 0.07, "--out", out)
    assert "miss its profile by" in fails(main, run, "--std", 0.01, "--out", out)
    assert "at least 1e-08 and under" in fails(main, run, "--std", 0.5, "--out", out)
    assert "nearest are of 40 and 50" in fails(main, run, "--std", 0.07, "--step", 45, "--out", out)
    assert "exists already" in fails(main, run, "--std", 0.07, "--out", run)
    path = run / "snapshots/step-0000090/ema.safetensors"
    facts = {"format": 1, "step": 90, "updates": 90, "std": 0.05, "gamma": 1.0, "buffers": []}
    save_file({"other": torch.zeros(1)}, path, {"snapshot": json.dumps(facts)})
    assert "holds other tensors" in fails(main, run, "--std", 0.07, "--out", out)
    path.write_bytes(b"")
    assert "cut or damaged" in fails(main, run, "--std", 0.07, "--out", out)
    for snapshot in run.glob("snapshots/*/*"):
        snapshot.unlink()
    assert "no snapshots: train with" in fails(main, run, "--std", 0.07, "--out", out)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_whose_checkpoint_is_missing_or_another_model_is_refused(trained, tmp_path, fails):
    run, _ = trained
    folder, out = run / "step-0000100", tmp_path / "out"
    other = create_model(None, sample_size=4, num_classes=3, patch_size=2, in_channels=1, hidden_size=16, depth=2,
                         num_heads=2, token_mixer="hybrid")  # fmt: skip
    config = folder / "ema" / "config.json"
    other.save_config(folder / "ema")
    assert "config.json was changed or cut" in fails(main, run, "--std", 0.07, "--out", out)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["ema/config.json"] = sha256(config)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "do not fit its model" in fails(main, run, "--std", 0.07, "--out", out)
    folder.rename(run / "step-0000100.tmp")
    assert "has no checkpoint yet" in fails(main, run, "--std", 0.07, "--out", out)
    assert not out.exists()
