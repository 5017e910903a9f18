"""From an image file to pixels, and to the tensor that a codec takes: ADM's centre crop, grey levels, and what they are
in [-1, 1]. What all kinds of datasets share. Torch loads with the first tensor, not before."""

from __future__ import annotations

import importlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from sit_atconv.config import Loading
from sit_atconv.runtime.bounded import read_bytes
from sit_atconv.runtime.claims import SETTINGS
from sit_atconv.runtime.errors import InputError, reason, said
from sit_atconv.runtime.reading import spelt

if TYPE_CHECKING:
    import torch

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
# What Pillow raises over bytes of any kind.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # of the others Pillow hands some to other programs
MOST_BYTES = 1 << 28  # of an image file
LOSSLESS, LOSSY_TIFF = ("PNG", "BMP", "PPM", "TIFF", "GIF"), ("jpeg", "tiff_jpeg", "webp")
OF_16_BITS = ("PNG", "PPM")  # at most, though Pillow may hold them in 32
GREY, ALPHA = ("1", "L", "LA"), ("LA", "PA", "RGBA", "RGBa")  # modes of Pillow
ONE_CLASS = ("all",)  # where there are no labels
FEATURES = "features"  # the folder of features in a folder of images
MOST_CLASSES = 1 << 20  # that are told by number alone
MAX_ASPECT = 200  # a line of pixels, scaled until its short side is that of the crop, would fill the memory


class Unreadable(InputError):
    """One image of a dataset cannot be read; others may. image: what to count it by, where its index is no name."""

    def __init__(self, message: str, image: int | None = None):
        super().__init__(message, every_rank=True)
        self.image = image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size: halve with a box filter while possible, scale bicubically, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_image(
    file: bytes | BinaryIO, max_pixels: int = Loading.max_pixels, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """An image of one of these formats, not yet decoded. Every image comes through here.

    Raises one of DAMAGED for what is none of them, or has more pixels than its header may say.
    """
    image = Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=formats)
    try:
        check_size(image.width, image.height, max_pixels)
    except ValueError:
        image.close()
        raise
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ValueError for an image of more pixels, or of one that is a line."""
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, and no more than {max_pixels:,} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels")


@dataclass
class Reader:
    """The one way from an image file to pixels, whatever they are for.

    channels: 1, grey; 3, RGB; None, whichever of the two the file has. background: the colour that transparent images
    are composited on, None leaves their transparency out. max_pixels: of a larger image nothing is decoded.

    16 bits become 8: of grey rounded, of colours the upper ones. Of an animation the first image counts. What EXIF says
    of the orientation is not followed.
    lossy: the format of an image that was read and that may have lost something, None where there was none.
    transparent: whether an image that was read was composited.
    """

    channels: int | None = 3
    background: str | None = Loading.background
    max_pixels: int = Loading.max_pixels
    lossy: str | None = field(default=None, init=False)
    transparent: bool = field(default=False, init=False)

    @classmethod
    def of(cls, data: Loading) -> Reader:
        """As a recipe's section `data` says."""
        return cls(data.channels or 3, data.background, data.max_pixels)

    def __call__(self, encoded: bytes, name: str, size: int | None = None) -> Image.Image:
        """An image file's bytes -> the image, of mode L or RGB, its centre size x size where that is given.

        Raises Unreadable, which says `name`.
        """
        try:
            with open_image(encoded, self.max_pixels) as file:
                if file.format not in LOSSLESS or file.info.get("compression") in LOSSY_TIFF:
                    self.lossy = file.format
                image = self._opaque(_of_8_bits(file, encoded))
                return image if size is None else center_crop(image, size)
        except UnidentifiedImageError:
            raise Unreadable(
                f"image {name!r} does not decode (no known format: {', '.join(FORMATS)}); repair or remove it"
            ) from None
        except DAMAGED as error:
            raise Unreadable(f"image {name!r} does not decode ({said(error)}); repair or remove it") from None

    def _opaque(self, image: Image.Image) -> Image.Image:
        """Grey or RGB, of an image of 8 bits."""
        grey = image.mode in GREY
        if self.background is not None and (image.mode in ALPHA or "transparency" in image.info):
            clear = image if image.mode == "RGBA" else image.convert("RGBA")
            if clear.getchannel("A").getextrema()[0] < 255:
                self.transparent = True
                image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), clear)
        image.info.pop("transparency", None)  # about which Pillow would warn, in every process
        return with_channels(image.convert("L" if grey and self.channels != 3 else "RGB"), self.channels)


