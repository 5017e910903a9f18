"""Reading a cache of latents: training from it is training from the images; what is damaged or another's is refused."""

import dataclasses
import json
import os
import shlex
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from sampled import sampled

from sit_atconv import config
from sit_atconv.__main__ import main as atconv
from sit_atconv.commands.encode import from_cache
from sit_atconv.config import Data, Latents
from sit_atconv.data import open_dataset
from sit_atconv.data.images import Unreadable
from sit_atconv.data.latent_cache import LatentCache
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.latents.__main__ import main as latents
from sit_atconv.latents.codecs import VaeCodec, draw_latents, open_codec
from sit_atconv.latents.encode import encode
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring.sources import open_source
from sit_atconv.training import train
from sit_atconv.training.facts import measured_facts
from sit_atconv.training.objectives.flow import build_model
from sit_atconv.training.plan import dry_run

SIZE, IMAGES, SHARD = 16, 11, 4
FIRST, SECOND = "moments-0000000-0000004.safetensors", "moments-0000004-0000008.safetensors"


@pytest.fixture
def cache(recipe, tmp_path, request):
    """A cache in fp32, or what the test asks for."""
    encode(recipe, tmp_path / "cache", getattr(request, "param", "fp32"), SHARD)
    return tmp_path / "cache"


def cached(recipe, cache, **data) -> config.Recipe:
    """The recipe, from the cache and without an autoencoder."""
    stated = config.to_dict(recipe)
    stated["data"] |= {"kind": "latents", "root": str(cache), "image_size": None, **data}
    stated["latents"]["vae"] = None
    return config.make_recipe(stated)


def losses(recipe, positions) -> torch.Tensor:
    """Flow losses of an untrained model at these positions of training."""
    dataset = open_dataset(recipe.data)
    codec = open_codec(recipe.latents, dataset)
    facts = measured_facts(dataset, codec, None)
    model = build_model(recipe, facts)
    torch.manual_seed(0)
    for parameter in model.parameters():  # it starts with a last layer of zeros, whose losses see half of everything
        torch.nn.init.normal_(parameter, std=0.1)
    samples = sampled(dataset, facts.latent_shape, 8, recipe.run.seed, posterior=codec.draws_posterior, flip=True)
    batch, bad = samples.fetch(positions)
    assert not bad
    latents = codec.encode(batch["image"], batch["posterior"])
    assert latents.dtype == torch.float32
    with torch.no_grad():
        return flow_loss(
            lambda x, t: model(x, t, batch["label"]).sample, PATHS["linear"](), latents, batch["noise"], batch["t"]
        )


@pytest.mark.parametrize(("cache", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)], indirect=["cache"])
def test_losses_from_a_cache_are_those_of_encoding_the_images(recipe, cache, tolerance):
    positions = range(3 * IMAGES)
    expected, found = losses(recipe, positions), losses(cached(recipe, cache), positions)
    assert expected.std() > 0.01  # losses that do not tell samples apart would prove nothing
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def test_training_from_a_cache_is_training_from_the_images_and_needs_no_autoencoder(recipe, vae_folder, tmp_path):
    encode(recipe, tmp_path / "cache", "fp32", SHARD)
    manifests, logs = [], []
    for name, stated in (("online", recipe), ("cached", cached(recipe, tmp_path / "cache"))):
        stated.run.out = str(tmp_path / name)
        last = train(stated)
        manifests.append(json.loads((last / "manifest.json").read_text()))
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert manifests[0]["codec"] == manifests[1]["codec"]
    assert manifests[0]["data"] == manifests[1]["data"]
    found, expected = ([row["loss"] for row in log] for log in logs)
    assert len(found) == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_cache_holds_out_the_images_that_their_folder_does_and_validates_as_it(recipe, tmp_path):
    """Of a cache of all images, made by a recipe that holds some out."""
    recipe.data.held_out, recipe.validation.every, recipe.train.max_steps = 0.4, 1, 2
    index = encode(recipe, tmp_path / "cache", "fp32", SHARD)
    assert (index["num_images"], index["data"].get("held_out")) == (IMAGES, None)
    rows = []
    for name, stated in (("online", recipe), ("cached", cached(recipe, tmp_path / "cache"))):
        stated.run.out = str(tmp_path / name)
        data = json.loads((train(stated) / "manifest.json").read_text())["data"]
        assert data == {"num_images": 7, "classes": ["cat", "dog"], "held_out": 4}
        rows.append([json.loads(line) for line in (tmp_path / name / "validation.jsonl").read_text().splitlines()])
    losses = [[row["loss"] for row in each] for each in rows]
    assert [row["num"] for row in rows[1]] == [4, 4]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # By the source of images, too, which are those of the training part.
    path = tmp_path / "cached.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(cached(recipe, tmp_path / "cache", source=recipe.data.root))))
    source, whole = open_source(path), open_dataset(recipe.data)
    kept = [2, 4, 7, 9]  # at 0.4 of five and six: the third and fifth, the third and fifth
    assert (source.n, source.data["held_out"]) == (7, 0.4)
    expected = [whole[index, False][0] for index in range(IMAGES) if index not in kept]
    assert torch.equal(next(source.batches(size=7)), torch.stack(expected))


