"""Recipes: what is refused and how, what ships, and which schema owns what."""

import dataclasses
import inspect
import json
from dataclasses import dataclass

import pytest
import yaml
from conftest import ROOT, slowly

from sit_atconv import SiTTransformer2DModel, config, data
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import differences, load_recipe, make_recipe, to_dict
from sit_atconv.config.identity import mutable_keys
from sit_atconv.config.keys import comments_of, keys_text
from sit_atconv.models.sit import options_of as sit_options
from sit_atconv.runtime import comparison
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.fields import When, setting, settle
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.plan import dry_run

SHIPPED = sorted((ROOT / "experiments/recipes").glob("*.yaml"))
RECIPES = [path for path in SHIPPED if "attnet" not in path.stem]  # those: tests/classification/test_recipes.py
MINIMAL = {"run": {"out": "x"}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_start_with_their_launch_command(path):
    recipe = load_recipe(path, ["distill.teacher=x"] if "distill" in path.stem else [])
    assert recipe.run.out == f"runs/{path.stem}"
    script = "experiments/distill_swap.py" if "distill" in path.stem else "train_sit.py"
    assert path.read_text().startswith(f"# accelerate launch {script} experiments/recipes/{path.name}")


def test_the_promised_recipes_ship():
    mixers = ("", "_atconv", "_atconv_hybrid")
    published = {
        f"{images}_sit_{size}2{mixer}"
        for images in ("imagenet256", "imagenet512", "ffhq512")
        for size in ("s", "b", "l", "xl")
        for mixer in mixers
    }
    assert {path.stem for path in RECIPES} == published | {
        "digits_sit", "digits_sit_atconv", "digits_sit_hybrid", "digits_distill", "imagefolder_small",
        "fashion",
    }  # fmt: skip


PUBLISHED = [path.stem for path in RECIPES if "2" in path.stem]
PLANNED = ["imagenet256_sit_xl2_atconv_hybrid", "imagenet512_sit_b2_atconv", "ffhq512_sit_s2"]


@pytest.mark.parametrize("name", [*PLANNED, *slowly([name for name in PUBLISHED if name not in PLANNED])])
def test_published_recipes_can_be_planned(name):
    parameters = dry_run(load_recipe(ROOT / f"experiments/recipes/{name}.yaml")).split("parameters")[1].split()[0]
    assert float(parameters) > 20


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in PUBLISHED], ids=lambda path: path.stem)
def test_published_recipes_are_what_their_name_says(path):
    recipe = load_recipe(path)
    images, _, size, *mixer = path.stem.split("_")
    kind = {"": "SiT-{}/2", "atconv": "SiT-ATConv-{}/2", "atconv_hybrid": "SiT-ATConv-{}/2-Hybrid"}["_".join(mixer)]
    assert recipe.model.name == kind.format(size[:-1].upper())
    assert recipe.data.image_size == 8 * recipe.model.sample_size == int(images[-3:])
    # SPEC: AdamW 1e-4 constant, betas 0.9 and 0.999, no decay, batch 256, no warm-up, EMA 0.9999, dropout 0.1, flips
    train = recipe.train
    assert (train.lr, train.lr_schedule, train.betas, train.weight_decay) == (1e-4, "constant", [0.9, 0.999], 0)
    assert (train.batch_size, train.warmup_steps, train.max_steps, recipe.ema.decay) == (256, 0, 400_000, 0.9999)
    assert recipe.data.flip
    assert recipe.model.class_dropout_prob == (0.0 if images == "ffhq512" else None)  # the model's own is 0.1


def test_a_recipe_takes_over_its_base_and_wins_against_it(recipe_file, tmp_path):
    (tmp_path / "bases").mkdir()
    recipe_file().rename(tmp_path / "bases" / "first.yaml")
    (tmp_path / "bases" / "second.yaml").write_text("base: first.yaml\ntrain: {lr: 0.5, betas: [0.1, 0.2]}")
    (tmp_path / "recipe.yaml").write_text("base: bases/second.yaml\ntrain: {lr: 0.25}\nmodel: {depth: 3}")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["train.warmup_steps=7"])
    assert (recipe.train.lr, recipe.train.betas, recipe.train.batch_size) == (0.25, [0.1, 0.2], 8)
    assert (recipe.model.depth, recipe.model.hidden_size, recipe.train.warmup_steps) == (3, 16, 7)
    assert "base" not in to_dict(recipe)


