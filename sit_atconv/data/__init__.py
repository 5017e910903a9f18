"""Images and labels. A dataset gives item `(index, flip)` as an image (C, H, W) in [-1, 1] and a label."""

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
from sit_atconv.reading import spelt

# Of a recipe's section `data`: which images there are, and how they are read.
IMAGE_KEYS = (
    "kind", "root", "image_size", "split", "subset", "revision", "image_key", "label_key", "channels", "background",
)  # fmt: skip


def _latents(data: Data) -> Dataset:
    from sit_atconv.data.latent_cache import LatentCache  # which opens the images it is of: it imports this module

    cache = LatentCache(data.root, data.verify, data.image_size, data.source, data.max_pixels)
    cache.check_stated(data)
    return cache


DATASETS: dict[str, Callable[[Data], Dataset]] = {
    "digits": lambda data: Digits("train", data.channels),
    "imagefolder": lambda data: Folder(data.root, data.image_size, Reader.of(data)),
    "zip": lambda data: Zip(data.root, data.image_size, Reader.of(data)),
    "lmdb": lambda data: Lmdb(data.root, data.image_size, Reader.of(data)),
    "hf": open_hub,
    "npz": lambda data: Npz(data.root, data.image_size, data.channels, data.max_pixels),
    "latents": _latents,
}


def open_dataset(data: Data) -> Dataset:
    """The training images that a recipe names.

    A dataset has `channels`, `image_size`, `class_names`, `labels` (int64, of every image), `len`, and `moments`:
    whether it gives an autoencoder's moments in place of images. An item raises Unreadable where its image cannot be
    read, InputError where the dataset is gone. One with `in_order` takes positions for indices, has no labels, and
    gives itself in another order by `shuffled(seed)`.
    Raises InputError when the images are not there.
    """
    return DATASETS[data.kind](data)


def describe_images(data: Data) -> dict[str, Any]:
    """What is recorded of the images that something was made from: IMAGE_KEYS, but for those that are left out."""
    stated = {key: getattr(data, key) for key in IMAGE_KEYS if getattr(data, key) is not None}
    if "root" in stated and Path(stated["root"]).exists():  # else it is the name of a dataset
        stated["root"] = spelt(str(Path(stated["root"]).absolute()))
    return stated
