"""What a run stores: every value that it runs with, and what those of earlier versions meant."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, assert_same_bits, run_recipe, slowly, weights

from sit_atconv import config
from sit_atconv.config import load_recipe, make_recipe, to_dict
from sit_atconv.models import sit
from sit_atconv.runtime.comparison import flat
from sit_atconv.runtime.errors import InputError
from sit_atconv.training import resolved as resolving
from sit_atconv.training.facts import Facts
from sit_atconv.training.resolved import FROM_FLOW, resolved

RECIPES = [path for path in sorted((ROOT / "experiments/recipes").glob("*.yaml")) if "attnet" not in path.stem]
EARLIER = ROOT / "tests/earlier"
FACTS = Facts((4, 8, 6), 3, 12)
# Nulls that are a choice of their own, or of what lies where.
CHOICES = {
    "train.max_grad_norm", "ema.snapshot_every", "repa.encoder", "distill.teacher", "distill.blockwise_lr",
    "checkpoint.keep_every", "score.weights", "score.extractor", "latents.vae", "model.name", "data.channels",
    "latents.precision", "train.init", "lora.rank", "lora.alpha", "lora.targets", "data.held_out", "validation.num",
    *(f"meanflow.{key}" for key in ("share", "power", "offset", "omega", "kappa", "tangent", "teacher")),
    # left to the model, or of the SDE samplers, see sampling.settings; they may change from start to start
    "preview.epsilon", "preview.guide", "preview.steps", "preview.guidance_scale", "preview.start",
    "preview.diffusion", "preview.diffusion_norm", "preview.last_step", "preview.last_step_size",
}  # fmt: skip
ON_HUB = {"data.split", "data.subset", "data.revision", "data.image_key", "data.label_key", "data.shuffle_buffer"}
UNIFORM, CONSTANT, POWER = {"flow.time_mean", "flow.time_std"}, {"ema.stds"}, {"ema.decay"}
OF_MODEL = {f"model.{name}" for name in sit.options_of(None)} - {f"model.{name}" for name in FROM_FLOW}


def nulls(recipe) -> set[str]:
    return {key for key, value in flat(to_dict(recipe)).items() if value is None}


SAID = [path for path in RECIPES if path.stem.endswith("2_atconv_hybrid") or "2" not in path.stem]


@pytest.mark.parametrize(
    "path", [*SAID, *slowly(path for path in RECIPES if path not in SAID)], ids=lambda path: path.stem
)
def test_a_shipped_recipe_is_stored_with_every_value_and_read_as_the_same(path):
    recipe = load_recipe(path, ["distill.teacher=x"] if "distill" in path.stem else [])
    facts = Facts(FACTS.latent_shape, recipe.model.num_classes or 3, recipe.data.num_images or 12)
    if recipe.model.sample_size is not None:
        facts = Facts((recipe.model.in_channels, *[recipe.model.sample_size] * 2), facts.num_classes, facts.num_images)
    stored = resolved(recipe, facts)
    idle = ON_HUB | UNIFORM | CONSTANT | {"data.source"}
    idle |= {"data.root", "data.image_size", "data.background"} if recipe.data.kind == "digits" else set()
    idle |= OF_MODEL if recipe.distill.teacher else set()
    assert nulls(stored) <= CHOICES | idle
    assert make_recipe(to_dict(stored)) == make_recipe(to_dict(stored), stored=True) == stored
    assert resolved(stored, facts) == stored


def test_what_null_stands_for_takes_its_place_where_it_acts():
    data = {"kind": "hf", "root": "x", "image_size": 8}
    stated = {"run": {"out": "x"}, "data": {**data, "streaming": True}, "ema": {"kind": "power"}}
    recipe = resolved(make_recipe({**stated, "flow": {"time_sampling": "logit-normal"}}), FACTS)
    assert nulls(recipe) == CHOICES | POWER | {"data.subset", "data.revision", "data.source"}
    found = flat(to_dict(recipe))
    for key, value in (
        ("data.split", "train"), ("data.image_key", "image"), ("data.label_key", "label"),
        ("data.shuffle_buffer", 10_000), ("data.num_images", 12), ("flow.time_mean", 0.0), ("flow.time_std", 1.0),
        ("ema.stds", [0.05, 0.1]), ("model.sample_size", [8, 6]), ("model.in_channels", 4), ("model.num_classes", 3),
        ("model.depth", 28), ("model.class_dropout_prob", 0.1), ("model.pool", "raster"), ("model.learn_sigma", True),
    ):  # fmt: skip
        assert (key, found[key]) == (key, value)
    other = make_recipe({"run": {"out": "x"}, "data": {**data, "label_key": "", "split": "held"}, "ema": {"decay": 0}})
    assert (other.data.label_key, other.data.split, other.data.shuffle_buffer) == ("", "held", None)
    assert (other.ema.decay, other.ema.stds, other.flow.time_mean) == (0, None, None)
    preset = resolved(make_recipe({"run": {"out": "x"}, "model": {"name": "SiT-ATConv-B/4", "depth": 2}})).model
    assert (preset.hidden_size, preset.patch_size, preset.token_mixer, preset.depth) == (768, 4, "atconv", 2)
    assert (preset.sample_size, preset.in_channels, preset.num_classes) == (None, None, None)


@pytest.mark.parametrize(
    ("train", "now", "before"), [("fp32", "fp32", "fp32"), ("tf32", "tf32", "tf32"), ("bf16", "tf32", "fp32")]
)
def test_the_precision_of_an_autoencoder_is_stored_where_training_encodes(train, now, before):
    """before: as an earlier version, which knew no such key, encoded in the step."""
    images = {"kind": "zip", "root": "x", "image_size": 8}
    stated = {"run": {"out": "x"}, "data": images, "latents": {"codec": "vae", "vae": "y"}}
    stated |= {"train": {"precision": train}, "model": {"name": "SiT-S/2"}, "preview": {"every": 0}}

    def changed(stored: dict, **sections) -> list[str]:
        return config.differences(stored, to_dict(resolved(make_recipe(stated | sections))), complete=resolved)

    stored = to_dict(resolved(make_recipe(stated)))
    assert stored["latents"]["precision"] == now
    assert changed(stored) == []
    own = {"codec": "vae", "vae": "y", "precision": "bf16"}
    assert changed(stored, latents=own) == [f'latents.precision: "{now}" -> "bf16"']
    # From the cache of its images, which is told by the rest of the recipe, nothing is encoded any more.
    cache = {"kind": "latents", "root": "x", "background": None}
    assert not [text for text in changed(stored, data=cache) if "latents." in text]
    assert to_dict(resolved(make_recipe(stated | {"data": cache})))["latents"]["precision"] is None

    del stored["latents"]["precision"]
    assert changed(stored) == ([] if now == before else [f'latents.precision: "{before}" -> "{now}"'])
    assert changed(stored, latents={**own, "precision": before}) == []


def test_a_model_is_built_alike_from_a_recipe_and_from_what_is_stored_of_it(recipe_file):
    from sit_atconv.training.objectives.flow import build_model

    recipe, facts = load_recipe(recipe_file(model={"class_dropout_prob": 0.2})), Facts((1, 8, 8), 10, 7)
    models = [build_model(each, facts) for each in (recipe, resolved(recipe, facts))]
    assert models[0].to_json_string() == models[1].to_json_string()
    for name, value in models[0].state_dict().items():
        assert value.equal(models[1].state_dict()[name])


def test_a_distilled_model_is_its_teachers_and_states_no_options():
    recipe = make_recipe({"run": {"out": "x"}, "distill": {"teacher": "y"}})
    stored = resolved(recipe, FACTS)
    assert nulls(stored) & OF_MODEL == OF_MODEL - {"model.sample_size", "model.in_channels", "model.num_classes"}
    assert make_recipe(to_dict(stored)) == stored


def test_what_earlier_versions_stored_means_what_it_meant():
    for name, expected in (
        ("digits", {"ema.decay": 0.9999, "ema.stds": None, "flow.time_mean": None, "data.split": None}),
        (
            "streamed",
            {
                "ema.decay": None, "ema.stds": [0.05, 0.1], "flow.time_mean": 0.0, "flow.time_std": 1.0,
                "data.split": "train", "data.image_key": "image", "data.label_key": "label",
                "data.shuffle_buffer": 10_000, "data.subset": None, "data.revision": None,
            },
        ),
    ):  # fmt: skip
        stored = yaml.safe_load((EARLIER / f"{name}.yaml").read_text())
        found = flat(to_dict(make_recipe(stored, stored=True)))
        assert {key: found[key] for key in expected} == expected
        own = {"data": stored["data"], "model": stored["model"], "ema": {"kind": stored["ema"]["kind"]}}
        fresh = make_recipe({"run": {"out": "z"}, "flow": {"time_sampling": stored["flow"]["time_sampling"]}, **own})
        found = config.differences(stored, to_dict(resolved(fresh, FACTS)), complete=resolved)
        assert found == (['data.background: null -> "white"'] if name == "streamed" else [])  # it left transparency out


def earlier(last: Path, stated: Path) -> None:
    """Have a run and its checkpoints say what an earlier version would have said."""
    stated = yaml.safe_load(stated.read_text())
    for file in (last.parent / "recipe.yaml", *last.parent.glob("step-*/manifest.json")):
        content = yaml.safe_load(file.read_text())
        recipe = content if file.suffix == ".yaml" else content["recipe"]
        recipe["model"] = {key: stated["model"].get(key) for key in recipe["model"]}
        recipe["ema"] |= {"decay": stated["ema"].get("decay"), "stds": stated["ema"].get("stds")}
        recipe["data"]["num_images"] = None
        file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))


@pytest.mark.parametrize("ema", [{"decay": None}, {"decay": None, "kind": "power"}])
def test_a_run_of_an_earlier_version_goes_on(recipe_file, tmp_path, ema):
    path = recipe_file(ema=ema)
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    earlier(run_recipe(path, "train.max_steps=4"), path)
    last = run_recipe(path)
    assert last.name == "step-0000008"
    assert_same_bits(whole, last)
    stored = json.loads((last / "manifest.json").read_text())["recipe"]
    assert stored == yaml.safe_load((last.parent / "recipe.yaml").read_text())
    assert stored["model"] | {"name": None} == stored["model"]
    assert nulls(make_recipe(stored)) <= CHOICES | ON_HUB | UNIFORM | CONSTANT | POWER | {
        "data.root", "data.image_size", "data.source", "data.background",
    }  # fmt: skip
    assert (stored["ema"]["decay"], stored["ema"]["stds"]) == ((None, [0.05, 0.1]) if "kind" in ema else (0.9999, None))


@pytest.mark.parametrize("stored", ["now", "by an earlier version"])
def test_a_default_that_changed_changes_no_run_without_a_word(recipe_file, monkeypatch, stored):
    """What the model was made with counts, also where the recipe left it to a default."""
    path = recipe_file()
    last = run_recipe(path, "train.max_steps=4")
    if stored != "now":
        earlier(last, path)
    before = weights(last)
    monkeypatch.setattr(resolving, "options_of", lambda name: sit.options_of(name) | {"class_dropout_prob": 0.3})
    with pytest.raises(InputError, match=r"another recipe \(model\.class_dropout_prob: 0\.1 -> 0\.3\)"):
        run_recipe(path)
    assert all(value.equal(weights(last)[name]) for name, value in before.items())
    assert run_recipe(path, "model.class_dropout_prob=0.1").name == "step-0000008"


def test_a_run_goes_on_by_the_recipe_that_it_stored(recipe_file, tmp_path):
    path = recipe_file(flow={"time_sampling": "logit-normal"})
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    run_recipe(path, "train.max_steps=4")
    assert_same_bits(whole, run_recipe(tmp_path / "run/recipe.yaml", "train.max_steps=8", "run.log_every=2"))
