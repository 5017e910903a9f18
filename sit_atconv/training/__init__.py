"""Training: the loop, and what keeps it going."""

from sit_atconv.training.loop import train

__all__ = ["train"]