def test_the_commands_encode_and_train_with_previews(recipe_path, tmp_path, capsys):
    out = tmp_path / "it's a cache; $HOME"
    latents(["encode", str(recipe_path), "latents.batch_size=4", "--out", str(out)])
    program, *words = shlex.split(capsys.readouterr().out.partition("train from it with: ")[2])
    assert program == "sit-atconv"
    atconv([*words, "preview.every=8", "preview.steps=2", "preview.num=4"])
    assert "trained to step 8" in capsys.readouterr().out
    assert len(list((tmp_path / "run").glob("**/*.png"))) == 1


def test_the_printed_command_leaves_out_what_a_cache_has_no_use_for(tmp_path):
    stated = {"kind": "hf", "root": "org/pictures", "image_size": 8, "image_key": "pixels", "split": "validation"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run": {"out": "run"}, "data": stated, "latents": {"codec": "vae", "vae": "here"}}))
    words = from_cache(config.load_recipe(path, ["latents.precision=bf16"]), "null")
    assert {"data.image_key=null", "data.split=null", "latents.precision=null"} <= {*words}
    data = config.load_recipe(path, words).data
    assert (data.kind, data.root, data.image_key, data.image_size) == ("latents", "null", None, 8)


def test_the_posterior_is_drawn_anew_at_every_visit_by_index(recipe, cache):
    dataset = open_dataset(cached(recipe, cache).data)
    codec = open_codec(Latents(codec="vae"), dataset)
    samples = sampled(dataset, (4, 4, 4), 8, posterior=True)
    places = [(samples.order.index(position), position) for position in range(2 * IMAGES)]
    first, second = (position for index, position in places if index == 7)
    batch, _ = samples.fetch([first, second])
    one, two = codec.encode(batch["image"], batch["posterior"])
    std = torch.exp(dataset[7, False][0][4:] / 2)
    assert torch.equal(batch["image"][0], batch["image"][1])
    torch.testing.assert_close(one - two, 0.5 * std * (batch["posterior"][0] - batch["posterior"][1]))
    assert (one - two).abs().max() > 0.1
    again, _ = samples.fetch([first])
    assert torch.equal(codec.encode(again["image"], again["posterior"])[0], one)


def test_moments_are_clamped_as_diffusers_clamps_them(vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        vae.quant_conv.bias[4:6] += 1e5
        vae.quant_conv.bias[6:] -= 1e5
    vae.save_pretrained(tmp_path)
    codec, images, posterior = VaeCodec(str(tmp_path), 2), torch.rand(3, 3, 16, 16), torch.randn(3, 4, 4, 4)
    moments = codec.moments(images)
    assert moments[:, 4:6].unique().tolist() == [20]
    assert moments[:, 6:].unique().tolist() == [-30]
    assert torch.equal(moments.half()[:, 4:].float(), moments[:, 4:])
    found = vae.encode(images).latent_dist
    torch.testing.assert_close(codec.encode(images, posterior), (found.mean + found.std * posterior - 0.1) * 0.5)


def test_latents_are_computed_in_fp32_from_whatever_is_stored():
    moments, posterior = torch.randn(2, 8, 4, 4).half(), torch.randn(2, 4, 4, 4)
    mean, log_variance = moments.double().chunk(2, dim=1)
    expected = (mean + (log_variance / 2).exp() * posterior - 0.1) * 0.5
    torch.testing.assert_close(draw_latents(moments, posterior, 0.5, 0.1), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache", ["fp16", "fp32"], indirect=True)
def test_rows_read_together_are_those_read_alone(cache):
    dataset = LatentCache(str(cache), verify=True)
    indices, flips = [10, 0, 3, 10, 4, 7], [True, False, True, False, False, True]
    moments, labels = dataset.read(indices, flips)
    assert labels.tolist() == [1, 0, 0, 1, 0, 1]
    for row, index, flip in zip(moments, indices, flips, strict=True):
        assert torch.equal(row, dataset[index, flip][0])
    assert not torch.equal(moments[0], moments[3])
    before = dataset[4, False][0].clone()
    moments.zero_()  # a copy: what a caller does to it stays out of the cache
    dataset[4, False][0].zero_()
    assert torch.equal(dataset[4, False][0], before)


def test_another_process_is_sent_the_way_to_the_cache_and_not_its_content(cache):
    dataset = LatentCache(str(cache), verify=True)
    expected = dataset[3, True][0]
    sent = bytes(ForkingPickler.dumps(dataset))
    assert torch.equal(ForkingPickler.loads(sent)[3, True][0], expected)
    assert b"moments-" in sent
    assert expected.numpy().tobytes() not in sent


def damage(cache, how: str):
    path = cache / SECOND
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 8)
    else:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(("how", "says"), [("missing", "No such file"), ("cut", "bytes"), ("changed", "SHA-256")])
def test_a_damaged_shard_is_named_with_the_remedy(cache, how, says):
    damage(cache, how)
    with pytest.raises(InputError, match=rf"{SECOND}.*{says}.*sit-atconv encode"):
        LatentCache(str(cache), verify=True)
    if how == "changed":
        assert len(LatentCache(str(cache), verify=False)) == IMAGES  # which is what verify=False leaves out
    else:
        with pytest.raises(InputError, match=SECOND):
            LatentCache(str(cache), verify=False)


def test_several_damaged_shards_are_counted(cache):
    damage(cache, "missing")
    (cache / FIRST).unlink()
    with pytest.raises(InputError, match=rf"{FIRST}.*and 1 more"):
        LatentCache(str(cache), verify=True)


def test_an_unfinished_or_damaged_index_is_refused(cache, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        LatentCache(str(tmp_path / "nowhere"), verify=True)
    path = cache / "index.json"
    index = json.loads(path.read_text())
    for changes, says in (
        ({"format_version": 2}, "format 2"),
        ({"shards": index["shards"][1:]}, "does not list the shards of 11 images"),
        ({"shards": [{**index["shards"][0], "file": "../elsewhere"}, *index["shards"][1:]]}, "does not list"),
        ({"num_images": "11"}, "damaged"),
        ({"dtype": "fp8"}, "fp8"),
    ):
        path.write_text(json.dumps({**index, **changes}))
        with pytest.raises(InputError, match=says):
            LatentCache(str(cache), verify=True)
    for text in ("{", "[]", "3"):
        path.write_text(text)
        with pytest.raises(InputError):
            LatentCache(str(cache), verify=True)
    path.unlink()
    with pytest.raises(InputError, match=r"index\.json.*yet to be finished, give"):
        LatentCache(str(cache), verify=True)


def test_a_shard_that_goes_while_training_costs_its_images_and_the_cache_everything(cache):
    dataset = LatentCache(str(cache), verify=True)
    whole = dataset[0, False][0]
    (cache / SECOND).unlink()
    for index in range(4, 8):
        with pytest.raises(Unreadable, match=SECOND):
            dataset[index, False]
    batch, bad = sampled(dataset, (4, 4, 4), 8).fetch(range(IMAGES))
    assert sorted(bad) == [4, 5, 6, 7]
    assert batch["image"].shape == (IMAGES, 8, 4, 4)
    shutil.rmtree(cache)
    assert torch.equal(dataset[0, False][0], whole)  # mapped already
    with pytest.raises(InputError, match="no longer there") as error:
        dataset[5, False]
    assert not isinstance(error.value, Unreadable)


def test_the_images_are_found_again(cache, pictures, tmp_path):
    images = open_dataset(Data(kind="imagefolder", root=str(pictures), image_size=SIZE))
    dataset = LatentCache(str(cache), verify=True)
    for index, flip in ((2, False), (9, True)):
        assert torch.equal(dataset.pixels(index, flip), images[index, flip][0])
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    assert torch.equal(LatentCache(str(cache), True, source=str(moved)).pixels(9, True), images[9, True][0])
    (moved / "dog" / "05.png").unlink()
    with pytest.raises(InputError, match="not those of the cache"):
        LatentCache(str(cache), True, source=str(moved)).pixels(0, False)
    with pytest.raises(InputError, match=r"data\.source says where"):
        LatentCache(str(cache), True, source=str(tmp_path / "nowhere")).pixels(0, False)


def test_another_image_size_is_refused(cache):
    dataset = LatentCache(str(cache), verify=True)
    assert dataset.image_size == SIZE
    dataset.check_stated(Data(kind="latents", root=str(cache), image_size=SIZE))
    with pytest.raises(InputError, match=r"data\.image_size=32: .* image_size 16"):
        dataset.check_stated(Data(kind="latents", root=str(cache), image_size=32))


def test_the_autoencoder_decodes_where_it_is_named_and_another_one_is_refused(cache, vae_folder, tmp_path):
    dataset, online = LatentCache(str(cache), verify=True), VaeCodec(str(vae_folder), 4)
    codec, latents = open_codec(Latents("vae", str(vae_folder)), dataset), torch.randn(2, 4, 4, 4)
    assert codec.describe() == online.describe()
    assert codec.latent_shape(3, SIZE) == online.latent_shape(3, SIZE)
    assert torch.equal(codec.decode(latents), online.decode(latents))
    blind = open_codec(Latents("vae"), dataset)
    assert blind.describe() == online.describe()
    with pytest.raises(InputError, match=r"latents\.vae is missing"):
        blind.decode(latents)
    other = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="not the autoencoder of the cache of latents: sha256"):
        open_codec(Latents("vae", str(tmp_path / "other")), dataset)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"latents": {"codec": "identity"}}, "state latents.codec=vae"),
        ({"preview": {"every": 5}}, "preview.every=5 draws images, and latents.vae is missing"),
        ({"score": {"every": 5}}, "score.every=5 draws images, and latents.vae is missing"),
    ],
)
def test_recipes_that_need_what_a_cache_does_not_have_are_refused(stated, says):
    recipe = {
        "run": {"out": "runs/x"}, "data": {"kind": "latents", "root": "cache"}, "latents": {"codec": "vae"},
        "preview": {"every": 0},
    }  # fmt: skip
    assert config.make_recipe(recipe).latents.vae is None
    assert config.make_recipe({**recipe, "latents": {"codec": "vae", "vae": "x"}, "preview": {"every": 5}})
    with pytest.raises(InputError) as error:
        config.make_recipe({**recipe, **stated})
    assert says in str(error.value)


