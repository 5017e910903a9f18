"""The error bar against the true spread, and the corrected value against the true distance, on Gaussians."""

import numpy as np
import pytest

from sit_atconv.scoring.frechet import frechet_distance, frechet_distances
from sit_atconv.scoring.jackknife import counted_off, design_of, jackknife
from sit_atconv.scoring.moments import GroupSums, Moments
from sit_atconv.scoring.sources import class_histogram

REPEATS = 80


def estimates(draw, reference):
    """value, se, corrected (REPEATS, 3) of Fréchet distances of features that `draw` draws anew."""
    rows = []
    for repeat in range(REPEATS):
        x = draw(np.random.default_rng([0, repeat]))
        sums = GroupSums(x.shape[1]).update(x, counted_off(None, len(x)))
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
    value, se, corrected = estimates(lambda rng: rng.normal(size=(n, dim)) * scale + shift, reference)
    truth = frechet_distance(mu, sigma, *reference)
    assert truth == pytest.approx(dim * (shift**2 + (scale - 1) ** 2))
    assert_honest(value, se, corrected, truth)
    # What is corrected is more than the error of the mean: without it, the test would fail.
    assert value.mean() - truth > 3 * value.std(ddof=1) / np.sqrt(REPEATS)


DRAWS = {  # images, classes, how often each has its turn, the manifest's rule; the design, groups, and whether a bound
    "20 a class": (1000, 50, "balanced", None, "stratified", 10, False),
    "15 a class": (600, 40, "balanced", None, "stratified", 15, False),
    "5 a class": (600, 120, "balanced", None, "stratified", 5, False),
    "2 a class": (600, 300, "balanced", None, "stratified", 2, False),
    "at random": (600, 30, "random", None, "random", 10, False),
    "at random, and it is said": (600, 30, "random", "random", "random", 10, False),
    "1 a class": (400, 400, "balanced", None, "random", 10, True),
    "unlabelled, at random": (600, 30, "unlabelled at random", None, "random", 10, True),
    "unlabelled, in turns": (600, 30, "unlabelled in turns", None, "random", 10, True),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_groups_differ_as_draws_do(name):
    """Classes twice as far apart as they are wide; stated errors against the spread of repeated draws."""
    n, classes, kind, rule, design, groups, bound = DRAWS[name]
    dim = 8
    centres = 2 * np.random.default_rng(1).normal(size=(classes, dim))
    reference = Moments(np.full(dim, 0.5), 5 * np.eye(dim))
    rows, designs = [], set()
    for repeat in range(100):
        rng = np.random.default_rng([2, repeat])
        labels = rng.integers(classes, size=n) if "random" in kind else np.arange(n) % classes
        x = centres[labels] + rng.normal(size=(n, dim))
        known = None if "unlabelled" in kind else labels
        found = design_of(n, class_histogram(known), rule)
        designs.add((found.design, found.groups, found.upper_bound))
        sums = GroupSums(dim, found.groups).update(x, found.group_ids(known, n))
        value, *deleted = frechet_distances(sums.all_moments(), reference)
        rows.append(jackknife(value, deleted))
    assert designs == {(design, groups, bound)}
    value, se, _ = np.array(rows).T
    ratio = np.sqrt((se**2).mean()) / value.std(ddof=1)
    if kind == "unlabelled in turns" or name == "1 a class":
        assert ratio > 1.5  # the bound is one
    else:
        assert ratio == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("labels", "rule", "design", "groups", "bound", "why"),
    [
        (np.arange(1000) % 10, None, "stratified", 10, False, "balanced, 100 images each"),
        (np.arange(1000) % 10, "balanced", "stratified", 10, False, "balanced, 100 images each"),
        (np.arange(1000) % 10, "random", "random", 10, False, "labels were drawn at random"),
        (np.sort(np.arange(1000) % 10) + 90, "file", "stratified", 10, False, "balanced"),  # a part of the classes
        (np.arange(2505) % 100, None, "stratified", 13, False, "balanced, 25 or 26 images each"),
        (np.arange(1200) % 100, None, "stratified", 12, False, "balanced, 12 images each"),
        (np.arange(201) % 100, None, "stratified", 2, False, "balanced, 2 or 3 images each"),
        (np.arange(299) % 100, None, "stratified", 3, False, "balanced, 2 or 3 images each"),
        (np.arange(250) % 100, None, "stratified", 2, True, "shared out unevenly over the groups"),
        (np.arange(950) % 100, None, "stratified", 9, True, "9 or 10 images each, shared out unevenly"),
        (np.arange(100), None, "random", 10, True, "1 image each, and one image does not tell"),
        (np.arange(150) % 100, None, "random", 10, True, "1 or 2 images each, and one image does not tell"),
        (np.zeros(100, int), None, "random", 10, False, "all images are of one class"),
        (np.repeat([3, 4], [49, 51]), None, "random", 10, False, "classes have 49 to 51 images"),
        (np.repeat([3, 4], [49, 51]), "file", "random", 10, False, "an upper bound where these numbers were fixed"),
        (None, None, "random", 10, True, "classes are unknown"),
        (None, "random", "random", 10, False, "labels were drawn at random"),
        (np.arange(19) % 2, None, None, None, False, "at least 20 images, and there are 19"),
        (np.arange(20) % 2, None, "stratified", 10, False, "balanced, 10 images each"),
    ],
)  # fmt: skip
def test_the_design_follows_histogram_and_rule(labels, rule, design, groups, bound, why):
    n = 100 if labels is None else len(labels)
    found = design_of(n, class_histogram(labels), rule)
    assert (found.design, found.groups, found.upper_bound) == (design, groups, bound)
    assert why in found.why
    ids = found.group_ids(labels, n)
    sizes = np.bincount(ids, minlength=groups or 1)
    assert len(sizes) == (groups or 1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("labels", [None, np.arange(103) % 7, np.repeat([5, 0, 2], [1, 99, 3]), np.arange(103)])
def test_groups_are_of_one_size_and_share_every_class(labels):
    ids = counted_off(labels, 103)
    sizes = np.bincount(ids, minlength=10)
    assert sizes.max() - sizes.min() == 1
    for label in np.unique(labels) if labels is not None else ():
        shares = np.bincount(ids[labels == label], minlength=10)
        assert shares.max() - shares.min() <= 1
    np.testing.assert_array_equal(counted_off(labels, 103), ids)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 103 images"):
        counted_off(np.zeros(2), 103)


def test_what_takes_turns_within_a_class_does_not_become_the_groups():
    """Labels that say less than there is to know: all images are of class 0, and ten sorts of them take turns."""
    ids = counted_off(np.zeros(1000, int), 1000)
    for sort in range(10):
        assert np.bincount(ids[sort::10], minlength=10).max() < 30


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
