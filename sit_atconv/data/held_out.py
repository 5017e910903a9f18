"""The images of a dataset that training never sees: which they are, and both parts as datasets of their own."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import is_main


class Part(Dataset):
    """Some images of a dataset, in their order there: image i of it is image `indices[i]` of the whole.

    It has what every dataset has, see `data.open_dataset`, and of images their names and pictures.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices, self.labels = dataset, indices, dataset.labels[indices]
        self.channels, self.image_size, self.class_names = dataset.channels, dataset.image_size, dataset.class_names
        self.moments = dataset.moments

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, bool]) -> tuple:
        index, flip = key
        return self.dataset[int(self.indices[index]), flip]

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def picture(self, index: int, *size: int) -> tuple[Image.Image, int]:
        return self.dataset.picture(int(self.indices[index]), *size)

    def pixels(self, index: int, flip: bool) -> Any:
        return self.dataset.pixels(int(self.indices[index]), flip)


def is_held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Which images are held out, bool (N,), by their labels (N,) alone: of every class, in the order of its images,
    each at which `share` times the number of images so far reaches the next whole number.

    So it is every tenth of a class with 0.1. Images of no class (a negative label) are not held out.
    """
    found = np.zeros(len(labels), bool)
    order = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        reached = np.floor(np.arange(len(members) + 1) * share + 1e-9)  # 0.29 * 100 is a little under 29
        found[members] = np.diff(reached) > 0
    return found


def split(dataset: Dataset, share: float | None) -> tuple[Dataset, Part | None]:
    """The images to train on, and those held out, see `is_held_out`: all, and None, where the share is None.

    share: 0 to 0.5, without 0. A class without images has none in either part.
    Raises InputError where a class has too few images for one to be held out. With a half at most, one is always left.
    """
    if share is None:
        return dataset, None
    held_out = is_held_out(dataset.labels, share)
    counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=len(dataset.class_names))
    kept = np.bincount(dataset.labels[held_out], minlength=len(dataset.class_names))
    if len(empty := np.flatnonzero((counts > 0) & (kept == 0))):
        least = empty[np.argmin(counts[empty])]  # a share that does for it does for the others
        number = int(counts[least])
        more = f" (and {len(empty) - 1} more classes)" if len(empty) > 1 else ""
        enough = math.ceil(100 / number) / 100
        remedy = "give it more" if number < 2 else f"state {enough:g} or more, or give it more"
        raise InputError(
            f"data.held_out={share:g} holds out none of the {number} images of class "
            f"{dataset.class_names[least]!r}{more}; {remedy}"
        )
    return Part(dataset, np.flatnonzero(~held_out)), Part(dataset, np.flatnonzero(held_out))


def describe_parts(train: Dataset, held_out: Dataset | None) -> dict[str, Any]:
    """What a manifest says of a run's images: how many it trains on, their classes, and how many are held out."""
    counted = {} if held_out is None else {"held_out": len(held_out)}
    return {"num_images": len(train), "classes": list(train.class_names), **counted}


def tell_of_share(source: str, manifest: Mapping[str, Any], share: float | None) -> None:
    """Warn where a model that a run begins with, or learns from, was trained with another share held out than that of
    the run: of the same images, it has learnt some that are held out here.

    source: the setting that names the model. manifest: the model's; where it has no recipe, nobody knows.
    """
    stored = manifest.get("recipe")
    if share is None or not stored or (theirs := stored.get("data", {}).get("held_out")) == share or not is_main():
        return
    shown = "null" if theirs is None else f"{theirs:g}"
    say(
        f"warning: {source} was trained with data.held_out={shown}, and this run has data.held_out={share:g}: if the "
        "images are the same, it has learnt some that are held out here, and their loss is too low"
    )
