"""Score over time: grids, which points are worth taking, and a command that goes on, repeats and prunes."""

import io
import itertools
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv import create_model
from sit_atconv.__main__ import main
from sit_atconv.bench import choosing, frontier, grid, plots
from sit_atconv.commands import parser_of
from sit_atconv.commands.frontier import _models
from sit_atconv.commands.options import sampling_asked
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import png
from sit_atconv.sampling.samples import Samples
from sit_atconv.scoring import digits
from sit_atconv.scoring.extractor import load_extractor

GRID = """
- {sampler: [euler, midpoint], steps: [2, 4], guidance_scale: 1}
- {sampler: euler-maruyama, steps: 3, guidance_scale: 1.0}
- {steps: 4, guidance_scale: [1, null], guidance_interval: null}
"""
SMALL = "- {sampler: [euler, euler-maruyama], steps: 3}"


@pytest.fixture
def written(tmp_path):
    """Writes a grid, and returns its path."""

    def write(text: str = GRID) -> Path:
        (tmp_path / "grid.yaml").write_text(text)
        return tmp_path / "grid.yaml"

    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of 8 x 8 digits with weights drawn at random."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = create_model(None, 8, 10, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def untrained_classifier(monkeypatch):
    torch.manual_seed(0)
    made = digits.DigitsClassifier().eval(), 0.1
    monkeypatch.setattr(digits, "train_classifier", lambda: made)


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(frontier, "plot_frontier", lambda *_: png(Image.new("L", (2, 2))))


def call(models, out, grid, *more, names=("first",)) -> dict:
    """What the command finds; names: of folders of models, or NAME=FOLDER."""
    ckpts = [f"{name.partition('=')[0]}={models / name.rpartition('=')[2]}" for name in names]
    words = ["frontier", *ckpts, "--grid", str(grid), "--ref", "digits", "--num", "22", "--batch", "8"]
    main([*words, "--out", str(out), *map(str, more)])
    return json.loads((out / "frontier.json").read_text())


def scores(result: dict) -> list:
    return [(point["model"], point["label"], point["nfe"], point["seeds"]) for point in result["points"]]


# Grids


