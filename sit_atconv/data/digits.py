"""The embedded images: scikit-learn's handwritten digits."""

import functools

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from sit_atconv.data.images import center_crop, with_channels


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, 17 grey levels: a fixed stratified 80/20 split.

    split: "train" (1,437 images) or "test" (360). channels: 1 (None too), or 3 of the same. Items are fp32 in [-1, 1].
    """

    image_size = 8
    moments = False
    class_names = tuple("0123456789")

    def __init__(self, split: str = "train", channels: int | None = None):
        images, labels = _split(split)
        self.channels = channels or 1
        grey = torch.from_numpy(images).float().unsqueeze(1) / 8 - 1
        self.images = grey.repeat(1, self.channels, 1, 1)
        self.labels = labels.copy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        return self.images[index].flip(2) if flip else self.images[index], int(self.labels[index])

    def picture(self, index: int, size: int | None = None) -> tuple[Image.Image, int]:
        """As of every kind."""
        image = Image.fromarray(((self.images[index, 0] + 1) * 127.5).round().byte().numpy())
        image = with_channels(image, self.channels)
        return (image if size is None else center_crop(image, size)), int(self.labels[index])


@functools.cache
def _split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8) in 0 to 16 and labels (N,) of a split; never changed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    chosen = np.sort({"train": train, "test": test}[split])
    return digits.images[chosen], digits.target[chosen]
