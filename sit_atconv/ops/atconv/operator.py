"""The dynamic depthwise convolution as one torch operator over the backends, and the rule that chooses among them.

`sit_atconv::dynamic_depthwise_conv` and `sit_atconv::dynamic_depthwise_conv_grad_kernels` differentiate into each
other, so derivatives of any order exist, reverse and forward, and every one of them runs on the backend of the forward.
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch

from sit_atconv.ops.atconv import conv, inlined, native, reference
from sit_atconv.ops.operators import define, multilinear, sees_tangents
from sit_atconv.runtime.compat.torch import is_exporting, onednn_takes_bf16
from sit_atconv.runtime.errors import InputError, check_choice

BACKENDS = ("auto", "reference", "conv", "native", "triton")
BACKEND_VARIABLE = "SIT_ATCONV_BACKEND"
CONV_VALUES = 2**16  # values of a sample from which `conv` is the faster one on a CPU
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = DTYPES[1:]
TRITON_KERNEL = 7  # the largest size that Triton's kernels, all taps unrolled, hold in registers, and compile soon


def _backend(name: str):
    """The module of a backend: it has `dynamic_depthwise_conv`, `grad_v` and `grad_kernels`."""
    if name == "triton":
        from sit_atconv.ops.atconv import triton_kernels  # here, since triton exists on few platforms

        return triton_kernels
    return {"conv": conv, "native": native}[name]


def _by_rows(v: torch.Tensor) -> torch.Tensor:
    """v (B, *grid, C), a copy if its channels do not lie side by side and row after row, as the backends read fast.

    Measured in fp32 at (1, 64, 64, 288) on a Xeon core, as it lies / with the copy, in ms: a channels-first map 65 / 10
    by `native`, and one with the columns outside the rows 27 / 11 by `conv`.
    """
    _, *sides, channels = v.stride()
    return v if channels == 1 and sides == sorted(sides, reverse=True) else v.contiguous()


def _rows_in_time(sizes: Sequence[int] | None, backend: str) -> bool:
    """Whether the kernel lies in time alone, so that each frame is a row to it and the volume a grid of such rows.

    Not for `native`, whose blocks do not cut rows.
    """
    return backend != "native" and sizes is not None and tuple(sizes[1:]) == (1, 1)


def _convolve(
    v: torch.Tensor, kernels: torch.Tensor, flip: bool, backend: str, kernel_size: Sequence[int] | None = None
) -> torch.Tensor:
    """y[p] = sum_t kernels[t] * v[p + offset t], or with `flip` v[p - offset t]; contiguous (B, *grid, C).

    kernel_size: in each dimension; None where it is the square or the cube that K is.
    """
    module, v = _backend(backend), _by_rows(v)
    form = module.grad_v if flip else module.dynamic_depthwise_conv
    if _rows_in_time(kernel_size, backend):
        return form(v.flatten(2, 3), kernels, kernel_size[:2]).view(v.shape)
    return form(v, kernels, kernel_size)


def _correlate(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: Sequence[int], backend: str) -> torch.Tensor:
    """dK[t] = sum_p grad_y[p] * v[p + offset t]; contiguous (B, K, C). kernel_size: in each dimension."""
    v, grad_y = _by_rows(v), _by_rows(grad_y)
    if _rows_in_time(kernel_size, backend):
        v, grad_y, kernel_size = v.flatten(2, 3), grad_y.flatten(2, 3), kernel_size[:2]
    return _backend(backend).grad_kernels(v, grad_y, kernel_size)


def _fake_convolution(v, kernels, flip, backend, kernel_size=None):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _fake_grad_kernels(v, grad_y, kernel_size, backend):
    return torch.empty((v.shape[0], math.prod(kernel_size), v.shape[-1]), dtype=v.dtype, device=v.device)


def _gradients_of_convolution(upstream, needed, tensors, shapes, settings):
    (v, kernels), (flip, *others) = tensors, settings
    to_v = convolution(upstream, kernels, not flip, *others) if needed[0] else None
    to_kernels = None
    if needed[1]:
        source, above = (upstream, v) if flip else (v, upstream)
        backend, kernel_size = others if len(others) == 2 else (*others, None)
        sizes = reference.sides(kernel_size, len(shapes[0]) - 2, shapes[1][1])
        to_kernels = grad_kernels(source, above, sizes, backend)
    return to_v, to_kernels


def _gradients_of_grad_kernels(upstream, needed, tensors, shapes, settings):
    (v, grad_y), (sizes, backend) = tensors, settings
    to_v = convolution(grad_y, upstream, True, backend, sizes) if needed[0] else None
    to_grad_y = convolution(v, upstream, False, backend, sizes) if needed[1] else None
    return to_v, to_grad_y


def _convolution_flops(v_shape, kernels_shape, *_, **__) -> int:
    return 2 * math.prod(v_shape) * kernels_shape[1]


def _grad_kernels_flops(v_shape, grad_y_shape, kernel_size, *_, **__) -> int:
    return 2 * math.prod(v_shape) * math.prod(kernel_size)


convolution = define(
    "dynamic_depthwise_conv",
    _convolve,
    _fake_convolution,
    multilinear(2, _gradients_of_convolution),
    _convolution_flops,
)
grad_kernels = define(
    "dynamic_depthwise_conv_grad_kernels",
    _correlate,
    _fake_grad_kernels,
    multilinear(2, _gradients_of_grad_kernels),
    _grad_kernels_flops,
)


class CannotRun(InputError, RuntimeError):
    """A backend was asked for that this machine, device or dtype does not have."""


@torch.compiler.assume_constant_result
def _requested() -> str:
    """What the environment asks for."""
    name = os.environ.get(BACKEND_VARIABLE, "auto")
    check_choice(BACKEND_VARIABLE, name, BACKENDS)
    return name


@torch.compiler.assume_constant_result
def _triton_refusal(device: torch.device, dtype: torch.dtype, large: bool) -> str | None:
    """Why Triton cannot run on such tokens, or None. large: whether the kernels are larger than TRITON_KERNEL."""
    if not _triton_is_installed():
        return "the package triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"it has no {str(dtype).removeprefix('torch.')} form"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tokens are on {device}, not on a CUDA device"
    if device.type == "cuda" and _is_old(device):
        return "the device has a compute capability below 8.0"
    if large:
        return f"kernels larger than {TRITON_KERNEL} x {TRITON_KERNEL} do not fit its registers"
    return None


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _is_old(device: torch.device) -> bool:
    """Whether Triton's kernels are not for that CUDA device; where there is none, tokens have no values."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


