"""The Triton kernels without a GPU (interpreted, and compiled ahead of time), and with one.

The first shows that they are right, the second that they compile to what they were laid out for; neither shows a speed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import slowly

triton = pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")
from ops.triton_interpreted import assert_as_exact_as_fp32_sums_allow  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sit_atconv.ops.atconv import triton_kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = ("dynamic_depthwise_conv", "grad_v", "grad_kernels")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def test_interpreted_kernels():
    cases = Path(__file__).with_name("triton_interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout


def compiled(name: str, dtype: torch.dtype, k: int, arch: int, **changes):
    """A kernel as the wrappers launch it at C = 1152, with the hints that the JIT gives for aligned tensors."""
    if name == "grad_kernels":
        kernel = triton_kernels.grad_kernels_kernel
        constants = triton_kernels.grad_kernels_constants(dtype, 1152, k)
    else:
        kernel = triton_kernels.convolution_kernel
        constants = triton_kernels.convolution_constants(dtype, 1152, k, flip=name == "grad_v")
    types = dict.fromkeys(("v", "kernels", "grad_y", "y"), f"*{NAMES[dtype]}") | {"partial": "*fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": triton_kernels.WARPS, **changes}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(binary, folder: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of a compiled kernel; what spills lies on the stack."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    shown = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


def accesses(binary, kind: str) -> list[str]:
    return re.findall(rf"{kind}\.global\S*", binary.asm["ptx"])


def bits(access: str) -> int:
    vector, element = re.search(r"(?:\.v(\d))?\.[bfus](\d+)$", access).groups()
    return int(vector or 1) * int(element)


@pytest.mark.parametrize(
    ("dtype", "k", "arch"),
    [
        (torch.bfloat16, 3, 90), (torch.float32, 5, 80),
        *slowly([
            (torch.bfloat16, 5, 90), (torch.float32, 3, 90), (torch.float32, 5, 90),
            (torch.bfloat16, 3, 80), (torch.bfloat16, 5, 80), (torch.float32, 3, 80),
        ]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernels_spill_nothing_and_load_128_bits(name, dtype, k, arch, tmp_path):
    binary = compiled(name, dtype, k, arch)
    used = resources(binary, tmp_path)
    print(used)
    assert used["STACK"] == used["LOCAL"] == 0, used
    loads, stores = accesses(binary, "ld"), accesses(binary, "st")
    assert loads
    assert {bits(load) for load in loads} == {128}, loads
    if name != "grad_kernels":
        assert {bits(store) for store in stores} == {128}, stores
        assert binary.metadata.shared == 0, "threads exchange what each could have loaded for itself"


def test_a_spill_would_be_seen(tmp_path):
    assert resources(compiled("dynamic_depthwise_conv", torch.bfloat16, 3, 80, maxnreg=32), tmp_path)["STACK"] > 0


@pytest.mark.parametrize("name", KERNELS)
def test_offsets_of_samples_are_widened_before_they_are_multiplied(name):
    """B * N * C passes 2**31: the product must not be taken in int32."""
    ir = compiled(name, torch.bfloat16, 3, 80).asm["ttir"]
    products = set(re.findall(r"(%\S+) = arith.muli", ir))
    widened = re.findall(r"arith.extsi (%\S+) : i32 to i64", ir)
    assert widened
    assert not products & set(widened)
    pointers = set(re.findall(r"%(\w+): !tt.ptr", ir))
    offsets = set(re.findall(r"tt.addptr %(\w+), \S+ : !tt.ptr<\w+>, (i\d+)", ir))
    assert {(pointer, "i64") for pointer in pointers} <= offsets
    assert not {(pointer, "i32") for pointer in pointers} & offsets


@pytest.mark.parametrize("tiles", [0, 1, 3, 4, 5, 31, 128, 1000])
@pytest.mark.parametrize("programs", [0, 1, 18, 36, 500, 5000])
def test_splits_hold_all_tiles_and_stay_few(tiles, programs):
    splits, tiles_per_split = triton_kernels.splits_of(tiles, programs)
    assert splits >= 1
    assert splits * tiles_per_split >= tiles
    assert splits == 1 or splits * triton_kernels.MIN_TILES <= tiles
    assert splits == 1 or splits * programs < triton_kernels.PROGRAMS + programs


def test_positions_are_split_until_the_gpu_is_filled():
    assert triton_kernels.splits_of(tiles=128, programs=18)[0] == 32
    assert triton_kernels.splits_of(tiles=128, programs=500)[0] == 3
    assert triton_kernels.splits_of(tiles=128, programs=5000)[0] == 1


def test_other_dtypes_are_refused():
    v, kernels = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.zeros(1, 9, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*use `conv`"):
        triton_kernels.dynamic_depthwise_conv(v, kernels)
    with pytest.raises(ValueError, match="float64"):
        triton_kernels.grad_v(v.float(), kernels)
    with pytest.raises(ValueError, match="float64"):
        triton_kernels.grad_kernels(v.float(), v, 3)


def test_samples_past_int32_are_refused():
    v = torch.empty(1, 2**8, 2**8, 2**15, device="meta")
    with pytest.raises(ValueError, match=r"2\*\*31.*use `conv`"):
        triton_kernels.grad_kernels(v, v, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_exact_on_a_gpu(dtype, k):
    generator = torch.Generator().manual_seed(k)
    draws = [
        torch.randn(2, *size, 1152, generator=generator).to("cuda", dtype) for size in ((32, 32), (k * k,), (32, 32))
    ]
    assert_as_exact_as_fp32_sums_allow(*draws)
