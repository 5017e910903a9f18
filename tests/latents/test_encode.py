"""Making a cache of latents: what is in it, that a kill costs nothing, and what is refused."""

import hashlib
import json
import os
import shutil
import sys
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from sit_atconv.config import Data
from sit_atconv.data import open_dataset
from sit_atconv.data.images import in_range
from sit_atconv.data.latent_cache import LatentCache
from sit_atconv.latents.__main__ import main
from sit_atconv.latents.encode import encode, write_shard
from sit_atconv.runtime.errors import InputError

SIZE, IMAGES, SHARD = 16, 11, 4


def content(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def processes(process_server):
    return partial(process_server, "sit_atconv.latents.__main__")


@pytest.fixture(scope="module")
def oracle(pictures, vae_folder):
    """Mean and log-variance (2C, h, w) of every image by diffusers, one by one; by index and flip."""
    images = open_dataset(Data(kind="imagefolder", root=str(pictures), image_size=SIZE))
    vae, moments = AutoencoderKL.from_pretrained(vae_folder).eval(), {}
    for index in range(len(images)):
        for flip in (False, True):
            with torch.no_grad():
                found = vae.encode(in_range(images[index, flip][0][None])).latent_dist
            moments[index, flip] = torch.cat([found.mean, found.logvar], dim=1)[0]
    return moments


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_the_cache_holds_the_moments_of_every_image_in_both_flips(recipe, oracle, tmp_path, dtype, tolerance):
    index = encode(recipe, tmp_path / "cache", dtype, SHARD)
    cache = LatentCache(str(tmp_path / "cache"), verify=True)
    assert (len(cache), cache.class_names, cache.latent_shape) == (IMAGES, ("cat", "dog"), (4, 4, 4))
    assert [shard["count"] for shard in index["shards"]] == [4, 4, 3]
    assert cache.labels.tolist() == [0] * 5 + [1] * 6
    for (number, flip), expected in oracle.items():
        moments, label = cache[number, flip]
        assert (moments.dtype, label) == ({"fp32": torch.float32, "fp16": torch.float16}[dtype], int(number >= 5))
        torch.testing.assert_close(moments.float(), expected, rtol=tolerance, atol=tolerance)
    # The test would not see a flip that is missing where an image is its own mirror image.
    assert all((oracle[number, False] - oracle[number, True]).abs().max() > 0.01 for number in range(IMAGES))


def test_an_index_says_all_there_is_to_know(recipe, recipe_path, vae_folder, pictures, tmp_path):
    index = encode(recipe, tmp_path / "cache", shard_images=SHARD)
    assert index == json.loads((tmp_path / "cache" / "index.json").read_text())
    assert len(index["codec"]["sha256"]) == 64
    assert (index["codec"]["scale"], index["codec"]["shift"]) == (0.5, 0.1)
    stated = {key: index[key] for key in ("image_size", "channels", "latent_shape", "dtype", "num_images")}
    assert stated == {
        "image_size": SIZE, "channels": 3, "latent_shape": [4, 4, 4], "dtype": "fp16", "num_images": IMAGES,
    }  # fmt: skip
    data = {"kind": "imagefolder", "root": str(pictures), "image_size": SIZE, "background": "white"}
    assert index["data"] == data
    assert index["versions"]["diffusers"]
    for shard in index["shards"]:
        path = tmp_path / "cache" / shard["file"]
        assert shard["file"] == f"moments-{shard['first']:07d}-{shard['first'] + shard['count']:07d}.safetensors"
        assert shard["bytes"] == path.stat().st_size
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_number_of_loader_processes_changes_nothing(recipe, tmp_path):
    encode(recipe, tmp_path / "one", shard_images=SHARD)
    recipe.data.workers = 2
    encode(recipe, tmp_path / "two", shard_images=SHARD)
    assert content(tmp_path / "one") == content(tmp_path / "two")


# Where processes die: in place of giving which file its name, of data (shards) or a record (settings, index).
def kill(call: str, number: int) -> dict:
    return {"at": [call, number, "KILL"]}


ONE = [[kill("record", 1)], [kill("data", 2)], [kill("data", 1)], [kill("record", 1)]]
TWO = [[kill("record", 1), {}], [{}, kill("data", 1)], [kill("data", 2), {}], [kill("record", 1), {}]]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [TWO, ONE], ids=["two-processes", "one-process"])
def test_a_killed_cache_ends_as_an_uninterrupted_one(recipe, recipe_path, processes, tmp_path, kills):
    encode(recipe, tmp_path / "whole", shard_images=2)
    out = tmp_path / "killed"
    arguments = ["encode", str(recipe_path), "--out", str(out), "--shard-images", "2"]
    left = []
    for ranks in kills:
        codes, said = processes(tmp_path, arguments, *ranks)
        assert -9 in codes, said
        names = [path.name for path in out.iterdir()]
        left.append(
            (sum(name.endswith(".safetensors") for name in names), any(n.endswith(".unfinished") for n in names))
        )
        assert "index.json" not in names
    assert left[0] == (0, True)
    assert left[-1] == (6, True)  # the index was about to get its name
    assert any(0 < shards < 6 and unfinished for shards, unfinished in left)
    codes, said = processes(tmp_path, arguments, *[{}] * len(kills[0]))
    assert codes == [0] * len(codes), said
    assert content(out) == content(tmp_path / "whole")


