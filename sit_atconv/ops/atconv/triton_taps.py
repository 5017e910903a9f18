"""The kernels of ATConv out of the pooled tokens as one Triton kernel, and its gradient as two; shapes as in `taps`.

A program owns all taps of one line of channels and goes through samples. The product over the taps is a matrix product
of fp32 on ordinary cores, padded to a power of two (9 taps to 16): its arithmetic is small beside one launch. A row of
ones below the activations carries the bias, and in the gradient sums it.
"""

from dataclasses import replace

import torch
import triton  # with these words: a bare `import triton` in an exported file is a requirement for diffusers
import triton.language as tl

from sit_atconv.ops.atconv.tiles import TapTile
from sit_atconv.ops.atconv.triton_launch import contiguous


def tile_of(taps: int) -> TapTile:
    """For the forward: as many channels as leave the registers room."""
    return TapTile(64 if taps < 16 else 16, 4 if taps < 32 else 8, stages=1, programs=2048)


def grad_tile_of(taps: int) -> TapTile:
    """For the gradient: each of its programs leaves a partial sum, which the second launch reads."""
    return replace(tile_of(taps), programs=512)


# The second launch sums SUM_COLS columns of the partial sums, SUM_ROWS rows at a time.
SUM_ROWS, SUM_COLS, SUM_WARPS = 32, 32, 4


