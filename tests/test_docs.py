"""README and docs: every block is checked, every command is read by its own parser, and what can be run is run.

A block in them is `bash`, `python` or `yaml`. A line of bash is run in a folder that holds small files of the names it
uses, unless NOT_RUN has a reason. Python runs as it stands.
"""

import copy
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from conftest import ROOT, reset_accelerate, slowly
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

import sit_atconv.models.attnet  # noqa: F401, its names of timm
from experiments import front_page
from experiments.data import CLASSES, SIDE
from sit_atconv import ATConv, SiTTransformer2DModel, swap_attention
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.commands import COMMANDS, parser_of
from sit_atconv.config import Recipe, load_recipe
from sit_atconv.convert import forms
from sit_atconv.layers.projectors import Projectors
from sit_atconv.runtime.errors import ArgumentParser
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.reading import read_yaml
from sit_atconv.scoring.table import PUBLISHED, PUBLISHED_METRICS

FILES = [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / folder / "README.md" for folder in (
    "", "eval", "sampling", "experiments/accelerate", "experiments/results",
))]  # fmt: skip
PAGES = {path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("docs/"): path for path in sorted(FILES)}
DOORS = {
    "train_sit.py": "train", "train_attnet.py": "classify", "sample.py": "sample",
    "experiments/distill_swap.py": "train",
}  # fmt: skip
EVAL = ("extract", "build-ref", "score", "verify", "table", "report")
OF_MODULE = {"sit_atconv": tuple(COMMANDS), "eval": EVAL, "sampling": ("generate", "likelihood", "speed")}
SCHEMAS = {"train": Recipe, "encode": Recipe, "classify": ClassifierRecipe}
STARTS = re.compile(r"([A-Z_]+=\S* )*(sit-atconv|python|accelerate|torchrun|make|pip) .|\S+\.py ")
# Why a line is not run here; each is a pattern that some line has.
NOT_RUN = {
    r"^make ": "each takes minutes",
    r"^pip ": "it installs",
    r"^python -m (experiments|sit_atconv\.bench\.gpu)": "each takes minutes; their own tests run them",
    r"IMAGENET|imagenet_attnet": "ImageNet, and models of its size",
    r"WEIGHTS|REF\.npz": "Inception's weights",
    r"dinov2|dino\.npz": "DINOv2's weights",
    r"--num_processes 8|--nproc_per_node": "several processes; tests of training and sampling start them",
    r"^sit-atconv (push|pull) ": "they ask the hub; tests/hub runs them against a stand-in",
    r"^sit-atconv app ": "it serves until it is ended; tests/app draws by it",
    r"^sit-atconv frontier ": "a grid of minutes; tests/bench runs it with small ones",
    r"speed --models": "models of published sizes; tests/bench runs it with small ones",
}


class Block(NamedTuple):
    """A block of a page: its language, its text, and the heading above it."""

    language: str
    text: str
    heading: str


def blocks(page: str) -> Iterator[Block]:
    heading, expect = "", False
    for token in MarkdownIt("commonmark").parse(PAGES[page].read_text()):
        if expect:
            heading, expect = token.content, False
        if token.type == "heading_open":
            expect = True
        elif token.type in ("fence", "code_block"):
            yield Block(token.info if token.type == "fence" else "indented", token.content, heading)


def lines_of(block: Block) -> list[str]:
    """The command lines of a block of bash."""
    whole = re.sub(r" *\\\n *", " ", block.text).splitlines() if block.language == "bash" else ()
    return [line.partition(" #")[0].strip() for line in whole if line.partition("#")[0].strip()]


def lines(page: str) -> list[str]:
    return [line for block in blocks(page) for line in lines_of(block)]


def inline(page: str) -> list[str]:
    """What stands between single backticks in a page's text and tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text())
    return [
        child.content for token in tokens for child in token.children or () if child.type == "code_inline"
    ]  # fmt: skip


class Parsed(Exception):
    """Raised in the place of a command's work."""


