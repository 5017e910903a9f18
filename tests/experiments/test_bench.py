"""The benchmark of the operator: rows that follow from the times, and the last run in the CSV file."""

import csv
import json

import pytest
import torch
from conftest import ROOT, unmarked
from PIL import Image

from experiments.bench import op
from sit_atconv.ops.atconv import conv


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_op(tmp_path, *options):
    op.main([*options, "--dim", "72", "--rounds", "2", "--out", str(tmp_path / "op")])
    return json.loads((tmp_path / "op.json").read_text())["rows"]


@pytest.mark.slow
def test_columns_follow_from_the_times_of_the_same_shape_and_pass(tmp_path, capsys):
    rows = run_op(tmp_path, "--shapes", "2x3x4", "1x5x2")
    names = [op.LINEARS, "ATConv", "ATConv compiled", "paper's form", "attention"]
    names += ["operator native", "operator conv", "operator compiled"]
    steps = ("forward", "backward")
    expected = [(name, shape, step) for shape in ("2x3x4x72", "1x5x2x72") for step in steps for name in names]
    assert [(row["what"], row["shape"], row["pass"]) for row in rows] == expected
    for row in rows:
        group = {o["what"]: o["ms"] for o in rows if (o["shape"], o["pass"]) == (row["shape"], row["pass"])}
        assert row["over_linears"] == pytest.approx(row["ms"] / group[op.LINEARS])
        assert row["vs_attention"] == pytest.approx(group["attention"] / row["ms"])
        assert row["vs_paper"] == pytest.approx(group["paper's form"] / row["ms"])
    linears = next(row for row in rows if row["what"] == op.LINEARS)
    assert linears["gmacs"] == pytest.approx(2 * 24 * 72 * 72 / 1e9)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)
    assert table == unmarked(tmp_path / "op.md")
    ratios = {(row["what"], row["shape"], row["pass"]): row["ratio"] for row in rows_of(tmp_path / "op.csv")}
    for row in rows:
        assert ratios[row["what"], row["shape"], row["pass"]] == f"{row['over_linears']:.3f}"
    with Image.open(tmp_path / "op.png") as image:
        assert image.width > image.height


def test_a_csv_of_other_columns_is_refused_before_the_work(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(op, "measure", None)
    (tmp_path / "op.csv").write_text("a,b\n")
    assert "op.csv has the columns ['a', 'b']" in fails(op.main, "--device", "cpu", "--out", tmp_path / "op")
    assert [path.name for path in tmp_path.iterdir()] == ["op.csv"]
    rows = [{"dtype": "fp32", "what": "x", "shape": "1", "pass": "forward", "ms": 1, "iqr_ms": 1, "over_linears": 1}]
    assert tuple(op.csv_rows(rows, torch.device("cpu"))[0]) == op.CSV


@pytest.mark.parametrize("broken", ["dynamic_depthwise_conv", "grad_v", "grad_kernels"])
def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch, broken):
    original = getattr(conv, broken)
    monkeypatch.setattr(conv, broken, lambda *arguments: original(*arguments) * 1.01)
    monkeypatch.setattr(torch, "compile", lambda form, **_: form)
    with pytest.raises(RuntimeError, match=r"operator conv at 2x3x4 .* not timed"):
        run_op(tmp_path, "--shapes", "2x3x4")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shapes", "3x4"], "BATCHxHEIGHTxWIDTH"),
        (["--shapes", "0x3x4"], "0x3x4"),
        (["--rounds", "0"], "--rounds 0"),
        (["--dim", "100"], "multiple of 72"),
    ],
)
def test_op_refuses(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as stop:
        op.main([*options, "--out", str(tmp_path / "op")])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_output_of_make_bench_is_in_the_csv_file():
    rows = rows_of(ROOT / "experiments/bench/bench.csv")
    text = (ROOT / "experiments/bench/bench.md").read_text()
    last = [row for row in rows if (row["commit"], row["device"]) == (rows[-1]["commit"], rows[-1]["device"])]
    assert rows[-1]["device"] in text
    for row in last:
        if row["ratio_to"] == op.LINEARS and row["what"] != op.LINEARS:
            assert row["ratio"] in text
