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
        _check(self, rows=(1, False), cols=(1, True), line_bytes=(4, True), warps=(1, True))

    def channels(self, dtype: torch.dtype) -> int:
        """How many channels a line holds."""
        return self.line_bytes // dtype.itemsize


@dataclass(frozen=True)
class TapTile:
    """`channels` channels of all taps, worked on by `warps` warps of 32 threads, sample after sample.

    stages: samples that are on their way from memory at once. programs: how many share out the samples at most; there
    is one for each line of channels at least. channels and warps are powers of two, channels 16 at least. Raises
    InputError for others.
    """

    channels: int
    warps: int
    stages: int
    programs: int

    def __post_init__(self):
        _check(self, channels=(16, True), warps=(1, True), stages=(1, False), programs=(1, False))


def _check(tile: Tile | TapTile, **rules: tuple[int, bool]) -> None:
    """rules: by name, the least value, and whether it is a power of two."""
    for name, (least, power) in rules.items():
        value = getattr(tile, name)
        if value < least or (power and value & (value - 1)):
            rule = f"a power of two, {least} or more" if power else f"{least} or more"
            raise InputError(f"{name}={value} of a tile: give {rule}")
