"""Push and pull by the hub's own client, against a stand-in of the hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_recipe
from diffusers import DiTTransformer2DModel
from hub_server import OWNER, TOKEN, serving_hub
from huggingface_hub import constants
from PIL import Image

from sit_atconv import SiTPipeline, swap_attention
from sit_atconv.__main__ import main
from sit_atconv.config import load_recipe
from sit_atconv.latents.encode import encode
from sit_atconv.runtime.reading import read_card
from sit_atconv.swap import save_delta

NAME = f"{OWNER}/digits"
CALL = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which this process's client takes for the hub, with its owner's token."""
    with serving_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in does not speak
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of digits with a preview, samples and their scores, and a file of the user's."""
    place = tmp_path_factory.mktemp("hub")
    recipe = place / "recipe.yaml"
    recipe.write_text(
        f"run: {{out: {place}/mine, log_every: 1}}\ndata: {{kind: digits}}\n"
        "model: {patch_size: 2, hidden_size: 16, depth: 2, num_heads: 2, token_mixer: hybrid, learn_sigma: false}\n"
        "train: {max_steps: 2, batch_size: 8}\ncheckpoint: {every: 2}\npreview: {every: 2, num: 10, steps: 1}\n"
    )
    run_recipe(recipe)
    samples = ["--ckpt", place / "mine", "--num", 20, "--steps", 3, "--out", place / "mine/samples/three"]
    main(["generate", *map(str, samples)])
    main(["score", str(place / "mine/samples/three"), "--ref", "digits"])
    (place / "mine/notes.txt").write_text("the user's own")
    return place / "mine"


@pytest.fixture(scope="module")
def exported(run_folder):
    """The run as `sit-atconv export` writes it."""
    main(["export", str(run_folder), "--out", str(run_folder.with_name("exported"))])
    return run_folder.with_name("exported")


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, vae_folder):
    """A cache of latents of seven images, by files that lie on this machine."""
    place = tmp_path_factory.mktemp("cached")
    for index in range(7):
        (folder := place / "images" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * index, 90, 120)).save(folder / f"{index}.png")
    recipe = place / "recipe.yaml"
    recipe.write_text(
        f"data: {{kind: imagefolder, root: {place}/images, image_size: 16}}\n"
        f"latents: {{codec: vae, vae: {vae_folder}}}\nmodel: {{patch_size: 2}}\n"
    )
    encode(load_recipe(recipe), place / "cache", shard_images=4)
    return place / "cache"


