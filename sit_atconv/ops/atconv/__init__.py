"""The ATConv operator on a grid of tokens: pooling, lateral inhibition and the dynamic depthwise convolution.

`reference` is the oracle; the functions exported here check their arguments and run a fast form: `pooling` for the
pooling, and for the convolution the backend that `operator.choose_backend` picks among `native`, `conv` and
`triton_kernels`.
"""

import math
from collections.abc import Sequence

import torch

from sit_atconv.ops.atconv import operator, pooling, reference
from sit_atconv.ops.atconv.operator import BACKEND_VARIABLE, BACKENDS, choose_backend
from sit_atconv.ops.atconv.reference import inhibit
from sit_atconv.runtime.errors import check_choice

POOLS = ("raster", "grid")

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "POOLS",
    "choose_backend",
    "dynamic_depthwise_conv",
    "inhibit",
    "on_grid",
    "pool_tokens",
]


def on_grid(tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Tokens (B, N, C) in raster order -> (B, H, W, C) or (B, T, H, W, C), a view; grid (H, W) or (T, H, W).

    Raises ValueError for a grid that does not hold N tokens.
    """
    count = 1
    for side in grid:
        count *= side
    if tokens.ndim != 3 or tokens.shape[1] != count:
        named = "(T, H, W)" if len(grid) == 3 else "(H, W)"
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not fill a grid of {' x '.join(map(str, grid))}; "
            f"give (B, {count}, C) tokens in raster order, or the right grid={named}"
        )
    return tokens.unflatten(1, tuple(grid))


FORMS = {2: "(B, H, W, C), or (B, N, C) with grid=(H, W)", 3: "(B, T, H, W, C), or (B, N, C) with grid=(T, H, W)"}


def _check_grid(x: torch.Tensor, kernel_size: int | Sequence[int] | None) -> None:
    """Raise ValueError unless x (B, *grid, C) has two or three sides: as many as a kernel size names, if it does."""
    named = FORMS if kernel_size is None or isinstance(kernel_size, int) else (len(kernel_size),)
    if not set(named) <= set(FORMS):
        raise ValueError(f"kernel_size={kernel_size!r}: give a number, or a size for each side of (H, W) or (T, H, W)")
    if x.ndim - 2 not in named:
        wanted = "; or of a volume ".join(FORMS[dims] for dims in named)
        raise ValueError(f"tokens of shape {tuple(x.shape)}: give {wanted}")


def pool_tokens(x: torch.Tensor, kernel_size: int | Sequence[int] = 3, pool: str = "raster") -> torch.Tensor:
    """Adaptive average pooling of a grid of tokens to one value per kernel tap: x (B, H, W, C) or a volume
    (B, T, H, W, C) -> (B, K, C).

    K: the product of the kernel's sizes, one for all sides or one for each: (kt, kh, kw). pool "raster": K bins of the
    N = H W tokens in raster order, bin i = [floor(i N / K), ceil((i + 1) N / K)); of a volume those of its N = T H W
    tokens, after the mean over each dimension where the kernel has size 1. "grid": kh x kw or kt x kh x kw cells.
    Raises ValueError for another shape or an unknown pool.
    """
    _check_grid(x, kernel_size)
    check_choice("pool", pool, POOLS)
    return pooling.pool_tokens(x, reference.sides(kernel_size, x.ndim - 2), pool)


def dynamic_depthwise_conv(
    v: torch.Tensor,
    kernels: torch.Tensor,
    grid: tuple[int, ...] | None = None,
    backend: str = "auto",
    kernel_size: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Depthwise convolution with a kernel of its own for every sample and channel, the same at all positions.

    v (B, H, W, C), kernels (B, K, C) with K = k * k, k odd -> (B, H, W, C); with grid=(H, W), of tokens in raster
    order: v (B, N, C) -> (B, N, C).
    y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c]: zero padding, stride 1,
    cross-correlation. fp32, bf16, fp16 (summed in fp32) and fp64; differentiable any number of times in reverse and
    forward mode (compiled: once in reverse), and under vmap.
    Volumes: v (B, T, H, W, C), or tokens with grid=(T, H, W), and K = k * k * k; frames as rows: the first k * k taps
    read the frame k // 2 before. It is not causal.
    kernel_size: where the kernel is no square or cube, its odd size in each dimension, such as (1, 3, 3) for 9 taps in
    space, (3, 1, 1) for 3 in time.

    backend: "reference" (the oracle), "conv" (grouped convolution), "native" (plain torch calls; under torch.compile
    one fused loop), "triton" (CUDA; no fp64) or "auto", which takes the environment variable SIT_ATCONV_BACKEND, else
    chooses as `choose_backend` says.
    Raises ValueError for a grid that does not hold N tokens, kernels that do not fit, an even k, dtypes or devices
    that differ, or an unknown backend; RuntimeError for "triton" where it cannot run.
    """
    if grid is not None:
        return dynamic_depthwise_conv(on_grid(v, grid), kernels, None, backend, kernel_size).flatten(1, len(grid))
    _check_grid(v, kernel_size)
    taps = kernels.shape[1] if kernels.ndim == 3 else 0
    sizes = reference.sides(kernel_size, v.ndim - 2, taps)
    if math.prod(sizes) != taps or taps % 2 == 0:  # a product is odd if all its factors are
        wanted = f"{'square' if v.ndim == 4 else 'cube'} of an odd size"
        if kernel_size is not None:
            wanted = f"product of the odd sizes kernel_size={kernel_size!r}"
        raise ValueError(f"kernels of shape {tuple(kernels.shape)}: give (B, K, C) with K the {wanted}")
    if kernels.shape[0] != v.shape[0] or kernels.shape[2] != v.shape[-1]:
        raise ValueError(f"kernels {tuple(kernels.shape)} do not fit tokens {tuple(v.shape)}; give (B, K, C)")
    if v.dtype not in operator.DTYPES:
        raise ValueError(f"tokens of {v.dtype}: give float64, float32, bfloat16 or float16")
    for what in ("dtype", "device"):
        if getattr(kernels, what) != getattr(v, what):
            ours, theirs = getattr(kernels, what), getattr(v, what)
            raise ValueError(f"kernels are {ours} and tokens are {theirs}; move the kernels: kernels.to(v.{what})")
    return operator.dynamic_depthwise_conv(v, kernels, backend, sizes)