def _of_8_bits(file: Image.Image, encoded: bytes) -> Image.Image:
    """The image in 8 bits, and so the one colour that a PNG may call transparent: Pillow leaves that as it is stored.

    Pillow's own conversion of 16 bits of grey would cut all that is over 255 off. Raises ValueError for numbers without
    a range.
    """
    if isinstance(file.info.get("transparency"), str):  # a text of that name, as a PNG may hold
        del file.info["transparency"]
    key = file.info.get("transparency")
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in OF_16_BITS):
        levels = np.asarray(file)
        image = Image.fromarray(np.rint(levels.astype(np.float32) / 257).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray((levels != key).astype(np.uint8) * 255))
        return image
    if file.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'32-bit integers' if file.mode == 'I' else 'floats'}, which have no white")
    if key is not None and file.format == "PNG" and file.mode in ("L", "RGB"):
        bits = encoded[24]
        levels = [level >> 8 if bits == 16 else level * (255 // ((1 << bits) - 1)) for level in np.atleast_1d(key)]
        file.info["transparency"] = tuple(levels) if file.mode == "RGB" else levels[0]
    return file


def with_channels(image: Image.Image, channels: int | None) -> Image.Image:
    """A grey or RGB image in so many channels: 1, 3, or None for those that it has."""
    mode = {1: "L", 3: "RGB", None: image.mode}[channels]
    return image if image.mode == mode else image.convert(mode)


def read_image(path: str) -> bytes:
    """The bytes of an image file. Raises Unreadable for what is no file, is not there, or is larger than MOST_BYTES."""
    try:
        return read_bytes(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise Unreadable(f"image {path!r} cannot be read ({reason(error)}); bring it back") from None


def is_image(path: str) -> bool:
    """Whether a path below a dataset's root counts as an image: by its suffix, and hidden at no level."""
    return path.lower().endswith(IMG_EXTENSIONS) and not any(map(is_hidden, path.split("/")))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's image or class."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(root: str | Path) -> Iterator[str]:
    """The paths of all images below `root`, with `root` in front, by name: what `is_image` says, hidden ones left out.

    Links are followed, but not to a folder that they lie in. What is no file (a FIFO, a broken link) is among them: who
    reads it names it. Raises OSError for a folder that cannot be read.
    """
    folders = [(os.fspath(root), ())]
    while folders:
        folder, above = folders.pop()
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in above:
            continue
        above = (*above, (place.st_dev, place.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    if not is_hidden(entry.name):
                        folders.append((entry.path, above))
                elif is_image(entry.name):
                    yield entry.path


def in_folders(root: str | Path) -> bool:
    """Whether images lie in folders below `root`, as those of classes do. Raises OSError as `image_files`."""
    return any(os.path.dirname(file) != os.fspath(root) for file in image_files(root))


def is_work(folder: str | Path) -> bool:
    """Whether a folder has features of images and none of these: earlier versions put it among folders of classes."""
    named = os.path.basename(folder) == FEATURES
    return named and any(Path(folder).glob(f"*/{SETTINGS}")) and not any(image_files(folder))


def check_labels(where: str, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raise InputError, beginning with `where`, where one of the labels (N,) of all images is none of the classes."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise InputError(
            f"{where}: image {wrong[0]} has the label {labels[wrong[0]]} ({len(wrong):,} images have such), and there "
            f"are {len(class_names)} classes, from 0 on; correct the labels, or leave those images out"
        )


def check_classes(where: str, folders: Iterable[str], filled: Iterable[str]) -> None:
    """Raise InputError, beginning with `where`, unless there are class folders and each is among the filled ones."""
    empty = sorted(set(folders) - set(filled))
    if not set(filled):
        raise InputError(f"{where} holds no images in folders; put those of a class into a folder of its name")
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise InputError(
            f"{where}: no image in the class folder {', '.join(map(repr, empty[:3]))}{more}; remove it, or bring its "
            f"images ({', '.join(IMG_EXTENSIONS)})"
        )


def of_extra(package: str, kind: str) -> ModuleType:
    """A package that the extra `data` brings. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"data.kind={kind} needs a package: pip install 'sit_atconv[data]'") from None


def to_tensor(image: Image.Image, flip: bool) -> torch.Tensor:
    """A grey or RGB image -> its levels, uint8 (C, H, W), mirrored where `flip`."""
    import torch

    pixels = np.array(image)
    tensor = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    return tensor.flip(2) if flip else tensor


def in_range(images: torch.Tensor) -> torch.Tensor:
    """Levels, uint8 of any shape -> level / 127.5 - 1, fp32 in [-1, 1], where they are; other images as they are.

    Every device gives the same bits. The divisor is a tensor, since CUDA multiplies by the reciprocal of a number.
    """
    import torch

    if images.dtype != torch.uint8:
        return images
    levels = images.float()
    return levels.div_(levels.new_full((), 127.5)).sub_(1)


def decode(encoded: bytes, size: int, flip: bool, name: str, reader: Reader | None = None) -> torch.Tensor:
    """An image file's bytes -> levels (C, size, size), by default of RGB. Raises Unreadable, which says `name`."""
    return to_tensor((reader or Reader())(encoded, name, size), flip)


class Images:
    """Images by index, each of a class: a dataset of torch's, which asks for `len` and items alone. Items
    (index, flip) -> (image (C, size, size), label): levels, uint8, see `in_range`.

    labels: the class of every image, int64 (N,), but of a stream, which has neither these nor an index. A subclass
    gives the images.
    """

    channels: int
    moments = False
    labels: np.ndarray

    def __init__(self, image_size: int, class_names: Iterable[str]):
        self.image_size, self.class_names = image_size, tuple(map(spelt, class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        raise NotImplementedError

    def picture(self, index: int, size: int | None = None) -> tuple[Image.Image, int]:
        """The image, grey or RGB, its centre size x size where that is given, and the label. Raises Unreadable."""
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        image, label = self.picture(index, self.image_size)
        return to_tensor(image, flip), label


class EncodedImages(Images):
    """Images that lie as image files somewhere; a subclass reads the bytes. reader: by default that of RGB."""

    def __init__(self, image_size: int, class_names: Iterable[str], reader: Reader | None):
        super().__init__(image_size, class_names)
        self.reader = reader or Reader()
        self.channels = self.reader.channels

    def encoded(self, index: int) -> tuple[bytes, int]:
        """An image file's bytes, and the label. Raises Unreadable."""
        raise NotImplementedError

    def picture(self, index: int, size: int | None = None) -> tuple[Image.Image, int]:
        (encoded, label), name, classes = self.encoded(index), self.name(index), len(self.class_names)
        if label is None or not 0 <= label < classes:  # which would be that of the null class, or of none
            raise Unreadable(
                f"image {name!r} has the label {label}, and there are {classes} classes, from 0 on; correct it"
            )
        return self.reader(encoded, name, size), label


class Packed:
    """Byte strings by index, in two arrays: a list of a million of them weighs on every loader process."""

    def __init__(self, items: Iterable[bytes]):
        items = list(items)
        self._ends = np.cumsum([0, *map(len, items)])
        self._bytes = np.frombuffer(b"".join(items), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
