"""The dynamic depthwise convolution as one torch operator over the backends, and the rule that chooses among them.

`sit_atconv::dynamic_depthwise_conv` and `sit_atconv::dynamic_depthwise_conv_grad_kernels` differentiate into each
other, so derivatives of any order exist, reverse and forward, and every one of them runs on the backend of the forward.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from sit_atconv.ops.atconv import conv, inlined, native, reference
from sit_atconv.ops.forward_mode import forward_mode, levels
from sit_atconv.runtime.compat.torch import (
    SingleLevelFunction,
    any_requires_grad,
    enable_single_level_autograd_function,
    is_forward_grad_enabled,
    onednn_takes_bf16,
    redispatch_below_autograd,
    set_forward_grad_enabled,
)
from sit_atconv.runtime.errors import InputError, check_choice

# Of the operators in torch.ops: the package's name. An exported pipeline has this module in a package of another name
# (`pipelines.bundle`), since it may be loaded beside this one or beside an export of another version.
NAMESPACE = __package__.split(".")[-3]
BACKENDS = ("auto", "reference", "conv", "native", "triton")
BACKEND_VARIABLE = "SIT_ATCONV_BACKEND"
CONV_VALUES = 2**16  # values of a sample from which `conv` is the faster one on a CPU
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _backend(name: str):
    """The module of a backend: it has `dynamic_depthwise_conv`, `grad_v` and `grad_kernels`."""
    if name == "triton":
        from sit_atconv.ops.atconv import triton_kernels  # here, since triton exists on few platforms

        return triton_kernels
    return {"conv": conv, "native": native}[name]


def _by_rows(v: torch.Tensor) -> torch.Tensor:
    """v (B, H, W, C), a copy if its channels do not lie side by side and row after row, as the backends read fast.

    Measured in fp32 at (1, 64, 64, 288) on a Xeon core, as it lies / with the copy, in ms: a channels-first map 65 / 10
    by `native`, and one with the columns outside the rows 27 / 11 by `conv`.
    """
    _, rows, columns, channels = v.stride()
    return v if channels == 1 and columns <= rows else v.contiguous()


def _convolve(v: torch.Tensor, kernels: torch.Tensor, flip: bool, backend: str) -> torch.Tensor:
    """y[p] = sum_t kernels[t] * v[p + offset t], or with `flip` v[p - offset t]; contiguous (B, H, W, C)."""
    module = _backend(backend)
    return (module.grad_v if flip else module.dynamic_depthwise_conv)(_by_rows(v), kernels)


def _correlate(v: torch.Tensor, grad_y: torch.Tensor, kernel_size: int, backend: str) -> torch.Tensor:
    """dK[t] = sum_p grad_y[p] * v[p + offset t]; contiguous (B, K, C)."""
    return _backend(backend).grad_kernels(_by_rows(v), _by_rows(grad_y), kernel_size)


def _fake_convolution(v, kernels, flip, backend):
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _fake_grad_kernels(v, grad_y, kernel_size, backend):
    return torch.empty((v.shape[0], kernel_size**2, v.shape[-1]), dtype=v.dtype, device=v.device)


def _differentiate_convolution(ctx, upstream):
    (v, kernels), (flip, backend) = ctx.saved_tensors, ctx.settings
    to_v = convolution(upstream, kernels, not flip, backend) if kernels is not None else None
    to_kernels = None
    if v is not None:
        source, above = (upstream, v) if flip else (v, upstream)
        to_kernels = grad_kernels(source, above, math.isqrt(ctx.rows), backend)
    return to_v, to_kernels


def _differentiate_grad_kernels(ctx, upstream):
    (v, grad_y), (_, backend) = ctx.saved_tensors, ctx.settings
    to_v = convolution(grad_y, upstream, True, backend) if grad_y is not None else None
    to_grad_y = convolution(v, upstream, False, backend) if v is not None else None
    return to_v, to_grad_y


def _differentiable(operator, differentiate: Callable) -> Callable:
    """What `operator` (first, second, *settings), linear in each of its two tensors, does under the key Autograd.

    `custom_op.register_autograd` knows no forward mode: without a gradient to keep it drops tangents without a word,
    and it refuses the transforms of torch.func. As there, the function runs only where something is to be kept.
    """

    class Bilinear(SingleLevelFunction):
        @staticmethod
        def forward(keyset, grad, tangents, *arguments):
            if not levels():
                return redispatch_below_autograd(operator, keyset, arguments)
            # The levels below this one differentiate on; `apply` has switched that off for all of them.
            with torch.set_grad_enabled(grad), set_forward_grad_enabled(tangents):
                return redispatch_below_autograd(operator, keyset, arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, _, ctx.tangents, first, second, *ctx.settings = inputs
            ctx.rows = second.shape[1]
            *_, needs_first, needs_second = ctx.needs_input_grad[:5]
            # Each gradient needs the other's tensor alone.
            ctx.save_for_backward(first if needs_second else None, second if needs_first else None)
            ctx.save_for_forward(first, second)

        @staticmethod
        def backward(ctx, upstream):
            return None, None, None, *differentiate(ctx, upstream), *(None for _ in ctx.settings)

        @staticmethod
        def jvp(ctx, keyset, grad, tangents, to_first, to_second, *_):
            # Torch switches tangents off here, and a jvp of a jvp would lose the outer one's. With them on, what
            # was saved must not bring its own.
            with set_forward_grad_enabled(ctx.tangents):
                first, second = (unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors)
                parts = [] if to_first is None else [operator(to_first, second, *ctx.settings)]
                if to_second is not None:
                    parts.append(operator(first, to_second, *ctx.settings))
                return sum(parts[1:], parts[0])

    def kernel(keyset, *arguments):
        transformed = levels()
        if transformed or forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*arguments)):
            state = keyset, torch.is_grad_enabled(), is_forward_grad_enabled()
            with enable_single_level_autograd_function() if transformed else nullcontext():
                return Bilinear.apply(*state, *arguments)
        return redispatch_below_autograd(operator, keyset, arguments)

    return kernel


def _batched(operator):
    """vmap: samples are independent, so the mapped dimension joins the batch."""

    def rule(info, in_dims, first, second, *settings):
        tensors = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip((first, second), in_dims[:2], strict=True)
        ]
        result = operator(*(tensor.flatten(0, 1) for tensor in tensors), *settings)
        return result.unflatten(0, (info.batch_size, -1)), 0

    return rule


def _convolution_flops(v_shape, kernels_shape, *_, **__) -> int:
    return 2 * math.prod(v_shape) * kernels_shape[1]


def _grad_kernels_flops(v_shape, grad_y_shape, kernel_size, *_, **__) -> int:
    return 2 * math.prod(v_shape) * kernel_size**2


def _operator(name: str, function: Callable, fake: Callable, differentiate: Callable, flops: Callable):
    """The torch operator NAMESPACE::name, defined unless it is there already: this source may be imported twice."""
    operators = getattr(torch.ops, NAMESPACE)
    if not hasattr(operators, name):
        # Not torch.library.custom_op: it takes the key Autograd, and torch 2.11 refuses a second kernel there.
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        packet = getattr(operators, name)
        packet.library = library  # its end would be the operator's: it outlives this module
        library.impl(name, function, "CompositeExplicitAutograd")
        library.impl(name, _differentiable(packet.default, differentiate), "Autograd", with_keyset=True)
        torch.library.register_fake(packet.default, fake, lib=library)
        torch.library.register_vmap(packet.default, _batched(packet.default), lib=library)
        register_flop_formula(packet)(flops)
    return getattr(operators, name).default


convolution = _operator(
    "dynamic_depthwise_conv",
    _convolve,
    _fake_convolution,
    _differentiate_convolution,
    _convolution_flops,
)
grad_kernels = _operator(
    "dynamic_depthwise_conv_grad_kernels",
    _correlate,
    _fake_grad_kernels,
    _differentiate_grad_kernels,
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


def _triton_refusal(v: torch.Tensor) -> str | None:
    """Why Triton cannot run on v, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if v.dtype == torch.float64:
        return "it has no float64 form"
    if not v.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tokens are on {v.device}, not on a CUDA device"
    if v.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(v.device) < (8, 0):
        return "the device has a compute capability below 8.0"
    return None


