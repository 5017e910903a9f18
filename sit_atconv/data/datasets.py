"""Every dataset that a recipe can name: images, and the latents that were made of them."""

from collections.abc import Callable

from torch.utils.data import Dataset

from sit_atconv.config import Data
from sit_atconv.data.kinds import IMAGES
from sit_atconv.data.latent_cache import LatentCache


def _latents(data: Data) -> LatentCache:
    cache = LatentCache(data.root, data.verify, data.source, data.max_pixels)
    cache.check_stated(data)
    return cache


DATASETS: dict[str, Callable[[Data], Dataset]] = {**IMAGES, "latents": _latents}


def open_dataset(data: Data) -> Dataset:
    """The training images that a recipe names.

    An item (index, flip) is an image (C, H, W) and its label. The image is uint8, which `images.in_range` takes to
    [-1, 1]: a quarter of the bytes on the way to the device. Digits, whose 17 levels are no bytes, are fp32 in [-1, 1].
    A dataset has `channels`, `image_size`, `class_names`, `labels` (int64, of every image), `len`, and `moments`:
    whether it gives an autoencoder's moments in place of images. An item raises Unreadable where its image cannot be
    read, InputError where the dataset is gone. One with `in_order` takes positions for indices, has no labels, and
    gives itself in another order by `shuffled(seed)`.
    Raises InputError when the images are not there.
    """
    return DATASETS[data.kind](data)
