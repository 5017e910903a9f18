"""The Triton kernels that make ATConv's kernels, compiled ahead of time, and the tokens that they are taken for.

`triton_taps_interpreted` shows that they are right; nothing here shows a speed.
"""

import math
import re

import pytest
import torch
from conftest import slowly
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv import ATConv
from sit_atconv.ops.atconv import BACKEND_VARIABLE, taps
from sit_atconv.ops.atconv.reference import sides
from sit_atconv.runtime.errors import InputError

pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")
from ops.ahead_of_time import launches, resources, widths

from sit_atconv.ops.atconv import triton_taps
from sit_atconv.ops.atconv.tiles import TapTile


def launched(dtype, k, channels, activation="gelu_tanh", inhibition="learned", bias=True, batch=256):
    """The launches of forward and gradient, parameters in fp32, as under autocast."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    taps = math.prod(sides(k, 2))
    p, weight = meta(batch, taps, channels, dtype=dtype), meta(taps, taps)
    parameters = weight, meta(taps) if bias else None, meta(channels) if inhibition == "learned" else None
    forward = launches(triton_taps.tap_kernels, p, *parameters, activation, inhibition)
    return forward, launches(triton_taps.grads, p, p, *parameters, activation, inhibition)


def width(dtype, k, channels) -> int:
    """Bits that a thread takes of a line at once: what alignment, its share of the line, and the device allow."""
    tile, rows = triton_taps.tile_of(k * k), {1: 16, 3: 16, 5: 32, 7: 64}[k]
    row = channels * dtype.itemsize
    share = rows * tile.channels // (32 * tile.warps) * dtype.itemsize
    return 8 * min(16, row & -row, share)


@pytest.mark.parametrize(
    ("dtype", "k", "arch", "channels"),
    [
        (torch.bfloat16, 3, 90, 1152),
        *slowly([
            (dtype, k, arch, channels)
            for dtype in (torch.bfloat16, torch.float32) for k in (3, 5) for arch in (80, 90)
            for channels in (1152, 384, 70)
            if (dtype, k, arch, channels) != (torch.bfloat16, 3, 90, 1152)
        ]),
        *slowly([(dtype, k, 90, 384) for dtype in (torch.float16, torch.float32) for k in (1, 7)]),
    ],
)  # fmt: skip
def test_compiled_kernels_spill_nothing_and_access_whole_words(dtype, k, arch, channels, tmp_path):
    forward, gradient = launched(dtype, k, channels)
    assert [len(forward), len(gradient)] == [1, 2]
    for launch in (*forward, *gradient):
        binary = launch.compiled(arch)
        used, loads, stores = resources(binary, tmp_path), widths(binary, "ld"), widths(binary, "st")
        print(launch.name, used, "loads", loads, "stores", stores, "shared", binary.metadata.shared)
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert "mma" not in binary.asm["ptx"], "tf32 has 11 bits; the interpreter knows no product but fp32's"
        if launch.kernel is not triton_taps.sum_kernel:
            assert width(dtype, k, channels) in loads
            assert width(dtype, k, channels) in stores
        if launch.kernel is triton_taps.tap_kernels_kernel:
            assert stores == {width(dtype, k, channels)}


@pytest.mark.parametrize(
    ("activation", "inhibition", "bias", "k"),
    [
        ("silu", "full", False, 3),
        *slowly([("gelu", "none", True, 3), ("gelu", "learned", False, 5), ("silu", "none", False, 5)]),
    ],
)
def test_every_form_compiles_without_spills(activation, inhibition, bias, k, tmp_path):
    forward, gradient = launched(torch.bfloat16, k, 1152, activation, inhibition, bias)
    for launch in (*forward, *gradient):
        assert resources(launch.compiled(90), tmp_path)["STACK"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 1, 1)])
def test_those_of_volumes_do_too(sizes, dtype, tmp_path):
    forward, gradient = launched(dtype, sizes, 1536)
    for launch in (*forward, *gradient):
        for arch in (80, 90):
            assert resources(launch.compiled(arch), tmp_path)["STACK"] == 0


def test_offsets_of_samples_are_64_bits_wide():
    """B * K * C passes 2**31: the product must not be taken in int32."""
    (forward,), (gradient, _) = launched(torch.bfloat16, 3, 1152)
    for launch, names in ((forward, {"p", "kernels"}), (gradient, {"p", "upstream", "grad_p"})):
        ir = launch.compiled(90).asm["ttir"]
        assert re.search(r"arith.muli %\S+, %\S+ : i64", ir)
        assert {(name, "i64") for name in names} <= set(re.findall(r"tt.addptr %(\w+), \S+ : !tt.ptr<\w+>, (i\d+)", ir))


@pytest.mark.parametrize(("batch", "channels"), [(1, 70), (2, 1152), (256, 1152), (4096, 64)])
def test_programs_fill_the_device_and_partial_sums_stay_few(batch, channels):
    (forward,), (gradient, _) = launched(torch.bfloat16, 3, channels, batch=batch)
    blocks = -(-channels // 64)
    for launch, most in ((forward, 2048), (gradient, 512)):
        (programs,), samples = launch.grid, launch.arguments["samples"]
        assert batch <= programs // blocks * samples < batch + samples
        assert programs <= most
        assert samples == 1 or programs > most // 2


def test_wrong_tiles_are_refused():
    for wrong in ((8, 4, 1, 1), (24, 4, 1, 1), (16, 3, 1, 1), (16, 4, 0, 1), (16, 4, 1, 0)):
        with pytest.raises(InputError, match="of a tile: give"):
            TapTile(*wrong)


# ---- which tokens it is taken for


def made_of(device: str, dtype=torch.float32, **options) -> tuple[torch.Tensor | None, list]:
    """What a layer's operator gives for projected tokens on a device that need not be there, and what ran for it."""
    layer = ATConv(64, dtype=dtype, **options)
    return of_layer(layer, device, dtype)


