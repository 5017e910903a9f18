"""The dynamic depthwise convolution and its two gradients as Triton kernels, of grids and of volumes; shapes as in
`reference`.

Every element is used k * k times and costs 2 bytes. So the kernels are laid out for memory traffic, that DRAM sees it
once; they are not measured on a GPU yet. A program owns ROWS x COLS positions of one sample and one cache line of
channels. It takes the kernel one column at a time: a row of v, shifted to that column, is loaded once and serves k
output rows from registers; the shifted loads of the next column hit L1, and the halo rows of the tile below hit L2.
One column of taps at a time is also what keeps k = 5 free of spills. In a volume it goes through the frames of the
kernel so, one after the other; for a grid, `frames` is None, and nothing is compiled for it.
"""

import math
from collections.abc import Sequence

import torch
import triton  # with these words: a bare `import triton` in an exported file is a requirement for diffusers
import triton.language as tl

from sit_atconv.ops.atconv.reference import sides
from sit_atconv.ops.atconv.tiles import Tile
from sit_atconv.ops.atconv.triton_launch import add, contiguous, splits_of

# 4 warps on a tile row of 16 columns x 128 bytes make one 128-bit access per thread: 8 half or 4 fp32 channels.
# A tile of R rows loads (R + k - 1) / R rows of v for each of its own; more rows cost registers, hence the warps that
# hide latency. grad_kernels holds its sums for all taps beside the rows and has room for fewer.
CONVOLUTION_TILE = Tile(rows=4, cols=16, line_bytes=128, warps=4)
LARGE_TILE = Tile(rows=2, cols=16, line_bytes=128, warps=4)  # for k = 7, where 4 rows of fp32 spill
GRAD_TILE = Tile(rows=2, cols=16, line_bytes=128, warps=4)


def tile_of(kernel_size: int) -> Tile:
    """For the convolution: as many rows as leave no spills."""
    return CONVOLUTION_TILE if kernel_size < 7 else LARGE_TILE


