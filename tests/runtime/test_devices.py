"""What the devices' helpers say, and leave as it was."""

import logging
import subprocess
import sys

import pytest
import torch

from sit_atconv.runtime.devices import FP32_SWITCHES, check_bf16, computing, import_compiler
from sit_atconv.runtime.errors import InputError


def test_the_compiler_comes_without_a_word_of_a_cuda_that_is_not_there(monkeypatch, tmp_path, caplog):
    name = "torch.utils.cpp_extension"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    level = logging.getLogger(name).level
    import_compiler()
    assert name in sys.modules
    assert caplog.records == []
    assert logging.getLogger(name).level == level


# In a process of its own: what a switch inherits cannot be told from what it was set to, and comes back as the latter.
SWITCHES = """
import itertools, warnings
import torch
from sit_atconv.runtime.devices import CPU_SWITCHES, CUDA_SWITCHES, FP32_SWITCHES, numerics

warnings.simplefilter("error")
backends = torch.backends

def old():
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

def set_old(tf32):
    torch.set_float32_matmul_precision("medium" if tf32 else "highest")  # medium: bf16, in oneDNN
    backends.cudnn.allow_tf32 = tf32

wanted = {False: ("ieee", ("highest", False, False)), True: ("tf32", ("high", True, True))}
outside = [lambda value=value: set_old(value) for value in (True, False)]
for switch in (backends, backends.cudnn, backends.mkldnn, *FP32_SWITCHES):
    for value in ("tf32", "ieee", "none"):
        outside.append(lambda switch=switch, value=value: setattr(switch, "fp32_precision", value))
for set_before, tf32, again in itertools.product(outside, wanted, wanted):
    set_before()
    before = [switch.fp32_precision for switch in FP32_SWITCHES]
    with numerics(tf32):
        with numerics(again):
            for value, each in ((again, CUDA_SWITCHES), (False, CPU_SWITCHES)):
                assert {switch.fp32_precision for switch in each} == {wanted[value][0]}
            assert old() == wanted[again][1], old()
        assert {switch.fp32_precision for switch in CUDA_SWITCHES} == {wanted[tf32][0]}
        assert old() == wanted[tf32][1], old()
    assert [switch.fp32_precision for switch in FP32_SWITCHES] == before
set_old(True)
with numerics():
    pass
assert old() == ("medium", True, True), old()
"""


def test_both_sets_of_switches_say_what_was_asked_for_whatever_was_set_before():
    done = subprocess.run([sys.executable, "-c", SWITCHES], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("around", ["fp32", "bf16"])
def test_a_network_computes_in_its_own_precision_whatever_is_around(around):
    cpu, layer, x = torch.device("cpu"), torch.nn.Linear(64, 64), torch.randn(4, 64)

    def seen():
        return layer(x).dtype, torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    full, half = (torch.float32, "ieee", "ieee"), (torch.bfloat16, "ieee", "ieee")
    before = [switch.fp32_precision for switch in FP32_SWITCHES]
    with computing(around, cpu):
        outside = seen()
        assert outside == (full if around == "fp32" else half)
        for precision, wanted in (
            ("fp32", full), ("tf32", (torch.float32, "tf32", "tf32")), ("bf16", half), (None, outside)
        ):  # fmt: skip
            with computing(precision, cpu):
                assert seen() == wanted
        assert seen() == outside
    assert [switch.fp32_precision for switch in FP32_SWITCHES] == before


def test_bf16_is_refused_on_a_gpu_that_has_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Old GPU")
    with pytest.raises(InputError, match=r"^latents\.precision=bf16: Old GPU has no bf16; use fp32 or tf32$"):
        check_bf16("latents.precision=bf16", torch.device("cuda"))
    check_bf16("latents.precision=bf16", torch.device("cpu"))
