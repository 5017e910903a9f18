"""The kinds of images, by their names in a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sit_atconv.config import Data
from sit_atconv.data.archive import Zip
from sit_atconv.data.arrays import Npz
from sit_atconv.data.database import Lmdb
from sit_atconv.data.digits import Digits
from sit_atconv.data.folder import Folder
from sit_atconv.data.hub import open_hub
from sit_atconv.data.images import Reader
from sit_atconv.runtime.errors import check_choice
from sit_atconv.runtime.reading import spelt

# Of a recipe's section `data`: which images there are, and how they are read.
IMAGE_KEYS = (
    "kind", "root", "image_size", "split", "subset", "revision", "image_key", "label_key", "channels", "background",
)  # fmt: skip

IMAGES: dict[str, Callable[[Data], Dataset]] = {
    "digits": lambda data: Digits("train", data.channels),
    "imagefolder": lambda data: Folder(data.root, data.image_size, Reader.of(data)),
    "zip": lambda data: Zip(data.root, data.image_size, Reader.of(data)),
    "lmdb": lambda data: Lmdb(data.root, data.image_size, Reader.of(data)),
    "hf": open_hub,
    "npz": lambda data: Npz(data.root, data.image_size, data.channels, data.max_pixels),
}


def open_images(data: Data) -> Dataset:
    """The images that a recipe names, see `data.open_dataset`. Raises InputError when they are not there."""
    check_choice("data.kind", data.kind, IMAGES)
    return IMAGES[data.kind](data)


def describe_images(data: Data) -> dict[str, Any]:
    """What is recorded of the images that something was made from: IMAGE_KEYS, but for those that are left out."""
    stated = {key: getattr(data, key) for key in IMAGE_KEYS if getattr(data, key) is not None}
    if "root" in stated and Path(stated["root"]).exists():  # else it is the name of a dataset
        stated["root"] = spelt(str(Path(stated["root"]).absolute()))
    return stated
