"""The recipes that come with the package: found by name, printed whole, and where their runs lie."""

import pytest

from sit_atconv.config import load_recipe, to_dict
from sit_atconv.config.shipped import FOLDER, about, recipe_names, recipe_path, recipe_text
from sit_atconv.runtime.errors import InputError

STATED = {"digits_distill": ["distill.teacher=x"]}
OF_SIT = [name for name in recipe_names() if "attnet" not in name]


@pytest.mark.parametrize("name", OF_SIT)
def test_a_printed_recipe_is_one_wherever_it_is_saved(tmp_path, name):
    (tmp_path / f"{name}.yaml").write_text(recipe_text(name))
    saved, shipped = (load_recipe(each, STATED.get(name, [])) for each in (tmp_path / f"{name}.yaml", name))
    assert to_dict(saved) == to_dict(shipped)


def test_every_recipe_says_what_it_is_in_its_first_line():
    for path in FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# ")
    assert all(about(name).strip(" .") for name in recipe_names())
    assert not any(name.startswith("_") for name in recipe_names())


def test_a_word_is_a_name_whatever_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert recipe_path("digits") == FOLDER / "digits.yaml"
    assert load_recipe("digits").data.kind == "digits"
    for path in ("./digits", "a/digits", "digits.yaml", "/digits"):
        assert str(recipe_path(path)) != str(FOLDER / "digits.yaml")
    for name in ("dgits", "_imagenet_attnet", ""):
        with pytest.raises(InputError, match="see `sit-atconv recipes`, or give the path of a"):
            recipe_path(name)


@pytest.mark.parametrize(
    ("recipe", "overrides", "folder"),
    [
        ("digits", [], "runs/digits-attention"),
        ("digits", ["model.token_mixer=atconv"], "runs/digits-atconv"),
        ("digits", ["model.token_mixer=[attention,atconv,atconv,atconv,atconv]"], "runs/digits"),
        ("imagenet256", [], "runs/imagenet256-SiT-ATConv-XL-2"),
        ("imagenet256", ["model.name=SiT-XL/2"], "runs/imagenet256-SiT-XL-2"),
        ("imagenet256", ["model.name=SiT-ATConv-S/2-Hybrid"], "runs/imagenet256-SiT-ATConv-S-2-Hybrid"),
        ("digits_distill", ["distill.teacher=x"], "runs/digits_distill"),
        ("digits", ["run.out=elsewhere"], "elsewhere"),
    ],
)
def test_a_run_lies_by_recipe_and_model_unless_it_is_placed(recipe, overrides, folder):
    assert load_recipe(recipe, overrides).run.out == folder


def test_a_recipe_of_ones_own_names_its_run_and_its_base(tmp_path):
    (tmp_path / "sit_s2.yaml").write_text("base: imagenet256\nmodel: {name: SiT-S/2}\n")
    recipe = load_recipe(tmp_path / "sit_s2.yaml")
    assert (recipe.run.out, recipe.data.image_size) == ("runs/sit_s2", 256)
    (tmp_path / "mine.yaml").write_text("base: imagenet_256\n")
    with pytest.raises(InputError, match="base='imagenet_256': give a recipe's name, or the path of its file"):
        load_recipe(tmp_path / "mine.yaml")
