"""The benchmark of AttNet: what it counts and writes, and that a form that computes something else is not timed."""

import json

import pytest
import timm
import torch
from conftest import slowly, unmarked

from experiments.bench import attnet
from sit_atconv.bench.timing import Timing
from sit_atconv.models.attnet import ATConv2d

# GMACs at 224 px of the published code.
PUBLISHED = {"xxs": 0.53, "xs": 1.00, "s": 1.33, "t1": 2.42, "t2": 5.09, "t3": 9.38, "t4": 16.7}
TINY = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture
def tiny_models(monkeypatch):
    """Every model of the benchmark in the same architecture and a size for tests, and two members of the family."""
    create = timm.create_model
    monkeypatch.setattr(attnet, "FAMILY", ["attnet_xs", "attnet_t2"])

    def small(name, **options):
        if name == "convnext_tiny":
            return create("test_convnext", **options)
        return create(name, **(TINY if name in attnet.FAMILY else {"depth": 1}), **options)

    monkeypatch.setattr(attnet.timm, "create_model", small)


@pytest.mark.parametrize("size", ["xxs", "t1", *slowly(size for size in PUBLISHED if size not in ("xxs", "t1"))])
def test_the_papers_form_costs_what_is_published_and_pooling_first_saves_the_rest(size):
    cost = attnet.costs(f"attnet_{size}", 224)
    assert cost["paper_gmacs"] == pytest.approx(PUBLISHED[size], rel=0.01)
    saved = 0
    for stage, pixels in zip(timm.create_model(f"attnet_{size}", device="meta").stages, (56, 28, 14, 7), strict=True):
        dim = stage.blocks[0].token_mixer.x_proj.in_features
        saved += len(stage.blocks) * (pixels**2 - 9) * dim**2 / 1e9
    assert cost["paper_gmacs"] - cost["gmacs"] == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_follow_from_the_times(tmp_path, capsys, monkeypatch, tiny_models, dtype):
    milliseconds = iter([4.0, 6.0, 8.0, 3.0, 2.0])

    def interleaved(calls, rounds, device, label):
        for call in calls:
            assert call().dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        return [Timing(next(milliseconds) / 1e3, 0.1e-3) for _ in calls]

    monkeypatch.setattr(attnet, "interleaved", interleaved)
    options = ["--models", "attnet_t2", "--size", "64", "--batch", "2", "--dtype", dtype, "--rounds", "3"]
    attnet.main([*options, "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/latency.json").read_text())
    names = ["attnet_t2", "attnet_t2 (paper's form)", "attnet_t2 (paper's form, NCHW)", *attnet.BASELINES]
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == names
    assert [row["ms_per_image"] for row in rows.values()] == pytest.approx([2.0, 3.0, 4.0, 1.5, 1.0])
    assert [row["over_first"] for row in rows.values()] == pytest.approx([1.0, 1.5, 2.0, 0.75, 0.5])
    assert [row["vs_paper"] for row in rows.values()] == [pytest.approx(1.5), None, None, None, None]
    assert [row["top1"] for row in rows.values()] == [84.4, None, None, 82.1, 79.8]
    assert rows[names[0]]["gmacs"] < rows[names[1]]["gmacs"] == rows[names[2]]["gmacs"]
    assert len({row["params"] for row in list(rows.values())[:3]}) == 1
    assert (result["dtype"], result["batch"], result["size"], result["rounds"]) == (dtype, 2, 64, 3)
    cost = json.loads((tmp_path / "out/cost.json").read_text())
    assert [row["model"] for row in cost["rows"]] == attnet.FAMILY
    out = capsys.readouterr().out
    for stem in ("latency", "cost"):
        assert unmarked(tmp_path / f"out/{stem}.md") in out
    assert "| attnet_t2 | " in out
    assert "1.50x" in out


def test_a_folder_that_cannot_be_written_is_found_before_the_clock(tmp_path, tiny_models, fails, monkeypatch):
    monkeypatch.setattr(attnet, "measure", None)
    (tmp_path / "out").write_text("")
    assert "cannot be written" in fails(attnet.main, "--out", str(tmp_path / "out"))


def test_times_are_taken(tmp_path, tiny_models):
    attnet.main(["--size", "32", "--batch", "1", "--rounds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert all(row["ms_per_image"] > 0 for row in rows)


@pytest.mark.parametrize("nchw", [False, True])
def test_the_papers_form_runs_no_operator_of_this_library_and_has_the_same_weights(nchw, tiny_models, monkeypatch):
    model = attnet.random_attnet("attnet_t2")
    form = attnet.PaperForm(model, nchw)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (form, model)]
    assert sizes[0] == sizes[1]
    x, formats = torch.randn(2, 3, 64, 96), []
    expected = model(x)
    monkeypatch.setattr(ATConv2d, "forward", None)
    form.model.stages[0].blocks[0].channel_mixer.register_forward_pre_hook(
        lambda _module, inputs: formats.append(inputs[0].is_contiguous())
    )
    torch.testing.assert_close(form(x), expected, rtol=1e-3, atol=1e-4)
    assert formats == [nchw]
    with pytest.raises(ValueError, match="raster"):
        attnet.PaperATConv2d(ATConv2d(8, 8, pool="grid"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_that_is_not_its_published_form_is_not_timed(tmp_path, monkeypatch, tiny_models, dtype):
    forward = ATConv2d.forward
    monkeypatch.setattr(ATConv2d, "forward", lambda layer, x: 1.01 * forward(layer, x))
    with pytest.raises(RuntimeError, match=r"attnet_t2 at 32 px in fp32 is .* not timed"):
        attnet.main(["--size", "32", "--batch", "1", "--dtype", dtype, "--rounds", "1", "--out", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "attnet_t5"], "--models='attnet_t5': did you mean"),
        (["--size", "100"], "--size 100"),
        (["--size", "0"], "--size 0"),
        (["--batch", "0"], "--batch 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--dtype", "fp16"], "fp16"),
    ],
)
def test_bad_options_are_refused(fails, tmp_path, options, says):
    assert says in fails(attnet.main, *options, "--out", tmp_path / "out")
    assert not any(tmp_path.iterdir())