def test_a_choice_that_is_laid_over_takes_what_went_with_the_other_one_along(recipe_file, tmp_path):
    recipe_file(
        latents={"codec": "vae", "vae": "somewhere", "precision": "bf16"}, ema={"decay": 0.5},
        data={"kind": "imagefolder", "root": "x", "image_size": 8},
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    pixels = load_recipe(path, ["latents.codec=identity"])
    assert (pixels.latents.vae, pixels.latents.precision) == (None, None)
    assert load_recipe(path, ["ema.kind=power"]).ema.decay is None
    (tmp_path / "over.yaml").write_text("base: recipe.yaml\nlatents: {codec: identity}")
    assert load_recipe(tmp_path / "over.yaml").latents.vae is None
    assert load_recipe(tmp_path / "over.yaml", ["latents.codec=vae", "latents.vae=y"]).latents.vae == "y"
    kept = load_recipe(path, ["latents.batch_size=3", "ema.kind=warmup"])
    assert (kept.latents.vae, kept.latents.precision, kept.ema.decay) == ("somewhere", "bf16", 0.5)
    for overrides, says in (  # what one and the same layer says
        (["latents.codec=identity", "latents.vae=y"], "latents.vae=y goes with latents.codec=vae"),
        (["ema.kind=power", "ema.decay=0.5"], "ema.decay=0.5 goes with ema.kind=constant or warmup"),
        (["data.split=test"], "data.split=test goes with data.kind=hf"),
    ):
        with pytest.raises(InputError, match=says):
            load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: nowhere.yaml", r"nowhere\.yaml': No such file"),
        ("base: recipe.yaml", r"recipe\.yaml': its base leads back to it"),
        ("base: [a.yaml, b.yaml]", "give a recipe's name, or the path of its file"),
        ("base: {", "cannot be read"),
    ],
)
def test_a_base_that_cannot_be_taken_is_named(tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


def test_overrides_are_typed_and_win(recipe_file):
    recipe = load_recipe(recipe_file(), ["train.lr=2e-4", "model.token_mixer=[atconv,attention]", "train.compile=true"])
    assert recipe.train.lr == 2e-4
    assert recipe.model.token_mixer == ["atconv", "attention"]
    assert recipe.train.compile is True
    assert recipe.train.batch_size == 8


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"trian": {}}, "did you mean 'train'"),
        ({"train": {"max_step": 3}}, "did you mean 'train.max_steps'"),
        ({"train": {"lr": "fast"}}, "train.lr: Value 'fast'"),
        ({"train": 3}, "train must be a mapping"),
        (
            {"train": {"batch_size": 0}},
            "train.batch_size=0: must be at least 1 and at most 1,000,000, since a step goes through",
        ),
        ({"train": {"precision": "fp8"}}, "train.precision='fp8': choose from ['bf16'"),
        ({"train": {"max_grad_norm": 0}}, "max_grad_norm"),
        ({"ema": {"decay": 1.0}}, "ema.decay=1.0"),
        ({"flow": {"path": "cosine"}}, "flow.path='cosine'"),
        ({"flow": {"prediction": "data"}}, "flow.prediction='data': choose from ['noise', 'score', 'velocity']"),
        ({"flow": {"loss_weight": "likelihood"}}, "flow.prediction=velocity has no weight"),
        ({"flow": {"prediction": "noise", "loss_weight": "likely"}}, "did you mean 'likelihood'"),
        ({"flow": {"time_sampling": "normal"}}, "did you mean 'logit-normal'"),
        ({"flow": {"time_mean": 0.0}}, "flow.time_mean=0.0 goes with flow.time_sampling=logit-normal"),
        ({"flow": {"time_std": 1.0}}, "flow.time_std=1.0 goes with"),
        ({"flow": {"time_sampling": "logit-normal", "time_mean": float("nan")}}, "flow.time_mean=nan"),
        (
            {"flow": {"time_sampling": "logit-normal", "time_std": 0.0}},
            "flow.time_std=0.0: must be at least 0.001 and at most 100",
        ),
        ({"flow": {"time_shift": 0.0}}, "flow.time_shift=0.0: must be at least 0.001"),
        (
            {"flow": {"time_sampling": "logit-normal", "time_std": float("inf")}},
            "flow.time_std=inf: must be",
        ),
        ({"flow": {"time_shift": float("inf")}}, "flow.time_shift=inf: must be at least 0.001"),
        ({"model": {"prediction": "noise"}}, "model.prediction"),
        ({"run": {"seed": -1}}, "run.seed=-1"),
        ({"run": {"trackers": ["tensorbord"]}}, "did you mean 'tensorboard'"),
        ({"data": {"kind": "imagefolder"}}, "data.root is missing"),
        (
            {"score": {"every": 1}, "data": {"kind": "zip", "root": "x", "image_size": 8}},
            "score.ref=digits scores digits",
        ),
        ({"data": {"kind": "hf", "root": "x", "image_size": 8, "shuffle_buffer": 3}}, "goes with data.streaming=true"),
        ({"data": {"split": "train"}}, "data.split=train goes with data.kind=hf"),
        (
            {"data": {"kind": "hf", "root": "x", "image_size": 8, "streaming": True, "sampling": "balanced"}},
            "balanced needs to reach every image",
        ),
        ({"data": {"kind": "tar"}}, "data.kind='tar'"),
        ({"ema": {"stds": [0.05]}}, "ema.stds=[0.05] goes with ema.kind=power; leave it out, or state ema.stds=null"),
        ({"ema": {"kind": "power", "decay": 0.5}}, "ema.decay=0.5 goes with ema.kind=constant or warmup"),
        ({"ema": {"kind": "power", "stds": [0.05, 0.3]}}, "ema.stds=[0.05, 0.3]"),
        ({"checkpoint": {"every": 4, "keep_every": 6}}, "checkpoint.keep_every=6: must be a multiple"),
        ({"checkpoint": {"on_full_disk": "cry"}}, "checkpoint.on_full_disk='cry'"),
        ({"train": {"max_skipped": 0}}, "train.max_skipped=0"),
        ({"repa": {"encoder": "x", "depth": 0}}, "repa.depth=0"),
        ({"repa": {"depth": 4}}, "repa.depth does nothing without repa.encoder"),
        ({"data": {"verify": False}}, "data.verify=False goes with data.kind=latents"),
        (
            {"data": {"kind": "zip", "root": 202401, "image_size": 8}},
            "data.root=202401: must be text; put it in quotes",
        ),
        ({"model": {"name": True}}, "model.name=True: must be text"),
        ({"data": {"root": "x"}}, "data.root=x"),
        (
            {"latents": {"codec": "vae"}},
            "latents.vae=null: a vae codec takes a vae; name it, or train on pixels",
        ),
        (
            {"latents": {"vae": "x"}},
            "latents.vae=x goes with latents.codec=vae; leave it out, or state latents.vae=null",
        ),
        ({"latents": {"precision": "bf16"}}, "latents.precision=bf16 goes with latents.codec=vae; leave it out, or"),
        ({"latents": {"codec": "vae", "vae": "x", "precision": "fp16"}}, "latents.precision='fp16'"),
        (
            {
                "latents": {"codec": "vae", "precision": "tf32"},
                "data": {"kind": "latents", "root": "x"},
                "preview": {"every": 0},
            },
            "latents.precision=tf32: data.kind=latents is encoded already, and nothing is in training; leave it out, "
            "or state latents.precision=null",
        ),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(stated, says):
    merged = {**MINIMAL, **stated}
    merged["run"] = {**MINIMAL["run"], **stated.get("run", {})}
    with pytest.raises(InputError) as error:
        make_recipe(merged)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["2024_01", "1e3", "0x10", "yes", "2024-01-01", "plain", "a=b", "12:30", "ä: #1", "'2_0'"]
)
def test_a_text_on_the_command_line_stays_as_it_was_written(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text("run: {out: x}\ndata: {kind: zip, image_size: 8, root: y}\n")
    overrides = [f"data.root={text}", f"run.out={text}", "train.lr=1e-3", "train.betas=[0.5,0.6]", "repa.encoder=null"]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    assert (recipe.data.root, recipe.run.out) == (text.strip("'"),) * 2
    assert (recipe.train.lr, recipe.train.betas, recipe.repa.encoder) == (1e-3, [0.5, 0.6], None)


@pytest.mark.parametrize("prediction", ["score", "noise"])
@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
def test_score_and_noise_prediction_take_every_weight(prediction, weight):
    flow = make_recipe({**MINIMAL, "flow": {"prediction": prediction, "loss_weight": weight}}).flow
    assert (flow.prediction, flow.loss_weight) == (prediction, weight)


def test_a_recipe_decides_where_t_is_drawn_and_how_previews_are():
    assert config.Flow(prediction="noise").times().interval == (1e-3, 1 - 1e-3)
    preview = {"sampler": "sde-heun", "steps": 7, "guidance_scale": 2.5, "diffusion": "linear", "diffusion_norm": 0.5}
    preview |= {"last_step": "tweedie", "last_step_size": 0.1}
    recipe = make_recipe({"run": {"out": "x", "seed": 3}, "preview": preview})
    model = SiTTransformer2DModel(sample_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1)
    expected = Sampling(
        "sde-heun", 7, 2.5, diffusion="linear", diffusion_norm=0.5, last_step="tweedie", last_step_size=0.1
    )
    assert recipe.preview.for_model(model).describe() == expected.describe()


def test_a_preview_takes_every_setting_of_sampling_and_a_stored_one_means_what_it_meant():
    stated = {"guidance_channels": "first3", "guidance_interval": [0.2, 0.6], "epsilon": 0.01, "num": 4}
    recipe = make_recipe({**MINIMAL, "preview": stated})
    assert stated.items() <= json.loads(json.dumps(to_dict(recipe)))["preview"].items()
    assert make_recipe(to_dict(recipe), stored=True) == recipe
    for wrong in ({"guidance_interval": [0.6, 0.2]}, {"guidance_interval": [0.2]}, {"guidance_scale": 1}):
        with pytest.raises(InputError, match="preview: guidance_"):
            make_recipe({**MINIMAL, "preview": stated | wrong})
    earlier = {"sampler": "sde-heun", "steps": 10**6, "diffusion": None, "last_step": None, "last_step_size": None}
    found = make_recipe({**MINIMAL, "preview": earlier}, stored=True).preview
    assert (found.steps, found.diffusion, found.last_step, found.last_step_size) == (10**6, "sigma", "mean", 0.04)
    with pytest.raises(InputError, match=r"preview\.steps=1000000: must be at least 1"):
        make_recipe({**MINIMAL, "preview": earlier})


def test_every_key_that_is_not_said_to_may_not_change():
    stated = to_dict(make_recipe(MINIMAL))
    may = {
        "run.out", "run.log_every", "run.trackers", "train.max_steps", "train.max_skipped", "data.root", "data.source",
        "data.verify", "data.workers", "data.worker_timeout", "data.max_bad_share", "data.max_pixels", "latents.vae",
        "latents.batch_size", "repa.encoder", "distill.teacher", "train.init", "train.gradient_accumulation_steps",
        "meanflow.teacher",
        "train.gradient_checkpointing", "train.compile", "ema.snapshot_every", "data.num_images", "model.sample_size",
        "model.in_channels", "model.num_classes",
    }  # fmt: skip
    before = to_dict(make_recipe(stated, stored=True))  # as `differences` reads what was stored
    for section, keys in stated.items():
        for key in keys:
            changed = {**stated, section: {**keys, key: "changed"}}
            name = f"{section}.{key}"
            free = name in may or section in ("checkpoint", "preview", "score", "validation")
            found = comparison.differences(before, changed, mutable_keys(changed))
            assert [text.partition(":")[0] for text in found] == ([] if free else [name])
        assert [text.partition(":")[0] for text in differences(stated, changed)] == ([] if free else [name])


def test_a_default_that_is_a_list_is_each_recipes_own():
    first = make_recipe({**MINIMAL, "ema": {"kind": "power"}}).ema
    first.stds.append(0.2)
    assert make_recipe({**MINIMAL, "ema": {"kind": "power"}}).ema.stds == [0.05, 0.1]


def test_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = make_recipe({"run": {"out": "~/x"}, "data": {"kind": "zip", "root": "~/y", "image_size": 8}})
    assert (recipe.run.out, recipe.data.root) == ("/somewhere/x", "/somewhere/y")


def test_run_out_is_required():
    with pytest.raises(InputError, match=r"run.out"):
        make_recipe({})


def test_model_section_has_exactly_the_models_options():
    options = set(inspect.signature(SiTTransformer2DModel.__init__).parameters) - {"self"}
    options -= {"path", "prediction", "use_meanflow", "trained_guidance"}  # what the sections flow and meanflow say
    assert {entry.name for entry in dataclasses.fields(config.Model)} == options | {"name"}


def test_every_data_kind_can_be_opened():
    assert set(data.DATASETS) == set(config.DATA_KINDS)


def test_only_steps_checkpoints_previews_and_logging_may_change():
    old = to_dict(make_recipe(MINIMAL))
    allowed = {
        "run": {"out": "y", "log_every": 1, "trackers": ["wandb"]},
        "train": {"max_steps": 1},
        "checkpoint": {"every": 1, "keep_last": 1},
        "preview": {"every": 1, "num": 1, "steps": 1, "sampler": "heun", "guidance_scale": 1.0},
    }
    assert differences(old, to_dict(make_recipe(allowed))) == []
    for section, key, value in (
        ("run", "seed", 1), ("data", "flip", True), ("model", "depth", 3), ("train", "lr", 1.0), ("ema", "decay", 0.5),
        ("train", "batch_size", 3), ("train", "precision", "bf16"), ("data", "sampling", "balanced"),
        ("flow", "path", "gvp"), ("flow", "prediction", "noise"), ("flow", "time_shift", 2.0),
    ):  # fmt: skip
        new = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
        changed = differences(old, to_dict(make_recipe(new)))
        assert len(changed) == 1
        assert changed[0].startswith(f"{section}.{key}: ")


@pytest.mark.parametrize("text", ["${", "${x}", "${oc.env:HOME}"])
def test_a_stored_recipe_is_not_worked_out_either(text):
    with pytest.raises(InputError, match="is not worked out"):
        make_recipe({**MINIMAL, "flow": {"prediction": text}}, stored=True)


@pytest.mark.parametrize("value", [[{"x": 1}, 0.9], [[0.9], 0.9]])
def test_a_list_in_a_recipe_is_of_single_values(value):
    with pytest.raises(InputError, match=r"train\.betas=.*: must be a list of single values"):
        make_recipe({**MINIMAL, "train": {**MINIMAL.get("train", {}), "betas": value}})


@dataclass
class Later:
    """A section as it might become: other defaults, and a setting that came after all that is stored."""

    kind: str = "constant"
    decay: float | None = setting(When("later.kind=constant", lambda later: later.kind == "constant"), 0.5)
    fade: float | None = setting(When("later.kind=constant", lambda later: later.kind == "constant"), 0.25)

    def __post_init__(self):
        settle("later", self)


def test_a_stored_null_means_what_it_meant_whatever_the_defaults_become():
    assert make_recipe({"decay": None}, Later, stored=True) == Later("constant", 0.9999, 0.25)
    assert make_recipe({"decay": None}, Later) == Later("constant", 0.5, 0.25)
    assert make_recipe({"decay": 0.1}, Later, stored=True) == Later("constant", 0.1, 0.25)
    assert make_recipe({"kind": "other"}, Later, stored=True) == Later("other", None, None)
    with pytest.raises(InputError, match=r"^later\.decay=0\.5 goes with later\.kind=constant; leave it out, or state"):
        make_recipe({"kind": "other", "decay": 0.5}, Later, stored=True)


FILES = {"kind": "zip", "root": "a.zip", "image_size": 8}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({**FILES, "channels": 2}, "data.channels=2: choose from [1, 3]"),
        ({**FILES, "channels": 4}, "data.channels=4: must be at least 1 and at most 3"),
        ({**FILES, "background": "whtie"}, "data.background='whtie' is no opaque colour; give a name, or #rrggbb"),
        ({**FILES, "background": "#ffffff80"}, "is no opaque colour"),
        ({**FILES, "background": ""}, "is no opaque colour"),
        ({"background": "black"}, "data.kind=digits has no transparency; leave it out, or state data.background=white"),
        ({**FILES, "kind": "npz", "background": "black"}, "data.kind=npz has no transparency"),
    ],
)
@pytest.mark.parametrize("schema", [config.Recipe, ClassifierRecipe])
def test_channels_and_backgrounds_that_there_are_not_are_refused(schema, data, says):
    if schema is ClassifierRecipe and "root" in data:
        data = {key: value for key, value in {**data, "val_root": data["root"]}.items() if key != "image_size"}
    with pytest.raises(InputError) as error:
        make_recipe({**MINIMAL, "data": data}, schema)
    assert says in str(error.value)