def test_a_grid_is_every_combination_of_its_blocks_once(written):
    expected = [
        {"sampler": sampler, "steps": steps, "guidance_scale": 1}
        for sampler, steps in itertools.product(("euler", "midpoint"), (2, 4))
    ]
    expected += [{"sampler": "euler-maruyama", "steps": 3, "guidance_scale": 1.0}]
    expected += [{"steps": 4, "guidance_scale": 1}, {"steps": 4}]
    assert grid.read_grid(written(), ["a"]) == {"a": expected}
    intervals = written("- {guidance_interval: [[0, 0.5], [0.5, 1]], compile: [true, false]}\n- {compile: true}")
    assert grid.read_grid(intervals, ["a"])["a"] == [
        {"guidance_interval": [0, 0.5], "compile": True}, {"guidance_interval": [0, 0.5]},
        {"guidance_interval": [0.5, 1], "compile": True}, {"guidance_interval": [0.5, 1]}, {"compile": True},
    ]  # fmt: skip
    times = written("- {steps: 1e1, grid: [cosine, [0, 0.3, 1.0]]}\n- {grid: [0, 0.5, 1]}")
    assert list(map(grid.words_of, grid.read_grid(times, ["a"])["a"])) == [
        shlex.split(f"--steps 10 --grid {text}") for text in ("cosine", "0 0.3 1")
    ] + [shlex.split("--grid 0 0.5 1")]
    own = written("- {models: a, steps: [1, 2]}\n- {models: [b, c], steps: 2}\n- {sampler: heun}")
    assert grid.read_grid(own, ["a", "b", "c"]) == {
        "a": [{"steps": 1}, {"steps": 2}, {"sampler": "heun"}],
        "b": [{"steps": 2}, {"sampler": "heun"}], "c": [{"steps": 2}, {"sampler": "heun"}],
    }  # fmt: skip
    one = grid.read_grid(written("- {guidance_interval: [0, 0.5], sampler: heun, dtype: bf16, compile: true}"), ["a"])[
        "a"
    ]
    assert grid.words_of(one[0]) == shlex.split("--cfg-interval 0 0.5 --sampler heun --dtype bf16 --compile")
    assert grid.in_words(one[0]) == "guidance_interval=0,0.5 sampler=heun dtype=bf16 compile"
    assert grid.label_of(one[0]) == "guidance_interval=0,0.5, heun, dtype=bf16, compile"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {smapler: heun}", "key='smapler': did you mean 'sampler'?.*; the keys are sampler, steps, .*, models"),
        ("sampler: heun", "it is no list of blocks of settings"),
        ("[]", "it is no list of blocks of settings"),
        ("- 3", "it is no list of blocks of settings"),
        ("- {steps: []}", r"steps=\[\]: give a value, or leave it out"),
        ("- {steps: {a: 1}}", "steps={'a': 1}: give a value"),
        ("- {steps: [[{a: 1}]]}", r"steps=\[{'a': 1}\]: give a value"),
        ("- {compile: 3}", "compile=3: give true or false"),
        (f"- {{steps: {list(range(1, 41))}, epsilon: {[0.01 + i / 100 for i in range(26)]}}}", "it has 1,040 comb"),
        ("- {steps: [1", "it cannot be read"),
        ("- {models: [a, d], steps: 1}", r"models='d': choose from \['a', 'b'\]"),
        ("- {models: [a], steps: 1}", "no block is for the model 'b'"),
        ("- {models: [], steps: 1}", "no block is for the model 'a'"),
    ],
)
def test_what_is_no_grid_is_refused(written, text, says):
    with pytest.raises(InputError, match=says):
        grid.read_grid(written(text), ["a", "b"])


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("- {sampler: heun, steps: [4, 0]}", [], "first, sampler=heun steps=0: --steps 0: must be at least 1"),
        ("- {sampler: huen}", [], "first, sampler=huen: argument --sampler: invalid choice: 'huen'"),
        ("- {sampler: heun, diffusion: sigma}", [], "diffusion=sigma: --diffusion=sigma goes with"),
        ("- {steps: [[4, 8]]}", [], "first, steps=4,8: unrecognized arguments: 8"),
        ("- {grid: [0, 0.3, 0.2, 1]}", [], "grid=['0', '0.3', '0.2', '1']: times of a grid must rise strictly"),
        ("- {guidance_channels: first3}", [], "--cfg-channels=first3 would do nothing: this model has 1"),
        ("- {guidance_interval: [0.99, 1]}", [], "no step evaluates the model at a time in it"),
        ("- {steps: 4}", ["--metrics", "recognised"], "points are compared by their Fréchet distance; add"),
        ("- {steps: 4}", ["--metrics", "fid"], "--metrics='fid': did you mean 'kid'? choose from"),
        ("- {steps: 4}", ["--extractor", "diigts"], "'diigts'"),
        ("- {steps: 4}", ["--num", "3", "--metrics", "frechet_distance,pr"], "pr: 3 images, and it takes 6"),
        ("- {steps: 4}", ["--seeds", "1", "1"], "--seeds 1 1: the same one twice"),
        ("- {steps: 4}", ["--ref", "nowhere"], "reference 'nowhere': no such file"),
        ("- {steps: 4}", ["--grid", "nowhere.yaml"], "grid 'nowhere.yaml': it cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_work(written, models, tmp_path, fails, text, more, says):
    words = ["frontier", models / "first", "--grid", written(text), "--ref", "digits", "--num", 22]
    assert says in fails(main, *words, "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", [3, 12])
def test_the_share_recognised_is_of_models_of_the_classes_alone(
    written, models, no_picture, tmp_path, fails, capsys, classes
):
    model = create_model(None, 8, classes, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2)
    model.save_pretrained(tmp_path / "other")
    out, path = tmp_path / "out", written("- {steps: 2}")
    points = call(models, out, path, names=("first", f"other={tmp_path / 'other'}"))["points"]
    assert [point["metrics"].keys() for point in points] == 2 * [{"frechet_distance"}]
    capsys.readouterr()
    if classes > 10:
        words = ["frontier", tmp_path / "other", "--grid", path, "--ref", "digits", "--num", 22, "--batch", 8]
        told = fails(main, *words, "--metrics", "frechet_distance,recognised", "--out", tmp_path / "new")
        assert "images of other has the label 11, and extractor digits knows 10 classes" in told
        assert not (tmp_path / "new").exists()


def test_models_are_told_apart_by_their_names(written, models, tmp_path, fails, monkeypatch):
    words = ["--grid", written(), "--ref", "digits", "--num", 22, "--out", tmp_path / "out"]
    copy = shutil.copytree(models / "first", tmp_path / "other" / "first")
    assert "'first': two models are called so; say NAME=CKPT" in fails(main, "frontier", models / "first", copy, *words)
    named = shutil.copytree(copy, tmp_path / "lr=1e-4")
    assert "'lr=1e-4': no name of a folder; say NAME=CKPT" in fails(main, "frontier", named, *words)
    monkeypatch.setenv("HOME", str(tmp_path))
    same = {"a": str(named), "b": str(copy), "first": str(copy)}
    assert _models([f"a={named}", "b=~/other/first", str(copy)]) == same


# Which points are worth taking


def made_up(ms: float, value: float, error: float | None = 0.5) -> dict:
    return {"ms": ms, "score": {"value": value, "error": error}}


@pytest.mark.parametrize("seed", range(3))
def test_pareto_and_recommendation_against_all_pairs(seed):
    drawn = np.random.default_rng(seed).integers(1, 8, (40, 2)).tolist()  # whole numbers: with ties
    points = [made_up(ms, value) for ms, value in drawn]

    def beaten(one: dict) -> bool:
        own = one["ms"], one["score"]["value"]
        others = [(each["ms"], each["score"]["value"]) for each in points]
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in others)

    found = choosing.pareto(points)
    assert sorted(map(id, found)) == sorted(id(each) for each in points if not beaten(each))
    best = min(value for _, value in drawn)
    chosen = choosing.recommended(points)
    assert chosen["score"]["value"] <= best + 0.5
    assert chosen["ms"] == min(ms for ms, value in drawn if value <= best + 0.5)


