"""Precision, recall, density and coverage against loops over differences in float64, and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from sit_atconv.scoring import manifold
from sit_atconv.scoring.jackknife import counted_off
from sit_atconv.scoring.manifold import manifold_scores


def sets(m, n, dim=6, offset=0.0):
    generator = np.random.default_rng(0)
    real = generator.normal(size=(m, dim)) + offset
    fake = generator.normal(size=(n, dim)) * 0.8 + 0.4 + offset
    return real.astype(np.float32), fake.astype(np.float32)


def distances(a, b):
    return np.sqrt(np.square(a[:, None].astype(np.float64) - b[None]).sum(2))


def radii(x, k):
    return np.sort(distances(x, x) + np.diag(np.full(len(x), np.inf)), axis=1)[:, k - 1]


def by_definition(real, fake):
    between = distances(real, fake)
    return {
        "precision": (between <= radii(real, 3)[:, None]).any(0).mean(),
        "recall": (between <= radii(fake, 3)[None]).any(1).mean(),
        "density": (between < radii(real, 5)[:, None]).sum() / (5 * len(fake)),
        "coverage": (between.min(1) < radii(real, 5)).mean(),
    }


@pytest.mark.parametrize("tile", [4096, 7])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equal_the_definitions_for_all_and_without_each_group(monkeypatch, tile, offset):
    monkeypatch.setattr(manifold, "TILE", tile)
    real, fake = sets(90, 123, offset=offset)
    ids = counted_off(np.random.default_rng(1).integers(4, size=123), 123)
    found = manifold_scores(real, fake, ids)
    expected = by_definition(real, fake)
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(expected, rel=1e-12)
    assert all(0.1 < expected[name] < 0.97 for name in ("precision", "recall", "coverage"))
    for group in range(10):
        without = by_definition(real, fake[ids != group])
        assert {name: deleted[group] for name, (_, deleted) in found.items()} == pytest.approx(without, rel=1e-12)


def test_leaving_a_group_out_makes_balls_grow():
    # The others' balls are taken anew: with their old radii, 0.5 would stand.
    real = np.array([[0.0], [10.0]] * 5, np.float32) + np.arange(10, dtype=np.float32)[:, None] / 100
    fake = np.concatenate([np.linspace(-3, 3, 21), np.full(9, 0.01)])[:, None].astype(np.float32)
    ids = np.repeat([0, 1], [21, 9])
    found = manifold_scores(real, fake, ids)
    for group in range(2):
        expected = by_definition(real, fake[ids != group])
        assert {name: deleted[group] for name, (_, deleted) in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("save_cpu_ram", [True, False])
def test_precision_and_recall_equal_torch_fidelitys(save_cpu_ram):
    real, fake = sets(200, 150)
    found = manifold_scores(real, fake, counted_off(None, 150))
    theirs = prc_features_to_metric(
        torch.from_numpy(fake).double(), torch.from_numpy(real).double(),
        prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=save_cpu_ram, verbose=False,
    )  # fmt: skip
    assert found["precision"][0] == pytest.approx(theirs["precision"], abs=1e-7)
    assert found["recall"][0] == pytest.approx(theirs["recall"], abs=1e-7)


def test_close_images_far_from_the_origin_keep_their_neighbours():
    """In float32 the expanded square of these loses every distance; in float64 it keeps those of the differences."""
    real, fake = sets(80, 60, dim=32)
    near_real, near_fake = (torch.from_numpy(x).double() * 1e-2 + 10 for x in (real, fake))
    found = manifold_scores(near_real.float().numpy(), near_fake.float().numpy(), counted_off(None, 60))
    expected = by_definition(near_real.float().numpy(), near_fake.float().numpy())
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(expected, rel=1e-12)


def test_squared_distances_are_as_exact_as_stated():
    real, fake = (torch.from_numpy(x) for x in sets(50, 40, dim=64, offset=100.0))
    tiles = manifold.tiles(real, fake, [slice(0, 40)], "cpu", manifold.Progress(disable=True))
    _, _, _, found = next(tiles)
    exact = distances(real.numpy(), fake.numpy()) ** 2
    scale = real.double().square().sum(1)[:, None] + fake.double().square().sum(1)
    assert ((found - torch.from_numpy(exact)).abs() <= 1e-14 * scale).all()


def test_identical_and_disjoint_sets_have_known_values():
    real, _ = sets(60, 60)
    same = manifold_scores(real, real.copy(), counted_off(None, 60))
    assert same["precision"][0] == same["recall"][0] == same["coverage"][0] == 1
    far = manifold_scores(real, real + 1e3, counted_off(None, 60))
    assert all(value == 0 and set(deleted) == {0.0} for value, deleted in far.values())


def test_the_ball_of_three_is_closed_and_that_of_five_open():
    # One dimension, whole numbers: the third neighbour of 0 is at 3 exactly, the fifth at 5.
    real = np.array([[0], [1], [2], [3], [4], [5], [100], [101], [102], [103], [104], [105]], np.float32)
    edges = np.array([[-3], [-3], [-5], [-5], [-5], [-5], [-5], [-5]], np.float32)
    found = manifold_scores(real, edges, np.zeros(8, np.int64))
    assert found["precision"] == (0.25, [])
    assert found["density"][0] == pytest.approx(2 / 8 / 5)  # the two at -3 lie in the ball of 0, none at -5 does
    assert found["coverage"][0] == pytest.approx(1 / 12)


def test_the_balls_of_samples_are_closed_too():
    # The third neighbour of 0 is at 3 exactly, and the real ones at -3 lie on its edge.
    fake = np.array([[0], [1], [2], [3], [100], [101], [102], [103]], np.float32)
    real = np.array([[-3]] * 4 + [[-30]] * 4, np.float32)
    assert manifold_scores(real, fake, np.zeros(8, np.int64))["recall"] == (0.5, [])


def test_what_has_no_neighbours_is_refused():
    real, fake = sets(20, 20)
    ids = counted_off(None, 20)
    with pytest.raises(ValueError, match="5 real images, 20 samples: nearest neighbours need more than 5"):
        manifold_scores(real[:5], fake, ids)
    with pytest.raises(ValueError, match="need more than 5"):
        manifold_scores(real, fake[:10], counted_off(None, 10, 2))
    with pytest.raises(ValueError, match="samples have 6 features, real images 5"):
        manifold_scores(real[:, :5], fake, ids)
    with pytest.raises(ValueError, match="features of samples are not finite"):
        manifold_scores(real, fake * np.nan, ids)
    with pytest.raises(ValueError, match="give"):
        manifold_scores(real[0], fake, ids)
