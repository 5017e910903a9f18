"""Image classification with AttNet and other timm models: recipe, augmented samples, training and evaluation."""

from typing import TYPE_CHECKING

from sit_atconv.runtime.lazy import lazily

if TYPE_CHECKING:
    from sit_atconv.classification.loop import train

__all__ = ["train"]

__getattr__, __dir__ = lazily(__name__, {"train": "sit_atconv.classification.loop"})
