"""Recipes, documents and command lines of any content: a command takes them, or refuses them in one line."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
from collections import Counter

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, reset_accelerate
from diffusers import DiTTransformer2DModel
from fuzzing import DELETED, ODD, TEXTS, edited, outcome, places, read_document, text_of, write_document
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_attnet
import train_sit
from eval.__main__ import main as evaluate
from experiments import ablation, bombs, distill_swap, error_bars, principles, schedulers, table, video
from experiments.bench import attnet, cache, loop, op, swap
from sampling.__main__ import main as sampling
from sit_atconv import ATConvDiTTransformer2DModel
from sit_atconv.bench import speed
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.latents.__main__ import main as latents
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines import exporting
from sit_atconv.pipelines.export import main as export
from sit_atconv.posthoc import main as posthoc
from sit_atconv.principles import report as measuring
from sit_atconv.runtime.files import sha256
from sit_atconv.sampling.samples import Samples
from sit_atconv.scoring import digits
from sit_atconv.swap import load_delta, save_delta, swap_attention

MODEL = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "token_mixer": "atconv"}
NET = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [2, 2], "stem_strides": [2, 1]}


def dit():
    """A tiny DiT, always the same."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=10, **sizes)


def delta(words):
    load_delta(dit(), words[0])


def swapped(words):
    ATConvDiTTransformer2DModel.from_pretrained(words[0])


