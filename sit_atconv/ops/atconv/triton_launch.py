"""What the functions that launch Triton kernels share: which tensors they take, and how sums over positions are split.

A sum is split among programs until the device is filled. Each writes its part in fp32, and a second kernel adds the
parts in one order: no atomics, so two runs agree to the bit.
"""

import math

import torch
import triton  # with these words: a bare `import triton` in an exported file is a requirement for diffusers
import triton.language as tl

from sit_atconv.ops.atconv.tiles import Tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Programs that positions are split for: two or three waves of some 130 multiprocessors. A split sums at least MIN_TILES
# tiles, so that its reduction and its line of partial sums (14 % of v in bf16 for the gradient of 3x3 kernels) stay
# small.
PROGRAMS = 1024
MIN_TILES = 4
ADD_TILE = Tile(rows=1, cols=16, line_bytes=128, warps=4)  # columns: parts that are loaded together


def splits_of(tiles: int, programs: int) -> tuple[int, int]:
    """(splits, tiles per split) of each sum over `tiles` tiles, where one split takes `programs` programs."""
    splits = max(1, min(tiles // MIN_TILES, triton.cdiv(PROGRAMS, max(1, programs))))
    return splits, triton.cdiv(tiles, splits)


def contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors (B, ...), contiguous: within a sample, kernels count in 32 bits.

    Raises ValueError for a dtype that is not in DTYPES, a sample of 2**31 values, or tensors of several devices.
    """
    for tensor in tensors:
        if tensor.device != tensors[0].device:  # to a kernel, an address that is none of its device's
            raise ValueError(
                f"tensors on {tensors[0].device} and {tensor.device}: the Triton kernels take those of one device; "
                "move them there with .to(device)"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"dtype {tensor.dtype}: the Triton kernels take {', '.join(map(str, DTYPES))}; use `conv` for others"
            )
        if math.prod(tensor.shape[1:]) >= 2**31:
            raise ValueError(
                f"shape {tuple(tensor.shape)}: the Triton kernels take samples of fewer than 2**31 values; "
                "use `conv` for larger ones"
            )
    return [tensor.contiguous() for tensor in tensors]


@triton.jit(do_not_specialize=["parts"])
def add_kernel(partial, total, parts, ROW: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """total (M, ROW): the sums over the parts of partial (M, parts, ROW), COLS of them at a time."""
    BLOCKS: tl.constexpr = (ROW + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // BLOCKS).to(tl.int64)
    c = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    partial += sample * parts * ROW
    sums = tl.zeros((COLS, BLOCK), tl.float32)
    for first in range(0, parts, COLS):
        part = (first + tl.arange(0, COLS))[:, None]
        sums += tl.load(partial + part * ROW + c, mask=(part < parts) & (c < ROW), other=0.0)
    sums = tl.sum(sums, 0, keep_dims=True).to(total.dtype.element_ty)
    tl.store(total + sample * ROW + c, sums, mask=c < ROW)


def add(partial: torch.Tensor, total: torch.Tensor, tile: Tile = ADD_TILE) -> torch.Tensor:
    """total (M, ...), filled with the fp32 sums over the parts of partial (M, parts, ...), and rounded once."""
    row, block = math.prod(total.shape[1:]), tile.channels(partial.dtype)
    with torch.cuda.device_of(total):
        add_kernel[(len(total) * triton.cdiv(row, block),)](
            partial, total, partial.shape[1], ROW=row, COLS=tile.cols, BLOCK=block, num_warps=tile.warps
        )
    return total
