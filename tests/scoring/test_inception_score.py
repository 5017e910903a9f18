"""The Inception score against its definition and torch-fidelity."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch_fidelity.metric_isc import isc_features_to_metric

from sit_atconv.scoring.inception_score import inception_scores
from sit_atconv.scoring.jackknife import counted_off


def logits(n, classes=20, seed=0):
    return np.random.default_rng(seed).normal(size=(n, classes)).astype(np.float32) * 3


def by_class(n):
    """Sorted by the likeliest class, so that the order matters."""
    x = logits(n)
    return x[np.argsort(x.argmax(1), kind="stable")]


def by_definition(parts):
    scores = []
    for part in parts:
        p = softmax(part.astype(np.float64), axis=1)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    return np.mean(scores)


def scores(x, ids, split):
    return inception_scores([(0, x)], ids, split)


def test_one_split_equals_torch_fidelity():
    x = logits(300, 1008)
    ids = counted_off(None, 300)
    expected = isc_features_to_metric(torch.from_numpy(x), splits=1, shuffle=False)["inception_score_mean"]
    assert scores(x, ids, 5000)[0] == pytest.approx(expected, rel=1e-12)


def test_splits_are_taken_in_the_order_of_the_images_and_a_short_one_counts_like_the_others():
    x = by_class(250)
    ids = counted_off(None, 250)
    expected = by_definition([x[:100], x[100:200], x[200:]])
    assert scores(x, ids, 100)[0] == pytest.approx(expected, rel=1e-12)
    assert abs(scores(x, ids, 250)[0] / expected - 1) > 0.1
    # Ten equal splits, as torch-fidelity takes them.
    tenth = isc_features_to_metric(torch.from_numpy(x), splits=10, shuffle=False)["inception_score_mean"]
    assert scores(x, ids, 25)[0] == pytest.approx(tenth, rel=1e-12)


def test_a_split_has_5000_images():
    x = by_class(5500)[:, :6]
    found, _ = inception_scores([(0, x)], counted_off(None, 5500))
    assert found == pytest.approx(by_definition([x[:5000], x[5000:]]), rel=1e-12)


def test_without_a_group_are_the_others_in_their_splits():
    x = by_class(250)
    ids = counted_off(np.arange(250) % 3, 250)
    _, deleted = scores(x, ids, 100)
    assert len(deleted) == 10
    for group, found in enumerate(deleted):
        kept = [x[first : first + 100][ids[first : first + 100] != group] for first in (0, 100, 200)]
        assert found == pytest.approx(by_definition(kept), rel=1e-12)
    # Of the last split's two images, one stays: a split of one image scores 1, and counts.
    ids = np.arange(102) % 10
    kept = [x[:100][ids[:100] != 0], x[101:102]]
    assert scores(x[:102], ids, 100)[1][0] == pytest.approx(by_definition(kept), rel=1e-12)
    # The last split has one image, of group 0.
    ids = np.arange(101) % 10
    assert scores(x[:101], ids, 100)[1][0] == pytest.approx(by_definition([x[:100][ids[:100] != 0]]), rel=1e-12)


def test_batches_may_come_in_any_order_and_size():
    x, ids = logits(230), counted_off(None, 230)
    whole = scores(x, ids, 100)
    parts = inception_scores([(150, x[150:]), (0, x[:33]), (33, x[33:150])], ids, 100)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1] == pytest.approx(whole[1], rel=1e-12)


def test_sure_answers_of_all_classes_score_their_number_and_one_answer_scores_one():
    sure = np.eye(7)[np.arange(70) % 7] * 1e4  # exp(-10,000) is 0, and 0 log 0 is 0
    ids = counted_off(None, 70)
    assert scores(sure, ids, 5000)[0] == pytest.approx(7, rel=1e-12)
    assert scores(np.repeat(sure[:1], 70, 0), ids, 5000)[0] == pytest.approx(1, rel=1e-12)
    assert scores(sure, np.zeros(70, np.int64), 5000)[1] == []


def test_what_has_no_score_is_refused():
    x, ids = logits(30), counted_off(None, 30)
    with pytest.raises(ValueError, match="logits of 29 images, not of 30"):
        scores(x[:29], ids, 5000)
    x[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        scores(x, ids, 5000)