def test_the_error_of_the_best_decides_what_is_as_good():
    points = [made_up(1, 3.0, 9.0), made_up(2, 2.4, 9.0), made_up(4, 2.0, 0.5)]
    assert choosing.recommended(points) is points[1]
    points[2]["score"]["error"] = 0.3
    assert choosing.recommended(points) is points[2]
    points[2]["score"]["error"] = None
    assert choosing.recommended(points) is points[2]
    assert choosing.is_better(made_up(1, 2.0, 0.3), made_up(1, 2.6, 0.4))
    assert not choosing.is_better(made_up(1, 2.0, 0.3), made_up(1, 2.4, 0.4))
    assert choosing.is_better(made_up(1, 2.0, None), made_up(1, 1.0, 0.4))  # nobody knows


def test_several_seeds_have_the_error_of_their_mean():
    assert choosing.estimate([4.0], [0.5]) == {"value": 4.0, "error": 0.5, "jackknife": 0.5, "values": [4.0]}
    several = choosing.estimate([4.0, 5.0, 9.0], [0.5, 0.7, None])
    assert several == {"value": 6.0, "error": pytest.approx((7 / 3) ** 0.5), "jackknife": None, "values": [4, 5, 9]}
    assert choosing.with_error(6.0, several["error"]) == "6.0 ± 1.5"


# The command


@pytest.mark.slow
def test_two_models_in_one_picture_and_the_recommendation_repeats_to_the_bit(written, models, tmp_path, capsys):
    out = tmp_path / "out"
    text = (
        "- {sampler: [euler, euler-maruyama], steps: 3, guidance_scale: 1}\n- {steps: 3, guidance_scale: [1.0, null]}"
    )
    result = call(models, out, written(text), "--seeds", 3, 4, names=("first", "second"))
    text = capsys.readouterr().out
    points = result["points"]
    # euler is the default: one of the second block's combinations is one of the first's, the other is guided
    assert result["common"] == {"steps": 3}
    labels = ["euler, guidance_scale=1", "euler-maruyama, guidance_scale=1", "defaults"]
    assert [(each["model"], each["label"]) for each in points] == [(a, b) for a in ("first", "second") for b in labels]
    assert [point["nfe"] for point in points] == 2 * [3, 3, 6]
    assert [point["kind"] for point in points] == 2 * ["ODE", "SDE", "ODE"]
    for point in points:
        own = [each["metrics"]["frechet_distance"]["value"] for each in point["seeds"]]
        assert [each["seed"] for each in point["seeds"]] == [3, 4]
        assert point["score"] == choosing.estimate(
            own, point["score"]["jackknife"] and 2 * [point["score"]["jackknife"]]
        )
        assert own[0] != own[1]
        assert len(point["ms_blocks"]) == 5  # of 2 x 3, without the first
        assert point["ms_quartiles"][0] <= point["ms"] <= point["ms_quartiles"][1]
    of_all = [id(point) for point in choosing.pareto(points)]
    assert [id(point) for point in points if point["pareto"] == "all"] == [id(p) for p in points if id(p) in of_all]
    assert [each["of"] for each in result["recommended"]] == ["first", "second", None]
    assert all(each["command"] in text and each["score_command"] in text for each in result["recommended"])
    assert set(result["models"]) == {"first", "second"}
    rows = [json.loads(line) for line in (out / frontier.TIMES).read_text().splitlines()]
    turns = [[(row["model"], row["point"]) for row in rows[first : first + 6]] for first in range(0, 36, 6)]
    assert turns == 3 * [turns[0], turns[0][::-1]]  # all points in each round, so that a drift meets all alike
    with Image.open(out / "frontier.png") as image:
        assert image.size == (1950, 975)

    chosen = result["recommended"][1]
    for line in (chosen["command"], chosen["score_command"]):
        main(shlex.split(line)[1:])
    point = next(p for p in points if p["model"] == "second" and grid.in_words(p["settings"]) == chosen["point"])
    folder = Path(point["seeds"][0]["samples"]).parent.name
    again = json.loads(Path(f"{out}-second-{folder}/metrics.json").read_text())
    assert again["pixels_sha256"] == point["seeds"][0]["pixels_sha256"]
    assert again["metrics"] == point["seeds"][0]["metrics"]
    assert (chosen["seed"], chosen["value"]) == (3, again["metrics"]["frechet_distance"]["value"])
    assert f"; the commands give {chosen['value']:.5g}, that of seed 3\n" in text
    assert chosen["value"] != point["score"]["value"]


