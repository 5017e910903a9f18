"""The embedded images: scikit-learn's handwritten digits."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, 17 grey levels: a fixed stratified 80/20 split.

    split: "train" (1,437 images) or "test" (360).
    """

    channels = 1
    image_size = 8
    moments = False
    class_names = tuple("0123456789")

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
        )
        chosen = np.sort({"train": train, "test": test}[split])
        self.images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 8 - 1
        self.labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        return self.images[index].flip(2) if flip else self.images[index], int(self.labels[index])

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """The digit as a grey image, and the label."""
        return Image.fromarray(((self.images[index, 0] + 1) * 127.5).round().byte().numpy()), int(self.labels[index])
