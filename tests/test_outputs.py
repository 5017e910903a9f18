"""What a command writes never costs a user's file: every --out, by one rule."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from PIL import Image

import sample
import sampling.__main__ as sampling
import train_attnet
import train_sit
from eval.__main__ import main as evaluate
from experiments import ablation, error_bars, finetune, meanflow, principles, schedulers, video
from experiments.bench import attnet, cache, loop, op, swap
from experiments.bench import meanflow as meanflow_step
from sit_atconv import create_model, posthoc
from sit_atconv.__main__ import main as command
from sit_atconv.convert import __main__ as convert
from sit_atconv.latents import __main__ as latents
from sit_atconv.pipelines import export
from sit_atconv.runtime import files
from sit_atconv.runtime.claims import claim, clear_leftovers
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import (
    REPORT,
    Made,
    check_out,
    figure_png,
    made_here,
    new_path,
    png,
    resolved,
    scratch,
    set_aside,
    write_out,
)
from sit_atconv.sampling.samples import Samples
from sit_atconv.training.trainer import Trainer

DIGITS, ATTNET = "experiments/recipes/digits_sit.yaml", "experiments/recipes/digits_attnet.yaml"

# Of every command that writes a file or a new folder: its arguments but --out, and the names that it writes beside it.
COMMANDS = {
    "sample": (sample.main, ["--ckpt", "none"], [".png"]),
    "likelihood": (sampling.main, ["likelihood", "--ckpt", "none", "--num", 1], [".json"]),
    "speed": (sampling.main, ["speed", "--models", "SiT-ATConv-S/2", "--device", "cpu"], [".json", ".md", ".png"]),
    "score": (evaluate, ["score", "none", "--ref", "digits"], [".json"]),
    "table": (evaluate, ["table", "none.json"], [".md", ".json"]),
    "report": (evaluate, ["report", "none"], [".html"]),
    "build-ref": (evaluate, ["build-ref", "none"], [".npz"]),
    "convert": (convert.main, ["none"], [""]),
    "convert to public": (convert.main, ["none", "--to", "public"], [".pt", ".safetensors"]),
    "export": (export.main, ["none"], [""]),
    "pull": (command, ["pull", "a/none"], [""]),
    "posthoc": (posthoc.main, ["none", "--std", 0.1], [""]),
    "bench.op": (op.main, ["--device", "cpu"], [".json", ".md", ".png"]),
    "bench.swap": (swap.main, ["--device", "cpu"], [".json", ".md"]),
    "bench.loop": (loop.main, [], [".json"]),
    "bench.cache": (cache.main, [], [".json", ".md"]),
    "bench.meanflow": (meanflow_step.main, ["--device", "cpu"], [".json", ".md"]),
}
STEMS = ("speed", "bench.op", "bench.swap", "bench.cache", "bench.meanflow")  # which add the endings themselves
FOLDERS = {  # commands with a fixed name in a folder
    "attnet": (attnet.main, ["--device", "cpu"], "cost.md"),
    "ablation": (ablation.main, [], "sit.png"),
    "finetune": (finetune.main, [], "finetune.md"),
    "meanflow": (meanflow.main, [], "meanflow.png"),
    "video": (video.main, [], "video.png"),
    "error_bars": (error_bars.main, [], "error_bars.md"),
    "schedulers": (schedulers.main, [], "schedulers.json"),
    "principles": (principles.main, ["attnet_t2"], "fields.png"),
}
# Commands with a folder that fills up: their arguments, of which nothing is there, and what they call the folder.
FILLED = {
    "generate": (sampling.main, ["generate", "--ckpt", "none", "--num", 1, "--out"], "--out"),
    "frontier": (
        command, ["frontier", "none", "--grid", "none.yaml", "--ref", "digits", "--num", 2, "--out"], "--out",
    ),
    "extract": (evaluate, ["extract", "none", "--extractor", "none:x", "--out"], "features folder"),
    "encode": (
        latents.main,
        ["encode", DIGITS, "data.kind=imagefolder", "data.root=none", "data.image_size=8", "latents.codec=vae",
         "latents.vae=none", "--out"],
        "--out",
    ),
    "train_sit": (train_sit.main, [DIGITS, "data.kind=imagefolder", "data.root=none", "data.image_size=8"], "run.out"),
    "train_attnet": (
        train_attnet.main, [ATTNET, "data.kind=imagefolder", "data.root=none", "data.val_root=none"], "run.out",
    ),
    "score": (train_sit.main, [DIGITS, "score.every=1", "score.ref=none", "score.weights=none"], "run.out"),
}  # fmt: skip
CASES = [(name, end) for name, (_, _, ends) in COMMANDS.items() for end in ends]


def out_of(name: str, place, end: str):
    """--out of a command that would write `place` with this ending."""
    return place if name in STEMS else place.with_name(place.name + (".md" if name == "table" else end))


@pytest.mark.parametrize(("name", "end"), CASES, ids=lambda value: value.strip("."))
def test_a_users_file_is_refused_before_the_work(name, end, tmp_path, fails):
    main, arguments, _ = COMMANDS[name]
    mine = tmp_path / f"mine{end}"
    mine.write_text('{"thesis": 1}')
    for place in (tmp_path / "mine", tmp_path / "new" / ".." / "mine"):  # "new" is not there
        said = fails(main, *arguments, "--out", out_of(name, place, end))
        assert str(mine) in said
        assert "--force" in said
    assert mine.read_text() == '{"thesis": 1}'
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_takes_nothing_is_told_before_the_work(name, tmp_path, fails):
    main, arguments, (end, *_) = COMMANDS[name]
    (tmp_path / "file").write_text("mine")
    (tmp_path / f"folder{end}").mkdir()
    for place in (tmp_path / "file" / "x", tmp_path / ("x" * 256), tmp_path / "a\0b", tmp_path / "folder"):
        said = fails(main, *arguments, "--out", out_of(name, place, end))
        assert "--out" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{end}"]


def filling(name: str, place) -> list:
    main, arguments, called = FILLED[name]
    return [main, *arguments, f"run.out={place}" if called == "run.out" else place]


@pytest.mark.parametrize("name", FILLED)
def test_a_folder_that_fills_up_is_judged_before_anything_is_loaded(name, tmp_path, fails):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    for place in (
        tmp_path / "mine", tmp_path / "new" / ".." / "mine", tmp_path / "mine" / "thesis",
        tmp_path / "mine" / "thesis" / "x", tmp_path / ("x" * 256), tmp_path / "a\0b",
    ):  # fmt: skip
        said = fails(*filling(name, place))
        assert FILLED[name][2] in said or "--out" in said or "a text with a NUL" in said
        assert "none" not in said
    assert "none" in fails(*filling(name, tmp_path / "new"))  # which is not there, and told after that
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis").read_text() == "mine"


@pytest.mark.parametrize("name", FILLED)
def test_the_current_folder_is_not_set_aside_for_one_that_fills_up(name, tmp_path, fails, monkeypatch):
    (tmp_path / "thesis").write_text("mine")
    arguments = [str(each).replace("experiments", f"{ROOT}/experiments") for each in filling(name, tmp_path)[1:]]
    monkeypatch.chdir(tmp_path)
    said = fails(FILLED[name][0], *arguments, "--force")
    assert "is the current folder, or above it, and stays" in said


@pytest.mark.parametrize("command", [["score", "none", "--ref", "none"], ["build-ref", "none", "--out", "ref.npz"]])
def test_features_are_judged_before_anything_is_loaded(command, tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    for place in ("mine", "mine/x", "x" * 256):
        assert "--features" in fails(evaluate, *command, "--features", place)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_users_file_in_the_folder_of_an_experiment_is_refused(name, tmp_path, fails):
    main, arguments, file = FOLDERS[name]
    (tmp_path / file).write_text("{}")
    assert str(tmp_path / file) in fails(main, *arguments, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "{}"


def test_results_are_known_by_their_marks_and_written_anew(tmp_path):
    ours = made_here("rows", "common")
    contents = {
        "a.json": json.dumps({"rows": [], "common": {}, "more": 1}),
        "b.json": json.dumps([{"rows": 1, "common": 2}]),
        "a.md": "# Table",
        "a.png": png(Image.new("L", (2, 2))),
        "figure.png": figure_png(Figure()),
        "a.html": '<html><meta name="generator" content="sit_atconv"></html>',
    }
    for name, content in contents.items():
        for _ in range(2):
            write_out(tmp_path / name, content, ours=ours)
        assert ours(tmp_path / name)
    others = {
        "c.json": '{"rows": []}',
        "d.json": "[]",
        "e.json": "{",
        "b.md": "# Table",
        "b.html": "<html>",
        "b.png": "",
    }
    for name, content in others.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=r"exists already; choose a new name, or force=True, which sets it aside"):
            write_out(tmp_path / name, "new", ours=ours)
        assert (tmp_path / name).read_text() == content
    Image.new("L", (2, 2)).save(tmp_path / "photo.png")
    assert not REPORT(tmp_path / "photo.png")
    assert not REPORT(tmp_path / "a.json")  # without keys no JSON is known
    assert not list(tmp_path.glob(".*"))


def test_force_sets_aside_and_loses_nothing(tmp_path, capsys):
    out = tmp_path / "a.json"
    for number in range(3):
        out.write_text(f"mine {number}")
        write_out(out, "new", force=True)
        assert out.read_text() == "new"
    asides = sorted(path.name for path in tmp_path.iterdir() if path != out)
    assert asides == ["a.json.aside", "a.json.aside-2", "a.json.aside-3"]
    assert [(tmp_path / name).read_text() for name in asides] == ["mine 0", "mine 1", "mine 2"]
    assert "what was there is now" in capsys.readouterr().err
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "thesis").write_text("mine")
    with new_path(tmp_path / "folder", force=True) as new:
        new.mkdir()
        (new / "config.json").write_text("{}")
    assert (tmp_path / "folder.aside" / "sub" / "thesis").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.json"]


def test_the_current_folder_is_never_set_aside(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for place in (".", "..", tmp_path):
        with pytest.raises(InputError, match="is the current folder, or above it"):
            set_aside(resolved(place))
        with pytest.raises(InputError), new_path(place, force=True) as new:
            new.mkdir()
    assert resolved("../../a/b/x.json") == type(tmp_path)("x.json")  # as short as it can be told


def test_a_link_is_followed_to_what_is_whose(tmp_path):
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "link.json").symlink_to("mine.json")
    with pytest.raises(InputError, match=r"mine\.json': exists already"):
        check_out(tmp_path / "link.json")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match="circle"):
        check_out(tmp_path / "circle")


def half(out, fault=None):
    """What a command does that comes to a fault in the middle of its file."""
    with new_path(out) as new:
        assert new.parent.name == f".{out.name}.unfinished"
        new.write_text("half")
        if fault:
            raise fault


def test_what_a_kill_left_is_cleared_by_the_next_that_owns_it(tmp_path):
    left = tmp_path / ".out.pt.unfinished"
    with pytest.raises(KeyboardInterrupt):
        half(tmp_path / "out.pt", KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []
    left.mkdir()
    (left / files.OWNER).touch()  # as SIGKILL leaves it
    (left / "out.pt").write_text("half")
    with new_path(tmp_path / "out.pt") as new:
        assert not new.exists()
        new.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]
    left.mkdir()
    (left / "thesis").write_text("mine")  # of that name, and the user's
    with pytest.raises(InputError, match="is in the way; move it"), new_path(tmp_path / "out.pt", force=True):
        pass
    assert (left / "thesis").read_text() == "mine"


def test_names_up_to_the_longest_are_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        with new_path(tmp_path / name) as new:
            new.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_fault_takes_back_the_folders_that_were_made_and_no_other(tmp_path):
    with pytest.raises(ZeroDivisionError):
        half(tmp_path / "a" / "b" / "out", ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []
    made = Made()
    assert made.folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "thesis").write_text("mine")
    made.take_back()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "thesis"]


WRITER = """
import sys
from sit_atconv.runtime.files import new_path
with new_path(sys.argv[1]) as new:
    new.write_text("first")
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_of_two_writers_of_one_out_the_second_is_refused(tmp_path):
    out = tmp_path / "a.pt"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert first.stdout.readline() == "at work\n"
    with pytest.raises(InputError, match="is in use by another process"), new_path(out):
        pass
    first.communicate("")
    assert (first.returncode, out.read_text()) == (0, "first")
    # Threads of one process, too; and the one that comes when the other is done.
    with new_path(tmp_path / "b.pt") as new:
        new.write_text("first")
        refused = []

        def second():
            try:
                with new_path(tmp_path / "b.pt"):
                    pass
            except InputError as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "is being written by another thread" in refused[0]
    second()
    assert "exists already" in refused[1]
    assert (tmp_path / "b.pt").read_text() == "first"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"out '.*x' cannot be written: No space left on device"):
        half(tmp_path / "new" / "x")
    assert list(tmp_path.iterdir()) == []


