"""Samples beside their nearest training images: what is found, what it is found in, what the page shows."""

import json

import numpy as np
import pytest
import torch
import yaml
from html_page import Page, picture
from PIL import Image

from sit_atconv.commands import parser_of
from sit_atconv.data.digits import Digits
from sit_atconv.report import nearest as module
from sit_atconv.report.nearest import nearest
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.scoring.sources import from_arrays


def pixels(seed, n, height=5, width=6, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def source_of(images):
    return from_arrays(torch.from_numpy(images).permute(0, 3, 1, 2))


def brute(samples, images):
    """(index, distance) of the nearest image of each sample, one difference after another."""
    found = []
    for sample in samples:
        squares = [int(((sample.astype(int) - image.astype(int)) ** 2).sum()) for image in images]
        found.append((int(np.argmin(squares)), min(squares) ** 0.5))
    return found


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_nearest_image_is_that_of_all_differences(monkeypatch, rows, channels):
    samples, images = pixels(0, 7, channels=channels), pixels(1, 23, channels=channels)
    monkeypatch.setattr(module, "BLOCK", 8 * rows * samples[0].size)
    found = nearest(samples, source_of(images))
    assert [(match.index, match.distance) for match in found] == brute(samples, images)
    assert all(np.array_equal(match.pixels, images[match.index]) and not match.mirrored for match in found)


def test_a_planted_image_is_found_at_distance_0_and_one_level_away_at_1():
    images = pixels(1, 30)
    samples = images[[17, 4]].copy()
    samples[1, 2, 3, 1] ^= 1
    found = nearest(samples, source_of(images))
    assert [(match.index, match.distance) for match in found] == [(17, 0.0), (4, 1.0)]


def test_of_images_as_near_the_first_counts(monkeypatch):
    images = np.concatenate([pixels(1, 9), pixels(2, 1), pixels(2, 1)])
    monkeypatch.setattr(module, "BLOCK", 8 * 3 * images[0].size)
    (match,) = nearest(pixels(2, 1), source_of(images))
    assert match.index == 9


def test_mirrored_images_count_where_training_mirrors_them():
    images = pixels(1, 9)
    sample = images[[5]][:, :, ::-1]
    (match,) = nearest(sample, source_of(images), mirrored=True)
    assert (match.index, match.distance, match.mirrored) == (5, 0.0, True)
    assert np.array_equal(match.pixels, sample[0])
    (match,) = nearest(images[[5]], source_of(images), mirrored=True)
    assert (match.index, match.distance, match.mirrored) == (5, 0.0, False)
    (match,) = nearest(sample, source_of(images))
    assert match.distance > 0


@pytest.fixture
def make(tmp_path):
    def write(*words):
        out = tmp_path / "out" / "report.html"
        args = parser_of("report", "report").parse_args([*map(str, words), "--out", str(out)])
        args.run(args)
        return Page(out.read_text())

    return write


def save(folder, images, labels=None):
    """Samples as `generate` writes them."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{index:06d}.png")
    manifest = {"num": len(images), "labels": labels}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run_of(folder, images, labels=None, **data):
    save(folder / "samples" / "x", images, labels)
    model = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 1}
    recipe = {"model": model, "data": {"kind": "digits", **data}, "train": {"max_steps": 1}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def digits(*indices):
    dataset = Digits()
    return np.stack([to_uint8(dataset[index, False][0]).permute(1, 2, 0).numpy() for index in indices])


def test_each_sample_stands_above_the_nearest_image_of_its_recipe(make, tmp_path):
    images = digits(7, 3, 1200)
    images[2, 0, 0, 0] += 30  # no longer a copy
    page = make(run_of(tmp_path / "a", images, [1, 0, 1]), "--nearest")
    assert [image["title"] for image in page.all("img")] == [
        "sample 1", "training image 3, distance 0", "sample 0", "training image 7, distance 0",
        "sample 2", "training image 1200, distance 30",
    ]  # fmt: skip
    shown = [np.asarray(picture(image)) for image in page.all("img")]
    for sample, near in zip(shown[::2], shown[1::2], strict=True):
        difference = sample.astype(int) - near
        assert np.abs(difference).max() in (0, 30)
    assert "the nearest of 1,437 training images of" in page.text
    assert "all 64 values, 0 to 255 each (L2). Least 0, median 0, greatest 30." in page.text
    assert "Copies of a training image: 2 of 3 (distance 0)." in page.text
    assert "mirror" not in page.text
    assert [each["role"] for each in page.all("div") if each.get("class") == "row pairs"] == ["group"] * 2


def test_without_being_asked_nothing_is_compared(make, tmp_path):
    page = make(run_of(tmp_path / "a", digits(7, 3)))
    assert len(page.all("img")) == 2
    assert "nearest" not in page.text


def test_training_images_may_be_given_and_mirrored_ones_count_by_the_recipe(make, tmp_path):
    images = pixels(1, 9, 8, 8)
    np.savez(tmp_path / "train.npz", arr_0=images)
    turned = images[[4, 2]][:, :, ::-1]
    run = run_of(tmp_path / "a", turned, flip=True)
    other = save(tmp_path / "b", turned)
    page = make(run, other, "--nearest-in", tmp_path / "train.npz")
    titles = [image["title"] for image in page.all("img") if image["title"].startswith("training")]
    assert titles[:2] == ["training image 4, mirrored, distance 0", "training image 2, mirrored, distance 0"]
    assert not any("mirrored" in title or title.endswith("distance 0") for title in titles[2:])
    assert "or of their mirror images, and its distance" in page.text


def test_samples_that_share_training_images_take_one_pass(make, tmp_path, monkeypatch):
    asked = []
    whole = module.nearest
    monkeypatch.setattr(module, "nearest", lambda samples, *rest: asked.append(len(samples)) or whole(samples, *rest))
    np.savez(tmp_path / "train.npz", arr_0=pixels(1, 9))
    first, second = save(tmp_path / "a", pixels(2, 3)), save(tmp_path / "b", pixels(3, 4))
    page = make(first, second, "--nearest-in", tmp_path / "train.npz")
    assert asked == [7]
    titles = [image["title"] for image in page.all("img")][1::2]
    expected = brute([*pixels(2, 3), *pixels(3, 4)], pixels(1, 9))
    assert [title.split(",")[0] for title in titles] == [f"training image {index}" for index, _ in expected]


def test_what_cannot_be_compared_is_said_before_the_work(make, tmp_path):
    np.savez(tmp_path / "train.npz", arr_0=pixels(1, 9))
    folder = save(tmp_path / "a", pixels(2, 3, 4, 4))
    with pytest.raises(InputError, match=r"RUN 'a' has no recipe.yaml, .*; give the training images with nearest_in"):
        make(folder, "--nearest")
    with pytest.raises(InputError, match=r"train.npz' have the shape \(3, 5, 6\) .* and the samples .*\(3, 4, 4\); "):
        make(folder, "--nearest-in", tmp_path / "train.npz")
    with pytest.raises(InputError, match="no such file or folder"):
        make(folder, "--nearest-in", tmp_path / "nowhere")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_text("train: {lr: 1}")
    with pytest.raises(InputError, match="no RUN has images of samples to compare; make samples first"):
        make(bare, "--nearest")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="not allowed with argument --nearest"):
        make(folder, "--nearest", "--nearest-in", tmp_path / "train.npz")


@pytest.mark.slow
def test_a_page_with_pairs_of_large_images_stays_under_two_megabytes(make, tmp_path):
    np.savez(tmp_path / "train.npz", arr_0=pixels(1, 80, 128, 128))
    folder = tmp_path / "a"
    folder.mkdir()
    labels = (np.arange(80) % 10).tolist()
    np.savez(folder / "samples.npz", arr_0=pixels(0, 80, 128, 128), arr_1=labels)
    (folder / "manifest.json").write_text(json.dumps({"num": 80, "labels": labels}))
    page = make(folder, "--nearest-in", tmp_path / "train.npz")
    assert len(page.all("img")) == 160
    assert len(page.source) < 2_000_000
