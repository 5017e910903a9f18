"""From files to tensors: crops, the scale, digits, the uint8 rule, and bytes that are no image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sampled import decode
from sklearn.datasets import load_digits
from torchvision.datasets.folder import IMG_EXTENSIONS as OF_TORCHVISION

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import IMG_EXTENSIONS, Packed, Reader, Unreadable, center_crop, in_range, is_image
from sit_atconv.runtime.pictures import NotFinite, to_uint8


def encoded(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


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
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(NotFinite, match="not finite: no uint8 made"):
            to_uint8(torch.tensor([0.0, value, 0.0]))


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


def test_decode_gives_the_levels_and_flips_left_to_right():
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, 3], array[5, :, 2] = (100, 50, 7), 255
    image = decode(encoded(array), 16, False, "x")
    assert image.shape == (3, 16, 16)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))
    assert torch.equal(decode(encoded(array), 16, True, "x"), image.flip(2))


ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_levels_come_into_range_to_the_same_bit_on_every_device(device):
    levels = np.arange(256, dtype=np.uint8)
    expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert (levels.astype(np.float32) * (np.float32(1) / np.float32(127.5)) - 1 != expected).any()  # as by a reciprocal
    found = in_range(torch.from_numpy(levels).to(device))
    assert found.dtype == torch.float32
    assert found.cpu().numpy().tobytes() == expected.tobytes()
    assert to_uint8(found).tolist() == levels.tolist()
    for other in (found, found.half()):  # digits, and moments of a cache
        assert in_range(other) is other


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (255, 255, 255)).convert("L" if mode == "I;16" else mode).convert(mode).save(
        file, "TIFF"
    )
    assert decode(file.getvalue(), 16, False, "x").shape == (3, 16, 16)


def test_bytes_that_are_no_image_are_named_whatever_is_wrong_with_them():
    array = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    for whole in (encoded(array), encoded(array, "JPEG"), encoded(array, "WEBP"), encoded(array, "BMP")):
        with pytest.raises(Unreadable, match=r"image 'a/b' does not decode \(.+\); repair or remove it") as error:
            decode(whole[: len(whole) // 2], 16, False, "a/b")
        assert error.value.every_rank
    for nothing in (b"", b"no image", bytes(100)):
        with pytest.raises(Unreadable, match=r"no known format"):
            decode(nothing, 16, False, "a/b")
    with pytest.raises(Unreadable, match="1 x 5000 pixels"):
        decode(encoded(np.zeros((5000, 1, 3), np.uint8)), 16, False, "a/b")


@pytest.mark.filterwarnings("ignore")
def test_damage_never_raises_anything_else():
    random = np.random.default_rng(1)
    array = random.integers(0, 256, (24, 20, 3), np.uint8)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        whole = np.frombuffer(encoded(array, format), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[random.integers(0, min(len(whole), 400), 5)] = random.integers(0, 256, 5)
            try:
                assert decode(damaged.tobytes(), 16, False, "x").shape == (3, 16, 16)
            except Unreadable:
                continue


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("cat/a.png", True), ("/cat/b/a.JPEG", True), ("cat/a.txt", False), ("cat/.a.png", False),
        (".cat/a.png", False), ("__MACOSX/cat/a.png", False), ("cat/../a.png", False), ("cat.png/", False),
    ],
)  # fmt: skip
def test_what_counts_as_an_image(path, counts):
    assert is_image(path) == counts


def test_packed_strings_are_the_strings():
    items = [b"", b"abc", b"\0", b"d\0", b""]
    packed = Packed(iter(items))
    assert [packed[index] for index in range(len(packed))] == items
    assert len(Packed([])) == 0


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(format):
    array = np.arange(0, 65536, 1024, np.uint16).repeat(64).reshape(64, 64)
    pixels = decode(encoded(array, format), 64, False, "x").float()
    expected = torch.from_numpy(np.rint(array / 257)).float()
    assert pixels.shape == (3, 64, 64)
    assert all(torch.equal(channel.round(), expected) for channel in pixels)


@pytest.mark.parametrize("form", ["TIFF of high bytes first", "PGM"])
def test_sixteen_bits_of_grey_in_rarer_forms(form):
    array = np.full((16, 16), 40_000, ">u2")
    file = io.BytesIO(b"P5 16 16 65535\n" + array.tobytes())
    if form != "PGM":
        file = io.BytesIO()
        Image.frombytes("I;16B", (16, 16), array.tobytes()).save(file, "TIFF")
    pixels = decode(file.getvalue(), 16, False, "x").float()
    assert pixels.round().eq(156).all()  # 40,000 / 257 = 155.6


@pytest.mark.filterwarnings("error")
def test_a_palette_whose_transparency_is_left_out_gives_its_colors_and_no_warning():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    for transparency in (bytes([255, 7]), 1):
        file = io.BytesIO()
        image.save(file, "PNG", transparency=transparency)
        reader = Reader(background=None)
        pixels = decode(file.getvalue(), 8, False, "x", reader).float()
        assert torch.equal(pixels[:, 4, 4].round(), torch.tensor([200.0, 100.0, 50.0]))
        assert not reader.transparent


@pytest.mark.parametrize(("dtype", "words"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_numbers_without_a_white_are_refused(dtype, words):
    with pytest.raises(Unreadable, match=f"its pixels are {words}, which have no white"):
        decode(encoded(np.ones((8, 8), dtype), "TIFF"), 8, False, "x")


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "1"])
def test_every_mode_becomes_three_channels_whose_transparency_is_left_out(mode):
    color = (200, 200, 200) if mode in ("LA", "1") else (200, 100, 50)
    image = Image.new("RGB", (8, 8), color)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    if "A" in mode:
        image.putalpha(7)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    pixels = decode(file.getvalue(), 8, False, "x", Reader(background=None))[:, 4, 4].float()
    expected = (255, 255, 255) if mode == "1" else color
    assert (pixels - torch.tensor(expected)).abs().max() <= 2


def test_files_that_count_as_images_are_those_of_torchvision():
    assert set(IMG_EXTENSIONS) == set(OF_TORCHVISION)
