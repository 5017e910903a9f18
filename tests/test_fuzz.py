"""Recipes, JSON documents and command lines of any content: a command takes them, or refuses them in one line."""

import dataclasses
import functools
import json
import shutil
from collections import Counter

import pytest
import yaml
from conftest import reset_accelerate
from fuzzing import DELETED, ODD, TEXTS, edited, outcome, places
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sample
import train_attnet
import train_sit
from eval import digits
from eval.__main__ import main as evaluate
from sampling.__main__ import main as sampling
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.files import sha256
from sit_atconv.latents.__main__ import main as latents
from sit_atconv.pipelines.export import main as export
from sit_atconv.posthoc import main as posthoc

MODEL = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "token_mixer": "atconv"}
STEP = "run/step-0000002"
# What reads a document: its file, the folder that is copied, and the command on the copy {0}, with a new name {1}.
READERS = {
    "sample of a model": ("model/config.json", sample.main, "--ckpt {0}/model --num 1 --steps 1 --out {1}.png"),
    "sample": (f"{STEP}/manifest.json", sample.main, "--ckpt {0}/run --num 1 --steps 1 --out {1}.png"),
    "generate": (f"{STEP}/manifest.json", sampling, "generate --ckpt {0}/run --num 2 --steps 1 --out {1}"),
    "likelihood": (f"{STEP}/manifest.json", sampling,
                   "likelihood --ckpt {0}/run --num 1 --sampler euler --steps 1 --out {1}.json"),
    "export": (f"{STEP}/manifest.json", export, "{0}/run --out {1}"),
    "export of a pipeline": ("pipe/model_index.json", export, "{0}/pipe --out {1}"),
    "convert": ("conv/conversion.json", convert, "{0}/conv --to public --out {1}.pt"),
    "resume": (f"{STEP}/trainer.json", train_sit.main, "{0}/tiny.yaml run.out={0}/run train.max_steps=3"),
    "posthoc": (f"{STEP}/ema/config.json", posthoc, "{0}/run --std 0.1 --out {1}"),
    "go on": ("png/manifest.json", sampling, "generate --ckpt {0}/run --num 20 --steps 1 --out {0}/png"),
    "score": ("png/manifest.json", evaluate, "score {0}/png --ref digits --features {1} --out {1}.json"),
    "features": ("features/features.json", evaluate, "score {0}/features --ref digits --out {1}.json"),
    "extract": ("features/settings.json", evaluate, "extract {0}/png --extractor digits --out {0}/features"),
    "table": ("png/metrics.json", evaluate, "table {0}/png/metrics.json --out {1}.md"),
    "report": ("png/metrics.json", evaluate, "report {0}/png --out {1}.html"),
    "report of a run": (f"{STEP}/manifest.json", evaluate, "report {0}/run --out {1}.html"),
}  # fmt: skip
COMMANDS = {
    "sample": (sample.main, []),
    "train_sit": (train_sit.main, ["--dry-run", "{0}/tiny.yaml"]),
    "generate": (sampling, ["generate"]),
    "likelihood": (sampling, ["likelihood"]),
    "speed": (sampling, ["speed", "--models"]),
    "extract": (evaluate, ["extract"]),
    "score": (evaluate, ["score"]),
    "build-ref": (evaluate, ["build-ref"]),
    "verify": (evaluate, ["verify"]),
    "table": (evaluate, ["table"]),
    "report": (evaluate, ["report"]),
    "convert": (convert, []),
    "export": (export, []),
    "latents": (latents, ["verify"]),
    "posthoc": (posthoc, []),
}
WORDS = [
    "", "x", "5", "-1", "0", "nan", "inf", "1e300", str(2**64), "9" * 5000, "a" * 300, "a/" * 3000, "/", ".",
    "/dev/null", "{0}", "{0}/run", "{0}/model", "{0}/png", "{0}/tiny.yaml", "--out", "--ckpt", "--num", "--steps",
    "--batch", "--seed", "--ref", "--cfg", "--vae", "--std", "--classes", "--dtype", "--device", "meta", "cpu",
    "cuda:99", "--sizes", "1000000", "SiT-S/8", "digits", "a=b", "--labels", "--metrics", "--epsilon", "--help",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and what the commands make of it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(digits, "train_classifier", functools.cache(digits.train_classifier))  # seconds, every time
    root = tmp_path_factory.mktemp("fuzz")
    recipe = {
        "run": {"out": str(root / "run")}, "model": MODEL, "train": {"batch_size": 4, "max_steps": 2},
        "ema": {"kind": "power", "snapshot_every": 1}, "preview": {"every": 0},
    }  # fmt: skip
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    for main, words in (
        (train_sit.main, "{0}/tiny.yaml"),
        (export, "{0}/run --out {0}/pipe"),
        (convert, "{0}/run --to public --out {0}/public.safetensors"),
        (convert, "{0}/public.safetensors --sample-size 8 --out {0}/conv"),
        (sampling, "generate --ckpt {0}/run --num 20 --steps 1 --out {0}/png"),
        (evaluate, "extract {0}/png --extractor digits --out {0}/features"),
        (evaluate, "score {0}/features --ref digits --out {0}/png/metrics.json"),
    ):
        reset_accelerate()
        main(words.format(root).split())
    shutil.copytree(root / STEP / "ema", root / "model")
    yield root
    patch.undo()


def fuzz(examples: int, strategy, check) -> None:
    """Tries `check` on as many examples as there are, the same ones at every run."""
    run = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run(given(strategy)(lambda example: check(example)))()


def tries(main, words: list[str]) -> str:
    reset_accelerate()
    found = outcome(lambda: main(words))
    assert not found.startswith("traceback"), f"{words}: {found}"
    return found.partition(":")[0]


def sign(file, root) -> None:
    """Give a changed file of a checkpoint the digest that its manifest has of it, so that it is read."""
    folder = root / STEP
    if file.is_relative_to(folder) and file.name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][file.relative_to(folder).as_posix()] = sha256(file)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def edits_of(document):
    spots = st.sampled_from(list(places(document)))
    one = st.tuples(spots, st.sampled_from(ODD)).map(lambda edit: json.dumps(edited(document, *edit)))
    return st.one_of(one, one, one, one, one, st.sampled_from(TEXTS))


