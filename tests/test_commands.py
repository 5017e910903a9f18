"""Bad input at the command line: one line on stderr, exit status 2, nothing left behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_recipe
from PIL import Image

import sample
import train_sit
from eval.__main__ import main as evaluate
from sampling.__main__ import main as sampling
from sit_atconv import SiTTransformer2DModel
from sit_atconv.config import load_recipe
from sit_atconv.pipelines.schedulers import check_scheduler
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling.schedulers import SCHEDULERS, make_scheduler
from sit_atconv.training import train

RECIPES = "experiments/recipes"


@pytest.fixture
def trained(digits_run, tmp_path):
    """A run folder of a few steps."""
    return shutil.copytree(digits_run, tmp_path / "run")


def test_dry_run_of_the_imagenet_recipe_needs_neither_data_nor_vae(capsys):
    train_sit.main([f"{RECIPES}/imagenet256_sit_xl2_atconv.yaml", "--dry-run"])
    out = capsys.readouterr().out
    assert "637.7 M" in out
    assert "95.8 GMACs" in out
    assert "256 px; 1,281,167 images in 1,000 classes, as the recipe states; checked when training starts" in out
    assert "5004.6 (global batch 256)" in out
    assert "400,000 steps = 79.9 epochs" in out
    assert "weights 2.38 GiB, gradients 2.38 GiB, optimiser 4.75 GiB, EMA 2.38 GiB" in out


def test_dry_run_measures_what_the_recipe_leaves_open(capsys, recipe_file, tmp_path):
    train_sit.main([str(recipe_file()), "--dry-run"])
    assert "1,437 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def plan_of(main, capsys, *words) -> dict[str, str]:
    """The rows that a command prints before the last, by their names."""
    main([str(word) for word in words])
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split("  +", line, maxsplit=1) for line in lines if "  " in line)


def files_of(folder) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_dry_run_says_what_a_start_would_do(recipe_file, tmp_path, capsys, fails):
    run, recipe = tmp_path / "run", recipe_file()

    def start(*words: str) -> dict:
        return plan_of(train_sit.main, capsys, recipe, *words)

    assert start("--dry-run")["run"] == f"a new run begins in {str(run)!r}"
    assert not run.exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").touch()
    start()
    before = files_of(tmp_path)
    for words, said in (
        ([], f"the run in {str(run)!r} is at its last step, 8"),
        (["train.max_steps=12"], f"the run in {str(run)!r} goes on from step 8 of 12"),
        (["model.depth=1"], f"run.out={str(run)!r} holds a run of another recipe (model.depth: 2 -> 1)"),
        (["train.max_steps=4"], f"train.max_steps=4: {str(run)!r} is already at step 8; state 8 or more"),
        ([f"run.out={tmp_path / 'photos'}"], "exists and is not a run"),
    ):
        told = start(*words, "--dry-run")["run"]
        assert said in told
        if said != told:  # the same words as the refusal
            assert fails(train_sit.main, recipe, *words) == f"error: {told.removeprefix('a start would be refused: ')}"
    assert files_of(tmp_path) == before


def test_dry_run_compares_the_images_where_it_has_opened_them(recipe_file, image_folder, tmp_path, capsys):
    recipe = recipe_file(
        data={"kind": "imagefolder", "root": str(image_folder), "image_size": 8}, model={"patch_size": 4}
    )
    plan_of(train_sit.main, capsys, recipe)
    assert "is at its last step" in plan_of(train_sit.main, capsys, recipe, "--dry-run")["run"]
    (image_folder / "a/00.png").unlink()
    told = plan_of(train_sit.main, capsys, recipe, "--dry-run")["run"]
    assert "refused: the images are not those of run.out=" in told


def test_a_plan_of_pixels_says_what_they_are(recipe_file, image_folder, capsys, fails):
    for name in "xyz":
        shutil.copytree(image_folder / "a", image_folder / f"a{name}")
    (image_folder / "a").rename(image_folder / "a\nb")
    recipe = recipe_file(
        data={"kind": "imagefolder", "root": str(image_folder), "image_size": 8}, model={"patch_size": 4}
    )
    rows = plan_of(train_sit.main, capsys, recipe, "--dry-run")
    assert rows["pixels"] == "3 x 8 x 8"
    assert "latent" not in rows
    assert rows["data"] == r"imagefolder, 8 px; 24 images in 6 classes: 'a\nb', ax, ay, az, b, ..."
    weights, gradients = re.match(r"weights (\S+) MiB, gradients (\S+) MiB, ", rows["memory"]).groups()
    assert float(weights) >= float(gradients) > 0
    assert "all in fp32 whatever the precision" in rows["memory"]
    assert rows["schedule"].endswith("; precision fp32")
    told = fails(train_sit.main, recipe, "--dry-run", "data.image_size=10")
    assert told.startswith("error: images of 10 x 10 pixels cannot be cut into patches of 4; make data.image_size a ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "SiT-ATConv-S/2"),
        (["model.patch_size=4", "model.depth=12"], "SiT-ATConv-S/2, patch_size=4"),  # 12 is the preset's
        (["model.name=null", "model.token_mixer=atconv", "model.depth=3"],
         "atconv, depth 3, hidden_size 1152, patch_size 2"),
    ],
)  # fmt: skip
def test_a_plan_names_a_preset_with_what_is_stated_over_it(options, says, image_folder, capsys, tmp_path):
    pixels = [f"data.root={image_folder}", "data.image_size=8", "latents.codec=identity", "latents.vae=null"]
    rows = plan_of(train_sit.main, capsys, "imagefolder", *pixels, f"run.out={tmp_path / 'r'}", *options, "--dry-run")
    assert rows["model"] == says


def test_training_begins_with_the_plan(recipe_file, tmp_path, capsys):
    recipe = recipe_file()
    planned = plan_of(train_sit.main, capsys, recipe, "--dry-run")
    assert plan_of(train_sit.main, capsys, recipe) == planned
    assert len(planned) == 11
    again = plan_of(train_sit.main, capsys, recipe, "train.max_steps=12")
    assert again["run"] == f"the run in {str(tmp_path / 'run')!r} goes on from step 8 of 12"


def test_dry_run_counts_every_average_and_names_them(capsys):
    recipe = f"{RECIPES}/imagenet256_sit_xl2_atconv.yaml"
    train_sit.main([recipe, "ema.kind=power", "ema.decay=null", "ema.snapshot_every=100000", "--dry-run"])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("EMA snap", "snap").splitlines())
    assert "EMA 4.75 GiB" in rows["memory"]
    assert rows["EMA"] == "power, std 0.05 and 0.1"
    assert "11.88 GiB each" in rows["checkpoints"]
    assert rows["snapshots"] == "every 100,000 steps, 4 of 4.75 GiB each, 19.00 GiB at the end"
    train_sit.main([recipe, "ema.decay=null", "--dry-run"])
    assert "constant, decay 0.9999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["repa.encoder=x", "repa.depth=29"], "repa.depth=29: the model has 2 blocks"),
        (["train.max_step=3"], "did you mean 'train.max_steps'"),
        (["train.lr"], "not of the form key=value"),
        (["model.name=SiT-ATConv-XXL/2"], "did you mean 'SiT-ATConv-XL/2'"),
        (["data.kind=imagefolder", "data.root=/nowhere", "data.image_size=8"], "'/nowhere': no such folder"),
        (["train.batch_size=9", "train.gradient_accumulation_steps=2"], "train.batch_size=9 is not divisible by 1"),
        (["model.class_dropout_prob=0", "preview.every=1"], "preview: guidance_scale=1.5 needs a null class"),
        (["model.depth=0"], "model.depth=0: must be at least 1"),
        (["model.token_mixer=5"], "token_mixer=5"),
        (["train.lr=.nan"], "train.lr=nan"),
        (["train.max_grad_norm=.nan"], "train.max_grad_norm=nan"),
        (["preview.guidance_scale=.inf"], "preview.guidance_scale=inf"),
        (["--resume"], "there is no checkpoint"),
        (["model.num_classes=11"], "the recipe says 11, data and codec say 10"),
        (["model.sample_size=16"], "model.sample_size"),
        (["data.num_images=3"], "the recipe says 3, data and codec say 1437"),
        (["preview.sampler=eular", "preview.every=1"], "did you mean 'euler'"),
        (["preview.diffusion=sigma"], "preview: diffusion=sigma goes with sampler="),
        (["flow.prediction=nois"], "did you mean 'noise'"),
        (["train.precision=fp16"], "fp16"),
        (["model.num_heads=3"], "num_heads=3 does not divide hidden_size=16"),
    ],
)
def test_train_refuses(fails, recipe_file, tmp_path, overrides, says):
    assert says in fails(train_sit.main, recipe_file(), *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.image_size=0"], "data.image_size=0"),
        (["data.num_images=0"], "data.num_images=0"),
        (["model.sample_size=abc"], "sample_size='abc'"),
        (["preview.sampler=eular"], "preview: sampler='eular': did you mean 'euler'"),
        (["model.class_dropout_prob=0"], "preview: guidance_scale=4 needs a null class"),
    ],
)
def test_dry_run_refuses_what_training_would(fails, overrides, says):
    assert says in fails(train_sit.main, f"{RECIPES}/imagenet256_sit_xl2_atconv.yaml", "--dry-run", *overrides)


def test_a_printed_command_can_be_pasted(recipe_file, tmp_path, capsys):
    out = tmp_path / "it's a run; $HOME"
    train_sit.main([str(recipe_file()), f"run.out='{str(out).replace(chr(39), chr(39) * 2)}'", "train.max_steps=1"])
    words = shlex.split(capsys.readouterr().out.partition("sample with: ")[2])
    assert words == ["sit-atconv", "sample", "--ckpt", str(out / "step-0000001")]


def test_train_refuses_a_missing_recipe(fails):
    assert "No such file" in fails(train_sit.main, "nowhere.yaml")


@pytest.mark.parametrize("workers", [0, 1])
def test_train_names_an_image_that_does_not_decode(fails, recipe_file, tmp_path, workers):
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    Image.effect_noise((32, 32), 100).save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:500])
    data = {"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 8, "workers": workers}
    message = fails(train_sit.main, recipe_file(data=data))
    assert f"{folder / 'bad.png'}' does not decode" in message
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_run_of_another_recipe_and_keeps_it(fails, recipe_file, trained):
    before = sorted(trained.rglob("*"))
    message = fails(train_sit.main, recipe_file(), "train.lr=0.5", "train.max_steps=9")
    assert "another recipe (train.lr: 0.001 -> 0.5)" in message
    assert sorted(trained.rglob("*")) == before


def test_train_refuses_other_images(fails, recipe_file, tmp_path):
    for index in range(3):
        folder = tmp_path / "images" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    recipe = recipe_file(data={"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 8})
    train_sit.main([str(recipe)])
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "new.png")
    with pytest.raises(InputError, match="more or fewer images"):
        train(load_recipe(recipe))


def test_train_refuses_another_autoencoder_in_the_same_place(recipe_file, tmp_path, vae_folder):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / f"{index}.png")
    vae = tmp_path / "vae"
    shutil.copytree(vae_folder, vae)
    recipe = recipe_file(
        data={"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 8},
        latents={"codec": "vae", "vae": str(vae)},
    )
    train_sit.main([str(recipe)])
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.7}))
    with pytest.raises(InputError, match=r"not the autoencoder of this checkpoint: scale is 0\.7, was 0\.5"):
        train(load_recipe(recipe))


def test_a_folder_of_a_start_killed_at_its_first_file_is_taken(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".recipe.yaml.0123456789ab.unfinished", "recipe.yaml.0123456789ab.tmp"):  # today's and an earlier one
        (tmp_path / "run" / name).write_text("run: {o")
    train_sit.main([str(recipe_file())])
    assert not list((tmp_path / "run").glob("*0123456789ab*"))
    assert (tmp_path / "run" / "step-0000008").is_dir()


def test_a_run_stored_before_a_key_existed_goes_on(trained, recipe_file):
    folder = trained / "step-0000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["recipe"]["train"]["weight_decay"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    train_sit.main([str(recipe_file()), "train.max_steps=9", "--resume"])
    assert (trained / "step-0000009").is_dir()


def test_a_damaged_stored_recipe_is_told_from_the_users(fails, recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()  # else it is no run
    for text, says in (("run: {o", "recipe.yaml is damaged"), ("trian: {}", "its own recipe is not valid here")):
        (tmp_path / "run" / "recipe.yaml").write_text(text)
        assert says in fails(train_sit.main, recipe_file())


def test_train_refuses_fewer_steps_than_are_done(fails, recipe_file, trained):
    assert "already at step 8" in fails(train_sit.main, recipe_file(), "train.max_steps=7")


def test_train_refuses_a_folder_that_is_no_run(fails, recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("dear")
    assert "exists and is not a run" in fails(train_sit.main, recipe_file())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["letters.txt"]


def test_train_wants_installed_trackers(fails, recipe_file, monkeypatch):
    monkeypatch.setattr("sit_atconv.training.launch.is_wandb_available", lambda: False)
    assert "'wandb' is not installed; pip install wandb" in fails(train_sit.main, recipe_file(), "run.trackers=[wandb]")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--classes", "0", "10"], "class id 10 is out of range; this model has classes 0 to 9"),
        (["--classes", "-1"], "--classes -1: must be at least 0"),
        (["--num", "0"], "--num 0"),
        (["--num", "4", "--rows", "2"], "--rows 2 goes with --classes"),
        (["--classes", *"0123456789", "--rows", "4096"], "40,960 images; one picture holds at most 4,096"),
        (["--num", "2", "--classes", "1"], "not allowed with"),
        (["--steps", "0"], "--steps 0"),
        (["--sampler", "rk5"], "rk5"),
        (["--diffusion", "sigma"], "--diffusion=sigma goes with --sampler=euler-maruyama or sde-heun; leave it out"),
        (["--sampler", "rk4", "--diffusion-norm", "1"], "--diffusion-norm=1.0 goes with --sampler="),
        (["--sampler", "dopri5", "--last-step", "none"], "--last-step=none goes with --sampler="),
        (["--sampler", "heun", "--last-step-size", "0.1"], "--last-step-size=0.1 goes with --sampler="),
        (
            ["--sampler", "sde-heun", "--last-step", "none", "--last-step-size", "0.1"],
            "--last-step-size=0.1 goes with --sampler=euler-maruyama or sde-heun and a last_step; leave it out",
        ),
        (["--sampler", "sde-heun", "--diffusion", "sigmoid"], "sigmoid"),
        (["--sampler", "sde-heun", "--diffusion-norm", "0"], "--diffusion-norm 0.0: must be over 0"),
        (["--sampler", "euler-maruyama", "--last-step-size", "1"], "--last-step-size 1.0: must be over 0"),
        (["--sampler", "euler-maruyama", "--steps", "1"], "steps=1: must be at least 2 with a last step"),
        (["--cfg-interval", "0.7", "0.2"], "0 <= low <= high <= 1"),
        (["--seed", "-3"], "--seed -3"),
        (["--out", "grid.jpeg"], "must end in .png"),
        (["--scheduler", "ddim"], "ddim"),
        (["--scheduler", "unipc", "--sampler", "euler"], "--sampler euler does nothing with --scheduler unipc"),
        (["--scheduler", "unipc", "--no-cuda-graphs"], "--no-cuda-graphs does nothing with --scheduler unipc"),
        (["--scheduler", "unipc", "--diffusion", "sigma"], "goes with --sampler="),
        (["--device", "tpu9"], "--device tpu9"),
        (["--device", "meta"], "--device meta"),
        (["--cfg", "nan"], "--cfg nan"),
    ],
)
def test_sample_refuses(fails, trained, tmp_path, options, says):
    out = tmp_path / "grid.png"
    assert says in fails(sample.main, "--ckpt", trained, "--out", out, *options)
    assert not out.exists()


@pytest.fixture
def shaken(trained):
    """The run with an EMA that is not zero."""
    folder = trained / "step-0000008"
    model = SiTTransformer2DModel.from_pretrained(folder / "ema")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder.parent / "shaken")
    return folder.parent / "shaken"


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def of_animals(tmp_path_factory) -> Path:
    """The checkpoint of a run on images of cats, dogs and fish."""
    folder, noise = tmp_path_factory.mktemp("animals"), np.random.default_rng(0)
    for name in ("cat", "dog", "goldfish"):
        (folder / "images" / name).mkdir(parents=True)
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name / "0.png")
    (folder / "recipe.yaml").write_text(
        f"run: {{out: {folder}/run}}\ndata: {{kind: imagefolder, root: {folder}/images, image_size: 8}}\n"
        "model: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}\npreview: {every: 0}\n"
        "train: {max_steps: 4, batch_size: 4, lr: 0.1}\nema: {decay: 0}\n"
    )
    return run_recipe(folder / "recipe.yaml")


def test_classes_go_by_name_in_every_command(of_animals, tmp_path, fails, capsys):
    def drawn(*classes: str) -> np.ndarray:
        out = tmp_path / "grid.png"
        sample.main(["--ckpt", str(of_animals), "--steps", "2", "--out", str(out), "--classes", *classes])
        capsys.readouterr()
        return np.array(Image.open(out))

    assert np.array_equal(drawn("goldfish", "0", "Dog"), drawn("2", "0", "1"))
    assert not np.array_equal(drawn("goldfish"), drawn("cat"))
    base = ["--ckpt", of_animals, "--steps", "2", "--out"]
    error = fails(sample.main, *base, tmp_path / "none.png", "--classes", "cat", "goldfsh")
    assert "error: --classes: class='goldfsh': did you mean 'goldfish'?" in error
    for number, text in enumerate(("goldfish\n0\n Cat \n", '["goldfish", 0, "cat"]')):
        (tmp_path / "labels").write_text(text)
        out = tmp_path / f"samples-{number}"
        sampling(["generate", *map(str, base), str(out), "--num", "3", "--labels", str(tmp_path / "labels")])
        capsys.readouterr()
        assert json.loads((out / "manifest.json").read_text())["labels"] == [2, 0, 0]
    (tmp_path / "labels").write_text("cat\ndogs\n0\n")
    error = fails(sampling, "generate", *base, tmp_path / "none", "--num", 3, "--labels", tmp_path / "labels")
    assert "labels, line 2: class='dogs': did you mean 'dog'?" in error
    assert "names no classes; give ids, 0 to 2" in fails(  # of a model alone
        sample.main, "--ckpt", model_alone(of_animals, tmp_path), "--classes", "cat", "--out", tmp_path / "none.png"
    )


def model_alone(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint / "ema", tmp_path / "alone")


def test_schedulers_take_the_place_of_the_sampler(shaken, tmp_path, capsys):
    def draw(*options) -> np.ndarray:
        out = tmp_path / "grid.png"
        sample.main(["--ckpt", str(shaken), "--classes", "1", "2", "3", "--out", str(out), *map(str, options)])
        return pixels(out)

    euler = draw("--sampler", "euler", "--steps", 6)
    assert abs(draw("--scheduler", "flow-match-euler", "--steps", 6) - euler).max() <= 1
    assert "NFE 12" in capsys.readouterr().out
    exact = draw("--sampler", "rk4", "--steps", 40)
    for name in ("flow-match-heun", "unipc", "dpm++"):
        assert abs(draw("--scheduler", name, "--steps", 40) - exact).mean() < 3
    lcm = ("--scheduler", "flow-match-lcm", "--steps", 3)
    with pytest.warns(UserWarning, match="right for a model that was distilled to such steps"):
        assert abs(draw(*lcm, "--batch", 1) - draw(*lcm)).max() <= 1  # what is drawn belongs to the image
    assert abs(draw(*lcm, "--seed", 1) - draw(*lcm)).max() > 1
    for options in (("--cfg", 4), ("--cfg", 4, "--cfg-interval", 0, 0.4)):
        guided = draw("--scheduler", "flow-match-euler", "--steps", 6, *options)
        assert abs(guided - draw("--sampler", "euler", "--steps", 6, *options)).max() <= 1
        assert abs(guided - euler).max() > 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_the_one_that_its_name_says(name):
    words = {"flow-match-euler": "FlowMatchEuler", "flow-match-heun": "FlowMatchHeun", "flow-match-lcm": "FlowMatchLCM"}
    words |= {"unipc": "UniPCMultistep", "dpm++": "DPMSolverMultistep"}
    model = SiTTransformer2DModel(sample_size=4, hidden_size=8, depth=1, num_heads=1)
    scheduler = make_scheduler(name, model)
    assert type(scheduler).__name__.startswith(words[name])
    check_scheduler(scheduler)
    with pytest.raises(InputError, match=r"path='vp'; leave it out"):
        make_scheduler(name, SiTTransformer2DModel(sample_size=4, hidden_size=8, depth=1, num_heads=1, path="vp"))


def test_sample_refuses_guidance_without_a_null_class(fails, recipe_file, tmp_path, capsys):
    train_sit.main([str(recipe_file(model={"class_dropout_prob": 0.0}))])
    capsys.readouterr()
    out = tmp_path / "grid.png"
    assert "without class dropout" in fails(sample.main, "--ckpt", tmp_path / "run", "--cfg", "1.5", "--out", out)
    assert not out.exists()
    sample.main(["--ckpt", str(tmp_path / "run"), "--cfg", "1", "--steps", "1", "--out", str(out)])
    assert out.exists()


def test_sample_and_generate_refuse_a_truncated_checkpoint(fails, trained, tmp_path):
    weights = trained / "step-0000008" / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged" in fails(sample.main, "--ckpt", trained, "--out", tmp_path / "grid.png")
    out = tmp_path / "samples"
    assert "is damaged" in fails(sampling, "generate", "--ckpt", trained, "--num", 2, "--out", out)
    assert not out.exists()
    assert not (tmp_path / "grid.png").exists()


def test_sample_refuses_what_is_no_checkpoint(fails, tmp_path):
    assert "no such folder" in fails(sample.main, "--ckpt", tmp_path / "nowhere")
    assert "not a checkpoint" in fails(sample.main, "--ckpt", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--num", 0], "--num 0"), (["--num", 2, "--batch", 0], "--batch 0"), ([], "--num")],
)
def test_generate_refuses(fails, trained, tmp_path, options, says):
    out = tmp_path / "samples"
    assert says in fails(sampling, "generate", "--ckpt", trained, "--out", out, *options)
    assert not out.exists()


def test_generate_never_writes_into_a_folder_of_something_else(fails, trained, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.txt").write_text("kept")
    assert "exists already" in fails(sampling, "generate", "--ckpt", trained, "--num", 2, "--out", tmp_path / "samples")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "SiT-Q/2"], "SiT-Q/2"),
        (["--models", "SiT-S/2", "--sizes", "100"], "multiples of 8"),
        (["--models", "SiT-S/4", "--sizes", "40"], "patches of 4"),
        (["--models", "SiT-S/2", "--sizes", "0"], "--sizes 0: must be at least 1"),
        (["--models", "SiT-S/2", "--rounds", "0"], "--rounds 0"),
        (["--models", "SiT-S/2", "--batch", "0"], "--batch 0"),
        (["--models", "SiT-S/2", "--steps", "0"], "--steps 0"),
        (["--models", "SiT-S/2", "--passes", "train"], "'train'"),
        (["--models", "SiT-S/2", "--baselines", "conv"], "'conv'"),
    ],
)
def test_speed_refuses(fails, tmp_path, options, says):
    assert says in fails(sampling, "speed", "--out", tmp_path / "speed", *options)
    assert not any(tmp_path.iterdir())


def test_score_refuses(fails, tmp_path):
    assert "no such file or folder" in fails(evaluate, "score", tmp_path / "nowhere", "--ref", "digits")
    assert "holds no images" in fails(evaluate, "score", tmp_path, "--ref", "digits")
    assert "arguments are required" in fails(evaluate, "score", tmp_path)


def test_a_worker_says_one_line_and_no_traceback(process_server, recipe_file, tmp_path):
    codes, (said,) = process_server("train_sit", tmp_path, [recipe_file(), "train.lrr=1"])
    assert codes == [2]
    assert (tmp_path / "printed-0").read_text() == ""
    assert said.splitlines() == [said.strip()]
    assert said.startswith("error: recipe key='train.lrr': did you mean 'train.lr'?")
    assert not (tmp_path / "run").exists()


def error_lines(said: list[str]) -> list[str]:
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")]


def test_what_the_main_process_finds_ends_all_processes_with_one_line(process_server, trained, recipe_file, tmp_path):
    codes, said = process_server("train_sit", tmp_path, [recipe_file(), "train.lr=0.5"], {}, {})
    assert codes == [2, 2]
    (line,) = error_lines(said)
    assert "another recipe (train.lr: 0.001 -> 0.5)" in line
    assert not any("Connection closed" in text for text in said)


def test_batch_must_divide_by_processes(process_server, recipe_file, tmp_path):
    codes, said = process_server("train_sit", tmp_path, [recipe_file(), "train.batch_size=7"], {}, {})
    assert codes == [2, 2]
    assert error_lines(said) == [
        "error: train.batch_size=7 is not divisible by 2 processes x 1 accumulation steps; choose a multiple of 2"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_line_of_all_processes_is_said_once_under_torchrun(recipe_file, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "train_sit.py", str(recipe_file()), "train.batch_size=7"],
        cwd=ROOT, capture_output=True, text=True, env={"ACCELERATE_USE_CPU": "true", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert error_lines([done.stderr]) == [
        "error: train.batch_size=7 is not divisible by 2 processes x 1 accumulation steps; choose a multiple of 2"
    ]
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


def test_a_moved_run_folder_goes_on(trained, recipe_file, tmp_path):
    shutil.move(trained, tmp_path / "elsewhere")
    train_sit.main([str(recipe_file()), f"run.out={tmp_path / 'elsewhere'}", "train.max_steps=9"])
    assert (tmp_path / "elsewhere/step-0000009").is_dir()
