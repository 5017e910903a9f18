"""The Fréchet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg

from eval.frechet import Moments, frechet_distance, moments


def random_moments(dim, seed, rank=None):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(dim, rank or dim))
    return Moments(generator.normal(size=dim), root @ root.T)


def test_equals_the_definition_with_sqrtm():
    a, b = random_moments(12, 0), random_moments(12, 1)
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_closed_forms():
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Moments(np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4)  # |mu|^2 + sum (s_a - s_b)^2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_singular_covariances_give_no_nan():
    a, b = random_moments(20, 0, rank=3), random_moments(20, 1, rank=3)
    distance = frechet_distance(a, b)
    assert np.isfinite(distance)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_moments_are_unbiased():
    features = np.random.default_rng(0).normal(size=(50, 4))
    result = moments(features)
    np.testing.assert_allclose(result.mu, features.mean(0))
    centred = features - features.mean(0)
    np.testing.assert_allclose(result.sigma, centred.T @ centred / 49)


def test_what_has_no_moments_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[0.0, np.nan], [1.0, 2.0]]))