def test_it_goes_on_where_it_was_stopped_with_the_same_scores(
    written, models, no_picture, tmp_path, monkeypatch, capsys
):
    whole = call(models, tmp_path / "whole", written(SMALL))
    out, write, count = tmp_path / "out", Samples.write, itertools.count()

    def stopped(self, number, images, **measured):
        write(self, number, images, **measured)
        if next(count) == 3:  # in the second of three rounds
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "write", stopped)
        with pytest.raises(SystemExit, match="143"):
            call(models, out, written(SMALL))
    told = "SIGTERM: stopped; 24 of 44 images are there, and the same command goes on from them"
    assert told in capsys.readouterr().err
    assert not (out / "frontier.json").exists()
    with open(out / frontier.TIMES, "a") as file:
        file.write('{"model": "fir')  # cut as it was written
    result = call(models, out, written(SMALL))
    assert [each[:3] for each in scores(result)] == [each[:3] for each in scores(whole)]
    for one, other in zip(result["points"], whole["points"], strict=True):
        assert one["seeds"][0]["metrics"] == other["seeds"][0]["metrics"]
    assert {sitting for point in result["points"] for sitting in point["sittings"]} == {1, 2}
    assert any("2 sittings" in note for note in result["notes"])


def test_a_whole_one_is_not_drawn_again_and_its_grid_may_grow(
    written, models, no_picture, tmp_path, monkeypatch, fails, capsys
):
    first = call(models, tmp_path / "out", written("- {steps: [2, 4]}"))
    with monkeypatch.context() as patch:
        patch.setattr(frontier.Work, "images_of", lambda *_: pytest.fail("drawn"))
        patch.setattr(frontier, "score", lambda *_, **__: pytest.fail("scored"))
        assert call(models, tmp_path / "out", written("- {steps: [4, 2]}"))["points"] == first["points"][::-1]
    grown = call(models, tmp_path / "out", written("- {steps: [2, 4]}\n- {sampler: midpoint, steps: 2}"))
    assert scores(grown)[0][3] == scores(first)[0][3]
    assert [point["sittings"] for point in grown["points"]] == [[1], [1], [2]]
    times = tmp_path / "out" / frontier.TIMES
    rows = times.read_text()
    capsys.readouterr()
    words = ["frontier", models / "first", "--grid", written(), "--ref", "digits", "--out", tmp_path / "out"]
    assert "holds a frontier with other settings (frontier.num: 22 -> 30)" in fails(
        main, *words, "--num", 30, "--batch", 8
    )
    damaged = {
        "rubbish\n" + rows: "times.jsonl, line 1 is no JSON",
        rows.replace('"seconds": ', '"seconds": -', 1): "times.jsonl, line 1: seconds is -",
    }
    for text, told in damaged.items():
        times.write_text(text)
        said = fails(main, *words, "--num", 22, "--batch", 8)
        assert told in said
        assert said.endswith("; remove it; the times are measured again")


