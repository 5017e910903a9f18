"""Images and labels. A dataset gives item `(index, flip)` as an image (C, H, W) in [-1, 1] and a label."""

from collections.abc import Callable

from torch.utils.data import Dataset

from sit_atconv.config import Data
from sit_atconv.data.archive import Zip
from sit_atconv.data.database import Lmdb
from sit_atconv.data.digits import Digits
from sit_atconv.data.folder import Folder
from sit_atconv.data.hub import open_hub


def _latents(data: Data) -> Dataset:
    from sit_atconv.data.latent_cache import LatentCache  # which opens the images it is of: it imports this module

    return LatentCache(data.root, data.verify, data.image_size, data.source)


DATASETS: dict[str, Callable[[Data], Dataset]] = {
    "digits": lambda data: Digits("train"),
    "imagefolder": lambda data: Folder(data.root, data.image_size),
    "zip": lambda data: Zip(data.root, data.image_size),
    "lmdb": lambda data: Lmdb(data.root, data.image_size),
    "hf": open_hub,
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
    dataset = DATASETS[data.kind](data)
    dataset.max_pixels = data.max_pixels
    return dataset
