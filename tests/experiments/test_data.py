"""Installed data sets become image folders: every image in its class, whole or not at all, and nothing besides."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from experiments.data import CLASSES, main
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import Reader

NAMES = [f"{stem}-{kind}-ubyte.gz" for stem in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def idx(path, array, shape=None, kind=8):
    shape = array.shape if shape is None else shape
    head = struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def installed(tmp_path):
    """Two images of each class to train on, one to test by, in the files of the package."""
    folder, random = tmp_path / "installed", np.random.default_rng(0)
    folder.mkdir()
    parts = {}
    for stem, labels in (("train", [*range(9, -1, -1), *range(10)]), ("t10k", [*range(10)])):
        images, labels = random.integers(256, size=(len(labels), 28, 28), dtype=np.uint8), np.array(labels, np.uint8)
        idx(folder / f"{stem}-images-idx3-ubyte.gz", images)
        idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
        parts[stem] = images, labels
    return folder, parts


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_lies_in_its_class_and_is_what_it_was(installed, tmp_path, capsys):
    folder, parts = installed
    before = files(folder)
    main(["fashion-mnist", "--from", str(folder), "--out", str(tmp_path / "new" / "images")])
    assert "20 in " in capsys.readouterr().out
    for name, stem in (("train", "train"), ("test", "t10k")):
        dataset = Folder(str(tmp_path / "new" / "images" / name), 28, Reader(channels=1))
        assert dataset.class_names == CLASSES
        images, labels = parts[stem]
        assert len(dataset) == len(labels)
        for place in range(len(dataset)):
            number = int(dataset.name(place).rpartition("/")[2].removesuffix(".png"))
            image, label = dataset[place, False]
            assert np.array_equal(image[0].numpy(), images[number])
            assert label == labels[number]
    assert Image.open(next((tmp_path / "new/images/train").rglob("*.png"))).mode == "L"
    assert files(folder) == before


def test_what_is_there_already_is_never_overwritten(installed, tmp_path, fails):
    out = tmp_path / "images"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    arguments = ["fashion-mnist", "--from", installed[0], "--out", out]
    assert "exists already, and is a folder" in fails(main, *arguments)
    assert (out / "mine.txt").read_text() == "mine"
    main([*map(str, arguments), "--force"])
    assert (tmp_path / "images.aside" / "mine.txt").read_text() == "mine"
    assert len(files(out)) == 30


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / NAMES[0]).unlink(), "is not a file of dataset-fashion-mnist: No such file"),
        (lambda folder: shorten(folder / NAMES[0]), "is not a file of dataset-fashion-mnist"),
        (lambda folder: (folder / NAMES[1]).write_bytes(b"no archive"), "is not a file of dataset-fashion-mnist"),
        (lambda folder: idx(folder / NAMES[2], np.zeros((10, 28, 28), np.uint8), kind=13), "as bytes of 3 dimensions"),
        (lambda folder: idx(folder / NAMES[2], np.zeros((10, 28, 28), np.uint8), (11, 28, 28)), "it says 11 x 28 x 28"),
        (lambda folder: idx(folder / NAMES[2], np.zeros((10, 32, 32), np.uint8)), "images of the shape"),
        (lambda folder: idx(folder / NAMES[3], np.zeros(9, np.uint8)), "there are 9 labels"),
        (lambda folder: idx(folder / NAMES[3], np.full(10, 10, np.uint8)), "t10k has the label 10"),
    ],
)
def test_files_of_another_kind_are_refused_before_anything_is_written(installed, tmp_path, fails, spoil, says):
    folder, _ = installed
    spoil(folder)
    assert says in fails(main, "fashion-mnist", "--from", folder, "--out", tmp_path / "images")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installed"]


def test_a_folder_that_is_not_there_is_told_with_the_package(tmp_path, fails):
    said = fails(main, "fashion-mnist", "--from", tmp_path / "none", "--out", tmp_path / "images")
    assert "no such folder; install dataset-fashion-mnist, or say where its files lie" in said