def test_no_times_of_other_samples_models_or_machines_are_taken(
    written, models, no_picture, tmp_path, monkeypatch, fails, capsys
):
    out, path = tmp_path / "out", written("- {steps: 2}")

    def blocks(*seeds: int) -> list[float]:
        rows = [json.loads(line) for line in (out / frontier.TIMES).read_text().splitlines()]
        return [1e3 * row["seconds"] for row in rows if row["warm"] and row["seed"] in seeds]

    both = call(models, out, path, "--seeds", 0, 1)["points"][0]["ms_blocks"]
    assert len(both) == 5
    assert both == blocks(0, 1)
    assert call(models, out, path, "--seeds", 1)["points"][0]["ms_blocks"] == blocks(1)
    shutil.rmtree(out / "samples")
    another = call(models, out, path, "--seeds", 1, names=("first=second",))["points"][0]["ms_blocks"]
    assert len(another) == 3
    assert not {*another} & {*both}
    capsys.readouterr()
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    words = ["frontier", models / "first", "--grid", path, "--ref", "digits", "--num", 22, "--batch", 8, "--out", out]
    assert f'-> "{before + 1} threads"); state them as they were' in fails(main, *words)


def test_samples_of_something_else_are_told_and_set_aside_by_force(
    written, models, no_picture, tmp_path, fails, capsys
):
    out, path = tmp_path / "out", written("- {steps: 2}")
    first = call(models, out, path)["points"]
    samples, words = Path(first[0]["seeds"][0]["samples"]), ["--grid", path, "--ref", "digits", "--num", 22]
    words = ["frontier", f"first={models / 'second'}", *words, "--batch", 8, "--out", out]
    capsys.readouterr()
    told = fails(main, *words)
    assert f"first, steps=2: samples '{samples}' holds samples with other settings, " in told
    assert told.endswith("; state it as it was, or remove this folder, or give --force")
    (samples / "manifest.json").write_text("{")
    told = fails(main, *words)
    assert f"samples '{samples}': its manifest.json is damaged (" in told
    assert told.endswith("); remove this folder, or give --force")
    again = call(models, out, path, "--force", names=("first=second",))["points"]
    assert sorted(path.name for path in samples.parent.iterdir()) == ["seed0", "seed0.aside"]
    assert again[0]["seeds"] != first[0]["seeds"]


def test_steps_that_do_not_help_are_dropped_and_named(written, models, no_picture, tmp_path, monkeypatch, capsys):
    values = {2: 9.0, 4: 5.0, 6: 4.9, 8: 1.0}
    row = frontier._Frontier._row

    def with_value(self, point, results):
        made = row(self, point, results)
        made["score"] |= {
            "value": values[point.steps] + (made["settings"]["sampler"] == "midpoint") / point.steps,
            "error": 0.2,
        }
        return made

    monkeypatch.setattr(frontier._Frontier, "_row", with_value)
    text = "- {sampler: [euler, midpoint], steps: [8, 2, 6, 4]}"
    result = call(models, tmp_path / "out", written(text), "--prune")
    drawn = [(point["settings"]["sampler"], point["settings"]["steps"]) for point in result["points"]]
    assert sorted(drawn) == [(name, steps) for name in ("euler", "midpoint") for steps in (2, 4, 6)]
    assert [each["point"] for each in result["dropped"]] == ["sampler=euler steps=8", "sampler=midpoint steps=8"]
    assert "4.90 ± 0.20 at 6 steps is not below 5.00 ± 0.20 at 4 steps" in result["dropped"][0]["why"]
    assert "first, sampler=midpoint steps=8" in (tmp_path / "out/frontier.md").read_text()
    assert "dropped first, sampler=euler steps=8" in capsys.readouterr().err