def fuzz_documents(world, tmp_path, examples: int) -> Counter:
    counts = Counter()
    for name, (file, main, words) in READERS.items():

        def check(text, name=name, file=file, main=main, words=words):
            scratch = tmp_path / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            shutil.copy(world / "tiny.yaml", scratch)
            for folder in {file.partition("/")[0], "run", *(["png"] if name == "extract" else [])}:
                shutil.copytree(world / folder, scratch / folder)
            (scratch / file).write_text(text)
            sign(scratch / file, scratch)
            counts[tries(main, words.format(scratch, scratch / "new").split())] += 1

        fuzz(examples, edits_of(json.loads((world / file).read_text())), check)
    return counts


def fuzz_recipes(tmp_path, examples: int) -> Counter:
    counts = Counter()
    for main, schema in ((train_sit.main, Recipe), (train_attnet.main, ClassifierRecipe)):
        keys = [
            (section.name, key.name)
            for section in dataclasses.fields(schema)
            for key in dataclasses.fields(section.type)
            if (section.name, key.name) not in (("data", "root"), ("repa", "encoder"), ("distill", "teacher"))
        ]
        tiny = {"model": MODEL if schema is Recipe else {"name": "attnet_xxs", "input_size": 32}}
        tiny |= {"run": {"out": str(tmp_path / "run")}, "preview": {"every": 0}} if schema is Recipe else {}
        one = st.tuples(st.sampled_from(keys), st.sampled_from([value for value in ODD if value is not DELETED]))

        def check(changes, main=main, tiny=tiny):
            if isinstance(changes, str):
                text = changes
            else:
                stated = {section: dict(values) for section, values in tiny.items()}
                for (section, key), value in changes:
                    stated.setdefault(section, {})[key] = value
                text = yaml.safe_dump(stated)
            (tmp_path / "recipe.yaml").write_text(text)
            counts[tries(main, [str(tmp_path / "recipe.yaml"), "--dry-run"])] += 1

        fuzz(examples, st.one_of(*[st.lists(one, min_size=1, max_size=2)] * 6, st.sampled_from(TEXTS)), check)
    return counts


def fuzz_command_lines(world, tmp_path, examples: int) -> Counter:
    counts = Counter()
    for main, start in COMMANDS.values():

        def check(words, main=main, start=start):
            counts[tries(main, [word.format(world) for word in [*start, *words]])] += 1

        fuzz(examples, st.lists(st.sampled_from(WORDS), max_size=6), check)
    return counts


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Commands have defaults for --out: they are of this folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_documents_of_any_content_end_in_one_line(world, tmp_path, elsewhere):
    counts = fuzz_documents(world, tmp_path, 8)
    assert counts["refused"] > counts["taken"] > 0


def test_recipes_of_any_content_end_in_one_line(tmp_path, elsewhere):
    assert fuzz_recipes(tmp_path, 100)["refused"] > 20


def test_command_lines_of_any_content_end_in_one_line(world, tmp_path, elsewhere):
    assert fuzz_command_lines(world, tmp_path, 12)["refused"] > 20


@pytest.mark.slow
def test_twenty_thousand_inputs_end_in_one_line(world, tmp_path, elsewhere):
    parts = [fuzz_documents(world, tmp_path, 250), fuzz_recipes(tmp_path, 4000)]
    parts.append(fuzz_command_lines(world, tmp_path, 550))
    print(parts)
    assert sum(part.total() for part in parts) >= 20_000
