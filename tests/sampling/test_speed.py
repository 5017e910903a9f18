"""The timing harness: its statistics on a fake clock, its counts against known models."""

import json

import pytest
import torch

from sampling import speed
from sampling.__main__ import main as sampling
from sit_atconv import create_model


def test_medians_are_interleaved_and_per_call(monkeypatch):
    clock, order = [0.0], []
    durations = {"fast": iter([9.0, 1.0, 1.0, 1.0, 5.0]), "slow": iter([9.0, 3.0, 3.0, 7.0, 3.0])}
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(name):
        def function():
            order.append(name)
            clock[0] += next(durations[name])

        return function

    medians, spreads = speed.interleaved_medians([call("fast"), call("slow")], rounds=3)
    assert order == ["fast", "fast", "slow", "slow"] + ["fast", "slow"] * 3
    assert medians == [1.0, 3.0]
    assert spreads == [4.0, 4.0]


def test_short_calls_are_repeated_within_a_measurement(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call():
        calls.append(1)
        clock[0] += 0.004

    medians, _ = speed.interleaved_medians([call], rounds=2)
    assert len(calls) == 2 + 2 * 5
    assert medians == [pytest.approx(0.004)]


def test_peak_memory_is_weights_plus_activations():
    model = speed.random_model("SiT-S/8", 8)
    x = torch.randn(1, 4, 8, 8)
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    with torch.no_grad():
        small = speed.peak_bytes(model, x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
        large = speed.peak_bytes(model, x.repeat(64, 1, 1, 1), torch.zeros(64), torch.zeros(64, dtype=torch.long))
    assert weights < small < 1.01 * weights
    hidden = 64 * 1 * 4 * 384 * 4  # the MLP's hidden layer of 64 images with one token each
    assert large - small > hidden


def test_random_model_has_no_zero_gates():
    model = speed.random_model("SiT-ATConv-S/8", 8)
    assert all(parameter.any() for parameter in model.parameters())
    assert not any(parameter.any() for parameter in create_model("SiT-S/8", 8).final_layer.linear.parameters())


def test_command_writes_json_and_table(tmp_path, capsys):
    models = ["--models", "SiT-S/8", "SiT-ATConv-S/8"]
    sampling(["speed", *models, "--sizes", "64", "128", "--rounds", "2", "--batch", "2", "--out", f"{tmp_path}/speed"])
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["model"], row["size"]) for row in result["rows"]] == [
        ("SiT-S/8", 64), ("SiT-ATConv-S/8", 64), ("SiT-S/8", 128), ("SiT-ATConv-S/8", 128),
    ]  # fmt: skip
    assert result["rows"][0]["speedup"] == result["rows"][2]["speedup"] == 1.0
    for row in result["rows"]:
        base = next(other for other in result["rows"] if other["size"] == row["size"])
        assert row["speedup"] == pytest.approx(base["ms_per_nfe"] / row["ms_per_nfe"])
    table = (tmp_path / "speed.md").read_text()
    assert table.count("SiT-ATConv-S/8 | ") == 2
    assert capsys.readouterr().out == table
