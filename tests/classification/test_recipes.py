"""The shipped recipes of classifiers: the published settings of all seven AttNets."""

import pytest
import timm
import yaml
from conftest import ROOT
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sit_atconv import config
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.resolved import resolved
from sit_atconv.config import load_recipe
from sit_atconv.config.identity import mutable_keys
from sit_atconv.runtime.comparison import flat

FOLDER = ROOT / "experiments/recipes"
# weight decay, mixup, erasing, drop path, RandAugment
PUBLISHED = {
    "xxs": (0.015, 0.05, 0, 0.02, None),
    "xs": (0.025, 0.1, 0, 0.02, None),
    "s": (0.025, 0.3, 0, 0.1, "rand-m9-mstd0.5-inc1"),
    "t1": (0.025, 0.6, 0.15, 0.1, "rand-m9-mstd0.5-inc1"),
    "t2": (0.05, 0.8, 0.25, 0.2, "rand-m9-mstd0.5-inc1"),
    "t3": (0.05, 0.8, 0.25, 0.4, "rand-m9-mstd0.5-inc1"),
    "t4": (0.05, 0.8, 0.25, 0.5, "rand-m9-mstd0.5-inc1"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_settings(name):
    path = FOLDER / f"imagenet_attnet_{name}.yaml"
    recipe = load_recipe(path, (), ClassifierRecipe)
    train, augment = recipe.train, recipe.augment
    decay, mixup, erasing, drop_path, randaugment = PUBLISHED[name]
    assert recipe.model.name == f"attnet_{name}"
    assert timm.is_model(recipe.model.name)
    assert recipe.model.input_size == 224
    assert (train.weight_decay, augment.mixup, augment.erasing, recipe.model.drop_path_rate) == (
        decay, mixup, erasing, drop_path,
    )  # fmt: skip
    assert augment.auto_augment == randaugment
    assert (train.epochs, train.warmup_epochs, train.batch_size, train.lr) == (300, 5, 4096, 4e-3)
    assert (augment.smoothing, augment.cutmix, recipe.ema.decay) == (0.1, 1.0, 0.99995)


def test_every_recipe_starts_with_its_launch_command_and_no_other_ships():
    paths = sorted(FOLDER.glob("*attnet*.yaml"))
    assert {path.stem for path in paths} == {"digits_attnet", *(f"imagenet_attnet_{name}" for name in PUBLISHED)}
    for path in paths:
        recipe = load_recipe(path, (), ClassifierRecipe)
        assert recipe.run.out == f"runs/{path.stem}"
        assert path.read_text().startswith(f"# accelerate launch train_attnet.py experiments/recipes/{path.name}\n")


def test_every_key_that_is_not_said_to_may_not_change():
    stated = config.to_dict(resolved(config.make_recipe({"run": {"out": "x"}}, ClassifierRecipe)))
    may = {
        "run.out", "run.log_every", "run.trackers", "data.root", "data.val_root", "data.workers", "data.worker_timeout",
        "data.max_bad_share", "data.max_pixels", "train.max_skipped", "train.gradient_checkpointing", "train.compile",
    }  # fmt: skip
    for section, keys in stated.items():
        for key in keys:
            changed = {**stated, section: {**keys, key: "changed"}}
            free = f"{section}.{key}" in may or section in ("checkpoint", "eval")
            assert (f"{section}.{key}" in mutable_keys(changed, ClassifierRecipe)) == free
        found = config.differences(stated, changed, ClassifierRecipe, resolved)
        assert {".".join(text.partition(":")[0].split(".")[:2]) for text in found} == (
            set() if free else {f"{section}.{key}"}
        )


def nulls(recipe) -> set[str]:
    return {key for key, value in flat(config.to_dict(recipe)).items() if value is None}


# Nulls that are a choice of their own, or of what lies where.
CHOICES = {
    "data.root", "data.val_root", "data.channels", "data.held_out", "augment.auto_augment", "train.max_grad_norm",
    "checkpoint.keep_every", "model.options.layer_scale",
}  # fmt: skip
ON_HUB = {f"data.{name}" for name in ("split", "val_split", "subset", "revision", "image_key", "label_key")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*attnet*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_is_stored_with_every_value_and_read_as_the_same(path):
    stored = resolved(load_recipe(path, (), ClassifierRecipe))
    idle = {"augment.mix_prob", "augment.switch_prob"} if not stored.augment.mixes else set()
    idle |= {"augment.erasing_mode"} if not stored.augment.erasing else set()
    idle |= {"data.background"} if stored.data.kind == "digits" else set()
    assert nulls(stored) <= CHOICES | ON_HUB | idle
    as_dictionary = config.to_dict(stored)
    assert config.make_recipe(as_dictionary, ClassifierRecipe) == stored
    assert config.make_recipe(as_dictionary, ClassifierRecipe, stored=True) == resolved(stored) == stored


def test_mean_and_deviation_are_timms_or_those_of_grey_levels():
    def made(**data):
        return config.make_recipe({"run": {"out": "x"}, "data": data}, ClassifierRecipe).model

    colour = made(kind="imagefolder", root="x", val_root="y")
    assert (tuple(colour.mean), tuple(colour.std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (made().mean, made().std) == ([0.5], [0.5])


def test_what_earlier_versions_stored_means_what_it_meant():
    stored = yaml.safe_load((ROOT / "tests/earlier/classifier.yaml").read_text())
    recipe = resolved(config.make_recipe(stored, ClassifierRecipe, stored=True))
    assert nulls(recipe) == CHOICES - {"data.root"} | {"data.subset", "data.revision", "data.background"}
    found = flat(config.to_dict(recipe)) | {"model.options": recipe.model.options}
    for key, value in (
        ("data.split", "train"), ("data.val_split", "validation"), ("data.image_key", "image"),
        ("data.label_key", "label"), ("augment.erasing_mode", "pixel"), ("augment.mix_prob", 1.0),
        ("augment.switch_prob", 0.5), ("train.warmup_lr", 1e-6), ("model.drop_rate", 0.0),
        ("model.drop_path_rate", 0.0), ("model.mean", [0.485, 0.456, 0.406]), ("model.std", [0.229, 0.224, 0.225]),
        (
            "model.options",
            {
                "depths": [2, 2, 4, 2], "dims": [32, 64, 128, 240], "mlp_ratios": [8, 8, 4, 4], "glu_norm": False,
                "layer_scale": None, "stem_strides": [2, 2], "pos_embed": False, "kernel_size": 3, "pool": "raster",
                "routing": "adaptive", "inhibition": "learned", "global_pool": "avg",
            },
        ),
    ):  # fmt: skip
        assert (key, found[key]) == (key, value)
    assert config.differences(stored, config.to_dict(recipe), ClassifierRecipe, resolved) == []


def test_a_model_of_timm_keeps_its_own_drop_rates():
    recipe = config.make_recipe({"run": {"out": "x"}, "model": {"name": "resnet18"}}, ClassifierRecipe)
    assert resolved(recipe) == recipe
    assert (recipe.model.drop_rate, recipe.model.options) == (None, {})
