"""MeanFlow beside flow matching on digits: what is trained, what is scored, and the table; what a step costs."""

import json
from types import SimpleNamespace

import pytest
import torch

from experiments import meanflow
from experiments.bench import meanflow as bench
from experiments.meanflow import FRECHET, Arm, arms, averaging, key, scores, table
from sit_atconv import create_model
from sit_atconv.bench.timing import Timing
from sit_atconv.config import load_recipe
from sit_atconv.runtime.draws import Stream, normal_batch
from sit_atconv.training.resolved import resolved


def test_runs_are_alike_in_all_but_objective_and_steps(tmp_path):
    some = arms(100, [1.5, 2.25], ["meanflow.share=0.5", "meanflow.power=0.5", "flow.time_sampling=logit-normal"])
    assert [(arm.mixer, arm.objective, arm.steps) for arm in some] == [
        ("atconv", "meanflow", 100), ("atconv", "flow", 100), ("atconv", "flow", 150),
        ("attention", "meanflow", 100), ("attention", "flow", 100), ("attention", "flow", 225),
    ]  # fmt: skip
    others = arms(100, [1.5, 2.25], ["meanflow.share=0.5"])
    assert len({arm.name for arm in [*some, *others]}) == 8  # other settings, other runs; the same flows
    recipes = []
    for arm in some:
        script, path, *overrides = averaging(arm, 10).command(tmp_path, arm, 2)
        assert script == "train_sit.py"
        recipe = resolved(load_recipe(path, overrides))
        assert (recipe.model.token_mixer, recipe.train.max_steps, recipe.run.seed) == (arm.mixer, arm.steps, 2)
        average = arm.objective == "meanflow"
        assert (recipe.meanflow.share, recipe.meanflow.power) == ((0.5, 0.5) if average else (None, None))
        assert recipe.flow.time_sampling == ("logit-normal" if average else "uniform")
        recipes.append((recipe.train.lr, recipe.train.lr_schedule, recipe.ema.decay, recipe.train.batch_size))
    assert set(recipes) == {(2e-3, "linear", 0.99, 32)}


@pytest.mark.parametrize("objective", ["meanflow", "flow"])
def test_samples_are_the_run_seeds_of_balanced_classes(tmp_path, monkeypatch, objective):
    """Of 7 samples in blocks of 3, against the map written out: one evaluation is one step over all times."""
    options = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2}
    model = create_model(None, num_classes=10, learn_sigma=False, use_meanflow=objective == "meanflow", **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    asked, scored = [], []

    def load(folder):
        asked.append(folder)
        manifest = {"seconds": len(asked) / 2, "recipe": {"run": {"seed": 5}}}
        return SimpleNamespace(model=model, manifest=manifest)

    def scorer(images, labels):
        scored.append(images)
        assert labels == list(range(7))
        return {"frechet_distance": float(len(scored)), "recognised": 0.5}

    monkeypatch.setattr(meanflow.checkpoint, "load_trained", load)
    monkeypatch.setattr(meanflow, "AT_ONCE", 3)
    monkeypatch.setattr(meanflow, "EVALUATIONS", {objective: (1, 2)})
    found = scores(tmp_path, Arm("atconv", objective, 4), 7, scorer)
    assert asked == [tmp_path / "step-0000004"]
    assert {name: value for name, value in found.items() if not name.startswith("recognised")} == {
        "seconds": 0.5, "frechet_distance_1": 1, "frechet_distance_2": 2,
    }  # fmt: skip
    noise = normal_batch((1, 8, 8), 5, Stream.SAMPLE_NOISE, [[index] for index in range(7)])
    zeros, labels, to_one = torch.zeros(7), torch.arange(7), {}
    if objective == "meanflow":
        to_one = {"timestep_r": torch.ones(7)}
    with torch.no_grad():
        expected = noise + model(noise, zeros, labels, return_dict=False, **to_one)[0]
    expected = (127.5 * expected + 128).clamp(0, 255).to(torch.uint8)
    assert (scored[0].int() - expected.int()).abs().max() <= 1
    assert not torch.equal(scored[0], scored[1])


def made_up(some, seeds=(0, 1)):
    """Distances of 10 over the evaluations for MeanFlow, 30 over them for a flow of 100 steps and 20 for a longer one;
    half of the second seed's besides."""
    found = []
    for arm in some:
        high = 10 if arm.objective == "meanflow" else 30 if arm.steps == 100 else 20
        for seed in seeds:
            result = {"arm": arm.name, "seed": seed, "num": 10, "seconds": float(arm.steps + seed)}
            for count in meanflow.EVALUATIONS[arm.objective]:
                result[key(FRECHET, count)] = high / count + seed * (0.5 if arm.objective == "flow" else 0.1)
                result[key("recognised", count)] = 0.5
            found.append(result)
    return found


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_compares_within_a_seed_at_equal_time():
    some = arms(100, [1.5, 1.5], ["meanflow.share=0.5"])
    rows = cells(table(some, made_up(some)))
    assert rows[2][:4] == ["atconv", "MeanFlow, 100 steps", "100.50 ± 0.71", "10.05 ± 0.07"]
    assert rows[2][-2:] == ["", ""]
    assert rows[3][:4] == ["atconv", "flow, 100 steps", "100.50 ± 0.71", "30.25 ± 0.35"]
    assert rows[4][1:4] == ["flow, 150 steps", "150.50 ± 0.71", "20.25 ± 0.35"]
    # 10 - 20 / 8 and 5 - 20 / 50, and in the second seed 0.4 less
    assert rows[-1] == ["attention", "7.300 ± 0.200", "4.400 ± 0.200"]


def test_it_writes_all_of_what_is_there_and_refuses_other_samples(tmp_path, monkeypatch, capsys, fails):
    made = []

    def make(system, runs, arm, seed, dry_run):
        made.append(system.folder(runs, arm, seed).name)
        return next(each for each in made_up([arm], [seed]))

    monkeypatch.setattr(meanflow, "make", make)
    monkeypatch.setattr(meanflow, "TrainingScorer", lambda ref: SimpleNamespace(about={"name": ref}))
    where = ["--runs", tmp_path / "runs", "--out", tmp_path / "out", "--steps", "100", "--seeds", "0", "1"]
    meanflow.main(
        [str(each) for each in [*where, "--num", "10", "--set", "meanflow.share=0.5", "meanflow.offset=1e-2"]]
    )
    assert "meanflow-atconv-flow-194-seed1" in made
    assert "meanflow-atconv-meanflow-100-meanflow.share=0.5-meanflow.offset=1e-2-seed0" in made
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"meanflow.md", "meanflow.json", "meanflow.png"}
    assert len(json.loads((tmp_path / "out/meanflow.json").read_text())["results"]) == len(made) == 12
    assert "Fréchet distance of MeanFlow less" in capsys.readouterr().out
    assert "has scores of 10 samples; give that, or remove" in fails(meanflow.main, *where, "--num", "11")
    made.clear()
    assert "meanflow.powr" in fails(meanflow.main, *where, "--set", "meanflow.powr=1")
    assert not made