@triton.jit
def _activate(p, ACTIVATION: tl.constexpr):
    """act(p) = p gate(p), and act'(p)."""
    if ACTIVATION == "gelu":
        gate = 0.5 * (1.0 + tl.math.erf(p * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * p * p)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (p + 0.044715 p^3)
        gate = tl.sigmoid(1.5957691216057308 * (p + 0.044715 * p * p * p))
        slope = gate * (1.0 - gate) * (1.5957691216057308 * (1.0 + 0.134145 * p * p))
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = tl.sigmoid(p)
        slope = gate * (1.0 - gate)
    return p * gate, gate + p * slope


@triton.jit
def _load_weight(weight, bias, s, t, TAPS: tl.constexpr, BIAS: tl.constexpr):
    """(ROWS, ROWS) in fp32: the weight, the bias as column TAPS, zeros beside them."""
    matrix = tl.load(weight + s * TAPS + t, mask=(s < TAPS) & (t < TAPS), other=0.0).to(tl.float32)
    if BIAS:
        column = tl.load(bias + s, mask=s < TAPS, other=0.0).to(tl.float32)
        matrix = tl.where(t == TAPS, column, matrix)
    return matrix


@triton.jit
def _load_factor(control, c, CHANNELS: tl.constexpr, INHIBITION: tl.constexpr):
    """(1, BLOCK_C): the share of the mean that is subtracted."""
    if INHIBITION == "learned":
        return tl.sigmoid(tl.load(control + c, mask=c < CHANNELS, other=0.0).to(tl.float32))
    else:
        return tl.full(c.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["batch", "samples"])
def tap_kernels_kernel(
    p, weight, bias, control, kernels, batch, samples,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    INHIBITION: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The kernels (TAPS, BLOCK_C) of `samples` samples. ROWS: a power of two with a row to spare for the bias."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    t = tl.arange(0, ROWS)[:, None]
    inside = (t < TAPS) & (c < CHANNELS)
    matrix = _load_weight(weight, bias, t, tl.arange(0, ROWS)[None, :], TAPS, BIAS)
    factor = _load_factor(control, c, CHANNELS, INHIBITION)
    first = tl.program_id(0) // BLOCKS * samples
    start = first.to(tl.int64) * (TAPS * CHANNELS)
    for _ in range(first, min(first + samples, batch)):
        hidden, _ = _activate(tl.load(p + start + t * CHANNELS + c, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        result = tl.dot(matrix, tl.where(t == TAPS, 1.0, hidden), input_precision="ieee")
        if INHIBITION != "none":
            result -= factor * (tl.sum(result, 0, keep_dims=True) / TAPS)
        tl.store(kernels + start + t * CHANNELS + c, result.to(kernels.dtype.element_ty), mask=inside)
        start += TAPS * CHANNELS


@triton.jit(do_not_specialize=["batch", "samples"])
def grad_kernel(
    p, weight, bias, control, upstream, grad_p, weight_sums, control_sums, batch, samples,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    INHIBITION: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_p of `samples` samples; weight_sums (programs, TAPS, TAPS + BIAS), the bias as the last column, and
    control_sums (splits, CHANNELS), not yet by the derivative of the sigmoid: the sums over these samples."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = TAPS + BIAS
    c = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    t = tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, ROWS)[None, :]
    inside = (t < TAPS) & (c < CHANNELS)
    matrix = _load_weight(weight, bias, t, across, TAPS, BIAS)
    factor = _load_factor(control, c, CHANNELS, INHIBITION)
    to_weight = tl.zeros((ROWS, ROWS), tl.float32)
    to_factor = tl.zeros((1, BLOCK_C), tl.float32)
    first = tl.program_id(0) // BLOCKS * samples
    start = first.to(tl.int64) * (TAPS * CHANNELS)
    for _ in range(first, min(first + samples, batch)):
        hidden, slope = _activate(
            tl.load(p + start + t * CHANNELS + c, mask=inside, other=0.0).to(tl.float32), ACTIVATION
        )
        hidden = tl.where(t == TAPS, 1.0, hidden)
        above = tl.load(upstream + start + t * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
        if INHIBITION != "none":
            total = tl.sum(above, 0, keep_dims=True)
            if INHIBITION == "learned":
                before = tl.dot(matrix, hidden, input_precision="ieee")
                to_factor -= total * (tl.sum(before, 0, keep_dims=True) / TAPS)
            above = tl.where(inside, above - factor * (total / TAPS), 0.0)
        to_weight = tl.dot(above, tl.trans(hidden), to_weight, input_precision="ieee")
        to_hidden = tl.dot(tl.trans(matrix), above, input_precision="ieee")
        tl.store(grad_p + start + t * CHANNELS + c, (to_hidden * slope).to(grad_p.dtype.element_ty), mask=inside)
        start += TAPS * CHANNELS
    place = tl.program_id(0) * (TAPS * COLUMNS) + t * COLUMNS + across
    tl.store(weight_sums + place, to_weight, mask=(t < TAPS) & (across < COLUMNS))
    if INHIBITION == "learned":
        tl.store(control_sums + tl.program_id(0) // BLOCKS * CHANNELS + c, to_factor, mask=c < CHANNELS)


@triton.jit
def _sum_rows(partial, rows, column, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """partial (rows, columns) -> the sums (COLS,) of its columns `column`."""
    sums = tl.zeros((ROWS, COLS), tl.float32)
    r = tl.arange(0, ROWS)[:, None]
    for first in range(0, rows, ROWS):
        here = (first + r < rows) & (column[None, :] < columns)
        sums += tl.load(partial + (first + r) * columns + column[None, :], mask=here, other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["programs", "splits"])
def sum_kernel(
    weight_sums, control_sums, control, grad_weight, grad_bias, grad_control, programs, splits,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The partial sums of `grad_kernel` added up: COLS columns of the weight's, or after those, of the control's."""
    COLUMNS: tl.constexpr = TAPS + BIAS
    WEIGHT_BLOCKS: tl.constexpr = (TAPS * COLUMNS + COLS - 1) // COLS
    block = tl.program_id(0)
    if block < WEIGHT_BLOCKS:
        column = block * COLS + tl.arange(0, COLS)
        sums = _sum_rows(weight_sums, programs, column, TAPS * COLUMNS, ROWS, COLS)
        s, t = column // COLUMNS, column % COLUMNS
        tl.store(grad_weight + s * TAPS + t, sums.to(grad_weight.dtype.element_ty), mask=(s < TAPS) & (t < TAPS))
        if BIAS:
            tl.store(grad_bias + s, sums.to(grad_bias.dtype.element_ty), mask=(s < TAPS) & (t == TAPS))
    else:
        c = (block - WEIGHT_BLOCKS) * COLS + tl.arange(0, COLS)
        factor = tl.sigmoid(tl.load(control + c, mask=c < CHANNELS, other=0.0).to(tl.float32))
        sums = _sum_rows(control_sums, splits, c, CHANNELS, ROWS, COLS) * factor * (1.0 - factor)
        tl.store(grad_control + c, sums.to(grad_control.dtype.element_ty), mask=c < CHANNELS)


def _layout(p: torch.Tensor, bias, activation: str, inhibition: str, tile: TapTile) -> tuple[int, int, dict]:
    """(splits of the samples, samples of each, what a kernel is compiled with)."""
    batch, taps, channels = p.shape
    splits = max(1, min(batch, tile.programs // triton.cdiv(channels, tile.channels)))
    constants = {
        "TAPS": taps, "CHANNELS": channels, "ACTIVATION": activation, "BIAS": bias is not None,
        "INHIBITION": inhibition, "ROWS": max(16, triton.next_power_of_2(taps + 1)), "BLOCK_C": tile.channels,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    samples = triton.cdiv(batch, splits)
    return triton.cdiv(batch, max(1, samples)), samples, constants


def _ready(p: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors as the kernels read them; a missing one is not read, and p stands in for it."""
    return contiguous(p, *(p if each is None else each for each in others))


def tap_kernels(
    p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, control: torch.Tensor | None,
    activation: str, inhibition: str, tile: TapTile | None = None,
) -> torch.Tensor:  # fmt: skip
    """`reference.tap_kernels` in one launch, computed in fp32: contiguous (B, K, C) in the dtype of p.

    p (B, K, C), weight (K, K), bias (K), control (C), each in fp32, bf16 or fp16.
    Raises ValueError for another dtype, a sample of 2**31 values, or tensors of several devices.
    """
    read = _ready(p, weight, bias, control)
    kernels = p.new_empty(p.shape)
    tile = tile or tile_of(p.shape[1])
    splits, samples, constants = _layout(p, bias, activation, inhibition, tile)
    grid = (splits * triton.cdiv(p.shape[2], tile.channels),)
    with torch.cuda.device_of(p):
        tap_kernels_kernel[grid](*read, kernels, p.shape[0], samples, **constants)
    return kernels


def grads(
    upstream: torch.Tensor, p: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    control: torch.Tensor | None, activation: str, inhibition: str, tile: TapTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The gradients of p, weight, bias and control, each in its dtype, in two launches; errors as in `tap_kernels`.

    upstream (B, K, C). The fp32 sums of programs are added by the second launch: no atomics, so two runs agree to
    the bit.
    """
    batch, taps, channels = p.shape
    tile = tile or grad_tile_of(taps)
    *read, upstream = _ready(p, weight, bias, control, upstream)
    splits, samples, constants = _layout(p, bias, activation, inhibition, tile)
    programs = splits * triton.cdiv(channels, tile.channels)
    columns = taps + (bias is not None)
    weight_sums = p.new_empty((programs, taps, columns), dtype=torch.float32)
    learned = inhibition == "learned"
    control_sums = p.new_empty((splits, channels), dtype=torch.float32) if learned else weight_sums
    inputs = (p, weight, bias, control)
    grad_p, *to_parameters = (None if each is None else each.new_empty(each.shape) for each in inputs)
    written = [weight_sums if each is None else each for each in to_parameters]
    blocks = triton.cdiv(taps * columns, SUM_COLS) + (triton.cdiv(channels, SUM_COLS) if learned else 0)
    with torch.cuda.device_of(p):
        grad_kernel[(programs,)](*read, upstream, grad_p, weight_sums, control_sums, batch, samples, **constants)
        sum_kernel[(blocks,)](
            weight_sums, control_sums, read[3], *written, programs, splits,
            TAPS=taps, CHANNELS=channels, BIAS=bias is not None, ROWS=SUM_ROWS, COLS=SUM_COLS, num_warps=SUM_WARPS,
        )  # fmt: skip
    return grad_p, *to_parameters
