"""Which images are held out, and that training never meets one: not in its order, and not for a bad image."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from sampled import sampled

from sit_atconv.config import Data, load_recipe, make_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.held_out import Part, is_held_out, split, tell_of_share
from sit_atconv.data.images import Unreadable
from sit_atconv.data.samples import ValidationSamples
from sit_atconv.flow.times import TimeSampling
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.plan import dry_run


class Numbered(torch.utils.data.Dataset):
    """Image i is the number i, of the class labels[i]; images of `bad` cannot be read."""

    channels, image_size, moments, class_names = 1, 1, False, ("cat", "dog", "owl")

    def __init__(self, labels, bad=()):
        self.labels, self.bad = np.asarray(labels), bad

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, flip = key
        assert not flip or index not in self.bad
        if index in self.bad:
            raise Unreadable(f"image {index} is bad")
        return torch.full((1, 1, 1), float(index)), int(self.labels[index])


@pytest.mark.parametrize("share", ["0.01", "0.1", "0.29", "0.3", "0.5", "0.123456789"])
def test_of_every_class_the_share_is_held_out_evenly_whatever_the_order_of_the_classes(share):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [100, 1000, 7, 5]))
    expected = np.zeros(len(labels), bool)
    seen = dict.fromkeys((0, 1, 2), 0)
    for index, label in enumerate(labels):
        if label >= 0:
            seen[label] += 1
            expected[index] = (seen[label] * Fraction(share)) // 1 > ((seen[label] - 1) * Fraction(share)) // 1
    assert np.array_equal(is_held_out(labels, float(share)), expected)
    assert np.array_equal(is_held_out(np.zeros(30, int), 0.1), np.arange(30) % 10 == 9)


def test_both_parts_are_the_dataset_and_none_is_in_both():
    labels = np.arange(40) % 2 * 2  # of class 1 there is none, and so nothing to hold out
    whole = Numbered(labels)
    train, held_out = split(whole, 0.25)
    assert split(whole, None) == (whole, None)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train.indices, *held_out.indices]) == list(range(40))
    for part in (train, held_out):
        assert [int(part[place, False][0]) for place in range(len(part))] == part.indices.tolist()
        assert [part[place, True][1] for place in range(len(part))] == part.labels.tolist()
        assert (part.channels, part.image_size, part.class_names) == (1, 1, ("cat", "dog", "owl"))


@pytest.mark.parametrize(
    ("counts", "share", "says"),
    [
        ((20, 9, 3), 0.1, r"data.held_out=0.1 holds out none of the 3 images of class 'owl' \(and 1 more classes\); "
                          "state 0.34 or more"),
        ((20, 1, 9), 0.1, r"none of the 1 images of class 'dog' \(and 1 more classes\); give it more"),
        ((3, 30, 30), 0.33, "none of the 3 images of class 'cat'; state 0.34 or more, or give it more"),
        ((30, 30, 1), 0.5, "none of the 1 images of class 'owl'; give it more"),
    ],
)  # fmt: skip
def test_a_share_that_leaves_a_class_without_held_out_images_is_refused(counts, share, says):
    with pytest.raises(InputError, match=says):
        split(Numbered(np.repeat([0, 1, 2], counts)), share)
    if "0.34" in says:  # the remedy is one
        assert split(Numbered(np.repeat([0, 1, 2], counts)), 0.34)[1]


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_training_meets_no_held_out_image_also_in_the_place_of_a_bad_one(sampling):
    labels = np.arange(60) % 3
    kept = np.flatnonzero(is_held_out(labels, 0.2))
    bad = [index for index in range(0, 60, 2) if index not in kept]
    train, _ = split(Numbered(labels, bad), 0.2)
    samples = sampled(train, (1, 1, 1), 8, seed=3, sampling=sampling)
    met, wrong = [], {}
    for step in range(40):
        batch, found = samples.fetch(range(8 * step, 8 * step + 8))
        met += batch["image"].flatten().int().tolist()
        assert [index % 3 for index in met[-8:]] == batch["label"].tolist()
        wrong |= found
    readable = set(range(60)) - {*kept} - {*bad}
    assert set(met) == readable  # all of them, in some seven epochs
    assert {train.indices[place] for place in wrong} == {*bad}  # which are counted by their place among these


def expected_batch(images, count, shape):
    """The draws of a validation of so many images, one by one."""
    order = draws.generator(0, Stream.VALIDATION, 0, count).permutation(count)
    t = [
        (order[place] + float(draws.uniforms((), 0, Stream.VALIDATION, 1, image))) / count
        for place, image in enumerate(images)
    ]
    noise, posterior = (
        torch.stack([draws.normal(shape, 0, Stream.VALIDATION, what, image) for image in images]) for what in (2, 3)
    )
    return torch.tensor(t, dtype=torch.float32), noise, posterior


@pytest.mark.parametrize(("num", "images"), [(None, range(12)), (5, [0, 1, 5, 6, 10]), (13, range(12))])
def test_what_a_validation_is_made_of_belongs_to_the_image_alone(num, images):
    dataset = Numbered(np.arange(12) % 3)
    shape, count = (2, 4, 4), len(images)
    samples = ValidationSamples(dataset, shape, TimeSampling(), posterior=True, num=num)
    t, noise, posterior = expected_batch(images, count, shape)
    batch, bad = samples.__getitems__(range(count))
    assert not bad
    assert batch["image"].flatten().tolist() == list(images)
    assert batch["label"].tolist() == [image % 3 for image in images]
    torch.testing.assert_close(batch["t"], t)
    assert torch.equal(batch["noise"], noise)
    assert torch.equal(batch["posterior"], posterior)
    assert sorted((batch["t"] * count).int().tolist()) == list(range(count))  # one in every part
    for place in (0, count - 1):  # in a batch of another size, too
        alone = samples.__getitems__([place])[0]
        assert all(torch.equal(value[0], batch[key][place]) for key, value in alone.items())


@pytest.mark.parametrize("labels", [np.arange(2000) % 10, np.repeat(np.arange(10), 200)])
def test_images_of_a_validation_are_evenly_spread_over_the_classes_in_turn_or_one_after_the_other(labels):
    chosen = ValidationSamples(Numbered(labels), (1, 1, 1), TimeSampling(), num=100).images
    assert np.bincount(labels[chosen]).tolist() == [10] * 10
    for label in range(10):
        assert np.flatnonzero(labels == label).tolist()[::20] == chosen[labels[chosen] == label].tolist()


def test_times_are_those_of_the_recipe_and_of_no_class():
    time = TimeSampling((0.0, 0.999), "logit-normal", 0.5, 1.0, 2.0)
    dataset = Numbered(np.repeat([0, 1, 2], 500))
    samples = ValidationSamples(dataset, (1, 1, 1), time)
    even = time((torch.arange(15_000) + 0.5) / 15_000)  # the distribution, written out
    assert abs(samples.t.mean() - even.mean()) < 1e-3
    assert torch.quantile(samples.t, 0.9) == pytest.approx(float(torch.quantile(even, 0.9)), abs=2e-3)
    for label in range(3):
        assert abs(samples.t[dataset.labels == label].mean() - even.mean()) < 0.05


def test_unreadable_images_are_told_of_and_leave_the_others_as_they_are():
    dataset = Numbered(np.arange(12) % 3)
    whole = ValidationSamples(dataset, (1, 1, 1), TimeSampling()).__getitems__(range(12))[0]
    samples = ValidationSamples(Numbered(dataset.labels, bad=(4, 7)), (1, 1, 1), TimeSampling())
    batch, bad = samples.__getitems__(range(12))
    assert bad == {4: "image 4 is bad", 7: "image 7 is bad"}
    rest = [place for place in range(12) if place not in bad]
    assert all(torch.equal(batch[key][rest], whole[key][rest]) for key in whole)
    assert samples.__getitems__([4, 7])[0]["image"].shape == (2, 1, 1, 1)


def test_a_plan_says_how_many_are_held_out_and_counts_epochs_without_them(image_folder, recipe_file):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8, "num_images": 12, "held_out": 0.25}
    path = recipe_file(data=data, validation={"every": 4})
    plan = " ".join(dry_run(load_recipe(path)).split())
    assert "12 images, 3 held out, in 3 classes: a, b, c" in plan
    assert "steps per epoch 1.1 (global batch 8)" in plan
    assert "validation every 4 steps, of 3 held-out images" in plan
    with pytest.raises(InputError, match=r"data.num_images: the recipe says 9, data and codec say 12"):
        dry_run(load_recipe(path, ["data.num_images=9"]))  # it is of all images
    for stated, number in ((2, 2), (4, 3)):
        assert f"of {number} held-out" in dry_run(load_recipe(path, [f"validation.num={stated}"]))


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"data": {"held_out": 0.6}}, "data.held_out=0.6: must be over 0 and at most 0.5"),
        ({"data": {"held_out": 0}}, "data.held_out=0.0: must be over 0"),
        ({"validation": {"every": 5}}, "validation.every=5 is of held-out images, and there are none: state data.held"),
        ({"data": {"kind": "hf", "root": "x", "image_size": 8, "streaming": True, "held_out": 0.1}},
         "data.held_out=0.1 needs to reach every image; leave data.streaming out"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_out_or_validated_is_refused(stated, says):
    with pytest.raises(InputError, match=says):
        make_recipe({"run": {"out": "x"}, **stated})


def test_a_model_that_has_learnt_what_a_run_holds_out_is_told_of(capsys):
    for stored, share, told in (
        ({}, 0.1, "null"), ({"held_out": None}, 0.1, "null"), ({"held_out": 0.2}, 0.1, "0.2"),
        ({"held_out": 0.1}, 0.1, None), ({"held_out": 0.2}, None, None), ({}, None, None), (None, 0.1, None),
    ):  # fmt: skip
        tell_of_share("distill.teacher='x'", {"recipe": {"data": stored}} if stored is not None else {}, share)
        said = capsys.readouterr().err
        assert said.startswith(f"warning: distill.teacher='x' was trained with data.held_out={told}, and") == bool(told)
        assert bool(said) == bool(told)


def test_digits_hold_out_some_of_their_training_images(tmp_path):
    train, held_out = split(open_dataset(Data()), 0.1)
    assert isinstance(held_out, Part)
    assert (len(train), len(held_out)) == (1437 - 139, 139)
    assert np.bincount(held_out.labels).min() >= 13
