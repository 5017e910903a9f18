"""The shipped recipes of classifiers: the published settings of all seven AttNets."""

import pytest
import timm
from conftest import ROOT

from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe

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