@pytest.mark.parametrize("background", ["white", "#123", "rgb(1, 2, 3)", None])
def test_a_background_is_a_colour_or_none(background):
    assert make_recipe({**MINIMAL, "data": {**FILES, "background": background}}).data.background == background


def test_runs_of_before_there_was_a_background_go_on_as_they_began():
    def stored(**data) -> dict:
        return to_dict(make_recipe({**MINIMAL, "data": {**FILES, **data}}))

    before = stored()
    del before["data"]["background"], before["data"]["channels"]
    assert make_recipe(before, stored=True).data.background is None  # transparency was left out
    assert make_recipe(before).data.background == "white"
    assert differences(before, stored(background=None)) == []
    for background in ("white", "black"):  # which would change what the rest of the run sees
        assert differences(before, stored(background=background)) == [f'data.background: null -> "{background}"']
    assert differences(stored(), stored(background=None)) == ['data.background: "white" -> null']
    assert differences(stored(background=None), stored()) == ['data.background: null -> "white"']
    assert differences(before, stored(channels=1, background=None)) == ["data.channels: null -> 1"]
    run = to_dict(make_recipe(MINIMAL, ClassifierRecipe))
    assert run["data"]["background"] is None  # digits have no transparency
    before = {**run, "data": {key: value for key, value in run["data"].items() if key != "background"}}
    assert differences(before, run, ClassifierRecipe) == []


