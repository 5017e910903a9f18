"""KID against the definition over all pairs, and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from sit_atconv.scoring import kernel
from sit_atconv.scoring.jackknife import counted_off
from sit_atconv.scoring.kernel import kernel_distance


def sets(m, n, dim=8):
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(m, dim)), generator.normal(size=(n, dim)) * 1.1 + 0.3
    return real.astype(np.float32), fake.astype(np.float32)


def by_definition(real, fake):
    def kernel(a, b):
        return np.array([[(float(x @ y) / len(x) + 1) ** 3 for y in b] for x in a])

    real, fake = real.astype(np.float64), fake.astype(np.float64)
    own, among, across = kernel(fake, fake), kernel(real, real), kernel(fake, real)
    n, m = len(fake), len(real)
    return (own.sum() - own.trace()) / (n * (n - 1)) + (among.sum() - among.trace()) / (m * (m - 1)) - 2 * across.mean()


@pytest.mark.parametrize("rows", [4096, 5])
def test_the_full_estimate_is_that_of_all_pairs_and_without_each_group(monkeypatch, rows):
    monkeypatch.setattr(kernel, "ROWS", rows)
    monkeypatch.setattr(kernel, "SUBSETS", 2)
    real, fake = sets(31, 43)
    ids = counted_off(np.arange(43) % 3, 43)
    found = kernel_distance(real, fake, ids)
    assert found.full == pytest.approx(by_definition(real, fake), rel=1e-11)
    for group in range(10):
        assert found.deleted[group] == pytest.approx(by_definition(real, fake[ids != group]), rel=1e-10)


@pytest.mark.parametrize(("m", "n", "size"), [(1100, 1200, 1000), (80, 1050, 80), (300, 90, 90)])
def test_the_value_is_torch_fidelitys(monkeypatch, m, n, size):
    monkeypatch.setattr(kernel, "SUBSETS", 5)
    real, fake = sets(m, n)
    theirs = kid_features_to_metric(
        torch.from_numpy(fake).double(), torch.from_numpy(real).double(),  # of float32, it errs by 1e-3
        kid_subsets=5, kid_subset_size=size, rng_seed=2020, verbose=False,
    )  # fmt: skip
    found = kernel_distance(real, fake, counted_off(None, n))
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert found.subset_se == pytest.approx(theirs["kernel_inception_distance_std"] / np.sqrt(5), rel=1e-10, abs=1e-12)


def test_settings_are_torch_fidelitys_own():
    from torch_fidelity.defaults import DEFAULTS

    assert (DEFAULTS["kid_subsets"], DEFAULTS["kid_subset_size"]) == (kernel.SUBSETS, kernel.SUBSET_SIZE)
    assert (DEFAULTS["rng_seed"], DEFAULTS["kid_kernel"]) == (kernel.SEED, "poly")
    assert [DEFAULTS[f"kid_kernel_poly_{name}"] for name in ("degree", "gamma", "coef0")] == [3, None, 1]


@pytest.mark.slow
def test_the_draw_of_subsets_is_the_stated_error():
    """Over seeds, the mean over subsets spreads around the full estimate as `subset_se` says."""
    real, fake = sets(300, 300)
    found, seeds = [], range(60)
    for seed in seeds:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "SEED", seed)
            patch.setattr(kernel, "SUBSET_SIZE", 50)
            found.append(kernel_distance(real, fake, np.zeros(300, np.int64)))
    values = np.array([each.value for each in found])
    stated = np.mean([each.subset_se for each in found])
    assert abs(values.mean() - found[0].full) < 3 * values.std() / np.sqrt(len(seeds))
    assert values.std() == pytest.approx(stated, rel=0.3)


def test_samples_of_the_same_distribution_are_at_zero_on_average_and_the_error_says_how_far():
    from sit_atconv.scoring.jackknife import counted_off, jackknife

    values, errors = [], []
    real = np.random.default_rng(1).normal(size=(20000, 4))
    for repeat in range(40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "SUBSETS", 2)
            patch.setattr(kernel, "SUBSET_SIZE", 10)
            fake = np.random.default_rng(100 + repeat).normal(size=(200, 4)) + 0.3
            found = kernel_distance(real[:2000], fake, counted_off(None, 200))
        values.append(found.full)
        errors.append(jackknife(found.full, found.deleted).se)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_what_has_no_distance_is_refused():
    real, fake = sets(20, 20)
    ids = counted_off(None, 20)
    with pytest.raises(ValueError, match="features, real images 3"):
        kernel_distance(real[:, :3], fake, ids)
    with pytest.raises(ValueError, match="give at least two"):
        kernel_distance(real[:1], fake, ids)
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(real, fake * np.inf, ids)