@torch.compiler.assume_constant_result
def _triton_is_best(device: torch.device, dtype: torch.dtype, large: bool) -> bool:
    """Whether `auto` is `triton` on that CUDA device; where it could be and is not, it is said once."""
    refusal = _triton_refusal(device, dtype, large)
    if refusal and dtype in TRITON_DTYPES:
        _say_slow(refusal)
    return refusal is None


@cache
def _say_slow(reason: str) -> None:
    warnings.warn(f"ATConv is slow on this CUDA device, since Triton cannot run its kernels: {reason}", stacklevel=2)


def choose_backend(v: torch.Tensor, backend: str = "auto", kernel_size: int = 3) -> str:
    """The backend that v (B, *grid, C) runs on with kernels of that size, the largest of its dimensions: the argument,
    else SIT_ATCONV_BACKEND, else by this rule.

    CUDA, 16 or 32 bits, kernels up to TRITON_KERNEL: `triton`, one pass over memory (chosen by construction: not
    measured yet), under torch.compile, too, but not in what torch.export makes. A device without it, and larger
    kernels, are slow, which is said once. Elsewhere under torch.compile `native`, which is inlined there.
    CPU, fp32, or bf16 where oneDNN has it, samples of CONV_VALUES values or more: `conv`, which costs 45 us a sample
    and little more. Everywhere else `native`. Measured forward, and forward with backward, `native` / `conv` in ms on 2
    Xeon cores with AMX, fp32: (32, 8x8, 64) 0.16 / 1.48 and 0.84 / 5.2, (1, 16x16, 384) 0.13 / 0.10 and 0.78 / 0.57,
    (4, 16x16, 1152) 1.6 / 1.1 and 7.2 / 4.9, (1, 64x64, 1152) 6.6 / 1.0 and 32 / 4.0; bf16: 0.22 / 1.43 and 0.95 / 5.1,
    0.17 / 0.09 and 0.91 / 0.54, 1.9 / 0.7 and 8.0 / 2.4, 8.5 / 0.9 and 35 / 4.0.
    On the meta device, where nothing is computed, it is `native` whatever was asked for.
    Raises ValueError for an unknown name and RuntimeError for `triton` where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    chosen = backend if backend != "auto" else _requested()
    if v.is_meta:
        return "native"
    large = kernel_size > TRITON_KERNEL
    if chosen == "triton" and (reason := _triton_refusal(v.device, v.dtype, large)):
        asked = f"backend={backend!r}" if backend != "auto" else f"{BACKEND_VARIABLE}={chosen}"
        raise CannotRun(f"{asked} cannot run here: {reason}; choose 'auto', 'native' or 'conv'")
    if chosen != "auto":
        return chosen
    if v.is_cuda and not is_exporting():
        return "triton" if _triton_is_best(v.device, v.dtype, large) else "native"
    if torch.compiler.is_compiling():
        return "native"
    many = math.prod(v.shape[1:]) >= CONV_VALUES
    return "conv" if v.device.type == "cpu" and many and _onednn_takes(v.dtype) else "native"


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this processor has oneDNN's depthwise convolution, forward and backward, in that dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_takes_bf16())


def dynamic_depthwise_conv(
    v: torch.Tensor, kernels: torch.Tensor, backend: str = "auto", kernel_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """The operator on arguments that fit; see `sit_atconv.ops.atconv.dynamic_depthwise_conv`."""
    sizes = reference.sides(kernel_size, v.ndim - 2, kernels.shape[1])
    chosen = choose_backend(v, backend, max(sizes))
    # Inductor sees nothing of a custom operator; of the plain forms it makes loops of its own, with sums in fp32.
    if torch.compiler.is_compiling() and (chosen == "native" or not sees_tangents()):
        return inlined.dynamic_depthwise_conv(v, kernels, sizes)
    if chosen == "reference":
        return reference.dynamic_depthwise_conv(v, kernels, sizes)
    return convolution(v, kernels, False, chosen, *([sizes] if len(set(sizes)) > 1 else []))