def of_layer(layer: ATConv, device: str, dtype=torch.float32) -> tuple[torch.Tensor | None, list]:
    with FakeTensorMode(allow_non_fake_inputs=True), Recorded() as recorded:
        projected = torch.empty(2, layer.kernel_size**2, 64, device=device, dtype=dtype)
        recorded.operators.clear()
        kernels = layer._by_operator(projected)
    return kernels, [each for each in recorded.operators if each.namespace != "prim"]


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"inhibition": "none", "bias": False, "kernel_size": 7}], ids=str)
def test_on_cuda_one_operator_makes_the_kernels(options, dtype):
    kernels, operators = made_of("cuda", dtype, **options)
    assert operators == [taps.forward]
    assert (kernels.dtype, kernels.device.type) == (dtype, "cuda")
    assert kernels.shape == (2, ATConv(64, **options).kernel_size ** 2, 64)


@pytest.mark.parametrize(
    ("device", "dtype", "options"),
    [("cpu", torch.float32, {}), ("cuda", torch.float32, {"kernel_size": 9}), ("cuda", torch.float64, {})],
    ids=str,
)
def test_elsewhere_it_does_not(device, dtype, options):
    assert made_of(device, dtype, **options) == (None, [])


def test_dtypes_are_mixed_under_autocast_alone(monkeypatch):
    layer = ATConv(64)
    assert of_layer(layer, "cuda", torch.bfloat16) == (None, [])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # without one, torch refuses
    kernels, operators = of_layer(layer, "cuda", torch.bfloat16)
    assert operators == [taps.forward]
    assert kernels.dtype == torch.bfloat16


def test_another_backend_is_taken_at_its_word(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "native")
    assert made_of("cuda") == (None, [])


def test_its_flops_are_those_of_the_product():
    with FakeTensorMode():
        p, weight = torch.randn(2, 9, 64, requires_grad=True), torch.randn(9, 9, requires_grad=True)
        with FlopCounterMode(display=False) as counted:
            taps.tap_kernels(p, weight, None, None, "silu", "full").sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 2 * 9 * 9 * 64