def test_a_plan_takes_its_facts_from_the_cache_without_hashing_it(recipe, cache):
    damage(cache, "changed")
    report = dry_run(cached(recipe, cache))
    assert "4 x 4 x 4\n" in report
    assert "11 images in 2 classes: " in report
    with pytest.raises(InputError, match=r"data\.num_images: the recipe says 12"):
        dry_run(cached(recipe, cache, num_images=12))


def test_what_transparent_images_lie_on_belongs_to_a_cache(recipe, vae_folder, pictures, tmp_path):
    """One of a version that did not say so left their transparency out; it is read, and gone on with, as it began."""
    root = tmp_path / "clear"
    shutil.copytree(pictures, root)
    with Image.open(root / "cat" / "00.png") as image:
        image.putalpha(100)
        image.save(root / "cat" / "00.png")
    recipe.data.root, recipe.data.background = str(root), None
    encode(recipe, tmp_path / "before", "fp32", SHARD)
    stated = json.loads((tmp_path / "before" / "index.json").read_text())["data"]
    assert stated.keys() == {"kind", "root", "image_size"}  # the form that it had
    recipe.data.background = "black"
    with pytest.raises(InputError, match=r'data\.background: null -> "black"'):
        encode(recipe, tmp_path / "before", "fp32", SHARD)
    encode(recipe, tmp_path / "black", "fp32", SHARD)
    opaque = Data("imagefolder", str(root), SIZE, background=None)
    for name, background in (("before", None), ("black", "black")):
        dataset = open_dataset(Data("latents", str(tmp_path / name)))
        images = open_dataset(dataclasses.replace(opaque, background=background))
        assert torch.equal(dataset.pixels(0, True), images[0, True][0])
        with pytest.raises(InputError, match=rf"data\.background=red: .* with background {background}; leave it"):
            open_dataset(Data("latents", str(tmp_path / name), background="red"))
        with pytest.raises(InputError, match=r"data\.channels=1: .* images with channels 3; leave it out"):
            open_dataset(Data("latents", str(tmp_path / name), channels=1))
        assert open_dataset(Data("latents", str(tmp_path / name), channels=3, background=background)).channels == 3
        # It is scored as the images that it is of.
        (tmp_path / "cached.yaml").write_text(
            f"data: {{kind: latents, root: {tmp_path / name}}}\nlatents: {{codec: vae}}\npreview: {{every: 0}}\n"
        )
        with pytest.raises(InputError, match=r"say with data\.source=PLACE where its images lie"):
            open_source(tmp_path / "cached.yaml")
        source = open_source(tmp_path / "cached.yaml", overrides=[f"data.source={root}"])
        assert source.n == IMAGES
        wanted = torch.stack([images[index, False][0] for index in range(IMAGES)])
        assert torch.equal(torch.cat([*source.batches()]), wanted)
        assert source.describe()["data"].get("background") == source.background == background
    assert not torch.equal(LatentCache(str(tmp_path / "before"), True)[0, False][0], dataset[0, False][0])


def test_a_run_of_images_goes_on_from_a_cache_of_the_same_background(recipe, tmp_path):
    for background in ("white", None):
        recipe.data.background = background
        encode(recipe, tmp_path / f"{background}", "fp32", SHARD)
    recipe.data.background, recipe.train.max_steps = "white", 2
    train(recipe)
    with pytest.raises(InputError, match=r'data\.background: "white" -> null'):
        train(cached(recipe, tmp_path / "None"))
    recipe.train.max_steps = 3
    train(cached(recipe, tmp_path / "white"))
