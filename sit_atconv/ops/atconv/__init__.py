"""The ATConv operator on a grid of tokens: pooling, lateral inhibition and the dynamic depthwise convolution.

`reference` is the oracle; the functions exported here check their arguments and run a fast form: `pooling` for the
pooling, and for the convolution the backend that `operator.choose_backend` picks among `native`, `conv` and
`triton_kernels`.
"""

import math

import torch

from sit_atconv.ops.atconv import operator, pooling
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


def on_grid(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, N, C) in raster order -> (B, H, W, C), a view; grid (H, W).

    Raises ValueError for a grid that does not hold N tokens.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not fill a grid of {grid[0]} x {grid[1]}; "
            f"give (B, {grid[0] * grid[1]}, C) tokens in raster order, or the right grid=(H, W)"
        )
    return tokens.unflatten(1, tuple(grid))


def _check_grid(x: torch.Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"tokens of shape {tuple(x.shape)}: give (B, H, W, C), or (B, N, C) with grid=(H, W)")


def pool_tokens(x: torch.Tensor, kernel_size: int = 3, pool: str = "raster") -> torch.Tensor:
    """Adaptive average pooling of a grid of tokens to one value per kernel tap: x (B, H, W, C) -> (B, K, C).

    K = kernel_size ** 2. pool "raster": K bins of the N = H W tokens in raster order, bin i = [floor(i N / K),
    ceil((i + 1) N / K)); "grid": k x k cells.
    Raises ValueError for another shape or an unknown pool.
    """
    _check_grid(x)
    check_choice("pool", pool, POOLS)
    return pooling.pool_tokens(x, kernel_size, pool)


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, grid: tuple[int, int] | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Depthwise convolution with a kernel of its own for every sample and channel, the same at all positions.

    v (B, H, W, C), kernels (B, K, C) with K = k * k, k odd -> (B, H, W, C); with grid=(H, W), of tokens in raster
    order: v (B, N, C) -> (B, N, C).
    y[b, h, w, c] = sum_ij kernels[b, i k + j, c] * v[b, h + i - k // 2, w + j - k // 2, c]: zero padding, stride 1,
    cross-correlation. fp32, bf16, fp16 (summed in fp32) and fp64; differentiable any number of times in reverse and
    forward mode (compiled: once in reverse), and under vmap.

    backend: "reference" (the oracle), "conv" (grouped convolution), "native" (plain torch calls; under torch.compile
    one fused loop), "triton" (CUDA; no fp64) or "auto", which takes the environment variable SIT_ATCONV_BACKEND, else
    chooses as `choose_backend` says.
    Raises ValueError for a grid that does not hold N tokens, kernels that do not fit, an even k, dtypes or devices
    that differ, or an unknown backend; RuntimeError for "triton" where it cannot run.
    """
    if grid is not None:
        return dynamic_depthwise_conv(on_grid(v, grid), kernels, backend=backend).flatten(1, 2)
    _check_grid(v)
    k = math.isqrt(kernels.shape[1]) if kernels.ndim == 3 else 0
    if kernels.ndim != 3 or k * k != kernels.shape[1] or k % 2 == 0:
        raise ValueError(f"kernels of shape {tuple(kernels.shape)}: give (B, K, C) with K the square of an odd size")
    if kernels.shape[0] != v.shape[0] or kernels.shape[2] != v.shape[3]:
        raise ValueError(f"kernels {tuple(kernels.shape)} do not fit tokens {tuple(v.shape)}; give (B, K, C)")
    if v.dtype not in operator.DTYPES:
        raise ValueError(f"tokens of {v.dtype}: give float64, float32, bfloat16 or float16")
    for what in ("dtype", "device"):
        if getattr(kernels, what) != getattr(v, what):
            ours, theirs = getattr(kernels, what), getattr(v, what)
            raise ValueError(f"kernels are {ours} and tokens are {theirs}; move the kernels: kernels.to(v.{what})")
    return operator.dynamic_depthwise_conv(v, kernels, backend)
