"""Other people's checkpoints <-> ours, by Python or `sit-atconv convert`."""

from typing import TYPE_CHECKING

from sit_atconv.runtime.lazy import lazily

if TYPE_CHECKING:
    from sit_atconv.convert.public import Converted, load_public, read_public
    from sit_atconv.convert.writing import convert, export_public

__all__ = ["Converted", "convert", "export_public", "load_public", "read_public"]

__getattr__, __dir__ = lazily(
    __name__,
    dict.fromkeys(("Converted", "load_public", "read_public"), "sit_atconv.convert.public")
    | dict.fromkeys(("convert", "export_public"), "sit_atconv.convert.writing"),
)
