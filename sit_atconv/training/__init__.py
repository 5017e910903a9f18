"""Training: the loop, its objectives, and what keeps it going."""

from typing import TYPE_CHECKING

from sit_atconv.runtime.lazy import lazily

if TYPE_CHECKING:
    from sit_atconv.training.loop import train

__all__ = ["train"]

__getattr__, __dir__ = lazily(__name__, {"train": "sit_atconv.training.loop"})
