"""Images, crops, the uint8 rule, and which process sees what."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from sit_atconv.data import Digits, Folder, RankPositions, TrainingSamples, center_crop, training_batches
from sit_atconv.errors import InputError
from sit_atconv.images import to_uint8


def samples(**options) -> TrainingSamples:
    return TrainingSamples(Digits(), **{"latent_shape": (1, 8, 8), "batch_size": 6, "seed": 3, **options})


def test_digits_are_scikit_learns_split_80_20_by_class():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.min() == -1
    assert train.images.max() == 1
    everything = {image.tobytes() for image in load_digits().images.astype(np.float32)}
    seen = [((images + 1) * 8).numpy().tobytes() for part in (train, test) for images in part.images]
    assert set(seen) == everything
    assert np.bincount(test.labels).min() >= 34
    assert torch.equal(Digits("train").images, train.images)


def test_uint8_rule():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_center_crop_keeps_the_middle_and_the_aspect():
    array = np.zeros((40, 100, 3), np.uint8)
    array[:, 30:70] = 255  # exactly the middle 40 x 40
    cropped = np.array(center_crop(Image.fromarray(array), 40))
    assert cropped.shape == (40, 40, 3)
    assert (cropped == 255).all()
    assert np.array(center_crop(Image.fromarray(array), 10))[2:8, 2:8].min() == 255
    assert np.array(center_crop(Image.fromarray(array.swapaxes(0, 1)), 10))[2:8, 2:8].min() == 255


def test_center_crop_halves_with_a_box_filter_first():
    # 4 x 4 blocks of a checkerboard average to grey under the box filter; bicubic alone would not be exact.
    array = (np.indices((64, 64)).sum(0) % 2 * 254).astype(np.uint8)
    cropped = np.array(center_crop(Image.fromarray(array), 16))
    assert (cropped == 127).all()


@pytest.mark.parametrize("size", [(33, 47), (16, 16), (17, 300), (500, 16)])
def test_center_crop_gives_the_size_asked_for(size):
    assert center_crop(Image.new("RGB", size), 16).size == (16, 16)


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index, size in enumerate(((20, 30), (64, 40))):
            Image.new("RGB", size, (100 * label, 50 * index, 7)).save(root / name / f"{index}.png")
    return root


def test_folder_reads_classes_in_order_and_scales_to_one(image_folder):
    dataset = Folder(str(image_folder), 16)
    assert (len(dataset), dataset.class_names) == (4, ("cat", "dog"))
    image, label = dataset[3, False]
    assert label == 1
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([100, 50, 7]) / 127.5 - 1)


def test_folder_flips_left_to_right(image_folder):
    gradient = np.tile(np.arange(16, dtype=np.uint8)[None, :, None], (16, 1, 3))
    Image.fromarray(gradient).save(image_folder / "cat" / "0.png")
    dataset = Folder(str(image_folder), 16)
    assert torch.equal(dataset[0, True][0], dataset[0, False][0].flip(-1))
    assert not torch.equal(dataset[0, True][0], dataset[0, False][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_also_from_a_worker(image_folder, workers):
    bad = image_folder / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    dataset = Folder(str(image_folder), 16)
    stream = TrainingSamples(dataset, (3, 16, 16), batch_size=4, seed=0)
    with pytest.raises(InputError, match=r"dog/1.png' does not decode") as error:
        list(training_batches(stream, RankPositions(0, 1, 4), workers, pin_memory=False))
    assert error.value.every_rank


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Folder(str(tmp_path / "nowhere"), 16)
    with pytest.raises(InputError, match=str(tmp_path)):
        Folder(str(tmp_path), 16)


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order():
    stream = samples()
    n = len(stream.dataset)
    first, second = ([stream.image_index(epoch * n + place) for place in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert samples().image_index(n + 5) == second[5]  # without having passed through the first epoch


def test_an_item_depends_on_step_and_sample_alone():
    in_order, late = samples(flip=True, drop=0.3, null_label=10), samples(flip=True, drop=0.3, null_label=10)
    items = [in_order[position] for position in range(30)]
    again = late[29]
    assert all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(items[29][key])) for key in again)
    assert len({float(item["t"]) for item in items}) == 30
    assert len({float(item["noise"].sum()) for item in items}) == 30


def test_draws_have_their_shares():
    stream = samples(flip=True, drop=0.25, null_label=10, posterior=True, latent_shape=(4, 2, 2))
    items = [stream[position] for position in range(2000)]
    originals = [stream.dataset[stream.image_index(position), False] for position in range(2000)]
    flipped = np.mean(
        [not torch.equal(item["image"], image) for item, (image, _) in zip(items, originals, strict=True)]
    )
    assert flipped == pytest.approx(0.5, abs=0.05)
    assert np.mean([item["label"] == 10 for item in items]) == pytest.approx(0.25, abs=0.04)
    kept = [(item["label"], label) for item, (_, label) in zip(items, originals, strict=True) if item["label"] != 10]
    assert all(now == before for now, before in kept)
    assert items[0]["posterior"].shape == items[0]["noise"].shape == (4, 2, 2)
    assert not torch.equal(items[0]["posterior"], items[0]["noise"])
    assert "posterior" not in samples()[0]
    assert not any(samples()[position]["label"] == 10 for position in range(50))


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


def test_workers_change_nothing():
    plain, loaded = (
        list(training_batches(samples(), RankPositions(0, 5, 6), workers, pin_memory=False)) for workers in (0, 2)
    )
    for a, b in zip(plain, loaded, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