def test_two_processes_share_the_work_and_one_shows_it(recipe, recipe_path, processes, tmp_path):
    encode(recipe, tmp_path / "whole", shard_images=2)
    arguments = ["encode", str(recipe_path), "--out", str(tmp_path / "shared"), "--shard-images", "2"]
    codes, (first, second) = processes(tmp_path, arguments, {}, {})
    assert codes == [0, 0]
    assert content(tmp_path / "shared") == content(tmp_path / "whole")
    assert "encode (1 of 2 processes)" in first
    assert "image 6 of 6, " in first  # its half: three shards of two images
    assert second == ""


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "of-other-settings", "no-index"])
def test_what_is_not_whole_is_made_again(recipe, tmp_path, monkeypatch, damage):
    out = tmp_path / "cache"
    encode(recipe, out, shard_images=SHARD)
    before = content(out)
    shard = out / "moments-0000004-0000008.safetensors"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "changed":
        flip_a_bit(shard)
    elif damage == "of-other-settings":
        encode(recipe, tmp_path / "other", "fp32", SHARD)
        shutil.copy(tmp_path / "other" / shard.name, shard)
    (out / "index.json").unlink()
    encoded = []
    monkeypatch.setattr(
        "sit_atconv.latents.encode.write_shard",
        lambda path, *rest, write=sys.modules["sit_atconv.latents.encode"].write_shard: (
            encoded.append(path.name), write(path, *rest),
        ),
    )  # fmt: skip
    encode(recipe, out, shard_images=SHARD)
    assert content(out) == before
    assert encoded == ([] if damage == "no-index" else [shard.name])


