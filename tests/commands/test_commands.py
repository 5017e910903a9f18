"""`sit-atconv COMMAND`: what is said before torch is loaded, what the doors call, and where modules lie."""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import sample
import sit_atconv
import train_attnet
import train_sit
from eval.__main__ import main as evaluate
from sampling.__main__ import main as sampling
from sit_atconv import commands
from sit_atconv.__main__ import main
from sit_atconv.runtime.lazy import Renamed

# What takes long to load, and is of no use to whoever made a slip.
SLOW = (
    "accelerate",
    "diffusers",
    "gradio",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchdiffeq",
    "transformers",
)
# A command line of each command in which something is misspelt or missing, and what it is told.
SLIPS = {
    "train": ("digits trian.max_steps=1", "'trian'"),
    "classify": ("nowhere.yaml", "nowhere.yaml"),
    "encode": ("digits trian.max_steps=1 --out x", "'trian'"),
    "sample": ("--ckpt nowhere", "'nowhere': no such folder"),
    "generate": ("--ckpt nowhere --num 1 --out x", "'nowhere': no such folder"),
    "likelihood": ("--ckpt nowhere --num 1 --out x", "'nowhere': no such folder"),
    "app": ("nowhere", "'nowhere': no such folder"),
    "calibrate": ("nowhere", "'nowhere': no such folder"),
    "export": ("nowhere --out x", "'nowhere': no such folder"),
    "convert": ("nowhere --out x", "'nowhere': no such file or folder"),
    "table": ("nowhere.json --out x.md", "'nowhere.json': No such file"),
    "verify": ("nowhere", "cache 'nowhere': no such folder"),
    "recipes": ("dgits", "did you mean 'digits'?"),
    "score": ("nowhere --ref digits", "images 'nowhere': no such file or folder"),
    "extract": ("nowhere --out x", "images 'nowhere': no such file or folder"),
    "build-ref": ("nowhere --out x", "images 'nowhere': no such file or folder"),
    "report": ("nowhere --out x.html", "RUN 'nowhere' is no folder"),
    "push": ("nowhere --repo a/b", "SRC 'nowhere': no such file or folder"),
    "pull": ("a/b/c --out x", "pull 'a/b/c': a repository is OWNER/NAME"),
    "watch": ("nowhere", "RUN 'nowhere' is no folder"),
    "posthoc": ("nowhere --std 0.1 --out x", "run 'nowhere': no such folder"),
    "swap-check": ("DiTTransformer2DModel --grid 3", "--grid 3: give rows and columns"),
    "frontier": ("nowhere --grid nowhere.yaml --ref digits --num 20 --out x", "grid 'nowhere.yaml': it cannot be read"),
    "speed": ("--models SiT-S/2 --steps 0", "--steps 0: must be at least 1"),
    "principles": ("x --num 1", "--num 1: must be at least 2"),
}  # fmt: skip
# Runs command lines, one after the other, and prints of each its exit status, what it said, and what was loaded.
PROGRAM = f"""
import contextlib, io, json, sys
from sit_atconv.__main__ import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words) or 0
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), sorted(set({SLOW!r}) & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def answers():
    """What one new process answers to `--help` of all, to that of each, and to the slip of each."""
    lines = [["--help"], *([name, "--help"] for name in commands.COMMANDS)]
    lines += [[name, *slip.split()] for name, (slip, _) in SLIPS.items()]
    program = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    printed = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return {" ".join(words): json.loads(line) for words, line in zip(lines, printed.splitlines(), strict=True)}


def test_help_lists_all_commands_with_what_they_do(answers):
    code, out, err, _ = answers["--help"]
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out and about in out for name, about in commands.COMMANDS.items())


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself_and_tells_a_slip_without_torch(answers, name):
    code, out, err, loaded = answers[f"{name} --help"]
    assert (code, err, loaded) == (0, "", [])
    assert out.startswith(f"usage: sit-atconv {name} ")
    slip, told = SLIPS[name]
    code, out, err, loaded = answers[f"{name} {slip}".strip()]
    assert (code, out, loaded) == (2, "", [])
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_keys_are_of_a_command_and_not_of_one_recipe(fails, capsys):
    main(["recipes", "--keys", "classify"])
    assert "\naugment.mixup=0.0  # " in capsys.readouterr().out
    main(["recipes", "--keys"])
    assert "\nlatents.vae=null (*)  # " in capsys.readouterr().out
    assert "--keys prints the keys of all recipes; leave digits out" in fails(main, "recipes", "digits", "--keys")


def test_a_misspelt_command_is_told_with_the_nearest(fails):
    assert "'scroe': did you mean 'score'?" in fails(main, "scroe")
    assert "give a command" in fails(main)


def test_what_is_not_used_is_not_loaded():
    program = f"import sit_atconv, sys; print(sorted(set({SLOW!r}) & set(sys.modules)), dir(sit_atconv))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.startswith("[] ")
    assert all(f"'{name}'" in said for name in sit_atconv.__all__)


@pytest.mark.parametrize(
    ("door", "words", "prog"),
    [
        (main, ["score"], "sit-atconv score"),
        (evaluate, ["score"], "python -m eval score"),
        (evaluate, ["build-ref"], "python -m eval build-ref"),
        (sampling, ["speed"], "python -m sampling speed"),
        (train_sit.main, [], "train_sit.py"),
        (train_attnet.main, [], "train_attnet.py"),
        (sample.main, [], "sample.py"),
        *(
            (importlib.import_module(name).main, more, " ".join([f"python -m {name.removesuffix('.__main__')}", *more]))
            for name, more in (
                ("sit_atconv.convert.__main__", []),
                ("sit_atconv.latents.__main__", ["encode"]),
                ("sit_atconv.posthoc", []),
                ("sit_atconv.pipelines.export", []),
                ("experiments.principles", []),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_door_calls_the_command_and_speaks_by_its_own_name(door, words, prog, fails):
    assert f"see `{prog} --help`" in fails(door, *words, "--nonsense")


def test_a_clone_takes_its_own_commands_alone(fails):
    assert "'train': " in fails(evaluate, "train")
    assert "'score': " in fails(sampling, "score")


@pytest.mark.parametrize(
    ("earlier", "now", "told"),
    [
        ("sit_atconv.claims", "sit_atconv.runtime.claims", True),
        ("sit_atconv.images", "sit_atconv.runtime.pictures", True),
        ("sit_atconv.checkpoint", "sit_atconv.training.checkpoint", True),
        ("eval.refs", "sit_atconv.scoring.refs", False),
        ("eval.report", "sit_atconv.report", False),
        ("eval.report.page", "sit_atconv.report.page", False),
        ("sampling.speed", "sit_atconv.bench.speed", False),
    ],
)
def test_a_module_is_found_under_its_earlier_name(earlier, now, told, recwarn):
    sys.modules.pop(earlier, None)
    module = importlib.import_module(earlier)
    assert module is importlib.import_module(now)
    assert (module.__name__, module.__spec__.name) == (now, now)
    texts = [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert texts == ([f"{earlier} is now {now}; the old name ends with version 0.3"] if told else [])


def test_every_name_that_is_found_elsewhere_is_there():
    for finder in (each for each in sys.meta_path if isinstance(each, Renamed)):
        for now in finder.names.values():
            assert importlib.util.find_spec(now), now


def test_an_interrupt_while_something_is_imported_ends_in_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    whole = "stopped; whatever is there is whole, and the same command goes on"
    for name, text in (("score", whole), ("speed", "stopped")):
        monkeypatch.setattr(importlib.import_module(f"sit_atconv.commands.{name}"), "run", interrupted)
        words = ["x", "--ref", "digits"] if name == "score" else ["--models", "SiT-S/2"]
        with pytest.raises(SystemExit, match="130"):
            main([name, *words])
        assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setenv("RANK", "1")  # the first process speaks for all
    with pytest.raises(SystemExit, match="130"):
        main(["speed", "--models", "SiT-S/2"])
    assert capsys.readouterr().err == ""
