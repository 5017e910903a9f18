"""The Triton kernels without a GPU (interpreted, and compiled ahead of time), and with one.

The first shows that they are right, the second that they compile to what they were laid out for; neither shows a speed.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import slowly

pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")
from ops.ahead_of_time import launches, resources, widths
from ops.triton_interpreted import assert_as_exact_as_fp32_sums_allow

from sit_atconv.ops.atconv import operator, triton_kernels, triton_launch, triton_pooling, triton_taps


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


# By name: what launches a kernel, at a dtype, a kernel size and a number of channels. All tests of compiled code take
# every row.
CALLS = {
    "dynamic_depthwise_conv": lambda dtype, k, c: launches(
        triton_kernels.dynamic_depthwise_conv, meta(dtype, 2, 64, 64, c), meta(dtype, 2, k * k, c)
    ),
    "grad_v": lambda dtype, k, c: launches(triton_kernels.grad_v, meta(dtype, 2, 64, 64, c), meta(dtype, 2, k * k, c)),
    "grad_kernels": lambda dtype, k, c: launches(
        triton_kernels.grad_kernels, meta(dtype, 2, 64, 64, c), meta(dtype, 2, 64, 64, c), k
    ),
    "pool raster": lambda dtype, k, c: launches(triton_pooling.pool_tokens, meta(dtype, 2, 64, 64, c), k, "raster"),
    "pool grid": lambda dtype, k, c: launches(triton_pooling.pool_tokens, meta(dtype, 2, 64, 64, c), k, "grid"),
    "spread raster": lambda dtype, k, c: launches(
        triton_pooling.spread_tokens, meta(dtype, 2, k * k, c), 64, 64, k, "raster"
    ),
    "spread grid": lambda dtype, k, c: launches(
        triton_pooling.spread_tokens, meta(dtype, 2, k * k, c), 64, 64, k, "grid"
    ),
}


@pytest.mark.parametrize("marked", ["not slow", *slowly(["slow"])])
def test_interpreted_kernels(marked):
    cases = map(str, Path(__file__).parent.glob("*_interpreted.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout


def widest(channels: int, dtype: torch.dtype) -> int:
    """Bits of the widest access that rows of so many channels allow: each must be aligned to its own size."""
    row = channels * dtype.itemsize
    return min(128, 8 * (row & -row))


@pytest.mark.parametrize(
    ("dtype", "k", "arch", "channels"),
    [
        (torch.bfloat16, 3, 90, 1152), (torch.float32, 5, 80, 70),
        *slowly([
            (dtype, k, arch, channels)
            for dtype in (torch.bfloat16, torch.float32) for k in (3, 5) for arch in (80, 90)
            for channels in (1152, 384, 70)
            if (dtype, k, arch, channels) not in ((torch.bfloat16, 3, 90, 1152), (torch.float32, 5, 80, 70))
        ]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", CALLS)
def test_compiled_kernels_spill_nothing_and_access_all_that_alignment_allows(name, dtype, k, arch, channels, tmp_path):
    for launch in CALLS[name](dtype, k, channels):
        binary = launch.compiled(arch)
        used, loads, stores = resources(binary, tmp_path), widths(binary, "ld"), widths(binary, "st")
        print(launch.name, used, "loads", loads, "stores", stores, "shared", binary.metadata.shared)
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert loads == {widest(channels, launch.tensors[0].dtype)}
        if launch.kernel in (triton_kernels.convolution_kernel, triton_pooling.spread_kernel):  # they sum no positions
            assert stores == {widest(channels, dtype)}
            assert binary.metadata.shared == 0, "threads exchange what each could have loaded for itself"


@pytest.mark.parametrize(
    ("dtype", "sizes", "arch", "channels"),
    [
        (torch.bfloat16, (3, 3, 3), 90, 1536),
        *slowly([
            (dtype, sizes, arch, channels)
            for dtype in (torch.bfloat16, torch.float32) for arch in (80, 90) for channels in (1536, 70)
            for sizes in ((3, 3, 3), (1, 3, 3), (3, 1, 1), (5, 5, 5), (7, 7, 7))
            if (dtype, sizes, arch, channels) != (torch.bfloat16, (3, 3, 3), 90, 1536)
        ]),
    ],
)  # fmt: skip
def test_compiled_kernels_of_volumes_spill_nothing(dtype, sizes, arch, channels, tmp_path):
    v, kernels = meta(dtype, 2, 8, 30, 52, channels), meta(dtype, 2, math.prod(sizes), channels)
    for launch in (
        *launches(triton_kernels.dynamic_depthwise_conv, v, kernels, sizes),
        *launches(triton_kernels.grad_v, v, kernels, sizes),
        *launches(triton_kernels.grad_kernels, v, v, sizes),
    ):
        binary = launch.compiled(arch)
        used = resources(binary, tmp_path)
        print(launch.name, dtype, sizes, arch, channels, used)
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert widths(binary, "ld") == {widest(channels, launch.tensors[0].dtype)}
        if launch.kernel is triton_kernels.convolution_kernel:
            assert widths(binary, "st") == {widest(channels, dtype)}
            assert binary.metadata.shared == 0, "threads exchange what each could have loaded for itself"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "channels"), [(80, 1152), (90, 1152), (90, 384), (90, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["dynamic_depthwise_conv", "grad_v", "grad_kernels"])
def test_the_largest_kernels_that_are_taken_spill_nothing(name, dtype, arch, channels, tmp_path):
    """Next to nothing where a line of channels is not aligned: ptxas then holds an address for each load."""
    for launch in CALLS[name](dtype, operator.TRITON_KERNEL, channels):
        binary = launch.compiled(arch)
        used = resources(binary, tmp_path)
        print(launch.name, dtype, arch, channels, used)
        assert used["LOCAL"] == 0
        assert used["STACK"] <= (64 if channels == 70 else 0), used
        assert widths(binary, "ld") == {widest(channels, launch.tensors[0].dtype)}


def test_positions_are_divided_in_32_bits_where_they_may_be():
    """A division of 64 bits is a routine of some hundred instructions, and there is one or two for each position."""
    for channels, wide in ((1152, False), (8, True)):
        (launch,) = CALLS["spread raster"](torch.bfloat16, 3, channels)
        assert bool(re.search(r"arith.divsi .*xi64", launch.compiled(90).asm["ttir"])) == wide


def test_a_spill_would_be_seen(tmp_path):
    (launch,) = CALLS["dynamic_depthwise_conv"](torch.bfloat16, 3, 1152)
    assert resources(launch.compiled(80, maxnreg=32), tmp_path)["STACK"] > 0


@pytest.mark.parametrize("name", CALLS)
def test_offsets_of_samples_are_widened_before_they_are_multiplied(name):
    """B * N * C passes 2**31: the product must not be taken in int32."""
    for launch in CALLS[name](torch.bfloat16, 3, 1152):
        ir = launch.compiled(80).asm["ttir"]
        products = set(re.findall(r"(%\S+) = arith.muli", ir))
        widened = re.findall(r"arith.extsi (%\S+) : i32 to i64", ir)
        assert widened
        assert not products & set(widened)
        pointers = set(re.findall(r"%(\w+): !tt.ptr", ir))
        offsets = set(re.findall(r"tt.addptr %(\w+), \S+ : !tt.ptr<\w+>, (i\d+)", ir))
        assert {(pointer, "i64") for pointer in pointers} <= offsets
        assert not {(pointer, "i32") for pointer in pointers} & offsets


def test_what_is_launched():
    """One kernel, and a second where positions are split; the transpose of the pooling never is."""

    def names(function, *arguments):
        return [launch.name for launch in launches(function, *arguments)]

    small, large = (meta(torch.bfloat16, 2, side, side, 1152) for side in (16, 64))
    pooled = meta(torch.bfloat16, 2, 9, 1152)
    assert names(triton_kernels.dynamic_depthwise_conv, large, pooled) == ["convolution_kernel"]
    assert names(triton_kernels.grad_v, large, pooled) == ["convolution_kernel"]
    assert names(triton_kernels.grad_kernels, large, large, 3) == ["grad_kernels_kernel", "add_kernel"]
    many = meta(torch.bfloat16, 64, 16, 16, 1152)
    assert names(triton_kernels.grad_kernels, many, many, 3) == ["grad_kernels_kernel"]
    for pool in ("raster", "grid"):
        assert names(triton_pooling.pool_tokens, small, 3, pool) == ["pool_kernel"]
        assert names(triton_pooling.pool_tokens, large, 3, pool) == ["pool_kernel", "add_kernel"]
        assert names(triton_pooling.spread_tokens, pooled, 64, 64, 3, pool) == ["spread_kernel"]


@pytest.mark.parametrize("tiles", [0, 1, 3, 4, 5, 31, 128, 1000])
@pytest.mark.parametrize("programs", [0, 1, 18, 36, 500, 5000])
def test_splits_hold_all_tiles_and_stay_few(tiles, programs):
    splits, tiles_per_split = triton_launch.splits_of(tiles, programs)
    assert splits >= 1
    assert splits * tiles_per_split >= tiles
    assert splits == 1 or splits * triton_launch.MIN_TILES <= tiles
    assert splits == 1 or splits * programs < triton_launch.PROGRAMS + programs


def test_positions_are_split_until_the_gpu_is_filled():
    assert triton_launch.splits_of(tiles=128, programs=18)[0] == 32
    assert triton_launch.splits_of(tiles=128, programs=500)[0] == 3
    assert triton_launch.splits_of(tiles=128, programs=5000)[0] == 1


def test_other_dtypes_are_refused():
    v, kernels = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.zeros(1, 9, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64.*use `conv`"):
        triton_kernels.dynamic_depthwise_conv(v, kernels)
    with pytest.raises(ValueError, match="float64"):
        triton_kernels.grad_v(v.float(), kernels)
    with pytest.raises(ValueError, match="float64"):
        triton_kernels.grad_kernels(v.float(), v, 3)


def test_tensors_of_several_devices_are_refused():
    """The address of another device's tensor would be read as one of this device."""
    v, kernels = torch.zeros(1, 2, 2, 2), meta(torch.float32, 1, 9, 2)
    says = r"tensors on cpu and meta: .* those of one device"
    with pytest.raises(ValueError, match=says):
        triton_kernels.dynamic_depthwise_conv(v, kernels)
    with pytest.raises(ValueError, match=says):
        triton_kernels.grad_kernels(v, v.to("meta"), 3)
    with pytest.raises(ValueError, match=says):
        triton_taps.tap_kernels(torch.zeros(1, 9, 2), meta(torch.float32, 9, 9), None, None, "silu", "full")


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