def test_a_cache_says_in_which_precision_it_was_made_and_goes_on_in_that(recipe, oracle, tmp_path):
    recipe.train.precision = "tf32"  # of a training step alone
    assert encode(recipe, tmp_path / "plain", "fp32", SHARD)["precision"] == "fp32"
    recipe.latents.precision = "bf16"
    assert encode(recipe, tmp_path / "half", "fp32", SHARD)["precision"] == "bf16"
    plain, half = (LatentCache(str(tmp_path / name), True)[3, True][0] for name in ("plain", "half"))
    expected = oracle[3, True]
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    assert 1e-4 < (half - expected).abs().max() < 0.05 * expected.abs().max()
    # As an earlier version left it, which stated no precision and encoded in fp32.
    shutil.copytree(tmp_path / "plain", out := tmp_path / "earlier")
    for path in (out / "settings.json", out / "index.json"):
        stored = json.loads(path.read_text())
        del stored["precision"]
        path.write_text(json.dumps(stored, indent=1))
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match='precision: "fp32" -> "bf16"'):
        encode(recipe, out, "fp32", SHARD)
    recipe.latents.precision = None
    encode(recipe, out, "fp32", SHARD)
    assert torch.equal(LatentCache(str(out), True)[3, True][0], plain)


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--dtype", "fp32"], 'dtype: "fp16" -> "fp32"'),
        (["--shard-images", "5"], "shard_images: 4 -> 5"),
        (["data.image_size=20"], "image_size: 16 -> 20"),
        (["data.background=null"], 'data.background: "white" -> null'),
        (["latents.batch_size=2"], "batch_size: 3 -> 2"),
        (["latents.precision=bf16"], 'precision: "fp32" -> "bf16"'),
    ],
)
def test_other_settings_are_refused_by_name(recipe, recipe_path, tmp_path, fails, capsys, changed, says):
    out = tmp_path / "cache"
    encode(recipe, out, shard_images=SHARD)
    capsys.readouterr()
    before = content(out)
    error = fails(main, "encode", recipe_path, "--out", out, "--shard-images", SHARD, *changed)
    assert says in error
    assert "other settings" in error
    assert content(out) == before


def test_another_autoencoder_or_other_images_are_refused_and_moved_ones_are_not(recipe, vae_folder, pictures, tmp_path):
    out = tmp_path / "cache"
    encode(recipe, out, shard_images=SHARD)
    before = content(out)
    shutil.copytree(vae_folder, tmp_path / "moved")
    shutil.copytree(pictures, tmp_path / "elsewhere")
    recipe.latents.vae, recipe.data.root = str(tmp_path / "moved"), str(tmp_path / "elsewhere")
    next(out.glob("*.safetensors")).unlink()
    encode(recipe, out, shard_images=SHARD)
    assert content(out) == before
    (tmp_path / "elsewhere" / "dog" / "10.png").rename(tmp_path / "elsewhere" / "dog" / "11.png")
    with pytest.raises(InputError, match="images_sha256: "):
        encode(recipe, out, shard_images=SHARD)
    recipe.data.root = str(pictures)
    other = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    recipe.latents.vae = str(tmp_path / "other")
    with pytest.raises(InputError, match=r"codec\.sha256: "):
        encode(recipe, out, shard_images=SHARD)
    recipe.latents.vae = str(vae_folder)
    shutil.copytree(pictures, tmp_path / "fewer")
    (tmp_path / "fewer" / "dog" / "10.png").unlink()
    recipe.data.root = str(tmp_path / "fewer")
    with pytest.raises(InputError, match="num_images: 11 -> 10"):
        encode(recipe, out, shard_images=SHARD)
    assert content(out) == before


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match=r"'photo.png' and is no folder of latents"):
        encode(recipe, tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "settings.json").write_text("{")
    for text in ("{", "[1, 2]"):
        (tmp_path / "cache" / "settings.json").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            encode(recipe, tmp_path / "cache")
    with pytest.raises(InputError, match="cannot be written"):
        encode(recipe, tmp_path / "photo.png" / "cache")
    with pytest.raises(InputError, match=r"photo.png' is a file; give a new folder"):
        encode(recipe, tmp_path / "photo.png")


def test_an_unreadable_image_is_named_and_what_was_made_stays(recipe, pictures, tmp_path):
    encode(recipe, tmp_path / "whole", shard_images=SHARD)
    broken = pictures / "dog" / "06.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    try:
        with pytest.raises(InputError, match=r"dog/06\.png.*holds every image"):
            encode(recipe, tmp_path / "cache", shard_images=SHARD)
    finally:
        broken.write_bytes(good)
    assert [path.name for path in tmp_path.glob("cache/*.safetensors")] == ["moments-0000000-0000004.safetensors"]
    encode(recipe, tmp_path / "cache", shard_images=SHARD)
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