SETTINGS = {"num": 2, "block": 1, "format": "png", "labels": [0, 1]}


def test_a_folder_of_the_users_temporary_files_is_no_folder_of_ours(tmp_path):
    for name, begin in (
        ("samples", lambda folder, force: Samples(folder, SETTINGS, force).claim()),
        ("claimed", lambda folder, force: claim(folder, SETTINGS, (), "latents", force=force)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.tmp").write_text("mine")
        with pytest.raises(InputError, match=r"exists already|holds 'thesis\.tmp'|is a folder"):
            begin(folder, False)
        assert [path.name for path in folder.iterdir()] == ["thesis.tmp"]
        begin(folder, True)
        assert (folder / "settings.json").is_file()
        assert (tmp_path / f"{name}.aside" / "thesis.tmp").read_text() == "mine"


def test_settings_that_an_earlier_version_left_out_are_what_they_meant(tmp_path):
    earlier, now = ({"data": {"kind": "hf", **split}, "num": 3} for split in ({}, {"split": "train"}))
    assert claim(tmp_path / "x", earlier, (), "latents") == earlier
    assert claim(tmp_path / "x", now, (), "latents", meant={"data.split": "train"}) == earlier
    assert claim(tmp_path / "x", earlier, (), "latents", meant={"data.split": "train"}) == earlier
    for settings, meant in ((now, {}), (now, {"data.split": "test"}), (now | {"num": 4}, {"data.split": "train"})):
        with pytest.raises(InputError, match="holds latents with other settings"):
            claim(tmp_path / "x", settings, (), "latents", meant=meant)


def test_samples_clear_their_own_leftovers_alone(tmp_path):
    made = Samples(tmp_path / "out", SETTINGS)
    image = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    for number in made.claim():
        made.write(number, image, nfe=1, seconds=1.0)
    mine = ("notes.tmp", "000007.png.tmp", "blocks/notes.txt", ".hidden")
    for name in mine:
        (tmp_path / "out" / name).write_text("mine")
    left = [tmp_path / "out" / name for name in (".samples.npz.0123456789ab.unfinished", "a.0123456789ab.tmp")]
    for path in left:
        path.write_text("half")
    made.finish({})
    made.close()
    assert Samples(tmp_path / "out", SETTINGS).claim() is None
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in mine)
    assert not any(path.exists() for path in left)
    assert not (tmp_path / "out" / "settings.json").exists()
    # A complete folder may hold a settings.json that is of something else.
    (tmp_path / "out" / "settings.json").write_text('{"editor": 1}')
    assert Samples(tmp_path / "out", SETTINGS).claim() is None
    assert (tmp_path / "out" / "settings.json").read_text() == '{"editor": 1}'


def test_leftovers_are_files_of_one_kind_of_name(tmp_path):
    gone = [".shard-000000.safetensors.0123456789ab.unfinished", f"index.json.{'a' * 32}.tmp", "x.0123456789ab.tmp"]
    stay = ["thesis.tmp", ".x.unfinished", "x.0123456789AB.tmp", "x.0123456789ab.tmp.txt", "0123456789ab.tmp"]
    for name in gone + stay:
        (tmp_path / name).touch()
    (tmp_path / ".folder.0123456789ab.unfinished").mkdir()
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*stay, ".folder.0123456789ab.unfinished"}


