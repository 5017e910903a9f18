"""Adaptive average pooling and its transpose as Triton kernels; shapes as in `reference`.

Both are laid out for memory traffic, and not measured on a GPU yet: the pooling reads every token once (one between two
bins twice), the transpose writes it once. A program of the pooling owns one bin of one sample, or a split of it, and
one cache line of channels.
"""

from collections.abc import Sequence

import torch
import triton  # with these words: a bare `import triton` in an exported file is a requirement for diffusers
import triton.language as tl

from sit_atconv.ops.atconv.reference import sides
from sit_atconv.ops.atconv.tiles import Tile
from sit_atconv.ops.atconv.triton_launch import add, contiguous, splits_of

# rows x cols positions in raster order, `cols` of them in one load of a 128-bit access per thread; `rows` loads at a
# time hide the latency.
POOL_TILE = Tile(rows=4, cols=16, line_bytes=128, warps=4)
SPREAD_TILE = Tile(rows=4, cols=16, line_bytes=128, warps=4)


@triton.jit
def _start(index, size, BINS: tl.constexpr):
    """floor(index * size / BINS), in 32 bits: the product would not fit."""
    return index * (size // BINS) + index * (size % BINS) // BINS


@triton.jit
def _end(index, size, BINS: tl.constexpr):
    """ceil((index + 1) * size / BINS)."""
    return (index + 1) * (size // BINS) + ((index + 1) * (size % BINS) + BINS - 1) // BINS


@triton.jit(do_not_specialize=["height", "width", "splits", "tiles_per_split"])
def pool_kernel(
    x, pooled, height, width, splits, tiles_per_split,
    CHANNELS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, ONE_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """pooled (B, K, S, C): what each split of a bin adds to its mean. DOWN x ACROSS bins; ONE_ROW: height is 1."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    line = tl.program_id(0) // BLOCKS
    split = line % splits
    cell = line // splits % (DOWN * ACROSS)
    sample = (line // (splits * DOWN * ACROSS)).to(tl.int64)
    x += sample * height * width * CHANNELS
    top, left = _start(cell // ACROSS, height, DOWN), _start(cell % ACROSS, width, ACROSS)
    across = _end(cell % ACROSS, width, ACROSS) - left
    count = (_end(cell // ACROSS, height, DOWN) - top) * across

    sums = tl.zeros((COLS, BLOCK_C), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, tl.cdiv(count, ROWS * COLS))):
        start = tile * (ROWS * COLS)
        for r in tl.static_range(ROWS):
            step = (r * COLS + tl.arange(0, COLS))[:, None]
            inside = (step < count - start) & (c < CHANNELS)
            position = start + step
            token = left + position
            if not ONE_ROW:
                token = (top + position // across) * width + left + position % across
            sums += tl.load(x + token * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0, keep_dims=True), count.to(tl.float32))
    tl.store(pooled + line.to(tl.int64) * CHANNELS + c, mean.to(pooled.dtype.element_ty), mask=c < CHANNELS)


@triton.jit
def _first(position, size, BINS: tl.constexpr, CHANNELS: tl.constexpr):
    """The first bin that holds the position: floor(position * BINS / size).

    A sample has fewer than 2**31 values, so with CHANNELS >= BINS the product fits 32 bits; a division of 64 is slow.
    """
    if CHANNELS >= BINS:
        return position * BINS // size
    else:
        return (position.to(tl.int64) * BINS // size).to(tl.int32)


@triton.jit(do_not_specialize=["height", "width"])
def spread_kernel(
    g, spread, height, width,
    CHANNELS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, ONE_ROW: tl.constexpr,
    DEEP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of positions: the sum over the bins that hold it, DEEP x WIDE at most, of g (B, K, C) / their length."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    tiles = tl.cdiv(height * width, ROWS * COLS)
    sample = (tl.program_id(0) // BLOCKS // tiles).to(tl.int64)
    start = tl.program_id(0) // BLOCKS % tiles * (ROWS * COLS)
    g += sample * (DOWN * ACROSS * CHANNELS)
    spread += sample * height * width * CHANNELS
    for r in tl.static_range(ROWS):
        step = (r * COLS + tl.arange(0, COLS))[:, None]
        inside = (step < height * width - start) & (c < CHANNELS)
        position = start + step
        if ONE_ROW:
            row, column = tl.zeros_like(position), position
        else:
            row, column = position // width, position % width
        above, before = _first(row, height, DOWN, CHANNELS), _first(column, width, ACROSS, CHANNELS)
        sums = tl.zeros((COLS, BLOCK_C), tl.float32)
        for i in tl.static_range(DEEP):
            for j in tl.static_range(WIDE):
                top, left = _start(above + i, height, DOWN), _start(before + j, width, ACROSS)
                holds = (above + i < DOWN) & (before + j < ACROSS) & (top <= row) & (left <= column)
                down, across = _end(above + i, height, DOWN) - top, _end(before + j, width, ACROSS) - left
                bin = (above + i) * ACROSS + before + j
                value = tl.load(g + bin * CHANNELS + c, mask=inside & holds, other=0.0).to(tl.float32)
                sums += value * (1.0 / (down * across))
        tl.store(spread + position * CHANNELS + c, sums.to(spread.dtype.element_ty), mask=inside)


def _bins(height: int, width: int, kernel_size: int | Sequence[int], pool: str) -> tuple[int, int, int, int]:
    """(height, width, bins down, bins across): "raster" is a grid of one row; so is what has one bin."""
    down, across = sides(kernel_size, 2)
    if pool == "raster" or down == across == 1:
        return 1, height * width, 1, down * across
    return height, width, down, across


def _constants(tile: Tile, dtype: torch.dtype, channels: int, height: int, down: int, across: int) -> dict[str, int]:
    return {
        "CHANNELS": channels, "DOWN": down, "ACROSS": across, "ONE_ROW": height == down == 1,
        "ROWS": tile.rows, "COLS": tile.cols, "BLOCK_C": tile.channels(dtype), "num_warps": tile.warps,
    }  # fmt: skip


def _longest(size: int, bins: int) -> int:
    """Positions of the longest bin: uneven ones reach into the next."""
    return size // bins if size % bins == 0 else size // bins + 2


def pool_tokens(x: torch.Tensor, kernel_size: int | Sequence[int], pool: str, tile: Tile = POOL_TILE) -> torch.Tensor:
    """x (B, H, W, C) -> contiguous (B, K, C) in the dtype of x: means summed in fp32 and rounded once.

    Two launches where bins are split, else one.
    Raises ValueError for a dtype that is not in DTYPES or a sample of 2**31 values.
    """
    (x,) = contiguous(x)
    batch, height, width, channels = x.shape
    height, width, down, across = _bins(height, width, kernel_size, pool)
    lines = batch * down * across
    programs = lines * triton.cdiv(channels, tile.channels(x.dtype))
    tiles = triton.cdiv(_longest(height, down) * _longest(width, across), tile.rows * tile.cols)
    splits, tiles_per_split = splits_of(tiles, programs)
    pooled = x.new_empty((batch, down * across, channels))
    partial = pooled if splits == 1 else x.new_empty((lines, splits, channels), dtype=torch.float32)
    constants = _constants(tile, x.dtype, channels, height, down, across)
    with torch.cuda.device_of(x):
        pool_kernel[(programs * splits,)](x, partial, height, width, splits, tiles_per_split, **constants)
    if splits > 1:
        add(partial, pooled.flatten(0, 1))
    return pooled


def spread_tokens(
    g: torch.Tensor, height: int, width: int, kernel_size: int | Sequence[int], pool: str, tile: Tile = SPREAD_TILE
) -> torch.Tensor:
    """The transpose of `pool_tokens` in one launch: g (B, K, C) -> contiguous (B, H, W, C); errors as there."""
    spread = g.new_empty((g.shape[0], height, width, g.shape[2]))
    g, spread = contiguous(g, spread)
    height, width, down, across = _bins(height, width, kernel_size, pool)
    tiles = triton.cdiv(height * width, tile.rows * tile.cols)
    programs = g.shape[0] * tiles * triton.cdiv(g.shape[2], tile.channels(g.dtype))
    constants = _constants(tile, g.dtype, g.shape[2], height, down, across)
    deep, wide = (1 + triton.cdiv(bins - 1, size) for bins, size in ((down, height), (across, width)))
    with torch.cuda.device_of(g):
        spread_kernel[(programs,)](g, spread, height, width, DEEP=deep, WIDE=wide, **constants)
    return spread
