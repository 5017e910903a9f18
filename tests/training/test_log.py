"""Means by time, lines that a full disk keeps waiting, and what trackers are given."""

import json
import math
import os

import pytest
import torch
from accelerate import Accelerator

from sit_atconv.training import log
from sit_atconv.training.log import Log, Means, for_trackers, peak_flops, peak_memory


def test_means_are_over_samples_and_by_time():
    means = Means(["loss", "repa_loss"], torch.device("cpu"))
    means.add(
        torch.tensor([0.0, 0.05, 0.1, 1.0]), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    )
    means.add(torch.tensor([0.15]), torch.tensor([6.0]), torch.tensor([1.0]))
    row = means.row(means.reduced(Accelerator(cpu=True)))
    assert row["loss"] == pytest.approx(21 / 5)
    assert row["repa_loss"] == pytest.approx(3 / 5)
    assert row["loss_by_time"] == [1.5, 5.0, *[None] * 7, 8.0]
    means.reset()
    assert means.row(means.sums)["loss"] is None


def test_a_loss_that_is_not_finite_does_not_spoil_the_means():
    means = Means(["loss"], torch.device("cpu"))
    means.add(torch.tensor([0.5, 0.51]), torch.tensor([float("nan"), 2.0]))
    row = means.row(means.sums)
    assert row["loss"] == row["loss_by_time"][5] == 2.0


def test_no_line_has_what_json_has_not(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 1, "loss": math.inf, "bins": [1.0, math.nan, None], "sampling": {"norm": -math.inf, "steps": 2}})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "bins": [1.0, None, None], "sampling": {"norm": None, "steps": 2}}


def test_a_restart_drops_the_lines_past_its_step_and_the_cut_one(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step"')
    Log(file, 2).write({"step": 3, "loss": float("inf")})
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'


def test_lines_that_are_no_reports_are_left_out_with_a_warning(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n\0\0\0\ngarbage \xff\n[1]\n{"loss": 2}\n{"step": "x"}\n{"step": 2}\n')
    Log(file, 9)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "5 lines that are no reports are left out" in capsys.readouterr().err


def test_lines_that_the_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    file = tmp_path / "log.jsonl"
    lines = Log(file, 0)
    lines.write({"step": 1})

    class Full:
        """A file that takes half of what it is given and then fails, as on a full disk."""

        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.real.close()

        def write(self, text):
            self.real.write(text[: len(text) // 2])
            self.real.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log, "open", lambda *args: Full(open(*args)), raising=False)  # noqa: SIM115
        lines.write({"step": 2})
        lines.write({"step": 3})
    assert capsys.readouterr().err.count("No space left") == 1
    lines.write({"step": 4})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_trackers_get_numbers_alone():
    row = {"step": 3, "loss": 0.5, "peak_share": None, "loss_by_time": [1.0, None, 3.0, 4.0], "sampling": {"x": 1}}
    numbers = {"step": 3, "loss": 0.5, "loss_by_time/0.12": 1.0, "loss_by_time/0.62": 3.0, "loss_by_time/0.88": 4.0}
    assert for_trackers(row) == numbers


def test_memory_is_what_the_process_holds():
    ballast = bytearray(os.urandom(1 << 20) * 64)
    assert len(ballast) < peak_memory(torch.device("cpu")) < 1 << 40


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "tf32", 378), ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5), ("NVIDIA L40S", "bf16", 362), ("NVIDIA L40", "bf16", 181),
        ("NVIDIA H200", "tf32", 494), ("NVIDIA GH200 480GB", "bf16", 989), ("NVIDIA RTX A1000", "bf16", None),
        ("Some other card", "bf16", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_card(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cpu"), precision) is None
