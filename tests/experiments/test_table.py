"""The one command of a table: what it runs in which order, what it skips, and what it refuses before it begins."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, reset_accelerate, slowly
from timm.models import save_for_hf

import train_sit
from eval.__main__ import main as evaluate
from experiments import table
from experiments.table import is_sampled, is_scored, is_trained, load_table, main, models, reference_digest
from sampling.__main__ import main as sampling
from sit_atconv import config, create_model
from sit_atconv.commands import parser_of
from sit_atconv.commands.options import sampling_asked
from sit_atconv.data.digits import Digits
from sit_atconv.models import attnet  # noqa: F401 (registers the family with timm)
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.sampling import generate, trained
from sit_atconv.scoring import DIGITS, digits
from sit_atconv.scoring.sources import from_arrays
from sit_atconv.training.checkpoint import load_trained

TABLES = sorted((ROOT / "experiments/tables").glob("*.yaml"))
COMMANDS = {"train_sit.py": train_sit.main, "sampling": sampling, "eval": evaluate}


FEW = [path for path in TABLES if path.stem == "digits"]


@pytest.mark.parametrize(
    "path", [*FEW, *slowly(path for path in TABLES if path not in FEW)], ids=lambda path: path.name
)
def test_shipped_tables_start_with_their_command_and_can_be_planned(path, capsys, monkeypatch):
    monkeypatch.setattr(table, "stored_settings", lambda samples: None)  # whatever was made here
    assert path.read_text().startswith(f"# python -m experiments.table experiments/tables/{path.name}\n")
    main([str(path), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("# ")]
    assert all(line.startswith("$ python ") for line in commands)
    plan, found = load_table(path), models(load_table(path))
    assert sum("eval table" in line for line in lines) == len(plan.samplers)
    assert sum("generate" in line for line in lines) == len(plan.samplers) * len(found)


def stated(words: list[str]) -> dict:
    """What a command line of `generate` says of the settings of its samples."""
    args = parser_of("generate", "generate").parse_args(words)
    args.sampling = sampling_asked(args)
    return generate.stated(args)


def test_the_imagenet_table_names_what_it_lacks_and_where_to_get_it(capsys):
    main([str(ROOT / "experiments/tables/imagenet256.yaml"), "--dry-run"])
    lacks = [line for line in capsys.readouterr().out.splitlines() if "is not there" in line or "are not there" in line]
    for file in ("references/VIRTUAL_imagenet256_labeled.npz", "references/weights-inception-2015-12-05-6726825d.pth"):
        if not (ROOT / file).exists():
            assert any(file in line and "download https://" in line for line in lacks)


def test_the_digits_recipes_differ_in_the_mixer_alone():
    recipes = [config.to_dict(model.recipe) for model in models(load_table(ROOT / "experiments/tables/digits.yaml"))]
    assert [(recipe["model"].pop("token_mixer"), recipe["run"]["seed"]) for recipe in recipes] == [
        (mixer, seed) for mixer in ("attention", "atconv", "hybrid") for seed in (0, 1, 2)
    ]
    for recipe in recipes:
        recipe.pop("run")
    assert all(recipe == recipes[0] for recipe in recipes)
    assert recipes[0]["model"]["pos_embed"] is True


@pytest.fixture
def small(recipe_file, tmp_path, monkeypatch):
    """A table of two mixers with two and one seeds, whose commands run in this process; also the lines that ran."""
    recipe = recipe_file(train={"max_steps": 2}, checkpoint={"every": 2})
    path, lines = tmp_path / "table.yaml", []
    path.write_text(
        f"out: {tmp_path / 'results'}\nruns: {tmp_path / 'runs'}\nnum: 20\nref: digits\n"
        "metrics: [frechet_distance, recognised]\nentries:\n"
        f"  - {{name: a, recipe: {recipe}, seeds: [0, 1]}}\n"
        f"  - {{name: b, recipe: {recipe}, overrides: [model.token_mixer=attention], seeds: [5]}}\n"
        "samplers:\n  - {name: quick, sampler: euler, steps: 1, cfg: 1.0}\n"
    )

    def call(words):
        words = words[1:] if words[1] != "-m" else words[2:]
        lines.append(words)
        COMMANDS[words[0]](words[1:])
        reset_accelerate()
        return 0, None

    monkeypatch.setattr(table, "call", call)
    torch.manual_seed(0)
    classifier = digits.DigitsClassifier().eval()  # untrained: what it thinks of the samples does not matter here
    monkeypatch.setattr(digits, "train_classifier", lambda: (classifier, 0.1))
    return path, lines


def test_a_table_is_made_and_only_what_is_missing_is_made_again(small, tmp_path, capsys):
    path, lines = small
    main([str(path)])
    assert [words[0] for words in lines] == ["train_sit.py"] * 3 + ["sampling", "eval"] * 3 + ["eval"]
    result = json.loads((tmp_path / "results/quick.json").read_text())
    assert [(row["method"], row["seeds"]) for row in result["rows"]] == [("hybrid", [0, 1]), ("attention", [5])]
    assert set(result["rows"][0]["metrics"]) == {"frechet_distance", "recognised"}
    raw = sorted((tmp_path / "results/raw").iterdir())
    assert [file.name for file in raw] == ["a-seed0-quick.json", "a-seed1-quick.json", "b-seed5-quick.json"]
    original = (tmp_path / "runs/a-seed0/samples/quick/metrics.json").read_text()
    assert json.loads(raw[0].read_text()) == json.loads(original)
    assert "20" in (tmp_path / "results/quick.md").read_text()
    before = (tmp_path / "results/quick.json").read_bytes()

    lines.clear()
    shutil.rmtree(tmp_path / "results")
    scored = tmp_path / "runs/a-seed1/samples/quick/metrics.json"
    scored.write_text(json.dumps(json.loads(scored.read_text()) | {"samples_manifest_sha256": "other"}))
    shutil.rmtree(tmp_path / "runs/b-seed5/samples")
    main([str(path)])
    assert [words[:2] for words in lines] == [
        ["eval", "score"], ["sampling", "generate"], ["eval", "score"], ["eval", "table"],
    ]  # fmt: skip
    assert (
        json.loads((tmp_path / "results/quick.json").read_bytes())["rows"][0]["metrics"]
        == json.loads(before)["rows"][0]["metrics"]
    )

    capsys.readouterr()
    main([str(path), "--dry-run"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$")]
    assert len(shown) == 1  # of what is complete, the table alone
    assert "eval table" in shown[0]

    plan = load_table(path)
    plan.entries[0].overrides = ["train.lr=0.00{seed}1"]
    assert [model.recipe.train.lr for model in models(plan)[:2]] == [0.0001, 0.0011]
    run = tmp_path / "runs/a-seed0"
    plan = load_table(path)
    assert is_trained(models(plan)[0])
    plan.entries[0].overrides = ["train.lr=0.5"]
    assert not is_trained(models(plan)[0])
    model, sampler = models(load_table(path))[0], plan.samplers[0]
    assert is_sampled(model, sampler)
    manifest = run / "samples/quick/manifest.json"
    guide = {"checkpoint_sha256": {"config.json": "ab" * 32}}  # which the table does not name
    for change in ({"checkpoint_sha256": {}}, {"checkpoint_sha256": None}, {"guide": guide}):
        content = manifest.read_text()
        manifest.write_text(json.dumps(json.loads(content) | change))
        assert not is_sampled(model, sampler)
        manifest.write_text(content)
    assert not is_sampled(dataclasses.replace(model, ckpt=tmp_path / "runs/nowhere", recipe=None), sampler)
    sampler.vae = "elsewhere"
    assert not is_sampled(model, sampler)
    manifest.rename(run / "samples/quick/settings.json")  # begun, and not complete
    assert not is_sampled(model, load_table(path).samplers[0])
    (run / "step-0000002/ema/config.json").write_text("{}")
    assert not is_trained(models(load_table(path))[0])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num: 20", "num: 21", "num: 20 -> 21"),
        ("num: 20", "num: 20\nformat: npz", 'format: "png" -> "npz"'),
        ("steps: 1", "steps: 2", "steps: 1 -> 2"),
        ("cfg: 1.0", "cfg: 1.5", "guidance_scale: 1.0 -> 1.5"),
        ("cfg: 1.0", "cfg: 1.0, seed: 4", "seed: 0 -> 4"),
        ("cfg: 1.0", "cfg: 1.0, dtype: bf16", 'dtype: "fp32" -> "bf16"'),
        ("cfg: 1.0", "cfg: 1.0, batch: 8", "block: 20 -> 8"),
        ("cfg: 1.0", "cfg: 1.0, epsilon: 0.1", "epsilon: null -> 0.1"),
        ("cfg: 1.0", "cfg: 1.0, labels: random", 'labels_rule: "balanced" -> "random"'),
        ("overrides: [", "overrides: [train.max_steps=3, ", "step: 2 -> 3"),
    ],
)
@pytest.mark.parametrize("complete", [True, *slowly([False])])
def test_samples_of_other_settings_are_told_before_anything_runs(small, tmp_path, fails, old, new, says, complete):
    path, lines = small
    samples = tmp_path / "runs/b-seed5/samples/quick"
    samples.mkdir(parents=True)
    plan = load_table(path)
    settings = {**stated(table.generate_words(plan, models(plan)[2], plan.samplers[0])), "labels": [0] * 20, "step": 2}
    (samples / ("manifest.json" if complete else "settings.json")).write_text(json.dumps(settings))
    table.check_samples(plan, models(plan)[2], plan.samplers[0], models(plan))
    path.write_text(path.read_text().replace(old, new))
    message = fails(main, path)
    assert f"{str(samples)!r} has samples with other settings than the table's, {says}; " in message
    assert f"give sampler 'quick' another name, or remove {str(samples)!r}" in message
    assert lines == []


def test_a_file_of_labels_is_compared_with_those_of_the_samples(small, tmp_path, fails):
    path, _ = small
    file = tmp_path / "labels"
    file.write_text("1\n" * 20)
    path.write_text(path.read_text().replace("cfg: 1.0", f"cfg: 1.0, labels: {file}"))
    samples = tmp_path / "runs/a-seed0/samples/quick"
    samples.mkdir(parents=True)
    plan = load_table(path)
    settings = stated(table.generate_words(plan, models(plan)[0], plan.samplers[0]))
    (samples / "manifest.json").write_text(json.dumps({**settings, "labels": [1] * 20, "step": 2}))
    table.check_samples(plan, models(plan)[0], plan.samplers[0], models(plan))
    file.write_text("1\n" * 19 + "2\n")
    assert "labels.19: 1 -> 2; give sampler 'quick'" in fails(main, path)
    (samples / "manifest.json").write_text("{")
    assert f"manifest.json' is damaged; remove {str(samples)!r}" in fails(main, path)


def test_what_a_table_no_longer_has_is_named_and_left(small, tmp_path, capsys):
    path, _ = small
    path.write_text(path.read_text().replace("  - {name: a", "  #").replace("b, ", "b, "))
    out = tmp_path / "results"
    (out / "raw").mkdir(parents=True)
    for name in (
        "raw/a-seed0-quick.json",
        "raw/b-seed5-quick.json",
        "slow.md",
        "slow.json",
        "quick.md",
        "notes.txt",
        *table.CURVES,
    ):
        (out / name).write_text("{}")
    main([str(path), "--dry-run"])
    named = [line for line in capsys.readouterr().out.splitlines() if "is of nothing in this table" in line]
    assert [line.split("'")[1] for line in named] == [
        str(out / name) for name in ("raw/a-seed0-quick.json", "slow.json", "slow.md")
    ]
    assert (out / "slow.md").exists()


def test_every_option_of_a_table_reaches_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(
        "out: o\nruns: r\nnum: 21\nformat: npz\nref: ref.npz\nweights: w.pth\nmetrics: [fid, pr]\n"
        "entries: [{name: a, ckpts: [x]}]\nsamplers:\n"
        "  - {name: s, sampler: sde-heun, steps: 9, cfg: 2.0, cfg_channels: first3, cfg_interval: [0.1, 0.5], "
        "epsilon: 0.01, diffusion: sbdm, diffusion_norm: 2.0, last_step: mean, last_step_size: 0.1, labels: random, "
        "grid: [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1], time_shift: 2.0, cfg_every: 3, "
        "seed: 3, batch: 7, dtype: bf16, vae: v}\n"
    )
    main(["t.yaml", "--dry-run"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$")]
    assert shown == [
        "$ python -m sampling generate --ckpt x --num 21 --format npz --sampler sde-heun --steps 9 --cfg 2.0 "
        "--cfg-channels first3 --cfg-interval 0.1 0.5 --epsilon 0.01 --diffusion sbdm --diffusion-norm 2.0 "
        "--last-step mean --last-step-size 0.1 --grid 0.0 0.1 0.2 0.3 0.4 0.5 0.7 0.9 1.0 --time-shift 2.0 "
        "--cfg-every 3 --labels random --seed 3 --batch 7 --dtype bf16 --vae v "
        "--out r/a-0/samples/s",
        "$ python -m eval score r/a-0/samples/s --ref ref.npz --metrics fid,pr --weights w.pth",
        "$ python -m eval table o/raw/a-0-s.json --out o/s.md",
    ]


@pytest.mark.parametrize(("there", "processes", "says"), [(True, 2, None), (False, 2, "true"), (False, 1, None)])
def test_processes_without_an_accelerator_are_told_of_the_cpu(small, monkeypatch, there, processes, says):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")  # so that it is as it was afterwards
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    main([str(small[0]), "--dry-run", "--processes", str(processes)])
    assert os.environ.get("ACCELERATE_USE_CPU") == says


def test_what_was_scored_by_other_weights_is_scored_again(tmp_path, monkeypatch):
    samples, weights = tmp_path / "samples", tmp_path / "w.pth"
    samples.mkdir()
    (samples / "manifest.json").write_text("{}")
    weights.write_bytes(b"weights")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.setattr(table, "_described", lambda _: {"protocol": "dinov2-x-1", "weights_sha256": "vit"})
    file = tmp_path / "t.yaml"
    own = {"protocol": "adm-inception-1", "weights_sha256": sha256(weights)}
    vit = {"protocol": "dinov2-x-1", "weights_sha256": "vit"}
    for metrics, listed, is_it in (
        ("fid, fdd", [own, vit], True),
        ("fid", [own], True),
        ("fdd", [vit], True),
        ("fid", [own | {"weights_sha256": "other"}], False),
        ("fid", [own | {"protocol": "adm-inception-0"}], False),
        ("fid, fdd", [own, vit | {"weights_sha256": "other"}], False),
        ("fid, fdd", [own | {"weights_sha256": "other"}, vit], False),
        ("fid, fdd", [own], False),
        ("fdd", [vit | {"weights_sha256": "other"}], False),
    ):
        file.write_text(
            f"out: o\nruns: r\nnum: 20\nref: {tmp_path / 'ref.npz'}\nweights: {weights}\nmetrics: [{metrics}]\n"
            "entries: [{name: a, ckpts: [x]}]\nsamplers: [{name: s, sampler: euler, cfg: 1.5}]\n"
        )
        result = {
            "samples_manifest_sha256": sha256(samples / "manifest.json"), "extractors": listed,
            "protocol": listed[0]["protocol"], "metrics": {name: {"value": 1.0} for name in metrics.split(", ")},
            "reference": {"sha256": sha256(tmp_path / "ref.npz")},
            "error_bars": {"design": None, "groups": None, "upper_bound": False, "why": "few images"},
        }  # fmt: skip
        (samples / "metrics.json").write_text(json.dumps(result))
        assert is_scored(samples, load_table(file)) == is_it, (metrics, listed)


def test_a_reference_that_says_whose_features_it_is_of_decides_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "train_classifier", lambda: (digits.DigitsClassifier().eval(), 0.1))
    monkeypatch.setattr(table, "_extractor", table._extractor.__wrapped__)  # which would keep that classifier

    def write(metrics, protocol, weights=""):
        about = {"name": "x", "protocol": protocol, "weights_sha256": "own"}
        source = {"pixels_sha256": "0", "lossy": False}
        meta = {"format_version": 1, "n": 2, "image_shape": [1, 8, 8], "extractor": about, "source": source}
        np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3), meta=np.array(json.dumps(meta)))
        (tmp_path / "t.yaml").write_text(
            f"out: o\nruns: r\nnum: 20\nref: {tmp_path / 'ref.npz'}\nmetrics: [{metrics}]\n{weights}\n"
            "entries: [{name: a, ckpts: [x]}]\nsamplers: [{name: s, sampler: euler, cfg: 1.5}]\n"
        )
        return load_table(tmp_path / "t.yaml")

    for metrics, protocol, wanted, other, lacks in (
        (
            "frechet_distance, is",
            "module-a:b",
            [("module-a:b", "own")],
            "fid",
            "'a:b', whose file is not on",
        ),
        (
            "frechet_distance, recognised",
            DIGITS,
            [(DIGITS, None)],
            "fdd",
            "is of features with name 'x'",
        ),
        ("fdd, kid", "dinov2-a_vit-1", [("dinov2-a_vit-1", "own")], "is", "'a_vit'"),
    ):
        assert table.wanted_extractors(write(metrics, protocol)) == wanted
        with pytest.raises(InputError, match=f"metrics='{other}'"):
            write(other, protocol)
        found = write(metrics, protocol, "weights: w.pth")
        with pytest.raises(InputError, match="weights belong to Inception, and ref="):
            table.missing(found, [])
        found.weights = None
        (sentence,) = table.missing(found, [])  # another extractor than the reference's, or none
        assert lacks in sentence


def test_what_is_scored_is_scored_of_these_samples_against_this_reference(small, tmp_path):
    path, _ = small
    plan, samples = load_table(path), tmp_path / "samples"
    samples.mkdir()
    (samples / "manifest.json").write_text("{}")
    train = Digits("train")
    names = ["frechet_distance", "recognised", "classifier_heldout_accuracy"]
    metric = {"value": 1.0, "se": 0.1, "corrected": 0.9}
    good = {
        "n": 640,  # images are enough to correct the distance in 64 features
        "groups": 10,
        "class_histogram": {"1": 320, "2": 320},
        "samples_manifest_sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # of "{}"
        "protocol": "digits-classifier-2",
        "metrics": dict.fromkeys(names, metric),
        "reference": {"sha256": from_arrays(to_uint8(train.images), train.labels, "x").digest()},
    }
    for changes, is_it in (
        ({}, True),
        ({"metrics": dict.fromkeys(names[:2], metric)}, True),  # of a classifier whose accuracy nobody knows
        ({"metrics": dict.fromkeys(names[:1], metric)}, False),
        ({"metrics": dict.fromkeys([*names, "kid"], metric)}, False),
        # Of an earlier version, whose errors or corrected values do not hold.
        ({"class_histogram": None}, False),
        ({"n": 630, "class_histogram": {"1": 315, "2": 315}}, False),
        ({"n": 600, "class_histogram": {"1": 300, "2": 300}}, False),
        ({"samples_manifest": {"labels_rule": "random"}}, False),
        ({"samples_manifest_sha256": "other"}, False),
        ({"protocol": "adm-inception-1"}, False),
        ({"reference": {"sha256": "other"}}, False),
        ({"reference": None}, False),
    ):
        (samples / "metrics.json").write_text(json.dumps(good | changes))
        assert is_scored(samples, plan) == is_it, changes
    assert not is_scored(tmp_path / "nowhere", plan)


def test_references_are_told_by_what_results_state_of_them(tmp_path, image_folder):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert reference_digest(str(tmp_path / "statistics.npz")) == sha256(tmp_path / "statistics.npz")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    images = from_arrays(torch.from_numpy(pixels).permute(0, 3, 1, 2), None, "x")
    assert reference_digest(str(tmp_path / "images.npz")) == images.digest()


def test_results_are_copied_without_the_places_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = Path.cwd() / "runs" / "a"
    (tmp_path / "m.json").write_text(json.dumps({"samples": str(there), "x": [{"ref": "/else/where"}, 0.1 + 0.2]}))
    table.copy_result(tmp_path / "m.json", tmp_path / "new/raw.json")
    assert json.loads((tmp_path / "new/raw.json").read_text()) == {
        "samples": "runs/a", "x": [{"ref": "/else/where"}, 0.1 + 0.2],
    }  # fmt: skip


def test_a_run_that_ends_early_is_not_sampled(small, monkeypatch, capsys):
    lines = []
    monkeypatch.setattr(table, "call", lambda words: (lines.append(words), (0, None))[1])
    with pytest.raises(SystemExit):
        main([str(small[0])])
    assert len(lines) == 1
    assert "is not trained to its end; run again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_command_waited_for(tmp_path, number):
    script = (
        "import os, pathlib, signal\n"
        "signal.alarm(20)\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        f"signal.sigwait([{int(number)}])\n"
        f"pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    assert table.call([sys.executable, "-c", script]) == (0, number)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_before_the_command_is_there_is_passed_on_once(monkeypatch, number):
    sent, lost = [], []

    class Process:
        def __init__(self, *words, **options):
            signal.raise_signal(number)

        def send_signal(self, number):
            sent.append(number)

        def wait(self):
            return 7

    monkeypatch.setattr(table.subprocess, "Popen", Process)
    before = signal.signal(number, lambda *_: lost.append(number))
    try:
        assert table.call(["x"]) == (7, number)
        assert (sent, lost) == ([number], [])
        signal.raise_signal(number)
        assert lost == [number]  # afterwards they go where they went before
    finally:
        signal.signal(number, before)


def test_models_trained_elsewhere_are_not_trained(tmp_path, capsys, fails):
    (tmp_path / "t.yaml").write_text(
        "out: o\nruns: r\nnum: 20\nref: digits\nmetrics: [kid]\nentries:\n  - {name: a, ckpts: [x, y], method: A/2}\n"
        "samplers:\n  - {name: s, sampler: euler, cfg: 1.5}\n"
    )
    plan = load_table(tmp_path / "t.yaml")
    found = models(plan)
    assert [(str(model.ckpt), model.train) for model in found] == [("x", None), ("y", None)]
    assert all(map(is_trained, found))
    assert (found[1].samples / plan.samplers[0].name).as_posix() == "r/a-1/samples/s"
    assert [model.method for model in found] == ["A/2", "A/2"]
    main([str(tmp_path / "t.yaml"), "--dry-run"])
    out = capsys.readouterr().out
    assert "eval table A/2=o/raw/a-0-s.json A/2=o/raw/a-1-s.json --out o/s.md" in out
    assert "train_sit.py" not in out
    assert "# checkpoint 'x' is not there" in out
    assert "checkpoint 'x' is not there" in fails(main, tmp_path / "t.yaml")
    assert plan.samplers[0].options() == [
        "--sampler", "euler", "--cfg", "1.5", "--cfg-channels", "all", "--cfg-interval", "0.0", "1.0",
        "--labels", "balanced", "--seed", "0",
    ]  # fmt: skip


def test_several_processes_share_each_command_that_can(monkeypatch):
    lines = []
    monkeypatch.setattr(table, "call", lambda words: (lines.append(words[1:]) or 0, None))
    run = table.Runner(2, dry=False)
    for words in (["train_sit.py", "R"], ["-m", "sampling", "generate", "--num", "3"]):
        run(words, shared=True)
    run(["-m", "eval", "table"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert lines == [
        [*launcher, "train_sit.py", "R"], [*launcher, "-m", "--", "sampling", "generate", "--num", "3"],
        ["-m", "eval", "table"],
    ]  # fmt: skip


def test_the_first_command_that_fails_ends_it(small, monkeypatch, capsys):
    monkeypatch.setattr(table, "call", lambda words: (7, None))
    with pytest.raises(SystemExit) as stop:
        main([str(small[0])])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "train_sit.py" in message
    assert "ended with exit status 7; mend it, and run again" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nam: 3", "did you mean 'num'"),
        ("num: 1", "num=1: one sample is no distribution"),
        ("num: 10_000_001", "num=10000001: one sample is no distribution; give at least 2 and at most 10,000,000"),
        ("entries: [{name: a, ckpt: [x]}]", "did you mean 'ckpts'"),
        ("entries: [{name: a, recipe: x, ckpts: [y]}]", "give either recipe and seeds, or ckpts"),
        ("entries: [{name: a}]", "give either recipe and seeds, or ckpts"),
        ("entries: [{name: a, recipe: x}]", "seeds and overrides go with a recipe"),
        ("entries: [{name: a, recipe: x, seeds: [1, 1]}]", "the same one twice"),
        ("entries: [{name: ../a, ckpts: [x]}]", "entry name '../a'"),
        ("entries: [{name: a, ckpts: [x]}, {name: a, ckpts: [y]}]", "each a name of its own"),
        ("samplers: []", "samplers []: give at least one"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, stepz: 3}]", "did you mean 'steps'"),
        ("samplers: [{name: s}]", "missing mandatory value: sampler"),
        ("samplers: 3", "samplers=3 is to be a list"),
        ("num: many", "num"),
        ("ref: nowhere.npz\nref_url: https://x", "reference 'nowhere.npz' is not there; download https://x to that"),
        ("metrics: []", "metrics=[]: give at least one"),
        ("metrics: [fid]", "metrics='fid'"),
        ("format: jpg", "format='jpg'"),
        ("entries: [{name: a, recipe: x, seeds: [1], overrides: [run.seed=3]}]", "the table decides run.seed"),
        ("samplers: [{name: s, sampler: heunn, cfg: 1}]", "sampler 's': sampler='heunn': did you mean 'heun'"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, last_step: mean}]", "last_step=mean goes with sampler="),
        ("samplers: [{name: s, sampler: euler, cfg: 2, cfg_interval: [0.1]}]", "give two numbers, low and high"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, labels: blanced}]", "labels='blanced': no such file"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, dtype: fp8}]", "dtype='fp8'"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, batch: 0}]", "batch=0: must be at least 1"),
        ("samplers: [{name: s, sampler: euler, cfg: 1, seed: -1}]", "sampler 's': seed=-1: must be at least 0"),
        ("samplers: [{name: s, sampler: euler, cfg: 1e30}]", "sampler 's': guidance_scale=1e+30: must be at least"),
        ("samplers: [{name: s, sampler: euler, guidance_scale: 1}]", "table key='guidance_scale'"),
        ("samplers: [{name: s, sampler: euler, cfg: 2, guide: 'x-{seed}'}]", "{seed} stands for the seed of a recipe"),
        ("weights: x", "weights belong to Inception"),
        ("- 1", "is to be a mapping"),
    ],
)
def test_wrong_tables_are_refused_in_one_line_before_anything_runs(tmp_path, fails, text, says):
    lines = {
        "out": "out: o", "runs": "runs: r", "num": "num: 20", "ref": "ref: digits",
        "metrics": "metrics: [is]",
        "entries": "entries: [{name: a, ckpts: [x]}]", "samplers": "samplers: [{name: s, sampler: euler, cfg: 1.5}]",
    }  # fmt: skip
    key = text.partition(":")[0]
    path = tmp_path / "t.yaml"
    path.write_text(text if text.startswith("-") else "\n".join({**lines, key: text}.values()))
    assert says in fails(main, path)


def test_missing_inception_weights_are_named_before_anything_runs(tmp_path, fails):
    (tmp_path / "ref.npz").touch()
    (tmp_path / "t.yaml").write_text(
        f"out: o\nruns: r\nnum: 20\nref: {tmp_path / 'ref.npz'}\nweights: {tmp_path / 'w.pth'}\nmetrics: [fid]\n"
        "entries: [{name: a, ckpts: [x]}]\nsamplers: [{name: s, sampler: euler, cfg: 1.5}]\n"
    )
    message = fails(main, tmp_path / "t.yaml")
    assert "w.pth" in message
    assert "https://" in message


def weaker_in(folder, seed=1) -> str:
    torch.manual_seed(seed)
    create_model(None, 8, 10, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2).save_pretrained(folder)
    return str(folder)


def test_a_guide_that_is_not_there_is_named_before_anything_runs(small, tmp_path, fails, capsys):
    path, lines = small
    text, runs = path.read_text(), tmp_path / "runs"
    place = tmp_path / "guides/{seed}"
    path.write_text(text.replace("cfg: 1.0", f"cfg: 2.0, guide: '{place}'"))
    weaker_in(tmp_path / "guides/0")
    weaker_in(tmp_path / "guides/1")
    said = fails(main, path)  # of seed 5 there is none
    assert f"error: sampler 'quick': guide: checkpoint '{tmp_path}/guides/5': no such folder" in said
    assert lines == []
    main([str(path), "--dry-run"])
    shown = capsys.readouterr().out
    assert all(f"--guide {tmp_path}/guides/{seed} " in shown for seed in (0, 1, 5))
    assert "# sampler 'quick': guide: checkpoint" in shown
    # a guide may be a run of this table
    path.write_text(text.replace("cfg: 1.0", f"cfg: 2.0, guide: {runs}/b-seed5").replace("- {name: a", "- {name: c"))
    assert table.missing(load_table(path), models(load_table(path))) == []
    path.write_text(path.read_text().replace("b-seed5", "b-seed6"))
    assert "b-seed6': no such folder" in table.missing(load_table(path), models(load_table(path)))[0]


def test_samples_by_another_guide_are_told_before_anything_runs(small, tmp_path, fails):
    path, lines = small
    guides = [weaker_in(tmp_path / f"guides/{seed}", seed) for seed in (0, 1, 5)]
    path.write_text(path.read_text().replace("cfg: 1.0", f"cfg: 2.0, guide: '{tmp_path}/guides/{{seed}}'"))
    plan = load_table(path)
    for model, guide in zip(models(plan), guides, strict=True):
        words = table.generate_words(plan, model, plan.samplers[0])
        assert words[words.index("--guide") + 1] == guide
        (model.samples / "quick").mkdir(parents=True)
        recorded = trained.describe_guide(load_trained(guide))
        settings = {**stated(words), "labels": [0] * 20, "step": 2, "guide": recorded}
        (model.samples / "quick/manifest.json").write_text(json.dumps(settings))
        table.check_samples(plan, model, plan.samplers[0], models(plan))
    moved = shutil.move(tmp_path / "guides/5", tmp_path / "elsewhere")  # which is no other guide
    shutil.copytree(moved, tmp_path / "guides/5")
    table.check_samples(plan, model, plan.samplers[0], models(plan))
    weaker_in(tmp_path / "guides/5", 6)
    assert "other settings than the table's, guide.checkpoint_sha256.diffusion_pytorch_model" in fails(main, path)
    path.write_text(path.read_text().replace(f", guide: '{tmp_path}/guides/{{seed}}'", ""))
    assert 'guide.prediction: "velocity" -> null' in fails(main, path)
    assert lines == []


def test_a_run_with_the_options_of_its_source_is_known_again_and_the_source_looked_for(small, tmp_path, fails):
    path, lines = small
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"model": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shape = {"patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 2, "learn_sigma": False}
    source, entries = tmp_path / "source", path.read_text()
    path.write_text(entries.replace("seeds: [0, 1]", f"seeds: [0, 1], overrides: [train.init={source}]"))
    wanted = models(load_table(path))
    assert f"a-seed0: train.init={str(source)!r}: " in fails(main, path)
    assert lines == []
    options = {"token_mixer": "atconv", "pool": "grid", "class_dropout_prob": 0.0}
    create_model(None, 8, 10, **shape, **options).save_pretrained(source)
    assert table.missing(load_table(path), wanted) == []
    COMMANDS["train_sit.py"](wanted[0].train)
    assert [is_trained(model) for model in wanted] == [True, False, False]
    for override, same in (("model.pool=grid", True), ("model.pool=raster", False), ("train.init=null", False)):
        stated = config.load_recipe(wanted[0].train[0], [*wanted[0].train[1:], override])
        assert is_trained(dataclasses.replace(wanted[0], recipe=stated)) == same
    shutil.rmtree(source)  # which is there for the run that has ended, and for no other
    assert [said.partition(":")[0] for said in table.missing(load_table(path), wanted)] == ["a-seed1"]
    # A source may be a run that is trained before.
    for run, coming in (("a-seed1", True), ("b-seed5", False)):
        text = entries.replace("seeds: [0, 1]", f"seeds: [1, 2], overrides: [train.init={tmp_path / 'runs' / run}]")
        plan = load_table((path.write_text(text), path)[1])
        assert any(said.startswith("a-seed2: ") for said in table.missing(plan, models(plan))) != coming


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(InputError, match="see experiments/tables"):
        load_table(ROOT / "nowhere.yaml")


def test_a_stated_extractor_decides_the_metrics_and_scores(tmp_path, monkeypatch):
    """A classifier of one's own against a folder of images, which imply Inception."""
    model = timm.create_model("attnet_xxs", in_chans=1, num_classes=3, depths=[1], dims=[8], mlp_ratios=[2])
    config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,)}
    save_for_hf(model, str(tmp_path / "classifier"), safe_serialization=True, data_config=config)
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    spec = f"attnet:{tmp_path / 'classifier'}"

    def write(metrics, extractor=spec, more=""):
        (tmp_path / "t.yaml").write_text(
            f"out: o\nruns: r\nnum: 20\nref: {tmp_path / 'real.npz'}\nmetrics: [{metrics}]\nextractor: {extractor}\n"
            f"{more}\nentries: [{{name: a, ckpts: [x]}}]\nsamplers: [{{name: s, sampler: euler, cfg: 1.5}}]\n"
        )
        return load_table(tmp_path / "t.yaml")

    plan = write("frechet_distance, pr, nearest, recognised")
    digest = sha256(tmp_path / "classifier/model.safetensors")
    assert table.wanted_extractors(plan) == [("attnet-1", digest)]
    assert table.wanted_metrics(plan) == {
        "frechet_distance", "precision", "recall", "density", "coverage", "nearest", "copies", "recognised",
    }  # fmt: skip
    with pytest.raises(InputError, match="metrics='fid'"):
        write("fid")
    with pytest.raises(InputError, match="did you mean 'attnet'"):
        write("kid", "attnett")
    with pytest.raises(InputError, match="weights belong to Inception, and extractor=attnet:"):
        table.missing(write("kid", more="weights: w.pth"), [])
    assert table.missing(write("kid"), []) == []
    nowhere = "extractor 'attnet:/nowhere': no such folder; give the folder of a run of `sit-atconv classify`"
    assert table.missing(write("kid", "attnet:/nowhere"), []) == [nowhere]
    commands = []
    monkeypatch.setattr(table, "is_sampled", lambda *_: True)
    monkeypatch.setattr(table, "copy_result", lambda *_: None)

    class Run:
        processes, dry = 1, True

        def __call__(self, words, shared=False):
            commands.append(words)

    table.make(plan, table.models(plan), Run())
    (words,) = (words for words in commands if "score" in words)
    assert words[-2:] == ["--extractor", spec]