def choose_backend(v: torch.Tensor, backend: str = "auto") -> str:
    """The backend that v (B, H, W, C) runs on: the argument, else SIT_ATCONV_BACKEND, else by this rule.

    Under torch.compile `native`, which is inlined there. CUDA, 16 or 32 bits: `triton`, one pass over memory (chosen by
    construction: not measured yet). CPU, fp32, or bf16 where oneDNN has it, samples of CONV_VALUES values or more:
    `conv`, which costs 45 us a sample and little more. Everywhere else `native`. Measured forward, and forward with
    backward, `native` / `conv` in ms on 2 Xeon cores with AMX, fp32: (32, 8x8, 64) 0.16 / 1.48 and 0.84 / 5.2,
    (1, 16x16, 384) 0.13 / 0.10 and 0.78 / 0.57, (4, 16x16, 1152) 1.6 / 1.1 and 7.2 / 4.9, (1, 64x64, 1152) 6.6 / 1.0
    and 32 / 4.0; bf16: 0.22 / 1.43 and 0.95 / 5.1, 0.17 / 0.09 and 0.91 / 0.54, 1.9 / 0.7 and 8.0 / 2.4, 8.5 / 0.9 and
    35 / 4.0.
    On the meta device, where nothing is computed, it is `native` whatever was asked for.
    Raises ValueError for an unknown name and RuntimeError for `triton` where it cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    chosen = backend if backend != "auto" else _requested()
    if v.is_meta:
        return "native"
    if chosen == "triton" and (reason := _triton_refusal(v)):
        asked = f"backend={backend!r}" if backend != "auto" else f"{BACKEND_VARIABLE}={chosen}"
        raise CannotRun(f"{asked} cannot run here: {reason}; choose 'auto', 'native' or 'conv'")
    if chosen != "auto":
        return chosen
    if torch.compiler.is_compiling():
        return "native"
    if v.is_cuda:
        return "native" if _triton_refusal(v) else "triton"
    large = math.prod(v.shape[1:]) >= CONV_VALUES
    return "conv" if v.device.type == "cpu" and large and _onednn_takes(v.dtype) else "native"


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this processor has oneDNN's depthwise convolution, forward and backward, in that dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_takes_bf16())


def dynamic_depthwise_conv(v: torch.Tensor, kernels: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """The operator on arguments that fit; see `sit_atconv.ops.atconv.dynamic_depthwise_conv`."""
    chosen = choose_backend(v, backend)
    # Inductor sees nothing of a custom operator; of the plain forms it makes loops of its own, with sums in fp32. And a
    # custom operator cannot see that its graph makes dual tensors, unless a transform of torch.func does.
    if torch.compiler.is_compiling() and (chosen == "native" or (forward_mode() and not levels())):
        return inlined.dynamic_depthwise_conv(v, kernels)
    if chosen == "reference":
        return reference.dynamic_depthwise_conv(v, kernels)
    return convolution(v, kernels, False, chosen)
