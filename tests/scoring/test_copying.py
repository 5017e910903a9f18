"""Distances to the nearest reference image, against their definition and sets of known ones."""

import numpy as np
import pytest
import torch

from sit_atconv.scoring import manifold
from sit_atconv.scoring.copying import copying_scores, doubles
from sit_atconv.scoring.jackknife import counted_off


def drawn(n, dim, seed):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def by_definition(real, fake):
    """The two numbers, from all distances at once."""
    among = np.linalg.norm(real[:, None].astype(np.float64) - real[None], axis=2)
    np.fill_diagonal(among, np.inf)
    own, found = among.min(1), np.linalg.norm(fake[:, None].astype(np.float64) - real[None], axis=2).min(1)
    least = min(value for value in own if (own <= value).sum() >= 0.01 * len(own))
    return {"nearest": np.median(found) / np.median(own), "copies": np.mean(found <= least)}


@pytest.mark.parametrize("tile", [2048, 37])
def test_both_numbers_are_those_of_the_definition_of_all_and_without_each_group(monkeypatch, tile):
    monkeypatch.setattr(manifold, "TILE", tile)
    real, fake = drawn(130, 5, 0), drawn(90, 5, 1)
    fake[:11] = real[20:31] + np.float32(1e-3)  # so that some are counted, and in groups of one or two
    groups = counted_off(None, 90)
    found = copying_scores(real, fake, groups)
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(by_definition(real, fake), rel=1e-6)
    assert 0 < found["copies"][0] < 1
    for group in range(10):
        expected = by_definition(real, fake[groups != group])
        assert {name: deleted[group] for name, (_, deleted) in found.items()} == pytest.approx(expected, rel=1e-6)
    assert [len(deleted) for _, deleted in found.values()] == [10, 10]


def test_sets_of_known_distances():
    """Real images one apart on a line: each is 1 from its nearest other one, itself left out."""
    real, one = np.arange(200.0)[:, None], np.zeros(50, np.int64)
    beside = copying_scores(real, np.arange(50.0)[:, None] + 0.25, one)
    assert beside == {"nearest": (0.25, []), "copies": (1.0, [])}
    apart = copying_scores(real, np.arange(50.0)[:, None] + 1000, one)
    assert (apart["nearest"][0], apart["copies"][0]) == (825.5, 0.0)  # 801 to 850
    # Of 200 distances the second smallest is the 1st percentile: pairs 0.1 and 0.3 apart give two of each.
    uneven = np.concatenate([real, [[-50.0], [-49.9], [-70.0], [-69.7]]])[:200]
    uneven[-4:] = [[-50.0], [-49.9], [-70.0], [-69.7]]
    for offset, share in ((0.05, 1.0), (0.09, 1.0), (0.12, 0.0)):
        assert copying_scores(uneven, np.arange(20.0, 70.0)[:, None] + offset, one)["copies"][0] == share


def test_copies_are_at_nought_and_draws_of_the_same_kind_are_not():
    real = drawn(400, 2048, 2)
    real[:10] = real[10:20]  # so that a copy is what is at 0: of so many features, squares are off by rounding
    for copies in (real[:200].copy(), torch.from_numpy(real)):
        found = copying_scores(torch.from_numpy(real), copies, np.zeros(len(copies), np.int64))
        assert found == {"nearest": (0.0, []), "copies": (1.0, [])}
    real, fake = drawn(3000, 4, 3), drawn(3000, 4, 4)
    found = copying_scores(real, fake, np.zeros(3000, np.int64))
    assert found["nearest"][0] == pytest.approx(1, abs=0.05)
    assert found["copies"][0] == pytest.approx(0.01, abs=0.006)  # three times the error of both shares


def test_doubles_in_the_reference():
    real = drawn(10, 3, 5)
    assert doubles(real) == 0
    assert doubles(np.concatenate([real, real[:3]])) == 6
    few, many = np.concatenate([real, real[:5] + 1, real[:4]]), np.concatenate([real, real])
    assert copying_scores(few, drawn(5, 3, 6), np.zeros(5, np.int64))["nearest"][0] > 0
    with pytest.raises(ValueError, match="equal another one"):
        copying_scores(many, drawn(5, 3, 6), np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="at least two"):
        copying_scores(real[:1], real, np.zeros(10, np.int64))
    with pytest.raises(ValueError, match="not finite"):
        copying_scores(real, real * np.nan, np.zeros(10, np.int64))
