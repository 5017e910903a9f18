"""The curves of a table: numbers from logs written by hand, and what they lack."""

import json

import pytest
import yaml

from experiments import curves
from experiments.table import load_table, models
from sit_atconv.config import to_dict
from sit_atconv.training.resolved import resolved

STEPS = [10, 20, 30]
# Of every run, the seconds and the losses at STEPS.
RUNS = {
    "attention-seed0": ([1, 2, 3], [0.9, 0.7, 0.5]),
    "attention-seed1": ([1, 2, 3], [1.1, 0.9, 0.7]),
    "atconv-seed0": ([2, 4, 6], [0.8, 0.4, 0.2]),
    "atconv-seed1": ([2, 4, 6], [0.8, 0.6, 0.4]),
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two entries and two seeds, whose runs have logs, and in the place of a checkpoint its manifest."""
    for name, (seconds, losses) in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        write(tmp_path, name, [row(*each) for each in zip(STEPS, seconds, losses, strict=True)])
    entries = [
        {"name": name, "recipe": "digits", "seeds": [0, 1], "overrides": ["train.max_steps=30", "train.batch_size=6"]}
        for name in ("attention", "atconv")
    ]
    content = {
        "out": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "num": 10, "ref": "digits", "metrics": ["pr"],
        "entries": entries, "samplers": [{"name": "euler", "sampler": "euler", "steps": 2, "cfg": 1.0}],
    }  # fmt: skip
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(content))
    for model in models(load_table(tmp_path / "table.yaml")):
        manifest = {"step": 30, "recipe": to_dict(resolved(model.recipe))}
        (model.ckpt / "manifest.json").write_text(json.dumps(manifest))

    def newest(run):
        return run, json.loads((run / "manifest.json").read_text())

    monkeypatch.setattr("experiments.table.checkpoint.newest_valid", newest)
    return tmp_path


def row(step, seconds, loss, num=200):
    return {"step": step, "seconds": seconds, "loss": loss, "num": num}


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
        (None, "is not there; train the run anew, with data.held_out"),
        ([row(20, 1, 0.5)], "has no line of step 30; train the run anew, with validation.every to its end"),
        ([], "has no line of step 30"),
        ([row(30, None, 0.5)], "says no seconds; train the run anew"),
        ([row(20, 1, 0.5), row(30, 2, None)], "the last loss is not finite, and cannot be compared; take"),
        ([row(20, 1, 0.5), {"loss": 0.5}, row(30, 2, 0.5)], "line 2: step is missing; train the run anew"),
        ([row(20, 1, 0.5, 100), row(30, 2, 0.5)], "has losses of 100 images and of 200; train the run anew"),
        ([row(30, 2, 0.5, 100)], "'attention-seed0' and 'atconv-seed1' cannot be compared: their losses are of 200"),
        ([row(30, 6, 0.5)], "run 'atconv-seed1' has its first loss at 6 s, and is to be compared at 3 s, where another "
                            "ends; train both with a lower validation.every"),
    ],
)  # fmt: skip
def test_a_run_without_a_curve_to_compare_is_one_line(table, capsys, rows, says):
    log = table / "runs/atconv-seed1/validation.jsonl"
    if rows is None:
        log.unlink()
    else:
        write(table, "atconv-seed1", rows)
    with pytest.raises(SystemExit):
        curves.main([str(table / "table.yaml")])
    said = capsys.readouterr().err
    assert says in said
    assert repr(str(log)) in said or "'atconv-seed1'" in said
    assert not (table / "out").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.batch_size=3", "train.batch_size: 6 -> 3"),
        ("train.max_steps=20", "train.max_steps: 30 -> 20"),
        ("data.held_out=0.3", "data.held_out: null -> 0.3"),
        ("flow.prediction=noise", 'flow.prediction: "velocity" -> "noise"'),
        ("model.depth=2", "is no run of the table's recipe that has ended; make the table first"),  # nor was it trained
    ],
)
def test_runs_that_differ_and_those_of_another_recipe_are_not_compared(table, capsys, override, says):
    content = yaml.safe_load((table / "table.yaml").read_text())
    content["entries"][1]["overrides"].append(override)
    (table / "table.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        curves.main([str(table / "table.yaml")])
    assert says in capsys.readouterr().err