def test_time_ends_where_decoding_begins_and_is_of_a_whole_block(written, models, no_picture, tmp_path, monkeypatch):
    """Block n keeps the networks busy for 8 (n + 1) seconds and the rest for 1,000; the last of 22 images is short."""
    now, images_of = [0.0], frontier.Work.images_of

    def slow(self, number, bar):
        now[0] += 8.0 * (number + 1)
        made = images_of(self, number, bar)
        now[0] += 1_000.0
        return made

    monkeypatch.setattr(frontier, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(frontier.Work, "images_of", slow)
    point = call(models, tmp_path / "out", written("- {sampler: midpoint, steps: 2}"))["points"][0]
    assert (point["label"], point["line"]) == ("midpoint, 2 steps", "midpoint")
    assert point["ms_blocks"] == [2_000, 3_000, 1_000]  # the first is not warm, and drawn again for a third
    assert (point["ms"], point["ms_quartiles"]) == (2_000, [1_500, 2_500])


@pytest.mark.filterwarnings("ignore:scheduler FlowMatchLCMScheduler draws new noise")
def test_every_point_has_the_images_of_generate(written, models, no_picture, tmp_path):
    text = """
- {steps: 6, dtype: [fp32, bf16], cache: [null, "first_block:0.9"]}
- {steps: 6, scheduler: [flow-match-lcm, unipc], guidance_scale: 1}
"""
    out, drawn = tmp_path / "out", []
    points = call(models, out, written(text))["points"]
    for number, point in enumerate(points):
        words = ["--ckpt", models / "first", *grid.words_of(point["settings"]), "--num", 22, "--batch", 8]
        main(["generate", *map(str, words), "--format", "npz", "--out", str(tmp_path / str(number))])
        own, same = (np.load(Path(at) / "samples.npz") for at in (point["seeds"][0]["samples"], tmp_path / str(number)))
        np.testing.assert_array_equal(own["arr_0"], same["arr_0"])
        drawn.append(own["arr_0"].tobytes())
    assert len({*drawn}) == len(points) == 6
    assert [point["kind"] for point in points] == [*4 * ["ODE"], "SDE", "ODE"]


def test_other_metrics_references_and_extractors_are_scored_anew(written, models, no_picture, tmp_path, monkeypatch):
    out, path = tmp_path / "out", written("- {steps: 2}")

    def metrics(*more) -> dict:
        found = call(models, out, path, *more)["points"][0]
        assert found["metrics"]["frechet_distance"] == found["score"]
        return {name: each["value"] for name, each in found["metrics"].items()}

    first = metrics()
    assert metrics("--metrics", "frechet_distance,kid").keys() == {"frechet_distance", "kid"}
    own = next(out.glob("samples/first/*/seed0/samples.npz"))
    (own.parent / "metrics.json").write_text("somebody's own")
    assert metrics("--ref", own, "--extractor", "digits")["frechet_distance"] < 1e-3 * first["frechet_distance"]
    assert metrics() == first
    stored = own.parent / "frontier.metrics.json"
    for damage in ({"metrics": {}}, {"warnings": None}, {"error_bars": {}}):
        stored.write_text(json.dumps(json.loads(stored.read_text()) | damage))
        assert metrics() == first
    assert (own.parent / "metrics.json").read_text() == "somebody's own"
    torch.manual_seed(1)
    other = digits.DigitsClassifier().eval(), 0.1
    monkeypatch.setattr(digits, "train_classifier", lambda: other)
    assert metrics()["frechet_distance"] != first["frechet_distance"]


def test_a_reference_that_does_not_do_is_told_before_the_work(written, models, tmp_path, fails):
    about = load_extractor("digits").describe()
    meta = {"format_version": 1, "n": 9, "image_shape": [1, 16, 16], "extractor": about}
    meta["source"] = {"pixels_sha256": "", "lossy": None}
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64), meta=json.dumps(meta))
    words = ["frontier", models / "first", "--grid", written(), "--ref", tmp_path / "ref.npz", "--num", 22]
    told = fails(main, *words, "--extractor", "digits", "--out", tmp_path / "out")
    assert "is of 16 px images, the samples 8; compare what has one resolution" in told
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    told = fails(main, *words, "--extractor", "digits", "--metrics", "frechet_distance,kid", "--out", tmp_path / "out")
    assert "has neither images nor their features; leave kid out, or give another" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(Path("experiments/grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_that_are_shipped_name_what_generate_takes(path, models):
    points = grid.read_grid(path, ["attention", "atconv"])["atconv"]
    parser = parser_of("generate", "generate")
    for stated in points:
        words = ["--ckpt", str(models / "first"), *grid.words_of(stated), "--num", "2", "--out", "x"]
        sampling_asked(parser.parse_args(words))
    text = path.read_text().replace(" \\\n#", "")
    assert parser_of("frontier", "frontier").parse_args(shlex.split(text.splitlines()[0])[3:]).grid == str(path)


def test_a_picture_takes_points_without_errors():
    points = [
        {**made_up(ms, value, error), "model": "m", "line": kind, "label": "", "kind": kind, "pareto": "all",
         "ms_quartiles": [ms, ms]}
        for ms, value, error, kind in ((1, 2, None, "ODE"), (1, 2, 0.1, "SDE"))
    ]  # fmt: skip
    with Image.open(io.BytesIO(plots.plot_frontier(points, "t", "y"))) as image:
        image.verify()
