"""The device that a command runs on, and torch's switches of precision."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sit_atconv.runtime.errors import InputError, option, told

# Of torch's newer switches (`fp32_precision`), those that operations ask: a network may enter any of them.
CUDA_SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
CPU_SWITCHES = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn
FP32_SWITCHES = CUDA_SWITCHES + CPU_SWITCHES


def resolve_device(name: str | None) -> torch.device:
    """The torch device of that name, by default CUDA where there is one. Raises InputError when it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with told(option("device", name), RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a meta tensor has no value
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what speaks of "the current device", such as events and memory counts, means it
    return device


def import_compiler() -> None:
    """Import what torch.compile imports on a CPU: later, it says on stderr that CUDA_HOME's CUDA finds no device."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module(logger.name)
    finally:
        logger.setLevel(level)


@contextmanager
def switches_kept() -> Iterator[None]:
    """torch's switches of precision, and cuDNN's, are afterwards as they were; so they are after an error.

    Both of torch's sets of them: operations ask either, and some refuse to run where they contradict.
    """
    cudnn = torch.backends.cudnn
    switches = [switch.fp32_precision for switch in FP32_SWITCHES]
    precision = _unless_contradicted(torch.get_float32_matmul_precision, "highest")
    allowed = _unless_contradicted(lambda: cudnn.allow_tf32, True)
    flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32 = allowed
        for switch, value in zip(FP32_SWITCHES, switches, strict=True):
            switch.fp32_precision = value
        for name, value in flags.items():
            setattr(cudnn, name, value)


def _unless_contradicted(read: Callable[[], Any], default: Any) -> Any:
    """What an old switch says; its default where the newer ones were set otherwise, when torch refuses to say."""
    try:
        return read()
    except RuntimeError:
        return default


@contextmanager
def numerics(tf32: bool = False, deterministic: bool = False) -> Iterator[None]:
    """TF32 is on or off within, in matrix products and convolutions on CUDA; else fp32 means fp32, whatever was set.

    deterministic: of two convolutions that differ in rounding, cuDNN always takes the same. Also a decorator.
    The newer switches decide. The older ones (`allow_tf32`, `float32_matmul_precision`) say the same: torch raises
    where code asks one that contradicts the newer, and torch's own compiler asks them.
    """
    with switches_kept():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for switch in CUDA_SWITCHES:
            switch.fp32_precision = "tf32" if tf32 else "ieee"
        for switch in CPU_SWITCHES:
            switch.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic |= deterministic
        yield


@contextmanager
def computing(precision: str | None, device: torch.device) -> Iterator[None]:
    """Within, networks of fp32 weights compute in "fp32", "tf32" (on CUDA, else fp32) or "bf16" (autocast), whatever is
    around; None: in what is around."""
    if precision is None:
        yield
        return
    with numerics(tf32=precision == "tf32"), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        yield


def check_bf16(key: str, device: torch.device) -> None:
    """Raise InputError where a GPU has no bf16. key: what asks for it, "train.precision=bf16"."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"{key}: {name} has no bf16; use fp32 or tf32")
