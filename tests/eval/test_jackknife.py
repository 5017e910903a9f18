"""The error bar against the true spread, and the corrected value against the true distance, on Gaussians."""

import numpy as np
import pytest

from eval.frechet import frechet_distance, frechet_distances
from eval.jackknife import counted_off, jackknife
from eval.moments import GroupSums, Moments

REPEATS = 40


def estimates(draw, reference, labels):
    """value, se, corrected (REPEATS, 3) of Fréchet distances of features that `draw` draws anew."""
    rows = []
    for repeat in range(REPEATS):
        x = draw(np.random.default_rng([0, repeat]))
        sums = GroupSums(x.shape[1]).update(x, counted_off(labels, len(x)))
        value, *without = frechet_distances(sums.all_moments(), reference)
        rows.append(jackknife(value, without))
    return np.array(rows).T


def assert_honest(value, se, corrected, truth):
    assert abs(corrected.mean() - truth) < 2 * corrected.std(ddof=1) / np.sqrt(REPEATS)
    assert np.sqrt((se**2).mean()) == pytest.approx(value.std(ddof=1), rel=0.25)


@pytest.mark.parametrize(
    ("dim", "n", "shift", "scale"), [(16, 1000, 0.1, 1.1), (64, 2000, 0.1, 1.1), (32, 800, 0.05, 0.9)]
)
def test_corrected_value_and_error_bar_are_honest(dim, n, shift, scale):
    mu, sigma = np.full(dim, shift), np.eye(dim) * scale**2
    reference = Moments(np.zeros(dim), np.eye(dim))
    value, se, corrected = estimates(lambda rng: rng.normal(size=(n, dim)) * scale + shift, reference, None)
    truth = frechet_distance(mu, sigma, *reference)
    assert truth == pytest.approx(dim * (shift**2 + (scale - 1) ** 2))
    assert_honest(value, se, corrected, truth)
    # What is corrected is more than the error of the mean: without it, the test would fail.
    assert value.mean() - truth > 3 * value.std(ddof=1) / np.sqrt(REPEATS)


def test_classes_are_shared_out_over_the_groups():
    """With ten classes far apart whose numbers are fixed, groups by index alone would each be a class."""
    classes, n, dim = 10, 1000, 12
    labels = np.arange(n) % classes
    centres = np.random.default_rng(1).normal(size=(classes, dim))
    mu, between = centres.mean(0), np.cov(centres, rowvar=False, ddof=0)
    reference = Moments(np.zeros(dim), np.eye(dim))

    def draw(rng):
        return centres[labels] + rng.normal(size=(n, dim))

    value, se, corrected = estimates(draw, reference, labels)
    truth = frechet_distance(mu, between + np.eye(dim), *reference)
    assert_honest(value, se, corrected, truth)
    blind = estimates(draw, reference, None)[1]
    assert np.sqrt((blind**2).mean()) > 5 * value.std(ddof=1)


def test_of_a_mean_it_is_the_textbook_error():
    x = np.random.default_rng(0).normal(size=12)
    value, se, corrected = jackknife(x.mean(), [np.delete(x, i).mean() for i in range(12)])
    assert (value, corrected) == pytest.approx((x.mean(), x.mean()))
    assert se == pytest.approx(x.std(ddof=1) / np.sqrt(12))


def test_a_bias_of_one_over_n_goes_away():
    x = np.random.default_rng(0).normal(size=12)
    corrected = jackknife(x.var(), [np.delete(x, i).var() for i in range(12)]).corrected
    assert corrected == pytest.approx(x.var(ddof=1))


def test_without_groups_there_is_no_error_bar():
    assert jackknife(3.0, []) == (3.0, None, None)
    with pytest.raises(ValueError, match="one group"):
        jackknife(3.0, [2.0])
