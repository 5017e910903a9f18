"""Images and labels. A dataset gives item `(index, flip)` as an image (C, H, W) and a label.

What needs torch loads when it is used: files of images are read without it.
"""

from typing import TYPE_CHECKING

from sit_atconv.runtime.lazy import lazily

if TYPE_CHECKING:
    from sit_atconv.data.datasets import DATASETS, open_dataset
    from sit_atconv.data.kinds import IMAGE_KEYS, describe_images

__all__ = ["DATASETS", "IMAGE_KEYS", "describe_images", "open_dataset"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "DATASETS": "sit_atconv.data.datasets",
        "open_dataset": "sit_atconv.data.datasets",
        "IMAGE_KEYS": "sit_atconv.data.kinds",
        "describe_images": "sit_atconv.data.kinds",
    },
)
