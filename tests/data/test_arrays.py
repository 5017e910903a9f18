"""An npz as a dataset: its images are those of the files that hold the same pixels."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sampled import sampled

from sit_atconv.config import Data
from sit_atconv.data import open_dataset
from sit_atconv.data.arrays import Npz
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import Reader
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import RankPositions
from sit_atconv.runtime.errors import InputError

SAVE = {"stored": np.savez, "compressed": np.savez_compressed}
CLASSES = [0, 2, 1, 2, 0]


@pytest.fixture(params=[(20, 30, 3), (24, 24, 1)], ids=["RGB", "grey"])
def pixels(request):
    return np.random.default_rng(0).integers(0, 256, (len(CLASSES), *request.param), np.uint8)


@pytest.fixture(params=SAVE)
def root(request, pixels, tmp_path):
    SAVE[request.param](tmp_path / "a.npz", arr_0=pixels, arr_1=np.array(CLASSES, np.uint8))
    return str(tmp_path / "a.npz")


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_it_is_the_folder_of_the_same_pixels(root, pixels, channels, tmp_path):
    for index, (image, label) in enumerate(zip(pixels, CLASSES, strict=True)):
        file = tmp_path / "folder" / str(label) / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(file)
    number = channels or pixels.shape[3]
    expected = Folder(str(tmp_path / "folder"), 16, Reader(number))
    places = np.argsort(CLASSES, kind="stable")  # a folder's images are in the order of classes
    dataset = open_dataset(Data("npz", root, 16, channels=channels))
    assert (dataset.channels, dataset.image_size, dataset.moments) == (number, 16, False)
    assert (len(dataset), dataset.class_names) == (5, expected.class_names)
    assert dataset.labels.tolist() == CLASSES
    assert dataset.labels.dtype == np.int64
    for place, index in enumerate(places.tolist()):
        for flip in (False, True):
            image, label = dataset[index, flip]
            assert torch.equal(image, expected[place, flip][0])
            assert (type(label), label) == (int, CLASSES[index])
        whole, label = dataset.picture(index)
        assert np.array_equal(np.array(whole), np.array(expected.picture(place)[0]))


def test_loader_processes_read_it_too(root):
    batches = []
    for workers in (0, 2):
        dataset = pickle.loads(pickle.dumps(open_dataset(Data("npz", root, 16))))
        samples = sampled(dataset, (dataset.channels, 2, 2), 3, seed=1, flip=True)
        batches.append(list(TrainingBatches(samples, RankPositions(0, 4, 3), Data(workers=workers))))
    assert len(batches[0]) == 4
    for plain, loaded in zip(*batches, strict=True):
        assert all(torch.equal(plain[key], loaded[key]) for key in plain)


def test_without_labels_it_is_one_class(pixels, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    dataset = Npz(str(tmp_path / "a.npz"), 16)
    assert (dataset.class_names, dataset.labels.tolist()) == (("all",), [0] * 5)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
        ({"arr_0": np.zeros((2, 1, 300, 3), np.uint8)}, "images of 300 x 1 pixels"),
        ({"arr_0": np.zeros((2, 40, 30, 3), np.uint8)}, "images of 30 x 40 pixels, and no more than 1,000"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([0, -1])}, "image 1 has the label -1"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([0, 2**63], np.uint64)},
            "image 1 has the label",
        ),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, "2 images but labels of shape"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "labels must be integers"),
    ],
)
def test_what_is_no_such_npz_is_refused(arrays, says, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=says) as error:
        open_dataset(Data("npz", str(tmp_path / "a.npz"), 4, max_pixels=1000))
    assert str(error.value).startswith("data.root=")


def test_an_npz_that_is_not_there_or_changes_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No such file"):
        Npz(str(tmp_path / "nowhere.npz"), 4)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((9, 40, 40, 3), np.uint8))
    dataset = Npz(str(tmp_path / "a.npz"), 4)
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    assert dataset[1, False][0].shape == (3, 4, 4)
    with pytest.raises(InputError, match="truncated or damaged"):
        dataset[8, False]
    np.savez_compressed(tmp_path / "b.npz", arr_0=np.zeros((9, 40, 40, 3), np.uint8))
    monkeypatch.setattr("sit_atconv.data.npz.MOST_BYTES", 9 * 40 * 40 * 3 - 1)
    with pytest.raises(InputError, match=r"takes 43,200 bytes, over 43,199; store it without compression"):
        Npz(str(tmp_path / "b.npz"), 4)