def test_an_error_in_one_process_of_two_is_one_line_and_ends_both(recipe_path, pictures, processes, tmp_path):
    broken = pictures / "dog" / "06.png"  # of the second shard, which is the second process's
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    out = tmp_path / "cache"
    try:
        arguments = ["encode", str(recipe_path), "--out", str(out), "--shard-images", str(SHARD)]
        codes, said = processes(tmp_path, arguments, {}, {})
    finally:
        broken.write_bytes(good)
    assert codes == [2, 2]
    assert [text.count("error: ") for text in said] == [1, 0]  # it is known to both, and the first one speaks
    assert "06.png" in said[0]
    assert not any("Traceback" in text for text in said)
    assert sorted(path.name[8:15] for path in out.glob("*.safetensors")) == ["0000000", "0000008"]


def test_a_full_disk_leaves_nothing_half_written(recipe, recipe_path, processes, tmp_path):
    out = tmp_path / "cache"
    encode(recipe, tmp_path / "whole", shard_images=SHARD)
    before = content(tmp_path / "whole")
    arguments = ["encode", str(recipe_path), "--out", str(out), "--shard-images", str(SHARD)]
    codes, (said,) = processes(tmp_path, arguments, {"largest_file": 2000})
    assert codes == [2]
    assert said.splitlines()[-1].startswith("error: ")
    assert "cannot be written: File too large" in said
    assert "Traceback" not in said
    assert [path.name for path in out.iterdir()] == ["settings.json"]
    codes, said = processes(tmp_path, arguments)
    assert codes == [0], said
    assert content(out) == before


def test_moments_that_a_dtype_does_not_hold_are_refused(recipe, vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        vae.quant_conv.bias[:4] += 1e5
    vae.save_pretrained(tmp_path / "vae")
    recipe.latents.vae = str(tmp_path / "vae")
    with pytest.raises(InputError, match="moments that fp16 does not hold"):
        encode(recipe, tmp_path / "half")
    encode(recipe, tmp_path / "single", "fp32")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["latents.codec=identity", "latents.vae=null"], "nothing to encode"),
        (["data.kind=latents", "data.image_size=null"], "encoded already"),
        (["data.kind=hf", "data.streaming=true"], "every image"),
        (["--dtype", "bf16"], "invalid choice: 'bf16'"),
        (["--shard-images", "0"], "--shard-images 0"),
        (["--turbo"], "unrecognized arguments: --turbo"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_anything_is_made(recipe_path, tmp_path, fails, options, says):
    assert says in fails(main, "encode", recipe_path, "--out", tmp_path / "cache", *options)
    assert not (tmp_path / "cache").exists()


def test_the_command_encodes_and_verifies(recipe_path, tmp_path, capsys):
    out = tmp_path / "cache"
    late = ["--shard-images", "4", "latents.batch_size=2"]
    main(["encode", str(recipe_path), "--out", str(out), "data.workers=0", *late])
    assert f"data.kind=latents data.root={out}" in capsys.readouterr().out
    with safe_open(out / "moments-0000008-0000011.safetensors", framework="pt") as file:
        assert file.get_tensor("moments").shape == (3, 2, 8, 4, 4)
    assert json.loads((out / "index.json").read_text())["batch_size"] == 2
    main(["verify", str(out)])
    assert "11 images, all 3 shards" in capsys.readouterr().out


def test_verify_names_every_problem(recipe, tmp_path, capsys):
    out = tmp_path / "cache"
    encode(recipe, out, shard_images=2)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    (out / names[0]).unlink()
    flip_a_bit(out / names[2])
    os.truncate(out / names[4], 100)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(out)])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    for line, name, says in zip(lines, names[::2], ["No such file", "SHA-256", "100 bytes"], strict=True):
        assert name in line
        assert says in line


def test_a_shard_makes_no_folder_anew(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write_shard(tmp_path / "gone" / "moments.safetensors", {}, torch.zeros(1, 2, 2, 1, 1), torch.zeros(1))
    assert not (tmp_path / "gone").exists()