TINY = bench.Case((1, 8, 8), 8, {**bench.DIGITS, "hidden_size": 16, "depth": 1, "patch_size": 2})


def test_the_bench_times_a_step_with_its_share_and_compares_within_a_mixer(monkeypatch):
    steps = {}

    def timed(calls, rounds, device, label):
        steps.update(calls)
        return {(mixer, share): Timing((1 + share) * (3 if mixer == "attention" else 1), 0.0) for mixer, share in calls}

    monkeypatch.setattr(bench, "timed", timed)
    rows = bench.rows_of(TINY, 3, torch.device("cpu"))
    assert [(row["mixer"], row["share"], row["vs_flow"], row["vs_atconv"]) for row in rows] == [
        (mixer, share, 1 + share, above) for mixer, above in (("atconv", 1), ("attention", 3)) for share in bench.SHARES
    ]
    assert {row["tokens"] for row in rows} == {16}
    for (mixer, share), step in steps.items():
        objective, batch = step.args
        assert objective.model.config.token_mixer == mixer
        assert objective.model.config.use_meanflow is (share > 0)
        assert len(batch.get("apart", ())) == 8 * share
        step()
        assert all(each.grad.isfinite().all() for each in objective.model.parameters() if each.requires_grad)


def test_the_bench_times_no_derivative_that_is_not_there(monkeypatch):
    monkeypatch.setattr(bench, "change", lambda average, x, t, s, v: torch.zeros_like(x))
    with pytest.raises(RuntimeError, match=r"atconv at 16 tokens: the change of the average velocity .* not timed"):
        bench.rows_of(TINY, 1, torch.device("cpu"))


def test_the_table_of_the_bench_says_what_was_measured():
    row = {
        "tokens": 1024, "mixer": "attention", "share": 0.25, "batch": 4, "model": bench.WIDE, "flow_ms": 2.0,
        "flow_iqr_ms": 0.1, "ms": 5.0, "iqr_ms": 0.2, "vs_flow": 2.5, "vs_atconv": 3.0,
    }  # fmt: skip
    text = bench.markdown({"device": "a device", "rounds": 3, "rows": [row]})
    assert "1,024 tokens: width 192, depth 4, batch 4." in text
    assert cells(text)[2] == ["1,024", "attention", "25%", "2.0 ± 0.1", "5.0 ± 0.2", "2.50x", "3.00x"]