def test_where_images_lie_is_for_losses_that_look_at_them():
    data = {"kind": "latents", "root": "x", "source": "y"}
    recipe = make_recipe({**MINIMAL, "data": data, "latents": {"codec": "vae"}, "preview": {"every": 0}})
    with pytest.raises(InputError, match=r"data\.source='y': only a loss that looks at images needs them; leave"):
        FlowObjective(recipe, Facts((4, 4, 4), 3, 12))


def test_a_stored_recipe_takes_no_other_models_name(tmp_path):
    sizes = {key: sit_options("SiT-S/2")[key] for key in ("depth", "hidden_size", "num_heads", "patch_size")}
    stored = {**MINIMAL, "model": {"name": "SiT-S/2", **sizes}}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(stored))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({**MINIMAL, "model": {"name": "SiT-S/2"}}))
    with pytest.raises(InputError, match=r"model\.name=SiT-B/2: the recipe states the sizes of SiT-S/2, as"):
        load_recipe(tmp_path / "stored.yaml", ["model.name=SiT-B/2"])
    assert load_recipe(tmp_path / "stored.yaml", ["model.name=SiT-S/2"]).model.name == "SiT-S/2"
    assert load_recipe(tmp_path / "plain.yaml", ["model.name=SiT-B/2"]).model.name == "SiT-B/2"