@pytest.fixture
def delta(tmp_path):
    """A delta of a DiT that lay in a folder of this machine, and the model."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 2}
    DiTTransformer2DModel(sample_size=8, **options).save_pretrained(tmp_path / "dit")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", use_safetensors=True)
    swap_attention(model, select="all", init="copy_vo")
    save_delta(model, tmp_path / "atconv-delta.safetensors")
    return tmp_path / "atconv-delta.safetensors", model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploaded(hub, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(name).items() if path != ".gitattributes"}


def test_a_run_goes_up_with_its_card_and_comes_down_with_the_same_bytes(hub, run_folder, tmp_path, capsys):
    main(["push", str(run_folder), "--repo", NAME, "--license", "mit"])
    said = capsys.readouterr()
    commit = hub.repos[f"models/{NAME}"].commits[-1][0]
    assert said.out.splitlines() == [
        f"{hub.url}/{NAME}, 8 files at {commit}", f"sit-atconv pull {NAME} --out FOLDER"
    ]  # fmt: skip
    there = uploaded(hub, f"models/{NAME}")
    assert sorted(re.sub(r"[0-9a-f]{8}", "*", path) for path in there) == [
        "README.md", "model_index.json", "picture.png", "pipeline.py", "scheduler/scheduler_config.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/modeling_sit_*.py",
    ]  # fmt: skip
    main(["pull", NAME, "--out", str(tmp_path / "pulled")])
    assert contents(tmp_path / "pulled") == hub.files(f"models/{NAME}")
    assert commit in capsys.readouterr().out
    pipe = SiTPipeline.from_run(tmp_path / "pulled")
    ours = SiTPipeline.from_run(run_folder)
    for each in (pipe, ours):
        each.set_progress_bar_config(disable=True)
    images = [each([3], generator=torch.Generator().manual_seed(0), **CALL).images for each in (pipe, ours)]
    assert torch.equal(*images)
    # the card: picture, numbers, licence, command lines, and no place of this machine
    card = there["README.md"].decode()
    (tmp_path / "README.md").write_text(card)
    assert read_card(tmp_path / "README.md")["license"] == "mit"
    assert there["picture.png"] == next((run_folder / "previews").glob("*.png")).read_bytes()
    assert "](picture.png)" in card
    distance = json.loads((run_folder / "samples/three/metrics.json").read_text())["metrics"]["frechet_distance"]
    assert f"| {distance['value']:.0f} [{distance['se']:.0f}] |" in card.split("## Scores")[1].split("## Use")[0]
    assert f'folder = "{NAME}"' in card
    for line in (
        f"sit-atconv pull {NAME} --out FOLDER", "sit-atconv sample --ckpt FOLDER --classes 0 1 2 3 --out grid.png",
        "sit-atconv generate --ckpt FOLDER --num 20 --seed 0 --steps 3 --cfg 1.5 --out three",
        "sit-atconv score three --ref digits",
    ):  # fmt: skip
        assert f"\n{line}\n" in card
    assert not [path for path, content in there.items() if str(run_folder.parent).encode() in content]
    assert not [path for path, content in there.items() if TOKEN.encode() in content]
    assert TOKEN not in said.out + said.err


def test_the_lines_of_a_card_draw_the_samples_again(run_folder, tmp_path, monkeypatch):
    main(["export", str(run_folder), "--out", str(tmp_path / "FOLDER")])
    card = (tmp_path / "FOLDER/README.md").read_text()
    monkeypatch.chdir(tmp_path)
    lines = card.split("```bash\n")[1].split("\n```")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["sample", "generate", "score"]
    for line in lines:
        main(line.split()[1:])
    for name in ("000000.png", "000019.png"):
        assert (tmp_path / "three" / name).read_bytes() == (run_folder / "samples/three" / name).read_bytes()
    found, stored = (
        json.loads((place / "metrics.json").read_text()) for place in (tmp_path / "three", run_folder / "samples/three")
    )
    assert found["metrics"] == stored["metrics"]


def test_scores_of_other_weights_are_not_told(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    manifest = tmp_path / "run/samples/three/manifest.json"
    stored = json.loads(manifest.read_text())
    stored["checkpoint_sha256"]["ema/config.json"] = "0" * 64
    manifest.write_text(json.dumps(stored))
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "## Scores" not in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/picture.png").is_file()


STRANGER = """
import sys, torch
from diffusers import AutoModel, DiffusionPipeline
name, image = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
torch.save(pipe([3], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images, image)
model = AutoModel.from_pretrained(name, subfolder="transformer", trust_remote_code=True)
assert type(model).__name__ == "SiTTransformer2DModel"
assert not [name for name in sys.modules if name.startswith("sit_atconv.")]
"""


@pytest.mark.slow
def test_strangers_load_it_from_the_hub_with_remote_code_alone(hub, run_folder, tmp_path):
    """In a new process, which is in a folder without this package, and reads where the hub is from its environment."""
    main(["push", str(run_folder), "--repo", NAME])
    (tmp_path / "stranger.py").write_text(STRANGER)
    done = subprocess.run(
        [sys.executable, "-P", "stranger.py", NAME, "image.pt"], cwd=tmp_path, capture_output=True, text=True,
        env=own_environment(tmp_path, HF_ENDPOINT=hub.url, OMP_NUM_THREADS=str(torch.get_num_threads())),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipe = SiTPipeline.from_run(run_folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe([3], generator=torch.Generator().manual_seed(0), **CALL).images
    assert torch.equal(torch.load(tmp_path / "image.pt", weights_only=True), image)


def own_environment(home: Path, **more: str) -> dict[str, str]:
    """That of this process, with nothing of the hub's in it but what is given, and without xet."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**names, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1", **more}


def test_what_an_earlier_push_left_goes_and_its_commit_stays(hub, exported, tmp_path, capsys):
    name, folder = f"models/{NAME}", tmp_path / "out"
    main(["push", str(exported), "--repo", "digits", "--private"])
    assert hub.repos[name].private
    first, files = hub.repos[name].commits[-1]
    hub.files(name).update({"transformer/modeling_sit_00000000.py": b"", "NOTES.md": b"theirs"})
    shutil.copytree(exported, folder)
    edited(folder, "README.md", "license: unknown", "license: mit")
    (folder / ".git").mkdir()
    for stray in (".git/config", "optimizer.safetensors", "transformer/trainer.json"):
        (folder / stray).write_text("x")
    main(["push", str(folder), "--repo", NAME])
    second = hub.files(name)
    assert second.keys() == {*contents(exported), ".gitattributes", "NOTES.md"}
    assert second["NOTES.md"] == b"theirs"
    assert second["README.md"] == (folder / "README.md").read_bytes() != files["README.md"]
    main(["pull", NAME, "--out", str(tmp_path / "old"), "--revision", first])
    assert contents(tmp_path / "old") == files
    # large files that have not changed are not sent again
    assert sum(method == "PUT" for method, *_ in hub.asked) == 2


def test_a_dry_run_tells_all_and_asks_nobody(hub, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("x")
    main(["push", str(tmp_path / "out"), "--repo", "other/name", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert f"{size:,}  transformer/diffusion_pytorch_model.safetensors" in {line.strip() for line in lines}
    assert "stays here  mine.txt" in {line.strip() for line in lines}
    assert lines[-1].endswith(" MB would go to the model other/name; nothing was sent")
    assert hub.asked == []


def test_a_cache_goes_up_as_a_dataset_without_places_of_this_machine(hub, cache_folder, tmp_path, capsys):
    main(["push", str(cache_folder), "--repo", "latents", "--license", "cc-by-4.0"])
    assert f"sit-atconv pull datasets/{OWNER}/latents --out FOLDER" in capsys.readouterr().out
    there = uploaded(hub, f"datasets/{OWNER}/latents")
    assert sorted(there) == [
        "README.md", "index.json", "moments-0000000-0000004.safetensors", "moments-0000004-0000007.safetensors"
    ]  # fmt: skip
    index = json.loads(there["index.json"])
    assert (index["data"]["root"], Path(index["codec"]["vae"]).is_absolute()) == ("images", False)
    assert not [path for path, content in there.items() if str(cache_folder.parents[1]).encode() in content]
    (tmp_path / "README.md").write_bytes(there["README.md"])
    assert read_card(tmp_path / "README.md")["license"] == "cc-by-4.0"
    main(["pull", f"datasets/{OWNER}/latents", "--out", str(tmp_path / "FOLDER")])
    main(["verify", str(tmp_path / "FOLDER")])
    for name in there:
        if name.startswith("moments"):
            assert (tmp_path / "FOLDER" / name).read_bytes() == (cache_folder / name).read_bytes()


def test_a_damaged_shard_is_not_sent(hub, cache_folder, tmp_path, fails):
    shutil.copytree(cache_folder, tmp_path / "cache")
    shard = tmp_path / "cache/moments-0000004-0000007.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert "moments-0000004-0000007.safetensors" in fails(main, "push", tmp_path / "cache", "--repo", "latents")
    assert hub.repos == {}


def test_a_delta_goes_up_by_the_name_of_its_model_and_is_applied_from_there(hub, delta, tmp_path, capsys):
    path, swapped = delta
    main(["push", str(path), "--repo", "swapped", "--base", "facebook/DiT-XL-2-256", "--license", "cc-by-nc-4.0"])
    there = uploaded(hub, f"models/{OWNER}/swapped")
    assert sorted(there) == ["README.md", "atconv-delta.safetensors"]
    assert not [name for name, content in there.items() if str(tmp_path).encode() in content]
    (tmp_path / "README.md").write_bytes(there["README.md"])
    card = read_card(tmp_path / "README.md")
    assert (card["base_model"], card["license"]) == ("facebook/DiT-XL-2-256", "cc-by-nc-4.0")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", use_safetensors=True)
    swap_attention(model, weights=f"{OWNER}/swapped")
    x, t, label = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1])
    with torch.no_grad():
        outputs = [each(x, timestep=t, class_labels=label).sample for each in (model.eval(), swapped.eval())]
    assert torch.equal(*outputs)


def edited(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("README.md", "license: unknown", "license: [", "README.md: it is no YAML: see line"),
        ("README.md", "license: unknown", "other: unknown", "README.md names no license"),
        ("README.md", "## Limits", "## Limits hf_aBcDeFgHiJkLmNoPqRsTuVw", "README.md holds a token of the hub"),
        ("model_index.json", '"auto_map"', '"x": "/data/x", "auto_map"', "x is '/data/x', a place on this machine"),
        ("transformer/config.json", '"depth": 2', '"depth": 3', "exported"),
        ("pipeline.py", "import sys", "import sys(", "pipeline.py: invalid syntax"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_not_sent(hub, exported, tmp_path, fails, name, old, new, told):
    shutil.copytree(exported, tmp_path / "exported")
    edited(tmp_path / "exported", name, old, new)
    assert told in fails(main, "push", tmp_path / "exported", "--repo", NAME)
    assert hub.repos == {}


def test_what_the_hub_refuses_costs_one_line(hub, exported, tmp_path, fails, monkeypatch, capsys):
    out = tmp_path / "x"
    assert "there is no such repository, or it is private" in fails(main, "pull", "a/none", "--out", out)
    assert "a repository is OWNER/NAME" in fails(main, "pull", "a/b/c", "--out", out)
    assert "a repository is OWNER/NAME" in fails(main, "push", exported, "--repo", "a//b")
    assert "the token may not do this" in fails(main, "push", exported, "--repo", "other/digits")
    main(["push", str(exported), "--repo", NAME, "--private"])
    capsys.readouterr()
    assert "no such revision" in fails(main, "pull", NAME, "--revision", "v9", "--out", out)
    shutil.copytree(exported, tmp_path / "edited")
    edited(tmp_path / "edited", "README.md", "license: unknown", "license: mit")
    hub.fault = "/commit/", 503
    assert "the hub answers with status 503" in fails(main, "push", tmp_path / "edited", "--repo", NAME)
    hub.fault = None
    hub.damaged = {"transformer/config.json"}
    assert "transformer/config.json did not come as the hub lists it" in fails(main, "pull", NAME, "--out", out)
    hub.damaged = set()
    monkeypatch.delenv("HF_TOKEN")
    assert "it is private and the token does not open it" in fails(main, "pull", NAME, "--out", out)
    said = fails(main, "push", exported, "--repo", NAME)
    assert "there is no token of the hub; log in by `hf auth login`, or set HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    said = fails(main, "push", exported, "--repo", NAME)
    assert "the hub does not know the token" in said
    assert "hf_another" not in said
    assert not out.exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(hub, tmp_path, fails):
    from hub_server import Repository

    hub.repos["models/a/b"] = Repository(False)
    hub.repos["models/a/b"].commits.append(("1" * 40, {"../outside.txt": b"x"}))
    assert "'../outside.txt', which no folder here takes" in fails(main, "pull", "a/b", "--out", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_an_option_would_not_do_is_refused(hub, run_folder, delta, fails):
    assert "--base 'a/b' does nothing for" in fails(main, "push", run_folder, "--repo", NAME, "--base", "a/b")
    assert "--vae 'x' does nothing for" in fails(main, "push", delta[0], "--repo", NAME, "--vae", "x")
    assert "give a PNG" in fails(main, "push", run_folder, "--repo", NAME, "--picture", run_folder / "log.jsonl")
    assert "--license 'a b': give one identifier" in fails(main, "push", delta[0], "--repo", NAME, "--license", "a b")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (["pull", "a/b", "--out", "x"], {"HF_HUB_OFFLINE": "1"}, "pull 'a/b': HF_HUB_OFFLINE is set"),
        (["push", "RUN", "--repo", "a/b"], {"HF_HUB_OFFLINE": "1"}, "push to 'a/b': HF_HUB_OFFLINE is set"),
        (["pull", "a/b", "--out", "x"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["pull offline", "push offline", "no connection"],
)  # fmt: skip
def test_without_a_hub_a_new_process_says_so_at_once(run_folder, tmp_path, words, environment, told):
    words = [str(run_folder) if word == "RUN" else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "sit_atconv", *words], cwd=tmp_path, capture_output=True, text=True,
        env=own_environment(tmp_path, PYTHONPATH=str(ROOT), **environment),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_new_process_pulls_by_the_endpoint_of_its_environment(hub, exported, tmp_path):
    main(["push", str(exported), "--repo", NAME, "--private"])
    done = subprocess.run(
        [sys.executable, "-m", "sit_atconv", "pull", NAME, "--out", "pulled"], cwd=tmp_path, capture_output=True,
        text=True, env=own_environment(tmp_path, PYTHONPATH=str(ROOT), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "pulled") == hub.files(f"models/{NAME}")
    assert done.stderr == ""
