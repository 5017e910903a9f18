"""The Fréchet distance against closed forms, scipy's matrix square root and torch-fidelity."""

import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from sit_atconv.scoring.frechet import frechet_distance, frechet_distances, too_few
from sit_atconv.scoring.moments import Moments, moments


def random_moments(dim, seed, rank=None):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(dim, rank or dim))
    return Moments(generator.normal(size=dim), root @ root.T)


def test_equals_the_definition_with_sqrtm():
    a, b = random_moments(12, 0), random_moments(12, 1)
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 3, 64])
def test_diagonal_gaussians_have_a_closed_form(dim):
    generator = np.random.default_rng(dim)
    mu1, mu2, s1, s2 = generator.normal(size=(2, dim)).tolist() + generator.uniform(0, 3, size=(2, dim)).tolist()
    expected = sum((a - b) ** 2 for a, b in zip(mu1 + s1, mu2 + s2, strict=True))  # standard deviations s
    found = frechet_distance(np.array(mu1), np.diag(np.square(s1)), np.array(mu2), np.diag(np.square(s2)))
    assert found == pytest.approx(expected, rel=1e-8)


def test_a_rotation_changes_nothing():
    a, b = random_moments(30, 0), random_moments(30, 1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(30, 30)))[0]
    turned = [Moments(turn @ each.mu, turn @ each.sigma @ turn.T) for each in (a, b)]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(frechet_distance(*a, *b), rel=1e-10)


def test_the_distance_to_itself_is_zero():
    a = random_moments(30, 0)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-11 * np.trace(a.sigma))
    moved = Moments(a.mu + 2, a.sigma)
    assert frechet_distance(*a, *moved) == pytest.approx(120)


def test_singular_covariances_have_a_closed_form_too():
    # 5 and 3 directions of 20, in one basis: the root of the product is that of the shared directions.
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    s1, s2 = np.zeros(20), np.zeros(20)
    s1[:5], s2[3:6] = [1, 2, 3, 4, 5], [6, 7, 8]
    covariances = [(basis * s**2) @ basis.T for s in (s1, s2)]
    found = frechet_distance(np.zeros(20), covariances[0], np.zeros(20), covariances[1])
    assert found == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-6)
    few = [random_moments(20, seed, rank=3) for seed in (0, 1)]
    assert frechet_distance(*few[0], *few[1]) == pytest.approx(frechet_distance(*few[1], *few[0]), rel=1e-6)
    assert frechet_distance(*few[0], *few[0]) == pytest.approx(0, abs=1e-5)


def test_what_rounding_left_below_zero_counts_as_zero():
    mu, rounded = np.zeros(2), np.diag([4.0, -0.01])
    for pair in ((rounded, np.eye(2)), (np.eye(2), rounded)):
        assert frechet_distance(mu, pair[0], mu, pair[1]) == pytest.approx(4 - 0.01 + 2 - 2 * 2)


@pytest.mark.parametrize("n", [300, 40])
def test_equals_torch_fidelity_on_the_same_features(n):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 64, generator=generator).abs(), torch.randn(2 * n, 64, generator=generator).abs() * 1.2
    statistics = [fid_features_to_statistics(each.double()) for each in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected, rel=1e-6)


def test_several_at_once_are_each_by_itself():
    reference, *others = (random_moments(9, seed) for seed in range(4))
    assert frechet_distances(others, reference) == [frechet_distance(*other, *reference) for other in others]


def test_what_has_no_distance_is_refused():
    a = random_moments(4, 0)
    for wrong in (
        random_moments(5, 0),
        Moments(a.mu, a.sigma[:3]),
        Moments(a.mu[None], a.sigma),
        Moments(a.mu, np.diagonal(a.sigma)),
    ):
        for pair in ((a, wrong), (wrong, a)):
            with pytest.raises(ValueError, match="do not go with"):
                frechet_distance(*pair[0], *pair[1])
    for wrong in (Moments(a.mu * np.nan, a.sigma), Moments(a.mu, a.sigma + np.diag([0, 0, 0, np.inf]))):
        for pair in ((a, wrong), (wrong, a)):
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(*pair[0], *pair[1])


def test_it_takes_less_than_a_matrix_square_root():
    """Calibrated: 0.6 of what scipy's takes, by itself, of the product."""
    a, b = (moments(np.random.default_rng(seed).normal(size=(900, 600)) * np.linspace(1, 0.01, 600)) for seed in (0, 1))

    def seconds(task):
        started = time.process_time()  # what others on the machine take is not in it
        task()
        return time.process_time() - started

    own, theirs = (
        min(seconds(task) for _ in range(2))
        for task in (lambda: frechet_distance(*a, *b), lambda: scipy.linalg.sqrtm(a.sigma @ b.sigma))
    )
    assert own < theirs


def test_a_distance_of_few_images_on_either_side_is_told():
    needed = "at least 640 are needed; the distance is biased"
    assert too_few(64, 640, 640) is None
    assert too_few(64, 640, None) is None
    assert too_few(64, 639, 10_000) == f"64 features of 639 samples: {needed}"
    assert too_few(64, 10_000, 500) == f"64 features of 500 reference images: {needed}"
    assert too_few(64, 500, 500) == f"64 features of 500 samples and 500 reference images: {needed}"
    assert too_few(2048, 5000, None) == (
        "2,048 features of 5,000 samples: at least 20,480 are needed; the distance is biased"
    )