def test_a_scratch_folder_is_cleared_only_where_it_is_one(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis").write_text("mine")
    folder = scratch(tmp_path / "demo")
    assert (tmp_path / "demo.aside" / "thesis").read_text() == "mine"
    (folder / "run").mkdir()
    (folder / "run" / "log").touch()
    assert [path.name for path in scratch(folder).iterdir()] == [files.OWNER]


@pytest.fixture
def bad_images(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    return ["data.kind=imagefolder", f"data.root={tmp_path / 'images'}", "data.image_size=8"]


def test_a_run_that_fails_at_once_takes_back_what_it_made(recipe_file, bad_images, tmp_path, fails, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    recipe = recipe_file()
    assert "exists and is not a run" in fails(train_sit.main, recipe, f"run.out={tmp_path}/new/../mine", *bad_images)
    assert (mine / "thesis.txt").read_text() == "mine"
    fails(train_sit.main, recipe, f"run.out={tmp_path}/above/run", *bad_images)
    assert not (tmp_path / "above").exists()
    assert not (tmp_path / "new").exists()
    # What others put there meanwhile stays, and so does the folder.
    fetch = Trainer._fetch

    def meanwhile(self, signals):
        (self.run / "thesis.txt").write_text("mine")
        return fetch(self, signals)

    monkeypatch.setattr(Trainer, "_fetch", meanwhile)
    fails(train_sit.main, recipe, f"run.out={tmp_path}/other", *bad_images)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_folder_with_a_recipe_of_the_users_is_no_run(recipe_file, tmp_path, fails):
    """A run that was killed at once has no more than recipe.yaml too, but for its lock and its log."""
    recipe = recipe_file()
    mine = recipe.with_name("experiment") / "recipe.yaml"
    mine.parent.mkdir()
    recipe.rename(mine)
    content = mine.read_bytes()
    assert "exists and is not a run" in fails(train_sit.main, mine, f"run.out={mine.parent}")
    assert mine.read_bytes() == content
    assert list(mine.parent.iterdir()) == [mine]


def test_force_begins_a_run_beside_what_was_there(recipe_file, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    arguments = [str(recipe_file()), f"run.out={out}", "train.max_steps=1", "checkpoint.every=1"]
    train_sit.main([*arguments, "--force"])
    assert (tmp_path / "mine.aside" / "thesis.txt").read_text() == "mine"
    assert (out / "step-0000001").is_dir()
    train_sit.main([*arguments[:2], "train.max_steps=2", "checkpoint.every=1", "--force"])  # its own run goes on
    assert (out / "step-0000002").is_dir()
    assert not (tmp_path / "mine.aside-2").exists()


@pytest.fixture
def model_folder(tmp_path):
    options = {"patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 1, "num_heads": 2}
    create_model(None, 8, 10, token_mixer="atconv", **options).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_grid_is_drawn_again_and_a_photo_is_not_drawn_over(model_folder, tmp_path, fails, capsys):
    out = tmp_path / "grid.png"
    arguments = ["--ckpt", model_folder, "--num", 1, "--steps", 1, "--cfg", 1, "--out", out]
    for _ in range(2):
        sample.main([str(argument) for argument in arguments])
    Image.new("L", (3, 3)).save(out)
    photo = out.read_bytes()
    capsys.readouterr()
    assert "exists already" in fails(sample.main, *arguments)
    sample.main([*map(str, arguments), "--force"])
    assert (tmp_path / "grid.png.aside").read_bytes() == photo
    assert REPORT(out)


def test_the_largest_file_allowed_ends_an_export_in_one_line(model_folder, tmp_path, fails, monkeypatch):
    import resource
    import signal

    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        for main, arguments in (
            (export.main, [model_folder, "--out", tmp_path / "e"]),
            (convert.main, [model_folder, "--to", "public", "--out", tmp_path / "a.pt"]),
            (convert.main, [model_folder, "--to", "public", "--out", tmp_path / "a.safetensors"]),
        ):
            assert "cannot be written: " in fails(main, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
