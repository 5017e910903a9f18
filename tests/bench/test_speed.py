"""The speed command: what it compares, its columns against their definitions, and what it checks before the clock."""

import json

import pytest
import torch
from conftest import unmarked
from PIL import Image

from sampling.__main__ import main as sampling
from sit_atconv import create_model
from sit_atconv.bench import speed
from sit_atconv.models.cost import count_parameters
from sit_atconv.ops.atconv import native
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling


@pytest.fixture(autouse=True)
def two_blocks_deep(monkeypatch):
    """The presets, with fewer blocks: nothing here is of a speed."""
    shallow = {name: {**options, "depth": 2} for name, options in speed.PRESETS.items()}
    monkeypatch.setattr("sit_atconv.models.sit.PRESETS", shallow)


def test_random_model_has_no_zero_gates():
    model = speed.random_model("SiT-ATConv-S/8", 8)
    assert all(parameter.any() for parameter in model.parameters())
    assert not any(parameter.any() for parameter in create_model("SiT-S/8", 8).final_layer.linear.parameters())


def run_speed(tmp_path, *options):
    """The JSON of `sampling speed` with the options."""
    sampling(["speed", *map(str, options), "--rounds", "2", "--out", str(tmp_path / "speed")])
    return json.loads((tmp_path / "speed.json").read_text())


@pytest.mark.parametrize("sizes", [(64,), pytest.param((64, 128), marks=pytest.mark.slow)], ids=str)
def test_every_model_meets_its_baselines_and_the_columns_follow_from_the_times(tmp_path, capsys, sizes):
    options = ["--sizes", *sizes, "--batch", 2, "--steps", 2, "--passes", "forward", "backward", "sampling"]
    result = run_speed(tmp_path, "--models", "SiT-ATConv-S/8", *options)
    names = ["SiT-S/8", "SiT-ATConv-S/8", "SiT-ATConv-S/8 (paper's form)"]
    expected = [(name, size, p) for size in sizes for p in ("forward", "backward", "sampling") for name in names]
    assert [(row["model"], row["size"], row["pass"]) for row in result["rows"]] == expected
    for row in result["rows"]:
        group = {o["model"]: o for o in result["rows"] if (o["size"], o["pass"]) == (row["size"], row["pass"])}
        assert row["vs_attention"] == pytest.approx(group["SiT-S/8"]["ms"] / row["ms"])
        paper = group["SiT-ATConv-S/8 (paper's form)"]["ms"] / row["ms"]
        assert row["vs_paper"] == (None if row["model"] == "SiT-S/8" else pytest.approx(paper))
        model = speed.random_model(row["model"].removesuffix(speed.PAPER), row["size"] // 8)
        assert row["params"] == count_parameters(model)
        assert row["peak_mib"] > 4 * row["params"] / 2**20 * (1.9 if row["pass"] == "backward" else 1)
        assert row["nfe"] == 4  # two steps, each with and without the class
        per_evaluation = row["ms"] / (4 if row["pass"] == "sampling" else 1)
        assert row["ms_per_nfe"] == pytest.approx(per_evaluation)
        images = None if row["pass"] == "backward" else pytest.approx(2 / (4 * per_evaluation / 1e3))
        assert row["images_per_s"] == images
        alone = row["pass"] != "sampling" and "paper" not in row["model"]
        assert (row["gemm_ms"] is not None) == alone
        if alone:
            assert row["of_gemm_limit"] == pytest.approx(row["gemm_ms"] / row["ms"])
    table = unmarked(tmp_path / "speed.md")
    assert table.count("| SiT-ATConv-S/8 | ") == 3 * len(sizes)
    assert capsys.readouterr().out == table
    with Image.open(tmp_path / "speed.png") as image:
        assert image.width > 2 * image.height  # a panel per pass


def test_baselines_can_be_left_out_and_models_are_not_measured_twice(tmp_path):
    models = ["--models", "SiT-ATConv-S/8", "SiT-S/8", "SiT-ATConv-S/8-Hybrid", "--sizes", 64]
    rows = run_speed(tmp_path, *models, "--baselines", "attention")["rows"]
    assert [row["model"] for row in rows] == ["SiT-S/8", "SiT-ATConv-S/8", "SiT-ATConv-S/8-Hybrid"]
    rows = run_speed(tmp_path, *models, "--baselines")["rows"]
    assert [row["model"] for row in rows] == ["SiT-ATConv-S/8", "SiT-S/8", "SiT-ATConv-S/8-Hybrid"]
    assert {row["gemm_ms"] for row in rows} == {None}


@pytest.mark.slow
def test_compiled_blocks_are_what_is_timed(tmp_path, monkeypatch):
    compiled = []
    original = speed.SiTTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        speed.SiTTransformer2DModel,
        "compile_repeated_blocks",
        lambda self, **options: compiled.append(options) or original(self, **options),
    )
    options = ["--sizes", 64, 128, "--compile", "--passes", "forward", "backward"]
    result = run_speed(tmp_path, "--models", "SiT-ATConv-S/8", *options)
    assert compiled == [{"fullgraph": True}] * 6
    assert result["compiled"] is True


def test_a_wrong_output_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "in_paper_form", lambda model: speed.random_model("SiT-S/8", 8))
    with pytest.raises(RuntimeError, match="away from what it must be; not timed"):
        run_speed(tmp_path, "--models", "SiT-ATConv-S/8", "--sizes", 64)
    with pytest.raises(RuntimeError, match="not timed"):
        speed.assert_close("x", torch.full((2,), torch.nan), torch.ones(2), 1.0)
    with pytest.raises(RuntimeError, match="not timed"):
        speed.assert_close("x", torch.zeros(2), torch.zeros(2), 1.0)


@pytest.mark.parametrize("broken", ["dynamic_depthwise_conv", "grad_v", "grad_kernels"])
def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch, broken):
    original = getattr(native, broken)
    monkeypatch.setattr(native, broken, lambda *arguments: original(*arguments) * 1.01)
    with pytest.raises(RuntimeError, match=r"SiT-ATConv-S/8 at 64 px: the .* not timed"):
        run_speed(tmp_path, "--models", "SiT-ATConv-S/8", "--sizes", 64, "--baselines", "--passes", "backward")
    assert not (tmp_path / "speed.json").exists()


def test_what_was_measured_stays_when_a_later_size_fails(tmp_path, monkeypatch):
    original = speed.measure

    def fails_later(names, size, setting):
        if size == 128:
            raise torch.OutOfMemoryError("no memory")
        return original(names, size, setting)

    monkeypatch.setattr(speed, "measure", fails_later)
    with pytest.raises(torch.OutOfMemoryError):
        run_speed(tmp_path, "--models", "SiT-S/8", "--sizes", 64, 128, "--baselines")
    assert [row["size"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]] == [64]
    assert (tmp_path / "speed.png").exists()


@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4", "euler-maruyama", "sde-heun"])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_evaluations_are_those_of_a_real_run(sampler, scale):
    settings = Sampling(sampler, 3, scale)
    model = speed.random_model("SiT-S/8", 8)
    _, nfe = sample_latents(model, [0], torch.tensor([1]), settings)
    assert speed.evaluations(settings) == nfe
    assert speed.evaluations(Sampling("dopri5")) is None