@triton.jit
def _place(tile, height, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile's first row and its columns (COLS, 1); tiles are numbered in raster order, image after image."""
    across, down = tl.cdiv(width, COLS), tl.cdiv(height, ROWS)
    return tile // across % down * ROWS, (tile % across * COLS + tl.arange(0, COLS))[:, None]


@triton.jit
def _load_row(image, row, columns, c, height, width, CHANNELS: tl.constexpr):
    """(COLS, BLOCK_C) of one row in fp32, zero outside the grid: a column past an edge must not wrap to another row."""
    inside = (row >= 0) & (row < height) & (columns >= 0) & (columns < width) & (c < CHANNELS)
    return tl.load(image + (row * width + columns) * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add_column(
    sums, v, kernels, j, row, columns, c, height, width,
    CHANNELS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS sums (COLS, BLOCK_C), with what column j of the taps of one frame sees added."""
    TAPS: tl.constexpr = HIGH * WIDE
    taps = ()
    for i in tl.static_range(HIGH):
        t = TAPS - 1 - i * WIDE - j if FLIP else i * WIDE + j
        taps += (tl.load(kernels + t * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32),)
    rows = ()
    for r in tl.static_range(ROWS + HIGH - 1):
        shifted = columns + (j - WIDE // 2)
        rows += (_load_row(v, row + (r - HIGH // 2), shifted, c, height, width, CHANNELS),)
    before, sums = sums, ()
    for r in tl.static_range(ROWS):
        total = before[r]
        for i in tl.static_range(HIGH):
            total += taps[i] * rows[r + i]
        sums += (total,)
    return sums


@triton.jit(do_not_specialize=["frames", "height", "width"])
def convolution_kernel(
    v, kernels, y, frames, height, width,
    CHANNELS: tl.constexpr, DEEP: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, FLIP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y; FLIP takes tap K - 1 - t in the place of t. frames: None for grids, where DEEP is 1."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // BLOCKS
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    row, columns = _place(tile, height, width, ROWS, COLS)
    image = tile // (tl.cdiv(width, COLS) * tl.cdiv(height, ROWS))
    sample = (image if frames is None else image // frames).to(tl.int64)
    if DEEP == 1:
        v += image.to(tl.int64) * height * width * CHANNELS
    y += image.to(tl.int64) * height * width * CHANNELS
    kernels += sample * (DEEP * HIGH * WIDE * CHANNELS)

    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros((COLS, BLOCK_C), tl.float32),)
    if DEEP == 1:
        for j in tl.static_range(WIDE):
            sums = _add_column(sums, v, kernels, j, row, columns, c, height, width, CHANNELS, HIGH, WIDE, FLIP, ROWS)
    else:
        for column in range(DEEP * WIDE):  # not unrolled: of so many columns ptxas loads more than it can hold
            d, j = column // WIDE, column % WIDE
            frame = image % frames + d - DEEP // 2
            rows = tl.where((frame >= 0) & (frame < frames), height, 0)  # a frame outside of the volume has no rows
            source = v + (image.to(tl.int64) + d - DEEP // 2) * height * width * CHANNELS
            taps = kernels + (DEEP - 1 - d if FLIP else d) * (HIGH * WIDE * CHANNELS)
            sums = _add_column(sums, source, taps, j, row, columns, c, rows, width, CHANNELS, HIGH, WIDE, FLIP, ROWS)
    for r in tl.static_range(ROWS):
        inside = (row + r < height) & (columns < width) & (c < CHANNELS)
        tl.store(y + ((row + r) * width + columns) * CHANNELS + c, sums[r].to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["frames", "height", "width", "splits", "tiles_per_split"])
def grad_kernels_kernel(
    v, grad_y, partial, frames, height, width, splits, tiles_per_split,
    CHANNELS: tl.constexpr, DEEP: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (B, S, K, C): the sums over one split's tiles, for COLUMNS columns of one frame of the kernel. frames:
    None for grids, where DEEP is 1."""
    TAPS: tl.constexpr = DEEP * HIGH * WIDE
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = DEEP * WIDE // COLUMNS
    # Channels run fastest, then the groups of columns: programs that read the same lines run side by side.
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    first_column = tl.program_id(0) // BLOCKS % GROUPS * COLUMNS
    first_tap = first_column
    split = tl.program_id(0) // (BLOCKS * GROUPS)
    sample = (split // splits).to(tl.int64)
    if frames is None:
        v += sample * height * width * CHANNELS
        grad_y += sample * height * width * CHANNELS
    else:
        offset = first_column // WIDE - DEEP // 2  # of the frame of the kernel
        first_column = first_column % WIDE
        first_tap = (offset + DEEP // 2) * (HIGH * WIDE) + first_column
        v += (sample * frames + offset) * height * width * CHANNELS
        grad_y += sample * frames * height * width * CHANNELS

    sums = ()
    for _ in tl.static_range(HIGH * COLUMNS):
        sums += (tl.zeros((COLS, BLOCK_C), tl.float32),)
    first = split % splits * tiles_per_split
    tiles = tl.cdiv(width, COLS) * tl.cdiv(height, ROWS)
    if frames is not None:
        tiles *= frames
    for tile in range(first, min(first + tiles_per_split, tiles)):
        row, columns = _place(tile, height, width, ROWS, COLS)
        source, above, source_height = v, grad_y, height
        if frames is not None:
            frame = tile // (tl.cdiv(width, COLS) * tl.cdiv(height, ROWS))
            source += frame.to(tl.int64) * height * width * CHANNELS
            above += frame.to(tl.int64) * height * width * CHANNELS
            # A frame outside of the volume has no rows.
            source_height = tl.where((frame + offset >= 0) & (frame + offset < frames), height, 0)
        gradients = ()
        for r in tl.static_range(ROWS):
            gradients += (_load_row(above, row + r, columns, c, height, width, CHANNELS),)
        before, sums = sums, ()
        for j in tl.static_range(COLUMNS):
            rows = ()
            for r in tl.static_range(ROWS + HIGH - 1):
                shifted = columns + (first_column + j - WIDE // 2)
                rows += (_load_row(source, row + (r - HIGH // 2), shifted, c, source_height, width, CHANNELS),)
            for i in tl.static_range(HIGH):
                total = before[j * HIGH + i]
                for r in tl.static_range(ROWS):
                    total += gradients[r] * rows[r + i]
                sums += (total,)
    for j in tl.static_range(COLUMNS):
        for i in tl.static_range(HIGH):
            tap = split.to(tl.int64) * TAPS + first_tap + i * WIDE + j
            total = tl.sum(sums[j * HIGH + i], 0, keep_dims=True).to(partial.dtype.element_ty)
            tl.store(partial + tap * CHANNELS + c, total, mask=c < CHANNELS)


def _constants(tile: Tile, dtype: torch.dtype, channels: int, sizes: tuple[int, int, int]) -> dict[str, int]:
    return {
        "CHANNELS": channels, "DEEP": sizes[0], "HIGH": sizes[1], "WIDE": sizes[2],
        "ROWS": tile.rows, "COLS": tile.cols, "BLOCK_C": tile.channels(dtype), "num_warps": tile.warps,
    }  # fmt: skip


def _in_three(v: torch.Tensor, kernel_size: int | Sequence[int] | None, taps: int = 0) -> tuple[int | None, tuple]:
    """(frames of v, None if it is a grid; the kernel's size in time, rows and columns)."""
    sizes = sides(kernel_size, v.ndim - 2, taps)
    return (None, (1, *sizes)) if len(sizes) == 2 else (v.shape[1], sizes)


def _convolve(v: torch.Tensor, kernels: torch.Tensor, kernel_size, flip: bool, tile: Tile | None) -> torch.Tensor:
    v, kernels = contiguous(v, kernels)
    y, (frames, sizes) = v.new_empty(v.shape), _in_three(v, kernel_size, kernels.shape[1])
    tile = tile or tile_of(max(sizes[1:]))
    batch, *_, height, width, channels = v.shape
    tiles = (frames or 1) * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
    programs = batch * tiles * triton.cdiv(channels, tile.channels(v.dtype))
    constants = _constants(tile, v.dtype, channels, sizes)
    with torch.cuda.device_of(v):
        convolution_kernel[(programs,)](v, kernels, y, frames, height, width, FLIP=flip, **constants)
    return y


def dynamic_depthwise_conv(
    v: torch.Tensor,
    kernels: torch.Tensor,
    kernel_size: int | Sequence[int] | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c], summed in fp32.

    v (B, *grid, C), kernels (B, K, C) -> contiguous (B, *grid, C) in the dtype of v. tile: by default, `tile_of`.
    Raises ValueError for a dtype that is not in DTYPES, a sample of 2**31 values, or tensors of several devices.
    """
    return _convolve(v, kernels, kernel_size, False, tile)


def grad_v(
    grad_y: torch.Tensor,
    kernels: torch.Tensor,
    kernel_size: int | Sequence[int] | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """dv[b, h, w, c] = sum_ij kernels[b, K - 1 - i k - j, c] * grad_y[b, h + i - k // 2, w + j - k // 2, c].

    grad_y (B, *grid, C), kernels (B, K, C) -> contiguous (B, *grid, C); the rest as in `dynamic_depthwise_conv`.
    """
    return _convolve(grad_y, kernels, kernel_size, True, tile)


def grad_kernels(
    v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int | Sequence[int], tile: Tile = GRAD_TILE
) -> torch.Tensor:
    """dK[b, i k + j, c] = sum_hw grad_y[b, h, w, c] * v[b, h + i - k // 2, w + j - k // 2, c].

    v and grad_y (B, *grid, C) -> contiguous (B, K, C) in the dtype of v; errors as in `dynamic_depthwise_conv`.
    """
    v, grad_y = contiguous(v, grad_y)
    frames, sizes = _in_three(v, kernel_size)
    (deep, high, wide), (batch, *_, height, width, channels) = sizes, v.shape
    # 25 taps' sums fit the registers one column of them at a time, and a program has one frame of a kernel.
    columns = wide if high * wide <= 9 else 1
    tiles = (frames or 1) * triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.cols)
    programs = batch * triton.cdiv(channels, tile.channels(v.dtype)) * (deep * wide // columns)
    splits, tiles_per_split = splits_of(tiles, programs)
    result = v.new_empty((batch, math.prod(sizes), channels))
    partial = result if splits == 1 else v.new_empty((batch, splits, *result.shape[1:]), dtype=torch.float32)
    constants = _constants(tile, v.dtype, channels, sizes)
    with torch.cuda.device_of(v):
        grad_kernels_kernel[(programs * splits,)](
            v, grad_y, partial, frames, height, width, splits, tiles_per_split, COLUMNS=columns, **constants
        )
    return result if splits == 1 else add(partial, result)
