"""One reader of images: an odd image is the same pixels, or refused in the same words, wherever it is read."""

import importlib.util
import io
import re
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sit_atconv.classification.recipe import Data as ClassifierData
from sit_atconv.classification.samples import open_datasets
from sit_atconv.config import Data
from sit_atconv.data import open_dataset
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring.sources import open_source

_spec = importlib.util.spec_from_file_location("kinds", Path(__file__).with_name("kinds.py"))
kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kinds)

SIZE = 8
RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (SIZE, SIZE), np.uint8)
ALPHA = RANDOM.integers(0, 256, (SIZE, SIZE), np.uint8)
ALPHA[0, :2] = 0, 255
DEEP_GREY = RANDOM.integers(0, 1 << 16, (SIZE, SIZE), np.uint16)
DEEP = RANDOM.integers(0, 1 << 16, (SIZE, SIZE, 3), np.uint16)
PALETTE = RANDOM.integers(0, 256, (4, 3), np.uint8)
INDEX = RANDOM.integers(0, 4, (SIZE, SIZE), np.uint8)
CMYK = RANDOM.integers(0, 256, (SIZE, SIZE, 4), np.uint8)


def file(array: np.ndarray | Image.Image, format: str = "PNG", mode: str | None = None, **options) -> bytes:
    if mode is not None:
        array = Image.frombytes(mode, (SIZE, SIZE), array.tobytes())
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(rows: np.ndarray, bits: int, color: int, clear: tuple[int, ...] = (), side: int = SIZE) -> bytes:
    """A PNG by hand, of packed rows (H, bytes): what Pillow does not write. clear: the tRNS chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, color, 0, 0, 0))
    key = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) if clear else b""
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def paletted() -> Image.Image:
    image = Image.frombytes("P", (SIZE, SIZE), INDEX.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(levels)[..., None], 3, 2)


def cmyk() -> np.ndarray:
    light = 255 - CMYK[..., 3:].astype(float)
    return np.clip(light - np.rint(CMYK[..., :3] * light / 255), 0, 255)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEG = file(RGB, "JPEG")
TEXT = PngInfo()
TEXT.add_text("transparency", "none")
PACKED = (INDEX.reshape(SIZE, 2, 4) << np.array([6, 4, 2, 0])).sum(2).astype(np.uint8)  # in 2 bits each
CLEAR_COLOR = RGB.copy()
CLEAR_COLOR[2:4] = 10, 20, 30
CLEAR_DEEP = DEEP.copy()
CLEAR_DEEP[2:4] = 0x0AFF, 0x1401, 0x1E80  # whose lower bytes are the upper ones of the pixel below
CLEAR_DEEP[5, 5] = 0xFF00, 0x0100, 0x8000

# By name: the file, and its colours (H, W, 3) with their opacity, or what it is refused with.
ODD: dict[str, tuple[bytes, np.ndarray, np.ndarray | int] | tuple[bytes, str]] = {
    "RGB PNG": (file(RGB), RGB, 255),
    "RGB BMP": (file(RGB, "BMP"), RGB, 255),
    "RGB PPM": (file(RGB, "PPM"), RGB, 255),
    "RGB TIFF": (file(RGB, "TIFF"), RGB, 255),
    "grey PNG": (file(GREY), grey(GREY), 255),
    "1 bit": (file(Image.fromarray(GREY > 99)), grey(np.where(GREY > 99, 255, 0)), 255),
    "palette": (file(paletted()), PALETTE[INDEX], 255),
    "CMYK": (file(CMYK, "TIFF", "CMYK"), cmyk(), 255),
    "16-bit grey": (file(DEEP_GREY), grey(np.rint(DEEP_GREY / 257)), 255),
    "16-bit grey TIFF": (file(DEEP_GREY, "TIFF"), grey(np.rint(DEEP_GREY / 257)), 255),
    "16-bit RGB": (png(DEEP.astype(">u2"), 16, 2), DEEP >> 8, 255),
    "JPEG": (JPEG, np.array(Image.open(io.BytesIO(JPEG))), 255),
    "JPEG to be turned": (file(RGB, "JPEG", exif=rotated()), np.array(Image.open(io.BytesIO(JPEG))), 255),
    "PNG to be turned": (file(RGB, exif=rotated()), RGB, 255),
    "animated PNG": (file(RGB, save_all=True, append_images=[Image.fromarray(RGB[::-1])]), RGB, 255),
    "animated GIF": (file(paletted(), "GIF", save_all=True, append_images=[Image.fromarray(RGB)]), PALETTE[INDEX], 255),
    "RGBA": (file(np.dstack([RGB, ALPHA])), RGB, ALPHA),
    "RGBA, opaque": (file(np.dstack([RGB, np.full_like(ALPHA, 255)])), RGB, 255),
    "RGBA WebP": (file(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), RGB, ALPHA),
    "RGBA TIFF": (file(np.dstack([RGB, ALPHA]), "TIFF"), RGB, ALPHA),
    "16-bit RGBA": (
        png(np.dstack([DEEP, ALPHA.astype(np.uint16) << 8]).astype(">u2"), 16, 6), DEEP >> 8, ALPHA,
    ),
    "LA": (file(np.dstack([GREY, ALPHA]), mode="LA"), grey(GREY), ALPHA),
    "palette, an alpha each": (
        file(paletted(), transparency=bytes([0, 100, 200, 255])), PALETTE[INDEX], np.array([0, 100, 200, 255])[INDEX],
    ),
    "palette, one clear": (file(paletted(), transparency=2), PALETTE[INDEX], np.where(INDEX == 2, 0, 255)),
    "GIF, one clear": (file(paletted(), "GIF", transparency=2), PALETTE[INDEX], np.where(INDEX == 2, 0, 255)),
    "grey, one level clear": (
        png(GREY, 8, 0, (int(GREY[3, 3]),)), grey(GREY), np.where(GREY[3, 3] == GREY, 0, 255),
    ),
    "grey of 2 bits, one level clear": (png(PACKED, 2, 0, (2,)), grey(INDEX * 85), np.where(INDEX == 2, 0, 255)),
    "16-bit grey, one level clear": (
        png(DEEP_GREY.astype(">u2"), 16, 0, (int(DEEP_GREY[1, 1]),)), grey(np.rint(DEEP_GREY / 257)),
        np.where(DEEP_GREY[1, 1] == DEEP_GREY, 0, 255),
    ),
    "RGB, one colour clear": (
        png(CLEAR_COLOR, 8, 2, (10, 20, 30)), CLEAR_COLOR, np.where((CLEAR_COLOR == (10, 20, 30)).all(2), 0, 255),
    ),
    "16-bit RGB, one colour clear": (
        png(CLEAR_DEEP.astype(">u2"), 16, 2, (0x0AFF, 0x1401, 0x1E80)), CLEAR_DEEP >> 8,
        np.where((CLEAR_DEEP == (0x0AFF, 0x1401, 0x1E80)).all(2), 0, 255),
    ),
    "a text named transparency": (file(DEEP_GREY, pnginfo=TEXT), grey(np.rint(DEEP_GREY / 257)), 255),
    "32-bit integers": (file(np.ones((8, 8), np.int32), "TIFF"), "its pixels are 32-bit integers, which have no white"),
    "floats": (file(np.ones((8, 8), np.float32), "TIFF"), "its pixels are floats, which have no white"),
    "truncated PNG": (file(RGB)[:-40], "image file is truncated|broken PNG|Truncated"),
    "truncated JPEG": (JPEG[:-40], "truncated"),
    "empty": (b"", "no known format: PNG, JPEG, WEBP, BMP, PPM, TIFF, GIF"),
    "text": (b"no image", "no known format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "no known format"),
    "JPEG 2000": (file(RGB, "JPEG2000"), "no known format"),
    "too large": (png(np.zeros((1, 1), np.uint8), 1, 0, side=9500), "9500 x 9500 pixels, and no more than 89,478,485"),
    "a line": (file(np.zeros((5000, 1, 3), np.uint8)), "1 x 5000 pixels"),
}  # fmt: skip
NAMES = list(ODD)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The odd images as every kind of data, each the only one of its class; by kind, the section `data`."""
    root = tmp_path_factory.mktemp("odd")
    folder, records = root / "folder", []
    for number, name in enumerate(NAMES):
        (folder / f"{number:02d}").mkdir(parents=True)
        (folder / f"{number:02d}" / "0.png").write_bytes(ODD[name][0])
        records.append((ODD[name][0], number))
    lmdb = kinds.write_lmdb(root / "lmdb", records)
    table = {"image": [{"bytes": content, "path": None} for content, _ in records], "label": [*range(len(records))]}
    label = datasets.ClassLabel(names=[f"{number:02d}" for number in range(len(records))])
    table = datasets.Dataset.from_dict(table, datasets.Features(image=datasets.Image(), label=label))
    (root / "parquet").mkdir()
    table.to_parquet(root / "parquet" / "train.parquet")
    stream = {"streaming": True, "shuffle_buffer": 1, "num_images": len(records)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        datasets.disable_progress_bars()
        yield {
            "imagefolder": {"kind": "imagefolder", "root": str(folder)},
            "zip": {"kind": "zip", "root": shutil.make_archive(str(root / "a"), "zip", folder)},
            "lmdb": {"kind": "lmdb", "root": str(lmdb)},
            "hf": {"kind": "hf", "root": str(root / "parquet")},
            "stream": {"kind": "hf", "root": str(root / "parquet"), **stream},
        }


def pixels_of(image: Image.Image | torch.Tensor) -> np.ndarray:
    """(H, W, C)"""
    if isinstance(image, torch.Tensor):
        return image.permute(1, 2, 0).numpy()
    return np.array(image).reshape(image.height, image.width, -1)


# Each opens a place, and gives a function from the number of an image to its pixels (H, W, C), C 1 or 3.


def train(place: dict, folder: Path, **options):
    """As training, encoding and likelihood read it."""
    dataset = open_dataset(Data(image_size=SIZE, **place, **options))

    def read(number: int) -> np.ndarray:
        image, label = dataset[number, False]
        assert label == number
        return pixels_of(image)

    return read


def classify(place: dict, folder: Path, **options):
    held_out = {"val_root": place["root"], "val_split": "train" if place["kind"] == "hf" else None}
    dataset = open_datasets(ClassifierData(**place, **held_out, **options))[1]

    def read(number: int) -> np.ndarray:
        image, label = dataset.picture(number)
        assert label == number
        return pixels_of(image)

    return read


def score_recipe(place: dict, folder: Path, **options):
    """As `build-ref RECIPE` and `score --ref RECIPE` read it."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"image_size": SIZE, **place, **options}}))
    source = open_source(recipe)
    assert source.labels.tolist() == list(range(len(NAMES)))
    return lambda number: pixels_of(next(source.batches(number, number + 1))[0])


def score_as_it_lies(manifest: bool):
    def opened(place: dict, folder: Path):
        def read(number: int) -> np.ndarray:
            (folder / f"{number}").mkdir()
            for index in range(2):
                (folder / f"{number}" / f"{index}.png").write_bytes(ODD[NAMES[number]][0])
            if manifest:
                (folder / f"{number}" / "manifest.json").write_text('{"num": 2, "labels": null}')
            image, other = next(open_source(folder / f"{number}", allow_lossy=True).batches())
            assert torch.equal(image, other)
            return pixels_of(image)

        return read

    return opened


OF_RECIPES = {
    **{f"{kind}, trained on": (kind, train) for kind in ("imagefolder", "zip", "lmdb", "hf", "stream")},
    **{f"{kind}, classified": (kind, classify) for kind in ("imagefolder", "hf")},
    **{f"{kind}, scored": (kind, score_recipe) for kind in ("imagefolder", "zip", "lmdb", "hf")},
}
READERS = OF_RECIPES | {
    "folder as it lies, scored": ("imagefolder", score_as_it_lies(manifest=False)),
    "samples, scored": ("imagefolder", score_as_it_lies(manifest=True)),
}


@pytest.fixture(scope="module")
def reading(places, tmp_path_factory):
    """reading(reader, **options) gives what reads an image by number; each is opened once."""

    @cache
    def opened(reader: str, **options):
        kind, opener = READERS[reader]
        return opener(places[kind], tmp_path_factory.mktemp("scored"), **options)

    return opened


def on(background: tuple[int, int, int], colors: np.ndarray, alpha: np.ndarray | int) -> np.ndarray:
    """Colours over a background, to the nearest level."""
    alpha = np.broadcast_to(alpha, colors.shape[:2])[..., None].astype(float)
    return np.rint((colors * alpha + np.array(background) * (255 - alpha)) / 255)


def answer(read, number: int) -> np.ndarray | str:
    """The pixels of an image as RGB, or why it is refused."""
    try:
        pixels = read(number)
    except InputError as error:
        return re.fullmatch(r"image '.*' does not decode \((.*)\); repair or remove it", str(error))[1]
    assert pixels.shape in ((SIZE, SIZE, 3), (SIZE, SIZE, 1))
    return np.broadcast_to(pixels, (SIZE, SIZE, 3))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_an_odd_image_the_same_answer(reader, reading):
    read = reading(reader)
    for number, name in enumerate(NAMES):
        found, wanted = answer(read, number), ODD[name][1:]
        if isinstance(wanted[0], str):
            assert isinstance(found, str), name
            assert re.search(wanted[0], found), name
        else:
            assert np.array_equal(found, on((255, 255, 255), *wanted)), name


@pytest.mark.parametrize("reader", OF_RECIPES)
def test_every_kind_honours_channels_and_background(reader, reading):
    for channels, background, color in ((3, "#336699", (0x33, 0x66, 0x99)), (1, "red", (255, 0, 0)), (1, None, None)):
        read = reading(reader, channels=channels, background=background)
        for name in ("RGBA", "LA", "palette, an alpha each", "16-bit grey, one level clear", "CMYK", "grey PNG"):
            _, colors, alpha = ODD[name]
            expected = colors if color is None else on(color, colors, alpha)
            if channels == 1:  # ITU-R 601's luma
                expected = np.rint(expected @ np.array([0.299, 0.587, 0.114]))[..., None]
            difference = np.abs(read(NAMES.index(name)).astype(float) - expected)
            assert difference.shape == (SIZE, SIZE, channels)
            assert difference.max() <= (channels == 1), name  # which Pillow has to 16 bits


def test_what_was_read_is_recorded(places, tmp_path):
    def described(*names: str, allow_lossy: bool = True) -> dict:
        folder = tmp_path / "+".join(names)
        folder.mkdir()
        for index, name in enumerate(names):
            (folder / f"{index}.png").write_bytes(ODD[name][0])
        return open_source(folder, allow_lossy).describe()

    for names, lossy, background in (
        (("RGB PNG", "RGB TIFF", "RGB PPM"), False, None),
        (("RGB PNG", "RGBA, opaque"), False, None),
        (("RGB PNG", "RGBA"), False, "white"),
        (("LA", "grey, one level clear"), False, "white"),
        (("RGB PNG", "JPEG"), True, None),
    ):
        about = described(*names)
        assert (about["lossy"], about.get("background")) == (lossy, background)
        assert "data" not in about
    with pytest.raises(InputError, match="is JPEG, which moves the scores"):
        described("RGB BMP", "JPEG", allow_lossy=False)
    (tmp_path / "tiff").mkdir()
    for index, compression in enumerate(("jpeg", "tiff_lzw")):
        (tmp_path / "tiff" / f"{index}.tiff").write_bytes(file(RGB, "TIFF", compression=compression))
    assert open_source(tmp_path / "tiff", allow_lossy=True).describe()["lossy"] is True
    with pytest.raises(InputError, match="is TIFF, which moves the scores"):
        open_source(tmp_path / "tiff")


def test_a_record_that_is_none_ends_scoring_by_name(tmp_path):
    records = [(ODD["RGB PNG"][0], 0), (ODD["RGB PNG"][0], "1"), (ODD["RGB PNG"][0], 0)]
    place = {"kind": "lmdb", "root": str(kinds.write_lmdb(tmp_path / "lmdb", records)), "image_size": SIZE}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": place}))
    with pytest.raises(InputError, match=r"lmdb:1' cannot be read \(its label is '1'"):
        open_source(tmp_path / "recipe.yaml")
