"""Snippets and commands of the docs run as they stand, in a folder with small files of the names they use."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, reset_accelerate
from safetensors.torch import save_file

import train_attnet
import train_sit
from experiments import distill_swap
from experiments.principles import main as principles
from sample import main as sample
from sit_atconv import SiTTransformer2DModel
from sit_atconv.convert import forms
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.layers.projectors import Projectors
from sit_atconv.pipelines.export import main as export

STEP = re.compile(r"```python\n(?P<code>.*?)```|^    (?P<line>(?:python|accelerate) [^\n]*)$", re.DOTALL | re.MULTILINE)
MAINS = {"-m sit_atconv.convert": convert, "-m sit_atconv.pipelines.export": export, "sample.py": sample}
MADE = {  # what the steps leave behind
    "interop": ("grid.png", "digits-ema.pt", "digits.safetensors", "sit-pipeline-for-all/README.md"),
    "swap": ("DiT-XL-2-256-atconv/config.json", "atconv-delta.safetensors"),
    "attnet": ("runs/digits_attnet/step-0000584/ema/config.json",),
}
DISTIL = "accelerate launch experiments/distill_swap.py "
CLASSIFY = "accelerate launch train_attnet.py "


def run(line: str) -> None:
    """A command line of the docs, in this process."""
    if line.startswith(DISTIL):
        reset_accelerate()
        recipe, *overrides = shlex.split(line.removeprefix(DISTIL))
        short = (
            "train.max_steps=3",
            "train.warmup_steps=0",
            "distill.blockwise_steps=1",
            "distill.share_steps=1",
            "preview.every=0",
            "run.out=distilled",
        )
        distill_swap.main([str(ROOT / recipe), *overrides, *short])
        return
    if line.startswith(CLASSIFY):  # as many steps as the docs go on from
        reset_accelerate()
        short = ("train.batch_size=2", "train.epochs=0.8128", "train.warmup_epochs=0", "model.input_size=16")
        train_attnet.main([str(ROOT / line.removeprefix(CLASSIFY)), *short])
        return
    name = next(name for name in MAINS if line.startswith(f"python {name} "))
    few = ["--steps", "2"] if name == "sample.py" else []
    MAINS[name](shlex.split(line.removeprefix(f"python {name} ")) + few)


def small(mixer: str, **options) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    return SiTTransformer2DModel(sample_size=32, hidden_size=384, depth=8, num_heads=6, token_mixer=mixer, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae_folder):
    """What a user would have downloaded or trained."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("downloads")
    model = small("atconv")
    torch.save({"model": model.state_dict(), "ema": copy.deepcopy(model.state_dict())}, folder / "SiT-XL-2-256x256.pt")
    model = small("hybrid", learn_sigma=False, activation="silu")
    projectors = Projectors(384, 64, [24], encoder_depth=8)
    torch.save({"ema": forms.to_repa(model.state_dict()) | projectors.state_dict()}, folder / "REPA.pt")
    dit = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, out_channels=8, num_layers=2)
    dit.transformer_blocks[1].norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    dit.save_pretrained(folder / "DiT-XL-2-256")
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(folder / "sd-vae-ft-ema")
    save_file(public_attnet(), folder / "attnet_t2.safetensors")
    short = ("train.max_steps=2", "train.warmup_steps=0", "train.lr_schedule=constant", "preview.every=0")
    for name, of in (("digits", "digits_sit_atconv"), ("digits_sit", "digits_sit")):
        recipe = ROOT / f"experiments/recipes/{of}.yaml"
        train_sit.main([str(recipe), f"run.out={folder / 'runs' / name}", *short])
        reset_accelerate()
    return folder


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


@pytest.mark.parametrize("name", ["interop", "swap", "attnet"])
def test_snippets_and_commands_run_in_their_order(name, folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.chdir(folder)
    text = (ROOT / "docs" / f"{name}.md").read_text()
    ran = 0
    for section in text.split("\n## ")[1:]:
        title, steps = section.splitlines()[0], list(STEP.finditer(section))
        assert steps, f"{title} shows nothing"
        for step in steps:
            if step["line"]:
                run(step["line"])
                ran += 1
            else:
                exec(compile(step["code"], f"docs/{name}.md, {title}", "exec"), {})
    for made in MADE[name]:
        assert (folder / made).is_file()
    assert text.count("python -m") + text.count("python sample.py") + text.count("accelerate launch") == ran


@pytest.mark.slow
def test_the_commands_of_principles_run(image_folder, tmp_path, monkeypatch):
    for main, name, length in (
        (train_sit, "digits_sit_atconv", ("train.max_steps=1", "train.warmup_steps=0", "train.lr_schedule=constant")),
        (train_sit, "digits_sit", ("train.max_steps=1", "train.warmup_steps=0", "train.lr_schedule=constant")),
        (train_attnet, "digits_attnet", ("train.epochs=0.05", "train.warmup_epochs=0")),
    ):
        out = tmp_path / "runs" / name
        main.main([str(ROOT / f"experiments/recipes/{name}.yaml"), f"run.out={out}", *length])
        reset_accelerate()
    monkeypatch.chdir(tmp_path)
    image_folder.rename("IMAGES")
    lines = [step["line"] for step in STEP.finditer((ROOT / "docs/principles.md").read_text()) if step["line"]]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.removeprefix("python -m sit_atconv.principles "))
        principles([*words, "--num", "2", "--times", "1"])
    assert {path.name for path in Path("runs/principles").glob("*.*")} >= {"principles.json", "fields.png"}
    assert Path("runs/principles/attnet/routing.png").is_file()
