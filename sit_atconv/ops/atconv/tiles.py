"""The size of what one program of a Triton kernel works on. No Triton here: it exists on few platforms."""

from dataclasses import dataclass

import torch

from sit_atconv.runtime.errors import InputError


@dataclass(frozen=True)
class Tile:
    """`rows` x `cols` positions and `line_bytes` bytes of their channels, worked on by `warps` warps of 32 threads.

    cols, line_bytes and warps are powers of two, line_bytes 4 at least. Raises InputError for others.
    """

    rows: int
    cols: int
    line_bytes: int
    warps: int

    def __post_init__(self):
        for name, least, power in (("rows", 1, False), ("cols", 1, True), ("line_bytes", 4, True), ("warps", 1, True)):
            value = getattr(self, name)
            if value < least or (power and value & (value - 1)):
                rule = f"a power of two, {least} or more" if power else f"{least} or more"
                raise InputError(f"{name}={value} of a tile: give {rule}")

    def channels(self, dtype: torch.dtype) -> int:
        """How many channels a line holds."""
        return self.line_bytes // dtype.itemsize
