"""From an image file to the tensor that a codec takes: RGB, ADM's centre crop, [-1, 1]. What all file formats share."""

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from sit_atconv.config import Loading
from sit_atconv.errors import InputError
from sit_atconv.reading import spelt

# What Pillow raises over bytes of any kind.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # of the others Pillow hands some to other programs
MOST_BYTES = 1 << 28  # of an image file
OF_16_BITS = ("PNG", "PPM")  # at most, though Pillow may hold them in 32
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
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        image.close()
        raise ValueError(f"{size} pixels, and no more than {max_pixels:,} are decoded")
    return image


def decode(encoded: bytes, size: int, flip: bool, name: str, max_pixels: int = Loading.max_pixels) -> torch.Tensor:
    """An image file's bytes -> (3, size, size) in [-1, 1]. Raises Unreadable, which says `name`."""
    pixels = np.array(picture(encoded, name, lambda image: center_crop(image, size), max_pixels))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    return tensor.flip(2) if flip else tensor


def picture(
    encoded: bytes,
    name: str,
    work: Callable[[Image.Image], Image.Image] = Image.Image.copy,
    max_pixels: int = Loading.max_pixels,
) -> Image.Image:
    """An image file's bytes -> `work` of the RGB image. Raises Unreadable, which says `name`.

    max_pixels: as a recipe's data.max_pixels.
    """
    try:
        with open_image(encoded, max_pixels) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels")
            return work(_rgb(image))
    except UnidentifiedImageError:
        raise Unreadable(
            f"image {name!r} does not decode (no known format: {', '.join(FORMATS)}); repair or remove it"
        ) from None
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise Unreadable(f"image {name!r} does not decode ({reason}); repair or remove it") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; of 16-bit grey the upper ones, rounded. Transparency is left out.

    Pillow's own conversion would cut all that is over 255 off. Raises ValueError for numbers without a range.
    """
    image.info.pop("transparency", None)  # about which Pillow would warn, in every process
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in OF_16_BITS):
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floats'}, which have no white")
    return image.convert("RGB")


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


def check_label(label: int | None, class_names: Sequence[str], name: str) -> None:
    """Raise Unreadable, which says `name`, for a label that is no class: len(class_names) would be the null class."""
    if label is None or not 0 <= label < len(class_names):
        raise Unreadable(
            f"image {name!r} has the label {label}, and there are {len(class_names)} classes, from 0 on; correct it"
        )


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


class EncodedImages(Dataset):
    """Images that lie as image files somewhere; a subclass reads the bytes. Items (index, flip) -> (image, label).

    labels: the class of every image, int64 (N,). max_pixels: as a recipe's data.max_pixels.
    """

    channels = 3
    max_pixels = Loading.max_pixels
    moments = False
    labels: np.ndarray

    def __init__(self, image_size: int, class_names: Iterable[str]):
        self.image_size, self.class_names = image_size, tuple(map(spelt, class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytes, int]:
        """An image file's bytes, and the label. Raises Unreadable."""
        raise NotImplementedError

    def _labelled(self, index: int) -> tuple[bytes, int]:
        encoded, label = self.encoded(index)
        check_label(label, self.class_names, self.name(index))
        return encoded, label

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        encoded, label = self._labelled(index)
        return decode(encoded, self.image_size, flip, self.name(index), self.max_pixels), label

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """The whole image in RGB, and the label. Raises Unreadable."""
        encoded, label = self._labelled(index)
        return picture(encoded, self.name(index), max_pixels=self.max_pixels), label


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
