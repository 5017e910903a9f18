"""Image classification with AttNet and other timm models: recipe, augmented samples, training and evaluation."""

from sit_atconv.classification.loop import train

__all__ = ["train"]
