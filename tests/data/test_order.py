"""Which image stands where: every image, or every class, equally often, from any position on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sit_atconv.data.order import MAX_ATTEMPTS, Balanced, InOrder, Shuffled
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError


@given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_every_image_once(count, seed, epoch):
    order = Shuffled(count, seed)
    visits = [order.index(epoch * count + place) for place in range(count)]
    assert sorted(visits) == list(range(count))
    assert Shuffled(count, seed).index(epoch * count + count - 1) == visits[-1]


def test_epochs_and_seeds_differ_and_the_first_is_as_it_always_was():
    epochs = [
        [Shuffled(50, seed).index(epoch * 50 + place) for place in range(50)]
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert len(set(map(tuple, epochs))) == 3
    assert epochs[1] == np.random.default_rng(np.random.SeedSequence([3, 0, 1])).permutation(50).tolist()


LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=25).map(lambda extra: np.array([*range(4), *extra]))


@given(LABELS, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_balanced_visits_every_class_once_a_round_and_all_its_images_before_one_again(labels, seed):
    order = Balanced(labels, "abcd", seed)
    visits = [order.index(position) for position in range(4 * 3 * len(labels))]
    rounds = labels[visits].reshape(-1, 4)
    assert (np.sort(rounds, 1) == range(4)).all()
    for label in range(4):
        images = [image for image in visits if labels[image] == label]
        size = int((labels == label).sum())
        for start in range(0, len(images) - size + 1, size):
            assert sorted(images[start : start + size]) == np.flatnonzero(labels == label).tolist()
    # From the middle, without what came before, and backwards.
    for position in (len(visits) // 2 + 1, 7, len(visits) - 1, 0):
        assert Balanced(labels, "abcd", seed).index(position) == visits[position] == order.index(position)


def test_balanced_orders_are_drawn_anew_by_round_class_and_pass():
    labels = np.repeat([0, 1], 40)
    order = Balanced(labels, "ab", 0)
    visits = np.array([order.index(position) for position in range(160)])
    passes = [[image % 40 for image in visits[labels[visits] == label]] for label in (0, 1)]
    orders = [tuple(images[start : start + 40]) for images in passes for start in (0, 40)]
    assert len(set(orders)) == 4
    rounds = labels[visits].reshape(-1, 2)[:, 0]
    assert 20 < rounds.sum() < 60
    other = Balanced(labels, "ab", 1)
    assert visits.tolist() != [other.index(position) for position in range(160)]


def test_balanced_passes_over_images_of_no_class_and_names_empty_classes():
    order = Balanced(np.array([1, -1, 0, -1]), "ab", 0)
    assert {order.index(position) for position in range(20)} == {0, 2}
    with pytest.raises(InputError, match="no image is of class 'b', 'd'; use natural"):
        Balanced(np.array([0, 2, -1]), "abcd", 0)
    with pytest.raises(InputError, match="'5' and 4 more"):
        Balanced(np.array([0]), [str(number) for number in range(10)], 0)


def test_substitutes_are_of_the_class_while_half_of_the_attempts_last():
    labels = np.array([0] * 5 + [1] * 5 + [2])
    order = Balanced(labels, "abc", 0)
    for position in range(6):
        label = labels[order.index(position)]
        drawn = [
            order.substitute(position, attempt, draws.generator(0, Stream.SUBSTITUTE, 0, position, attempt))
            for attempt in range(MAX_ATTEMPTS)
        ]
        early, late = labels[drawn[: MAX_ATTEMPTS // 2]], labels[drawn[MAX_ATTEMPTS // 2 :]]
        assert (early == label).all()
        assert set(late) == {0, 1, 2}
        assert set(drawn[: MAX_ATTEMPTS // 2]) == set(np.flatnonzero(labels == label))
    drawn = [Shuffled(4, 0).substitute(7, 0, draws.generator(0, Stream.SUBSTITUTE, 0, n, 0)) for n in range(60)]
    assert set(drawn) == set(range(4))


def test_in_order_the_substitute_is_what_follows():
    assert InOrder().index(70) == 70
    assert [InOrder().substitute(70, attempt, None) for attempt in range(3)] == [71, 72, 73]
