"""The benchmark of the operator: rows that follow from the times, and a README that quotes the last run."""

import csv

import pytest
import torch
from conftest import ROOT

from experiments.bench import op
from sit_atconv.ops.atconv import conv


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_op(tmp_path, *options):
    op.main([*options, "--dim", "8", "--rounds", "2", "--csv", str(tmp_path / "op.csv")])
    return rows_of(tmp_path / "op.csv")


@pytest.mark.slow
def test_ratios_are_to_the_two_linears_of_the_same_shape_and_pass(tmp_path, capsys):
    rows = run_op(tmp_path, "--shapes", "2x3x4", "1x5x2")
    names = [op.LINEARS, "ATConv", "ATConv compiled", "paper's form", "attention"]
    names += ["operator native", "operator conv", "operator compiled"]
    expected = [
        (name, shape, step) for shape in ("2x3x4x8", "1x5x2x8") for step in ("forward", "backward") for name in names
    ]
    assert [(row["what"], row["shape"], row["pass"]) for row in rows] == expected
    for row in rows:
        base = next(o for o in rows if (o["what"], o["shape"], o["pass"]) == (op.LINEARS, row["shape"], row["pass"]))
        assert float(row["ratio"]) == pytest.approx(float(row["median_ms"]) / float(base["median_ms"]), rel=0.05)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)


def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(conv, "dynamic_depthwise_conv", lambda v, kernels, grid: v.clone())
    monkeypatch.setattr(torch, "compile", lambda form, **_: form)
    with pytest.raises(RuntimeError, match=r"operator conv at 2x3x4.*not timed"):
        run_op(tmp_path, "--shapes", "2x3x4")
    assert not (tmp_path / "op.csv").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--shapes", "3x4"], "BATCHxHEIGHTxWIDTH"), (["--shapes", "0x3x4"], "0x3x4"), (["--rounds", "0"], "--rounds 0")],
)
def test_op_refuses(tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as stop:
        op.main([*options, "--csv", str(tmp_path / "op.csv")])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_readme_quotes_the_output_of_make_bench():
    lines = (ROOT / "experiments/bench/bench.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    assert set(lines) <= {*readme, ""}


def test_output_of_make_bench_is_in_the_csv_file():
    rows = rows_of(ROOT / "experiments/bench/bench.csv")
    last = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    assert (
        op.to_markdown([row for row in last if row["ratio_to"] == op.LINEARS])
        in (ROOT / "experiments/bench/bench.md").read_text()
    )
