"""Triton kernels compiled without a GPU, as the functions that launch them would have them compiled."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; arguments: all of them by name, but the launch's options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]

    def compiled(self, arch: int, **changes):
        """The binary for a device such as sm_90, with the hints that the JIT gives for aligned tensors."""
        constants = {  # what is None is one to the JIT
            p.name: self.arguments[p.name]
            for p in self.kernel.params if p.is_constexpr or self.arguments[p.name] is None
        }  # fmt: skip
        signature, hints = {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name], hints[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif parameter.name in constants:
                signature[parameter.name] = "constexpr"
            else:
                assert parameter.do_not_specialize, f"{parameter.name}: a binary for every size"
                signature[parameter.name] = "i32"
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=hints)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**self.options, **changes})


def launches(function: Callable, *arguments) -> list[Launch]:
    """What function(*arguments) launches; of tensors on the meta device nothing is computed."""
    seen = []

    def record(kernel, *arguments, grid, warmup, **named):
        names = kernel.arg_names
        options = {name: value for name, value in named.items() if name not in names}
        given = dict(zip(names, arguments, strict=False)) | {n: v for n, v in named.items() if n in names}
        seen.append(Launch(kernel, grid, given, options))

    with mock.patch.object(JITFunction, "run", record):
        function(*arguments)
    return seen


def resources(binary, folder: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of a compiled kernel; what spills lies on the stack."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    shown = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def widths(binary, kind: str) -> set[int]:
    """Bits that one thread's accesses to the device's memory take at once; kind: ld or st."""
    accesses = re.findall(rf"{kind}\.global\S*", binary.asm["ptx"])
    found = [re.search(r"(?:\.v(\d))?\.[bfus](\d+)$", access).groups() for access in accesses]
    return {int(vector or 1) * int(element) for vector, element in found}
