"""What a sample is made of, which process makes it, and what comes in the place of what cannot be read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampled import item, sampled
from torch.utils.data import Dataset

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import Unreadable
from sit_atconv.data.order import MAX_ATTEMPTS
from sit_atconv.data.samples import RankPositions, TrainingSamples
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError


def samples(dataset=None, **options) -> TrainingSamples:
    return sampled(dataset or Digits(), (1, 8, 8), 6, seed=3, **options)


class Numbers(Dataset):
    """Image i is full of the number i, of class i modulo 4; some cannot be read."""

    channels, image_size, moments, class_names = 1, 2, False, tuple("abcd")

    def __init__(self, count: int = 20, bad: tuple[int, ...] = ()):
        self.labels, self.bad = np.arange(count) % 4, bad

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key):
        index, _ = key
        if index in self.bad:
            raise Unreadable(f"image {index} is bad")
        return torch.full((1, 2, 2), float(index)), int(self.labels[index])


def numbers(batch) -> list[int]:
    return batch["image"][:, 0, 0, 0].int().tolist()


def test_an_item_is_what_its_draws_say():
    stream = samples(flip=True, drop=0.4, posterior=True, flow={"time_sampling": "logit-normal"})
    order = draws.generator(3, Stream.ORDER, 0).permutation(1437)
    batch, bad = stream.fetch(range(100, 150))
    assert bad == {}
    for place, position in enumerate(range(100, 150)):
        index = divmod(position, 6)
        flip = draws.uniforms((), 3, Stream.FLIP, *index) < 0.5
        image, label = Digits()[order[position], flip]
        assert torch.equal(batch["image"][place], image)
        assert batch["label"][place] == (10 if draws.uniforms((), 3, Stream.LABEL_DROP, *index) < 0.4 else label)
        t = stream.time(draws.uniforms((1,), 3, Stream.TIME, *index))
        torch.testing.assert_close(batch["t"][place], t[0], atol=1e-7, rtol=0)
        assert torch.equal(batch["noise"][place], draws.normal((1, 8, 8), 3, Stream.NOISE, *index))
        assert torch.equal(batch["posterior"][place], draws.normal((1, 8, 8), 3, Stream.POSTERIOR, *index))
    assert {key: value.dtype for key, value in batch.items()} == {
        "image": torch.float32, "label": torch.int64, "t": torch.float32, "noise": torch.float32,
        "posterior": torch.float32,
    }  # fmt: skip


def test_an_item_is_the_same_in_a_batch_of_any_size():
    options = {"flip": True, "drop": 0.3, "flow": {"time_sampling": "logit-normal", "time_shift": 2.0}}
    whole, _ = samples(**options).fetch(range(37))
    assert whole["label"].eq(10).any()
    for size in (1, 3, 36):
        parts = [samples(**options).fetch(range(first, min(first + size, 37)))[0] for first in range(0, 37, size)]
        for key, value in whole.items():
            assert torch.equal(torch.cat([part[key] for part in parts]), value)
    alone = item(samples(**options), 36)
    assert all(torch.equal(alone[key], value[36]) for key, value in whole.items())
    assert len(whole["t"].unique()) == 37
    assert len(whole["noise"].sum((1, 2, 3)).unique()) == 37


def test_draws_have_their_shares():
    stream = samples(flip=True, drop=0.25)
    batch, _ = stream.fetch(range(1400))
    plain, _ = samples().fetch(range(1400))
    flipped = (batch["image"] != plain["image"]).flatten(1).any(1)
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.05)
    assert (batch["label"] == 10).float().mean() == pytest.approx(0.25, abs=0.04)
    assert (batch["label"] == plain["label"])[batch["label"] != 10].all()
    assert not (plain["label"] == 10).any()
    assert "posterior" not in plain


def test_balanced_samples_are():
    batch, _ = samples(Numbers(), sampling="balanced").fetch(range(4 * 30))
    assert (batch["label"].reshape(-1, 4).sort(1).values == torch.arange(4)).all()
    assert torch.tensor(numbers(batch)).bincount().eq(6).all()
    with pytest.raises(InputError, match="no image is of class"):
        samples(Numbers(3), sampling="balanced")


def test_a_substitute_is_the_first_that_reads_of_those_drawn_for_the_sample():
    bad = tuple(range(3, 17))
    batch, found = samples(Numbers(bad=bad)).fetch(range(40))
    plain, _ = samples(Numbers()).fetch(range(40))
    for position, (index, number) in enumerate(zip(numbers(plain), numbers(batch), strict=True)):
        attempt = 0
        while index in bad:
            index = draws.generator(3, Stream.SUBSTITUTE, *divmod(position, 6), attempt).integers(20)
            attempt += 1
        assert number == index
        assert batch["label"][position] == index % 4
    assert found == {index: f"image {index} is bad" for index in bad}
    assert all(torch.equal(batch[key], plain[key]) for key in ("t", "noise"))
    assert numbers({"image": item(samples(Numbers(bad=bad)), 39)["image"][None]}) == numbers(batch)[39:]


def test_a_balanced_substitute_is_of_the_same_class_if_one_reads():
    batch, found = samples(Numbers(bad=(0, 4, 8, 12)), sampling="balanced").fetch(range(80))
    plain, _ = samples(Numbers(), sampling="balanced").fetch(range(80))
    assert torch.equal(batch["label"], plain["label"])
    assert found.keys() == {0, 4, 8, 12}
    batch, _ = samples(Numbers(bad=(0, 4, 8, 12, 16)), sampling="balanced").fetch(range(8))
    assert set(batch["label"].tolist()) == {1, 2, 3}


def test_a_dataset_that_does_not_read_at_all_is_an_error_that_says_what_was_bad():
    error, found = samples(Numbers(bad=tuple(range(20)))).fetch([0, 1])
    assert isinstance(error, InputError)
    assert not isinstance(error, Unreadable)
    assert error.every_rank
    assert str(error).startswith(f"{MAX_ATTEMPTS} images in a row cannot be read, at last: image ")
    assert found.keys() == set(range(20))
    with pytest.raises(InputError, match="in a row"):
        item(samples(Numbers(bad=tuple(range(20)))), 0)


class Gone(Numbers):
    def __getitem__(self, key):
        raise InputError("it is gone", every_rank=True)


def test_a_dataset_that_is_gone_has_no_substitutes():
    error, found = samples(Gone()).fetch([0])
    assert str(error) == "it is gone"
    assert found == {}


class Sequence(Numbers):
    """Positions in order, each with the number of its position; what is bad is counted by another number."""

    in_order, labels = True, None

    def __init__(self, bad: tuple[int, ...] = ()):
        self.bad, self.seed = bad, None

    def shuffled(self, seed: int):
        other = Sequence(self.bad)
        other.seed = seed
        return other

    def __len__(self) -> int:
        return 10

    def __getitem__(self, key):
        position, _ = key
        if position in self.bad:
            raise Unreadable("bad", image=1000 + position % 10)
        return torch.full((1, 2, 2), float(position)), 0


def test_a_stream_is_asked_for_positions_and_what_follows_a_bad_one():
    stream = samples(Sequence(bad=(3, 4, 9, 10, 20)))
    batch, found = stream.fetch(range(12))
    assert stream.dataset.seed == 3
    assert numbers(batch) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 11, 11, 11]
    assert found == {1003: "bad", 1004: "bad", 1009: "bad", 1000: "bad"}


class Cached(Numbers):
    """Moments in place of images, and the images besides."""

    moments = True

    def __getitem__(self, key):
        index, flip = key
        return torch.full((2, 1, 1), index + 0.5 * flip, dtype=torch.float16), int(self.labels[index])

    def pixels(self, index, flip):
        if index in self.bad:
            raise Unreadable(f"image {index} is bad")
        return torch.full((1, 3, 3), index + 0.5 * flip)


def test_the_image_comes_besides_its_moments_where_it_is_wanted():
    batch, found = samples(Cached(bad=(5,)), flip=True, with_image=True).fetch(range(20))
    assert batch["image"].dtype == torch.float16
    assert torch.equal(batch["image"][:, 0, 0, 0].float(), batch["pixels"][:, 0, 0, 0])
    assert batch["pixels"].shape == (20, 1, 3, 3)
    assert found == {5: "image 5 is bad"}
    assert 5 not in batch["pixels"][:, 0, 0, 0].long()
    batch, found = samples(Cached(bad=(5,))).fetch(range(20))
    assert "pixels" not in batch
    assert found == {}
    assert "pixels" not in item(samples(with_image=True), 0)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_processes_and_micro_batches_share_out_every_global_batch(start, steps, world, accumulation, micro):
    batch_size = world * accumulation * micro
    ranks = [list(RankPositions(start, start + steps, batch_size, rank, world, accumulation)) for rank in range(world)]
    assert all(len(part) == micro for rank in ranks for part in rank)
    for step in range(steps):
        parts = slice(step * accumulation, (step + 1) * accumulation)
        seen = [position for rank in ranks for part in rank[parts] for position in part]
        first = (start + step) * batch_size
        assert sorted(seen) == list(range(first, first + batch_size))
    assert all(
        len(RankPositions(start, start + steps, batch_size, 0, world, accumulation)) == len(rank) for rank in ranks
    )