@pytest.mark.parametrize("schema", [config.Recipe, ClassifierRecipe])
def test_every_key_is_listed_once_and_marked_where_it_may_change(schema):
    keys = [
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(schema)
        for entry in dataclasses.fields(section.type)
    ]
    lines = {line.partition("=")[0]: line for line in keys_text(schema).splitlines() if line and line[0] != "#"}
    assert [*lines] == keys
    assert len(keys) == len([line for line in keys_text(schema).splitlines() if line and line[0] != "#"])
    if schema is config.Recipe:  # where train.max_steps and latents.precision may not change
        own = {"train": {"lr_schedule": "linear"}, "latents": {"codec": "vae", "vae": "x", "precision": "fp32"}}
        recipe = to_dict(make_recipe(MINIMAL | own))
        assert {key for key in keys if "(*)" in lines[key].partition("#")[0]} == mutable_keys(recipe)


def test_a_key_is_listed_with_its_default_its_comment_and_when_it_acts():
    lines = keys_text(config.Recipe).splitlines()
    for line in (
        "data.max_bad_share=0.001 (*)  # of the images: how many may turn out unreadable before training stops",
        "train.betas=[0.9, 0.999]  # of AdamW",
        "data.shuffle_buffer=null  # images in the buffer; only with data.streaming=true, where null means 10000",
        "preview.guidance_scale=null (*)  # guidance, classifier-free or by a guide; 1 is none (default: 1.5; 1 of a "
        "MeanFlow model)",
        "preview.guide=null (*)  # autoguidance: a weaker checkpoint of the same latents and classes, as "
        "`sit-atconv sample --guide` takes it",
        "data.sampling=natural  # every image once an epoch, or every class equally often; one of natural, balanced",
    ):
        assert line in lines


@dataclass
class Commented:
    plain: int = 0
    beside: int = 0  # at its end
    # two lines
    # above it
    above: int = 0
    within: int = dataclasses.field(  # where it begins
        default=0,
    )
    alone: int = 0


def test_a_comment_is_of_the_field_that_it_stands_at():
    assert comments_of(Commented) == {
        "plain": "", "beside": "at its end", "above": "two lines above it", "within": "where it begins", "alone": "",
    }  # fmt: skip