def python_target(words: list[str]) -> tuple[str, list[str]]:
    """The command that `python WORDS` calls, or a module that is its own door, and its arguments."""
    if words[0] != "-m":
        return DOORS[words[0]], words[1:]
    name, rest = words[1], words[2:]
    if name in OF_MODULE:
        assert not rest or rest[0] in OF_MODULE[name], f"{name} has no {rest[0]}"
        return (rest[0], rest[1:]) if rest else (name, rest)
    return name, rest


def target(line: str) -> tuple[str, list[str]]:
    """The command and its arguments, whatever launches it. Asserts that launchers take their options."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        asked = launch_command_parser().parse_args(rest[1:])
        if not asked.module:
            return DOORS[asked.training_script], asked.training_script_args
        return python_target(["-m", asked.training_script, *asked.training_script_args])
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        asked = get_args_parser().parse_args(rest)
        return python_target([*["-m"] * asked.module, asked.training_script, *asked.training_script_args])
    if program == "python":
        return python_target(rest)
    assert program in ("sit-atconv", *DOORS), f"{line!r} calls {program}"
    return (DOORS[program], rest) if program in DOORS else (rest[0], rest[1:])


def check(line: str, monkeypatch) -> None:
    """Fail unless the line is one that its command takes: options, recipe, overrides."""
    if line.startswith("make "):
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
        assert line.removeprefix("make ") in targets.split()
        return
    if line.startswith("pip "):
        extras = re.search(r"\[(.*)\]", line)
        known = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        assert line.startswith(("pip install -e ", "pip install sit_atconv"))
        assert all(f"\n{name} = [" in known for name in (extras[1].split(",") if extras else ()))
        return
    name, words = target(line)
    if name.startswith(("experiments", "sit_atconv.")):
        assert find_spec(name), name
        if words:
            monkeypatch.setattr(sys, "argv", [name, *words])

            def stop(self, *args, **kwargs):
                super(ArgumentParser, self).parse_args(*args, **kwargs)
                raise Parsed

            monkeypatch.setattr(ArgumentParser, "parse_args", stop)
            module = import_module(name)
            module = import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
            with pytest.raises(Parsed):
                module.main(*([words] if inspect.signature(module.main).parameters else []))
        return
    args = parser_of(name, name).parse_intermixed_args(words)
    if name in SCHEMAS:
        load_recipe("digits" if args.recipe == "RECIPE" else args.recipe, args.overrides, SCHEMAS[name])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    assert {block.language for block in blocks(page)} <= {"bash", "python", "yaml"}


def write_recipe(block: Block) -> str:
    """Write a block of YAML to the file that its first line names, in the current folder; the name."""
    (name,) = re.findall(r"\A# (\w+\.yaml)\n", block.text)
    Path(name).write_text(block.text)
    return name


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_one_that_its_command_takes(page, tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "yaml":
            write_recipe(block)
    for line in lines(page):
        with monkeypatch.context() as patch:
            check(line, patch)
    for code in filter(STARTS.match, inline(page)):
        if not code.startswith(("make ", "pip ")) and not target(code)[1]:
            assert target(code)[0] in (*COMMANDS, *OF_MODULE) or find_spec(target(code)[0]), code  # its name alone
        elif code != "pip install":
            with monkeypatch.context() as patch:
                check(code, patch)


def keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(schema):
        yield prefix + entry.name
        if dataclasses.is_dataclass(entry.type):
            yield from keys_of(entry.type, f"{prefix}{entry.name}.")


KEYS = {*keys_of(Recipe), *keys_of(ClassifierRecipe)}
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
# accelerate's, slurm's, the acceptance run's
OTHERS_FLAGS = {"--num_processes", "--signal", "--rehearse", "--stages", "--minutes"}


@pytest.mark.parametrize("page", PAGES)
def test_every_key_and_option_that_is_named_exists(page):
    flags = OTHERS_FLAGS | {
        flag for name in COMMANDS for action in parser_of(name, name)._actions for flag in action.option_strings
    }
    for code in inline(page):
        key = re.match(rf"((?:{SECTIONS})\.[a-z_]+)(?:=|$)", code)
        other = page == "files" or code.endswith(".jsonl")  # a module's function, or a file
        assert key is None or key[1] in KEYS or other, code
        if code.startswith("--") and code != "--":
            assert re.split("[ =]", code)[0] in flags, code


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.exists(), link
        assert not anchor or anchor in slugs(file), link


def test_the_readme_is_a_front_page():
    assert len(PAGES["README"].read_text().splitlines()) <= 120
    table = PAGES["README"].read_text().split("| page |")[1]
    assert all(f"(docs/{path.name})" in table for path in ROOT.glob("docs/*.md"))


def test_every_reason_not_to_run_a_line_is_needed():
    every = [line for page in PAGES for line in lines(page)]
    assert all(any(re.search(pattern, line) for line in every) for pattern in NOT_RUN)


def test_options_are_told_as_they_are_in_the_signature():
    for page, function in (("swap", swap_attention), ("operator", ATConv)):
        stated = re.findall(r"^\| (`[^|]*`) \| ?(?:`(.*?)`)? \|", PAGES[page].read_text(), re.MULTILINE)
        told = {name: default for names, default in stated for name in re.findall(r"`(\w+)`", names)}
        parameters = list(inspect.signature(function).parameters.values())
        for each in parameters[page == "swap" :]:
            default = "" if each.default is inspect.Parameter.empty else repr(each.default).replace("'", '"')
            assert told[each.name] == default, each.name


# The pages' figures


def test_published_figures_stand_as_they_are_stored():
    stored, page = read_yaml(PUBLISHED), PAGES["eval/README"].read_text()
    shown = {"fid": "FID", "sfid": "sFID", "is": "IS"}
    rows = (
        [each["model"], each["conditions"], *(str(each.get(name, "")) for name in PUBLISHED_METRICS), each["source"]]
        for each in stored["figures"]
    )  # fmt: skip
    head = ["model", "conditions", *(shown.get(name, name) for name in PUBLISHED_METRICS), "source"]
    assert markdown_table(head, rows, ("model", "conditions", "source")) in page
    assert all(claim["text"].strip() in " ".join(page.split()) for claim in stored["claims"])


def test_figures_of_one_layer_are_those_of_make_bench():
    made = (ROOT / "experiments/bench/bench.md").read_text().splitlines()
    section = PAGES["benchmarks"].read_text().split("\n## One layer\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 14
    assert set(rows) <= set(made)


def test_figures_of_the_model_are_those_of_make_bench():
    made = (ROOT / "experiments/bench/bench.md").read_text().splitlines()
    made = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made if line.startswith("| SiT")]
    section = PAGES["benchmarks"].read_text().split("\n## The whole model at 256 px\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:5] == "| SiT"]
    taken = [[row[0], *row[3:7], *row[9:11]] for row in made]
    assert [[row[0], *row[2:]] for row in rows] == taken
    assert [row[1] for row in rows] == ["fp32"] * 3 + ["bf16"] * 3


def test_the_front_pages_picture_is_drawn_from_the_table_and_a_grid(tmp_path, capsys):
    Image.new("L", (90, 70), 128).save(tmp_path / "grid.png")
    front_page.main(["--grid", str(tmp_path / "grid.png"), "--out", str(tmp_path / "front.png")])
    speed = front_page.from_table(PAGES["benchmarks"].read_text())
    assert speed.points[-1] == ("bf16", 1024, 29760, 8236)
    assert speed.caption.startswith("batch 1, compiled blocks, 2 cores of an AMD EPYC")
    for file in (tmp_path / "front.png", ROOT / "docs/front_page.png"):
        assert file.stat().st_size < 150_000
        with Image.open(file) as image:
            assert image.getpixel((2, 2))[:3] == (255, 255, 255)
            assert image.size == (1650, 615)


def test_the_front_pages_picture_is_drawn_from_a_speed_result(tmp_path, capsys):
    rows = [
        {"model": name, "size": size, "pass": "forward", "ms_per_nfe": time * size}
        for size in (256, 512)
        for name, time in zip(front_page.MODELS, (4.0, 2.0), strict=True)
    ]
    stated = {"dtype": "bf16", "device": "a GPU", "batch": 1, "compiled": True, "rounds": 9}
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({**stated, "rows": rows}))
    speed = front_page.from_speed(path)
    assert speed.points == [("bf16", 256, 1024, 512), ("bf16", 512, 2048, 1024)]
    assert speed.caption == "batch 1, compiled blocks, a GPU, medians of 9 interleaved rounds"
    path.write_text(json.dumps({**stated, "rows": rows[:1]}))
    with pytest.raises(SystemExit):
        front_page.main([f"--speed={path}", f"--grid={ROOT / 'docs/front_page.png'}", f"--out={tmp_path / 'x.png'}"])
    assert "has no forward pass of SiT-XL/2 and SiT-ATConv-XL/2 at one size" in capsys.readouterr().err


# Pages that are run

# Appended to the command lines, so that they are short; of several that fit, all.
FEWER = {
    r"^train digits ": "train.max_steps=2 train.warmup_steps=0 preview.every=0 checkpoint.every=1",
    r"^train digits .*score": "score.every=1 score.num=20",
    r"^train digits .*power": "ema.snapshot_every=1 train.max_steps=40",
    r"^train digits_distill": "train.max_steps=3 train.warmup_steps=0 distill.blockwise_steps=1 distill.share_steps=1 "
    "preview.every=0",
    r"^train imagefolder": "train.max_steps=1 train.batch_size=2 train.precision=fp32 data.workers=0 model.depth=1 "
    "preview.every=0 ema.decay=0.9",
    r"^train pixels32": "train.max_steps=1 train.batch_size=2 data.held_out=0.25 model.depth=1 preview.every=0",
    r"^classify digits": "train.batch_size=2 train.epochs=0.8128 train.warmup_epochs=0 model.input_size=16",
    r"^train mine.yaml": "train.max_steps=1 train.batch_size=2 model.depth=1 preview.num=3 preview.steps=2 "
    "preview.every=1",
    r"^classify small": "train.batch_size=2 train.epochs=0.5 train.warmup_epochs=0 data.workers=0 "
    "data.held_out=0.25",
    r"^(sample|generate) ": "--steps 2",
    r"^calibrate ": "--steps 3 --num 2",
    r"^generate ": "--num 40",
    r"^likelihood ": "--num 2 --steps 2 --sampler euler",
    r"^principles ": "--num 2 --times 1",
}  # fmt: skip


def run(line: str, folder: Path) -> None:
    """A command line of the docs, in this process, shortened; whatever it writes must be there."""
    reset_accelerate()
    name, words = target(line)
    for pattern, more in FEWER.items():
        if re.search(pattern, " ".join([name, *words])):
            words += more.split()
    print(f"\n$ {name} {shlex.join(words)}")
    door = next((door for door in DOORS if door in shlex.split(line)), None)
    if door is not None:
        import_module(door.removesuffix(".py").replace("/", ".")).main(words)
    else:
        module = next((module for module in OF_MODULE if f"-m {module} " in line), "sit_atconv")
        import_module(f"{module}.__main__").main([name, *words])
    out = getattr(parser_of(name, name).parse_intermixed_args(words), "out", None)
    assert out is None or (folder / out).exists(), f"{line!r} left no {out}"


def left_out(line: str) -> bool:
    return any(re.search(pattern, line) for pattern in NOT_RUN)


def small(mixer: str, **options) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    return SiTTransformer2DModel(sample_size=32, hidden_size=384, depth=8, num_heads=6, token_mixer=mixer, **options)


def small_dit() -> Any:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    dit = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, out_channels=8, num_layers=2)
    dit.transformer_blocks[1].norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    return dit


def public_attnet() -> dict[str, torch.Tensor]:
    """Random weights of AttNet-T2 under the published names, and as published: 1x1 convolutions, one fc1."""
    state, renamed = timm.create_model("attnet_t2").state_dict(), {}
    for name in [name for name in state if ".fc1_g." in name]:
        both = state.pop(name), state.pop(name.replace("fc1_g", "fc1_x"))
        state[name.replace("fc1_g", "fc1")] = torch.cat(both)
    for name, tensor in state.items():
        if name.endswith(("fc1.weight", "fc2.weight", "proj.weight")):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        for ours, theirs in (
            (r"^stem\.0\.conv", "downsample_layers.0.0.0"),
            (r"^stem\.0\.bn", "downsample_layers.0.0.1"),
            (r"^stem\.1\.conv", "downsample_layers.0.2.0"),
            (r"^stem\.1\.bn", "downsample_layers.0.2.1"),
            (r"^stages\.(\d)\.downsample\.conv", r"downsample_layers.\1.0"),
            (r"^stages\.(\d)\.downsample\.bn", r"downsample_layers.\1.1"),
            (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
            (r"^head\.norm", "norm"),
            (r"^head\.fc", "head"),
        ):
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor
    return renamed


def trained(name: str) -> None:
    run(f"sit-atconv train digits model.token_mixer={name.removeprefix('digits-')}", Path())


def scored(name: str = "digits-atconv") -> None:
    """Samples of a digits run, and their scores."""
    trained(name)
    run(f"sit-atconv generate --ckpt runs/{name} --num 40 --out runs/{name}/samples/first", Path())
    run(f"sit-atconv score runs/{name}/samples/first --ref digits", Path())


def images(vae_folder: Path) -> None:
    """IMAGES, of 33 to 40 pixels in three classes; VAE."""
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        folder = Path("IMAGES") / ("circle", "square", "triangle")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    shutil.copytree(vae_folder, "VAE")


def clothes() -> None:
    """data/fashion/train: noise in the folders of Fashion-MNIST, ten images each."""
    generator = torch.Generator().manual_seed(0)
    for index in range(100):
        folder = Path("data/fashion/train") / CLASSES[index % 10]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (SIDE, SIDE), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:05}.png")


def classifier() -> None:
    """The AttNet run that docs/attnet.md trains."""
    run("sit-atconv classify digits_attnet run.out=runs/digits_attnet", Path())


def downloads(vae_folder: Path) -> None:
    """What a reader of docs/interop.md would have downloaded or trained."""
    from diffusers import AutoencoderKL

    trained("digits-atconv")
    model = small("atconv")
    torch.save({"model": model.state_dict(), "ema": copy.deepcopy(model.state_dict())}, "SiT-XL-2-256x256.pt")
    model = small("hybrid", learn_sigma=False, activation="silu")
    projectors = Projectors(384, 64, [24], encoder_depth=8)
    torch.save({"ema": forms.to_repa(model.state_dict()) | projectors.state_dict()}, "REPA.pt")
    small_dit().save_pretrained("DiT-XL-2-256")
    AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True).save_pretrained("sd-vae-ft-ema")


def before(page: str, vae_folder: Path) -> None:
    """Make in the current folder what a page takes for there."""
    if page in ("README", "training", "principles", "scoring", "attnet"):
        images(vae_folder)
    elif page == "own_images":
        clothes()
    if page == "interop":
        downloads(vae_folder)
    elif page == "swap":
        small_dit().save_pretrained("DiT-XL-2-256")
    elif page == "attnet":
        save_file(public_attnet(), "attnet_t2.safetensors")
        shutil.copytree("IMAGES", "TRAIN")
    elif page == "scoring":
        scored()
        scored("digits-attention")
        for copy_of_images in ("SAMPLES", "TRAIN"):
            shutil.copytree("IMAGES", copy_of_images)
        Path("RUN").mkdir()
        Path("RUN/recipe.yaml").write_text("data: {kind: imagefolder, root: TRAIN, image_size: 40, held_out: 0.25}")
    elif page in ("sampling", "few_steps", "formats", "eval/README"):
        scored()
    elif page == "principles":
        trained("digits-atconv")
        trained("digits-attention")
        classifier()


RUN = [
    *slowly([
        "README", "start", "own_images", "training", "sampling", "few_steps", "app", "scoring", "attnet", "principles",
        "eval/README", "formats", "swap",
        "interop",
    ]),
    "operator", "how_it_works",
]  # fmt: skip
LEFT = {  # more of what the steps leave behind
    "interop": ("digits-ema.pt", "sit-pipeline-for-all/README.md"),
    "swap": ("DiT-XL-2-256-atconv/config.json", "atconv-delta.safetensors", "runs/distilled"),
    "scoring": ("own.npz", "trained_on.npz", "colours.npz", "SAMPLES/metrics.json"),
    "principles": ("runs/principles/fields.png", "runs/principles/attnet/routing.png"),
    "attnet": ("runs/digits_attnet/step-0000584/ema/config.json",),
    "training": ("runs/scored/scores.jsonl", "averaged/config.json"),
    "own_images": ("runs/mine/previews/step-0000001.png", "runs/mine/samples/first/metrics.json", "mine-for-all"),
}


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_in_its_order(page, tmp_path, vae_folder, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before(page, vae_folder)
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"{page}, {block.heading}", "exec"), given(page, block))
            if name := re.match(r"# (\w+\.py)\n", block.text):
                Path(name[1]).write_text(block.text)
        elif block.language == "yaml":
            load_recipe(write_recipe(block))
        for line in lines_of(block):
            if not left_out(line):
                run(line, tmp_path)
    assert all(os.path.exists(made) for made in LEFT.get(page, ()))
    if page == "formats":
        check_formats()


def named_under(heading: str) -> set[str]:
    """What stands in code in the first column of the tables under a heading of docs/formats.md."""
    section = PAGES["formats"].read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    firsts = (line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def check_formats() -> None:
    """Whether docs/formats.md names what the run and the samples in this folder have."""
    run, samples = Path("runs/digits-atconv"), Path("runs/digits-atconv/samples/first")
    step = max(run.glob("step-*"))
    held, manifest = {path.name for path in step.iterdir()}, json.loads((step / "manifest.json").read_text())
    of_files = {name.strip("/") for name in named_under("A checkpoint") if name.strip("/") in held}
    assert of_files == held
    assert manifest.keys() <= named_under("A checkpoint")
    assert {"recipe.yaml", "log.jsonl"} <= {path.name for path in run.iterdir()} & named_under("A run")
    told, manifest = named_under("Samples"), json.loads((samples / "manifest.json").read_text())
    assert told - {"000000.png", "samples.npz", "manifest.json"} <= manifest.keys()
    assert (samples / "000000.png").exists()
    result = json.loads((samples / "metrics.json").read_text())
    assert all(named_under("Scores") <= metric.keys() for name, metric in result["metrics"].items() if name != "copies")


def given(page: str, block: Block) -> dict[str, Any]:
    """What a snippet takes for there: of the README, a model to swap."""
    if page == "README" and "swap_attention(model)" in block.text:
        return {"model": timm.create_model("vit_tiny_patch16_224", depth=2, img_size=512)}  # where attention is slow
    return {}


def test_every_page_with_something_to_run_is_run():
    wanted = {
        page for page in PAGES
        if any(block.language != "bash" for block in blocks(page))
        or not all(map(left_out, lines(page)))
    }  # fmt: skip
    assert wanted == {each if isinstance(each, str) else each.values[0] for each in RUN}
