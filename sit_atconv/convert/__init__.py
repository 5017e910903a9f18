"""Other people's checkpoints <-> ours, by Python or `python -m sit_atconv.convert`."""

from sit_atconv.convert.public import Converted, convert, export_public, load_public, read_public

__all__ = ["Converted", "convert", "export_public", "load_public", "read_public"]
