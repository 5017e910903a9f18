"""The recipes that come with the package: found by name, printed whole, and where their runs lie."""

import dataclasses

import pytest

from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe, load_recipe, to_dict
from sit_atconv.config.schema import Preview
from sit_atconv.config.shipped import FOLDER, SETS, about, recipe_names, recipe_path, recipe_text, set_names
from sit_atconv.runtime.errors import InputError

STATED = {"digits_distill": ["distill.teacher=x"]}
OF_SIT = [name for name in recipe_names() if "attnet" not in name]


@pytest.mark.parametrize("name", OF_SIT)
def test_a_printed_recipe_is_one_wherever_it_is_saved(tmp_path, name):
    (tmp_path / f"{name}.yaml").write_text(recipe_text(name))
    saved, shipped = (load_recipe(each, STATED.get(name, [])) for each in (tmp_path / f"{name}.yaml", name))
    assert to_dict(saved) == to_dict(shipped)


def test_every_recipe_says_what_it_is_in_its_first_line():
    for path in (*FOLDER.glob("*.yaml"), *SETS.glob("*.yaml")):
        assert path.read_text().startswith("# ")
    assert all(about(name).strip(" .") for name in (*recipe_names(), *set_names()))
    assert not {*recipe_names()} & {*set_names()}
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


@pytest.mark.parametrize("name", recipe_names())
def test_the_fast_set_goes_over_every_recipe(name):
    schema, stated = ClassifierRecipe if "attnet" in name else Recipe, STATED.get(name, [])
    if stated:
        with pytest.raises(InputError, match=r"train\.compile with distill\.teacher: .* or state train.compile=false"):
            load_recipe(name, [*stated, "fast"])
        stated = [*stated, "train.compile=false"]
    plain, fast = (load_recipe(name, [*over, *stated], schema) for over in ([], ["fast"]))
    assert (fast.train.precision, fast.train.compile) == ("bf16", not stated)
    fast.train.precision, fast.train.compile = plain.train.precision, plain.train.compile
    assert to_dict(fast) == to_dict(plain)


@pytest.mark.parametrize("name", OF_SIT)
def test_the_meanflow_set_goes_over_every_recipe_of_a_flow(name):
    """With one step, unguided, whatever the recipe draws of a flow; its times are those of its paper."""
    if name == "digits_distill":
        with pytest.raises(InputError, match=r"meanflow\.share=0\.25 with distill\.teacher: one objective at a time"):
            load_recipe(name, [*STATED.get(name, []), "meanflow"])
        return
    plain, made = (load_recipe(name, [*over, *STATED.get(name, [])]) for over in ([], ["meanflow"]))
    assert (made.preview.steps, made.preview.guidance_scale, made.meanflow.share) == (None, None, 0.25)
    assert (made.flow.time_sampling, made.flow.time_mean, made.flow.time_std) == ("logit-normal", 0.4, 1.0)
    same = dataclasses.replace(made, flow=plain.flow, meanflow=plain.meanflow, preview=plain.preview)
    assert to_dict(same) == to_dict(plain)


def test_the_meanflow_set_draws_one_step_whatever_the_recipe_draws_of_a_flow(tmp_path):
    of_flow = {
        "sde.yaml": "sampler: euler-maruyama, diffusion: linear, last_step_size: 0.1, epsilon: 0.01, steps: 9",
        "adams.yaml": "sampler: adams2, start: rk, grid: [0, 0.2, 1], guidance_channels: first3, guidance_every: 2",
        "guide.yaml": "sampler: heun, guide: x, guidance_scale: 3, guidance_interval: [0, 0.5]",
    }
    for name, settings in of_flow.items():
        (tmp_path / name).write_text(f"base: digits\npreview: {{{settings}, num: 4, time_shift: 2}}\n")
        preview = load_recipe(tmp_path / name, ["meanflow"]).preview
        assert preview == Preview(every=load_recipe("digits").preview.every, num=4, time_shift=2.0)


def test_of_sets_and_keys_the_later_one_wins():
    for over, found in (
        (["fast"], ("bf16", True)), (["train.precision=fp32", "fast"], ("bf16", True)),
        (["fast", "train.precision=fp32"], ("fp32", True)), ([], ("tf32", False)),
    ):  # fmt: skip
        train = load_recipe("imagenet256", over).train
        assert (train.precision, train.compile) == found
    with pytest.raises(InputError, match="override 'fsat' is not of the form key=value, and no set of keys, as fast"):
        load_recipe("imagenet256", ["fsat"])
    with pytest.raises(InputError, match="recipe='fast' is a set of keys, which is laid over a recipe"):
        load_recipe("fast")
