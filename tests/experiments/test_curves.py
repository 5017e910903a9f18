"""The curves of a table: numbers from logs written by hand, and what they lack."""

import json

import pytest
import yaml

from experiments import curves

STEPS = [10, 20, 30]
# Of every run, the seconds and the losses at STEPS.
RUNS = {
    "attention-seed0": ([1, 2, 3], [0.9, 0.7, 0.5]),
    "attention-seed1": ([1, 2, 3], [1.1, 0.9, 0.7]),
    "atconv-seed0": ([2, 4, 6], [0.8, 0.4, 0.2]),
    "atconv-seed1": ([2, 4, 6], [0.8, 0.6, 0.4]),
}


@pytest.fixture
def table(tmp_path):
    """A table of two entries and two seeds, whose runs have logs alone."""
    for name, (seconds, losses) in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        rows = [
            dict(zip(("step", "seconds", "loss"), row, strict=True)) for row in zip(STEPS, seconds, losses, strict=True)
        ]
        write(tmp_path, name, rows)
    entries = [
        {"name": name, "recipe": "digits", "seeds": [0, 1], "overrides": ["train.max_steps=30", "train.batch_size=6"]}
        for name in ("attention", "atconv")
    ]
    content = {
        "out": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "num": 10, "ref": "digits", "metrics": ["pr"],
        "entries": entries, "samplers": [{"name": "euler", "sampler": "euler", "steps": 2, "cfg": 1.0}],
    }  # fmt: skip
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def write(folder, run, rows):
    (folder / "runs" / run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_losses_at_equal_steps_and_at_equal_time(table):
    curves.main([str(table / "table.yaml")])
    rows = [line.split(" | ") for line in (table / "out/curves.md").read_text().splitlines()[2:4]]
    # At the end 0.6 and 0.3 in the mean; the differences of the seeds are -0.3 both.
    # The first to end does so at 3 s, where ATConv is half-way between its first losses and its second: 0.6 and 0.7.
    assert rows[0][2:4] == ["0.60 ± 0.10", ""]
    assert rows[1][2:6] == ["0.30 ± 0.10", "-0.3000 ± 0.0000", "0.650 ± 0.050", "0.050 ± 0.050"]
    stored = json.loads((table / "out/curves.json").read_text())
    assert stored["seconds"] == 3
    assert {(run["entry"], run["seed"]): run["images_per_second"] for run in stored["runs"]} == {
        ("attention", 0): 60, ("attention", 1): 60, ("atconv", 0): 30, ("atconv", 1): 30
    }  # fmt: skip
    assert (table / "out/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (None, "is not there; make the table first, with data.held_out"),
        ([{"step": 20, "seconds": 1, "loss": 0.5}], "does not reach step 30; make the table first"),
        ([{"step": 30, "seconds": None, "loss": 0.5}], "says no seconds; train the run anew"),
    ],
)
def test_a_run_without_its_curve_is_one_line(table, capsys, rows, says):
    if rows is None:
        (table / "runs/atconv-seed1/validation.jsonl").unlink()
    else:
        write(table, "atconv-seed1", rows)
    with pytest.raises(SystemExit):
        curves.main([str(table / "table.yaml")])
    assert says in capsys.readouterr().err
    assert not (table / "out").exists()


def test_runs_of_different_length_are_not_compared(table, capsys):
    content = yaml.safe_load((table / "table.yaml").read_text())
    content["entries"][1]["overrides"] = ["train.max_steps=30", "train.batch_size=3"]
    (table / "table.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        curves.main([str(table / "table.yaml")])
    assert "differ in train.max_steps or train.batch_size; give them the same" in capsys.readouterr().err