STEP, ENDED, NET_STEP = "run/step-0000002", "aligned/step-0000001", "net/step-0000001"
ALIGNED = "{0}/tiny.yaml repa.encoder=local-dir:{0}/vit repa.depth=1 run.out={0}/aligned train.max_steps=1"
SAMPLES = "made/tables/a-0/samples/e"
# What reads a document: its file, and the command on the copy {0} of the world, with a new name {1}.
READERS = {
    "sample of a model": ("model/config.json", sample.main, "--ckpt {0}/model --num 1 --steps 1 --out {1}.png"),
    "sample of a converted model": ("conv/config.json", sample.main, "--ckpt {0}/conv --num 1 --steps 1 --out {1}.png"),
    "sample of shards": ("shards/diffusion_pytorch_model.safetensors.index.json", sample.main,
                         "--ckpt {0}/shards --num 1 --steps 1 --out {1}.png"),
    "sample": (f"{STEP}/manifest.json", sample.main, "--ckpt {0}/run --num 1 --steps 1 --out {1}.png"),
    "generate": (f"{STEP}/manifest.json", sampling, "generate --ckpt {0}/run --num 2 --steps 1 --out {1}"),
    "labels": ("labels.json", sampling,
               "generate --ckpt {0}/run --num 2 --steps 1 --labels {0}/labels.json --out {1}"),
    "likelihood": (f"{STEP}/manifest.json", sampling,
                   "likelihood --ckpt {0}/run --num 1 --sampler euler --steps 1 --out {1}.json"),
    "likelihood there": ("likelihood.json", sampling,
                         "likelihood --ckpt {0}/run --num 1 --sampler euler --steps 1 --out {0}/likelihood.json"),
    "speed there": ("speed.json", sampling, "speed --models SiT-S/8 --sizes 1 --out {0}/speed"),
    "export": (f"{STEP}/manifest.json", export, "{0}/run --out {1}"),
    "export of a pipeline": ("pipe/model_index.json", export, "{0}/pipe --out {1}"),
    "export of a transformer": ("pipe/transformer/config.json", export, "{0}/pipe --out {1}"),
    "export of a scheduler": ("pipe/scheduler/scheduler_config.json", export, "{0}/pipe --out {1}"),
    "convert": ("conv/conversion.json", convert, "{0}/conv --to public --out {1}.pt"),
    "convert of a public file": ("public.safetensors", convert, "{0}/public.safetensors --sample-size 8 --out {1}"),
    "convert of a DiT": ("dit/config.json", convert, "{0}/dit --out {1}"),
    "delta": ("delta.safetensors", delta, "{0}/delta.safetensors"),
    "swapped model": ("swapped/config.json", swapped, "{0}/swapped"),
    "resume": (f"{STEP}/trainer.json", train_sit.main, "{0}/tiny.yaml run.out={0}/run train.max_steps=3"),
    "resume, manifest": (f"{STEP}/manifest.json", train_sit.main,
                         "{0}/tiny.yaml run.out={0}/run train.max_steps=3"),
    "resume, optimiser": (f"{STEP}/optimizer.safetensors", train_sit.main,
                          "{0}/tiny.yaml run.out={0}/run train.max_steps=3"),
    "log": ("run/log.jsonl", train_sit.main, "{0}/tiny.yaml run.out={0}/run"),
    "recipe of a run": ("begun/recipe.yaml", train_sit.main, "{0}/tiny.yaml run.out={0}/begun train.max_steps=1"),
    "base of a recipe": ("base.yaml", train_sit.main, "{0}/derived.yaml --dry-run"),
    "projectors": (f"{ENDED}/model/projectors.safetensors", train_sit.main, ALIGNED),
    "encoder": ("vit/config.json", train_sit.main, ALIGNED),
    "posthoc": (f"{STEP}/ema/config.json", posthoc, "{0}/run --std 0.1 --out {1}"),
    "snapshot": ("run/snapshots/step-0000002/ema.safetensors", posthoc, "{0}/run --std 0.1 --out {1}"),
    "classifier": (f"{NET_STEP}/manifest.json", train_attnet.main, "{0}/net.yaml"),
    "classifier, trainer": (f"{NET_STEP}/trainer.json", train_attnet.main, "{0}/net.yaml"),
    "classifier, evaluations": ("net/evals.jsonl", train_attnet.main, "{0}/net.yaml"),
    "principles": (f"{NET_STEP}/ema/config.json", principles.main, "{0}/net --num 2 --out {1}"),
    "principles, manifest": (f"{NET_STEP}/manifest.json", principles.main, "{0}/net --num 2 --out {1}"),
    "principles of a SiT": (f"{STEP}/manifest.json", principles.main, "{0}/run --num 2 --out {1}"),
    "autoencoder": ("vae/config.json", latents, "encode {0}/images.yaml --out {1}"),
    "cache, verified": ("cache/index.json", latents, "verify {0}/cache"),
    "cache, gone on with": ("cache/settings.json", latents, "encode {0}/images.yaml --out {0}/cache"),
    "cache, trained from": ("cache/index.json", train_sit.main,
                            "{0}/images.yaml data.kind=latents data.root={0}/cache train.max_steps=1 run.out={1}"),
    "go on": ("png/manifest.json", sampling, "generate --ckpt {0}/run --num 20 --steps 1 --out {0}/png"),
    "samples, settings": ("parts/settings.json", sampling, "generate --ckpt {0}/run --num 2 --steps 1 --out {0}/parts"),
    "samples, record": ("parts/blocks/000000.json", sampling,
                        "generate --ckpt {0}/run --num 2 --steps 1 --out {0}/parts"),
    "score": ("png/manifest.json", evaluate, "score {0}/png --ref digits --features {1} --out {1}.json"),
    "features": ("features/features.json", evaluate, "score {0}/features --ref digits --out {1}.json"),
    "reference": ("ref.npz", evaluate, "score {0}/features --ref {0}/ref.npz --out {1}.json"),
    "extract": ("features/settings.json", evaluate, "extract {0}/png --extractor digits --out {0}/features"),
    "extract, index": ("features/features.json", evaluate, "extract {0}/png --extractor digits --out {0}/features"),
    "table": ("png/metrics.json", evaluate, "table {0}/png/metrics.json --out {1}.md"),
    "report": ("png/metrics.json", evaluate, "report {0}/png --out {1}.html"),
    "report of a run": (f"{STEP}/manifest.json", evaluate, "report {0}/run --out {1}.html"),
    "report, recipe": ("run/recipe.yaml", evaluate, "report {0}/run --out {1}.html"),
    "report, log": ("run/log.jsonl", evaluate, "report {0}/run --out {1}.html"),
    "report, frontier": ("run/frontier/frontier.json", evaluate, "report {0}/run --out {1}.html"),
    "made table": ("table.yaml", table.main, "{0}/table.yaml --dry-run"),
    "made table, samples": (f"{SAMPLES}/manifest.json", table.main, "{0}/table.yaml --dry-run"),
    "made table, metrics": (f"{SAMPLES}/metrics.json", table.main, "{0}/table.yaml --dry-run"),
}  # fmt: skip
# A command: its words in every case, and those that make it work.
COMMANDS = {
    "sample": (sample.main, "", "--ckpt {0}/run --num 1 --steps 1 --out {1}.png"),
    "train_sit": (train_sit.main, "--dry-run", "{0}/tiny.yaml"),
    "train_attnet": (train_attnet.main, "--dry-run", "{0}/net.yaml"),
    "distill_swap": (distill_swap.main, "--dry-run", "{0}/tiny.yaml distill.teacher={0}/run"),
    "generate": (sampling, "generate", "--ckpt {0}/run --num 2 --steps 1 --out {1}"),
    "likelihood": (sampling, "likelihood", "--ckpt {0}/run --num 1 --sampler euler --steps 1 --out {1}.json"),
    "speed": (sampling, "speed", "--models SiT-S/8 --out {1}"),
    "extract": (evaluate, "extract", "{0}/png --extractor digits --out {1}"),
    "score": (evaluate, "score", "{0}/features --ref digits --out {1}.json"),
    "build-ref": (evaluate, "build-ref", "{0}/features --out {1}.npz"),
    "verify": (evaluate, "verify", "--weights {0}/public.safetensors"),
    "table": (evaluate, "table", "{0}/png/metrics.json --out {1}.md"),
    "report": (evaluate, "report", "{0}/png --out {1}.html"),
    "convert": (convert, "", "{0}/public.safetensors --sample-size 8 --out {1}"),
    "export": (export, "", "{0}/run --out {1}"),
    "encode": (latents, "encode", "{0}/images.yaml --out {1}"),
    "verify a cache": (latents, "verify", "{0}/cache"),
    "posthoc": (posthoc, "", "{0}/run --std 0.1 --out {1}"),
    "ablation": (ablation.main, "--dry-run", "--seeds 0 --out {1}"),
    "principles": (principles.main, "", "{0}/run --num 2 --out {1}"),
    "made table": (table.main, "--dry-run", "{0}/table.yaml"),
    "bombs": (bombs.main, "", ""),
    "video": (video.main, "--dry-run", "--seeds 0 --out {1}"),
    "schedulers": (schedulers.main, "", "--out {1}"),
    "error_bars": (error_bars.main, "", "--repeats 2 --out {1}"),
    "bench.op": (op.main, "", "--rounds 1 --out {1}"),
    "bench.attnet": (attnet.main, "", "--rounds 1 --out {1}"),
    "bench.swap": (swap.main, "", "--out {1}"),
    "bench.cache": (cache.main, "", "--rounds 1 --out {1}"),
    "bench.loop": (loop.main, "", "--rounds 1 --out {1}"),
}
# Where the long work of a command begins, which no word decides any more.
WORK = (
    (speed, "random_model"), (measuring, "measure"), (bombs, "bombs"), (schedulers, "rows"),
    (error_bars, "error_bars"), (op, "measure"), (attnet, "measure"), (swap, "rows_of"), (cache, "in_new_process"),
    (loop, "growth"),
)  # fmt: skip
WORDS = [
    "", "x", "5", "-1", "0", "nan", "inf", "1e300", str(2**64), "9" * 5000, "a" * 300, "a/" * 3000, "/", ".",
    "/dev/null", "a\0b", "a\udcffb", "{0}", "{0}/run", "{0}/model", "{0}/png", "{0}/net", "{0}/vae", "{0}/cache",
    "{0}/features", "{0}/ref.npz", "{0}/labels.json", "{0}/tiny.yaml", "{0}/net.yaml", "{0}/public.safetensors",
    "{0}/png/metrics.json", "{0}/png/000000.png", "meta", "cpu", "cuda:99", "10000000000", "SiT-S/8", "digits", "a=b",
    "1x1x1", "--",
]  # fmt: skip
OVERRIDES = [
    "=", "x=1", "train=1", "train.lr", "train.lr=nan", "train.lr=1e-400", "train.lr=???", "train.lr=${oc.env:HOME}",
    "train.lr=[1", "train.lr={{", "train.max_steps=0", "train.batch_size=7", "model.depth=x", "model.name=SiT-S/8",
    "model.options={dims: 5}", "model.kernel_size=127", "data.kind=latents", "data.kind=imagefolder",
    "data.root={0}/cache", "data.root={0}/images", "data.image_size=8", "latents.codec=vae", "latents.vae={0}/vae",
    "latents.vae={0}/run", "run.out={0}/png", "run.out=", "run.seed=-1", "base=x", "ema.kind=power", "repa.encoder=x",
    "repa.encoder=local-dir:{0}/vit", "repa.encoder=local-dir:{0}/vae", "distill.teacher={0}/net",
    "distill.select=[x]", "run.trackers=[x]", "score.every=1", "preview.sampler=x", "a\0=b", "run.out=a\udcffb",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A name may be one of the hub: it is looked for in the cache alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def world(tmp_path_factory, vae_folder, encoder_folder):
    """A run, and what the commands make of it."""
    patch = pytest.MonkeyPatch()
    classifier = digits.DigitsClassifier().eval()  # training it takes seconds, every time
    patch.setattr(digits, "train_classifier", lambda: (classifier, 0.1))
    root = tmp_path_factory.mktemp("fuzz")
    tiny = {
        "run": {"out": f"{root}/run"}, "model": MODEL, "train": {"batch_size": 4, "max_steps": 2},
        "ema": {"kind": "power", "snapshot_every": 1}, "preview": {"every": 0},
    }  # fmt: skip
    images = {
        "data": {"kind": "imagefolder", "root": f"{root}/images", "image_size": 16},
        "latents": {"codec": "vae", "vae": f"{root}/vae"},
    }
    net = {
        "run": {"out": f"{root}/net"}, "model": {"name": "attnet_xxs", "input_size": 8, "options": NET},
        "train": {"epochs": 0.02, "warmup_epochs": 0, "batch_size": 32},
    }  # fmt: skip
    made = {
        "out": f"{root}/made", "runs": f"{root}/made/tables", "num": 20, "ref": "digits",
        "metrics": ["frechet_distance"], "entries": [{"name": "a", "ckpts": [f"{root}/run"]}],
        "samplers": [{"name": "e", "sampler": "euler", "steps": 1, "cfg": 1.0}],
    }  # fmt: skip
    recipes = {"tiny": tiny, "images": tiny | images, "net": net, "base": tiny, "derived": {"base": "base.yaml"}}
    for name, recipe in (recipes | {"table": made}).items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    pixels = np.random.default_rng(0).integers(256, size=(4, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        (root / "images" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / "ab"[index % 2] / f"{index}.png")
    shutil.copytree(vae_folder, root / "vae")
    shutil.copytree(encoder_folder, root / "vit")
    for name in ("labels", "likelihood", "speed"):
        keys = ["device", "dtype", "batch", "rounds", "rows", "sampling", "compiled", "commit", "versions"]
        (root / f"{name}.json").write_text(json.dumps([0, 1] if name == "labels" else dict.fromkeys(keys, 0)))
    parts = "generate --ckpt {0}/run --num 2 --steps 1 --out {0}/parts"
    for main, words in (
        (train_sit.main, "{0}/tiny.yaml"),
        (train_sit.main, ALIGNED),
        (train_attnet.main, "{0}/net.yaml"),
        (latents, "encode {0}/images.yaml --shard-images 2 --out {0}/cache"),
        (export, "{0}/run --out {0}/pipe"),
        (convert, "{0}/run --to public --out {0}/public.safetensors"),
        (convert, "{0}/public.safetensors --sample-size 8 --out {0}/conv"),
        (sampling, "generate --ckpt {0}/run --num 20 --steps 1 --out {0}/png"),
        (evaluate, "extract {0}/png --extractor digits --out {0}/features"),
        (evaluate, "build-ref {0}/features --out {0}/ref.npz"),
        (evaluate, "score {0}/features --ref digits --out {0}/png/metrics.json"),
    ):
        reset_accelerate()
        main(words.format(root).split())
    state = load_file(file := root / STEP / "optimizer.safetensors")
    offsets = {name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in state.items()}
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, file, {"DCP_SHARDING_INFO": json.dumps(offsets)}
    )
    sign(file, root)
    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(Samples, "finish", lambda *_: sys.exit(0))
        outcome(lambda: sampling(parts.format(root).split()))
    for which in ("model", "shards"):
        model = SiTTransformer2DModel.from_pretrained(root / STEP / "ema")
        model.save_pretrained(root / which, max_shard_size="1GB" if which == "model" else "20KB")
    measured = json.loads((ROOT / "experiments/results/frontier/digits/frontier.json").read_text())
    (root / "run/frontier").mkdir()
    (root / "run/frontier/frontier.json").write_text(json.dumps(measured | {"points": measured["points"][:2]}))
    (root / "begun").mkdir()
    shutil.copy(root / "run/recipe.yaml", root / "begun")
    (root / "begun/log.jsonl").touch()
    shutil.copytree(root / "png", root / SAMPLES)
    (model := dit()).save_pretrained(root / "dit")
    swap_attention(model, "all")
    model.save_pretrained(root / "swapped")
    save_delta(model, root / "delta.safetensors")
    patch.setattr(exporting.Bundle, "text", lambda *_: "")  # of this program's own code, always the same
    for module, name in WORK:
        patch.setattr(module, name, lambda *_, **__: sys.exit(0))
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
    """Give a changed file the digest that the record of its folder has of it, so that it is read."""
    for name in ("manifest.json", "conversion.json"):
        for folder in file.parents[: len(file.relative_to(root).parts) - 1]:
            if (folder / name).is_file() and file.name != name:
                record = json.loads((folder / name).read_text())
                if (key := file.relative_to(folder).as_posix()) in record.get("files", {}):
                    record["files"][key] = sha256(file)
                    (folder / name).write_text(json.dumps(record))


def edits_of(file):
    document = read_document(file)
    spots = st.sampled_from(list(places(document))[::-1])  # the first is tried more often
    one = st.tuples(spots, st.sampled_from(ODD)).map(lambda edit: text_of(file, edited(document, *edit)))
    return st.one_of(one, one, one, one, one, st.sampled_from(TEXTS))


def fuzz_documents(world, tmp_path, examples: int) -> Counter:
    counts = Counter()
    for file, main, words in READERS.values():
        named = {file.partition("/")[0], *re.findall(r"\{0\}/([\w-]+)(?=[\s/]|$)", words)}
        if file.endswith("table.yaml") or file.startswith("made"):
            named |= {"run", "made"}
        if "images.yaml" in words:
            named |= {"images", "vae"}

        def check(text, file=file, main=main, words=words, named=named):
            scratch = tmp_path / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            for path in world.iterdir():
                if path.suffix == ".yaml":
                    (scratch / path.name).write_text(path.read_text().replace(str(world), str(scratch)))
                elif path.is_file():
                    shutil.copy(path, scratch)
                elif path.name in named:
                    shutil.copytree(path, scratch / path.name)
            write_document(scratch / file, text.replace(str(world), str(scratch)))
            sign(scratch / file, scratch)
            counts[tries(main, words.format(scratch, scratch / "new").split())] += 1

        fuzz(examples, edits_of(world / file), check)
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


def flags_of(main, start: list[str]) -> list[str]:
    """The options that a command's help tells of."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*start, "--help"])
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]+", said.getvalue())))


def fuzz_command_lines(world, tmp_path, examples: int) -> Counter:
    counts = Counter()
    scratch = tmp_path / "scratch"
    for main, start, works in COMMANDS.values():
        words = st.sampled_from(WORDS + (OVERRIDES if ".yaml" in works else []))
        flags = flags_of(main, start.split())
        one = st.sampled_from([[flag] for flag in flags]) | words.map(lambda word: [word])
        pair = st.tuples(st.sampled_from(flags), words).map(list) | one
        lines = st.tuples(st.just([]), st.lists(one, max_size=6)) | st.tuples(
            st.just(works.split()), st.lists(pair, min_size=1, max_size=2)
        )

        def check(line, main=main, start=start):
            said = [*start.split(), *line[0], *(word for part in line[1] for word in part)]
            if not scratch.exists():
                shutil.copytree(world, scratch)
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            new = tmp_path / "new" / "name"
            counts[tries(main, [word.replace("{0}", str(scratch)).replace("{1}", str(new)) for word in said])] += 1
            if "--force" in said and any(tmp_path.rglob("*.aside*")):  # what others read
                shutil.rmtree(scratch, ignore_errors=True)
                for path in tmp_path.glob("*.aside*"):
                    shutil.rmtree(path)

        fuzz(examples, lines, check)
    return counts


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Commands have defaults for --out: they are of this folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_documents_of_any_content_end_in_one_line(world, tmp_path, elsewhere):
    counts = fuzz_documents(world, tmp_path, 2)
    assert counts["refused"] > counts["taken"] > 0


def test_recipes_of_any_content_end_in_one_line(tmp_path, elsewhere):
    assert fuzz_recipes(tmp_path, 24)["refused"] > 8


def test_command_lines_of_any_content_end_in_one_line(world, tmp_path, elsewhere):
    assert fuzz_command_lines(world, tmp_path, 12)["refused"] > 10


@pytest.mark.slow
def test_twenty_thousand_inputs_end_in_one_line(world, tmp_path, elsewhere):
    parts = [fuzz_documents(world, tmp_path, 115), fuzz_recipes(tmp_path, 4500)]
    parts.append(fuzz_command_lines(world, tmp_path, 210))
    print(parts)
    assert sum(part.total() for part in parts) >= 20_000
