"""Ranges of numbers: every key and every flag has one with a reason, and both ends hold."""

import argparse
import dataclasses
import math
import re

import pytest
from conftest import ROOT

import sample
import train_attnet
import train_sit
from eval.__main__ import main as evaluate
from experiments import ablation, distill_swap, error_bars, finetune, schedulers, table
from experiments.bench import attnet, cache, loop, op, swap
from experiments.drill.__main__ import main as drill
from experiments.principles import main as principles
from sampling.__main__ import main as sampling
from sit_atconv import posthoc
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe, differences, load_recipe, make_recipe, to_dict
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.latents.__main__ import main as latents
from sit_atconv.pipelines.export import main as export
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training.plan import dry_run

SCHEMAS = {"sit": Recipe, "classifier": ClassifierRecipe}
COMMANDS = [
    train_sit.main, train_attnet.main, distill_swap.main, sample.main, sampling, evaluate, convert, export, latents,
    posthoc.main, table.main, ablation.main, error_bars.main, schedulers.main, principles, drill, attnet.main,
    cache.main, finetune.main, loop.main, op.main, swap.main,
]  # fmt: skip


def keys(schema, prefix=""):
    """(name, field) of every key of a recipe."""
    for entry in dataclasses.fields(schema):
        if dataclasses.is_dataclass(entry.type):
            yield from keys(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


def stated(schema, **given):
    """A recipe's dictionaries by its defaults, and what is given over them."""
    found = to_dict(make_recipe({"run": {"out": "x"}}, schema))
    for key, value in given.items():
        section, _, name = key.partition("__")
        found[section][name] = value
    return found


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_number_of_a_recipe_has_a_range_and_its_reason(schema):
    for name, entry in keys(schema):
        if re.search(r"\b(int|float)\b", getattr(entry.type, "__name__", "") + str(entry.type)):
            assert len(entry.metadata[limits.RANGE].why) > 10, name


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_numbers_beyond_either_end_are_refused_by_name_and_reason(schema):
    ranges = {name: entry.metadata[limits.RANGE] for name, entry in keys(schema) if limits.RANGE in entry.metadata}
    assert len(ranges) > 30
    for name, found in ranges.items():
        section, _, key = name.partition(".")
        values = stated(schema)
        most = values[section][found.most] if isinstance(found.most, str) else found.most
        values[section][key] = most if not found.under else math.nextafter(most, -math.inf)
        limits.check(schema, values)
        next_one = most + 1 if found.whole else math.nextafter(most, math.inf)
        beyond = [most if found.under else next_one, math.inf, math.nan, -math.inf, 10**400, -(10**400)]
        for value in [*beyond, found.least if found.over else found.least - 1]:
            values[section][key] = value if isinstance(values[section][key], int | float) else [value]
            with pytest.raises(InputError) as error:
                limits.check(schema, values)
            assert str(error.value).startswith(f"{name}=")
            assert found.why in str(error.value)
            assert len(str(error.value)) < 320


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.__module__}")
def test_every_number_of_a_command_line_has_a_range_and_its_reason(command, monkeypatch):
    parsers = []

    def seen(self, *arguments, **options):
        parsers.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", seen)
    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(KeyboardInterrupt):
        command()
    for parser in parsers:
        for action in parser._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
            if action.type in (int, float):
                assert len(action.within.why) > 10, action.option_strings
                action.within.check("", action.default)


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (sample.main, ["--num", "1000000000"], "--num 1000000000: must be at least 1 and at most 4,096, since"),
        (sample.main, ["--seed", 2**64], f"--seed {2**64}: must be at least 0"),
        (sample.main, ["--cfg", "1e30"], "--cfg 1e+30: must be at least -1,000 and at most 1,000, since"),
        (sample.main, ["--cfg-interval", "0", "nan"], "--cfg-interval 0.0 nan: must be at least 0 and at most 1"),
        (sample.main, ["--epsilon", "0.5"], "--epsilon 0.5: must be at least 1e-06 and under 0.5"),
        (sampling, ["speed", "--models", "x", "--sizes", "256", "1000000"], "--sizes 256 1000000: must be"),
        (sampling, ["likelihood", "--probes", "0"], "--probes 0: must be at least 1"),
        (posthoc.main, ["run", "--std", "0"], "--std 0.0: must be at least 1e-08 and under 0.288, since"),
        (convert, ["x", "--num-heads", "-2"], "--num-heads -2: must be at least 1"),
        (latents, ["encode", "r", "--shard-images", "1e9"], "invalid int value"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_by_value_and_reason(fails, main, arguments, says):
    assert says in fails(main, *arguments)


@pytest.mark.parametrize(
    ("schema", "given", "says"),
    [
        (Recipe, {"data__max_bad_share": 1.5}, "data.max_bad_share=1.5: must be at least 0 and at most 1"),
        (Recipe, {"train__lr": 0}, "train.lr=0.0: must be at least 1e-12"),
        (Recipe, {"train__max_grad_norm": 1e-300}, "train.max_grad_norm=1e-300: must be at least 1e-06"),
        (Recipe, {"flow__time_shift": 1e30}, "flow.time_shift=1e+30"),
        (Recipe, {"flow__time_sampling": "logit-normal", "flow__time_mean": 1e30}, "flow.time_mean=1e+30"),
        (Recipe, {"flow__time_sampling": "logit-normal", "flow__time_std": 1e30}, "flow.time_std=1e+30"),
        (Recipe, {"preview__num": 10**9}, "preview.num=1000000000: must be at least 1 and at most 4,096, since they"),
        (Recipe, {"model__sample_size": [8, 10**6]}, "model.sample_size=[8, 1000000]"),
        (Recipe, {"train__betas": [0.9, 1.0]}, "train.betas=[0.9, 1.0]: must be at least 0 and under 1"),
        (Recipe, {"checkpoint__every": 0, "checkpoint__keep_every": 4}, "checkpoint.every=0: must be at least 1"),
        (Recipe, {"run__seed": 2**64}, "must be a whole number of 64 bits"),
        (Recipe, {"data__flip": 2}, "data.flip=2: give true or false"),
        (ClassifierRecipe, {"train__gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps=0: must be"),
        (ClassifierRecipe, {"train__warmup_epochs": 300}, "at least 0 and under epochs=300"),
        (ClassifierRecipe, {"augment__scale": [0.5, 2.0]}, "augment.scale=[0.5, 2.0]: must be over 0 and at most 1"),
        (ClassifierRecipe, {"model__options": {"depths": [1, 10**6]}}, "model.options={'depths': [1, 1000000]}"),
        (ClassifierRecipe, {"model__std": [1e-300]}, "model.std=[1e-300]: must be at least 0.0001"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_its_reason(schema, given, says):
    with pytest.raises(InputError) as error:
        make_recipe(stated(schema, **given), schema)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_of_before_a_range_was_narrowed_is_still_read():
    old = stated(Recipe, train__lr=0.0, train__warmup_steps=10**6, preview__num=10**6, data__max_bad_share=2.0)
    assert make_recipe(old, stored=True).train.warmup_steps == 10**6
    new = to_dict(make_recipe(stated(Recipe)))
    assert differences(old, new) == ["train.lr: 0.0 -> 0.0001", "train.warmup_steps: 1000000 -> 0"]
    for given in ({"train__batch_size": 0}, {"train__lr": math.nan}, {"train__lr": math.inf}):
        with pytest.raises(InputError):
            make_recipe(stated(Recipe, **given), stored=True)


@pytest.mark.parametrize("text", ["run.seed=???", "run={seed: ???}", "train.betas=['???',0.9]", "distill=???"])
def test_a_value_that_is_missing_is_not_passed_over(recipe_file, text):
    with pytest.raises(InputError, match=r"\?\?\? stands for a value that is missing; state it"):
        load_recipe(recipe_file(run={"seed": 5}), [text])


def test_a_value_that_a_file_leaves_to_the_command_line_must_come_from_there(recipe_file):
    path = recipe_file(run={"seed": "???"})
    assert load_recipe(path, ["run.seed=7"]).run.seed == 7
    with pytest.raises(InputError, match=r"run\.seed=\?\?\?: \?\?\? stands for a value that is missing"):
        load_recipe(path)


@pytest.mark.parametrize(("kernel", "patch", "most"), [(5, 2, 4), (9, 1, 8), (5, 4, 3)])
def test_a_kernel_is_no_larger_than_the_grid(recipe_file, kernel, patch, most):
    grid = 8 // patch
    with pytest.raises(InputError, match=f"={kernel}: must be at most {most}, since the grid has {grid} x {grid} tok"):
        dry_run(load_recipe(recipe_file(model={"kernel_size": kernel, "patch_size": patch, "token_mixer": "atconv"})))
    dry_run(load_recipe(recipe_file(model={"kernel_size": 3, "patch_size": patch, "token_mixer": "atconv"})))


@pytest.mark.parametrize(
    ("overrides", "others", "remedy"),
    [
        (["latents.codec=identity", "latents.vae=x"], [], "latents.vae=null"),
        (["data.split=train"], [], "data.split=null"),
        (
            ["data.kind=digits"],
            ["data.image_size=null", "latents.codec=identity"],
            "data.root=null",
        ),
        (["flow.time_std=2"], [], "flow.time_std=null"),
        (["ema.kind=power", "ema.decay=0.9"], [], "ema.decay=null"),
        (["data.streaming=true"], [], "data.streaming=false"),
        (["flow.loss_weight=velocity"], [], "flow.loss_weight=none"),
        (["data.verify=false"], [], "data.verify=true"),
        (["data.source=x"], [], "data.source=null"),
    ],
)
def test_what_acts_on_nothing_can_be_left_out_on_a_command_line(overrides, others, remedy):
    path = ROOT / "experiments/recipes/imagenet256_sit_s2.yaml"
    with pytest.raises(InputError) as error:
        load_recipe(path, overrides)
    assert f"state {remedy}" in str(error.value)
    load_recipe(path, [*overrides, *others, remedy])


def test_sampling_has_the_ranges_of_its_flags():
    for given in ({"steps": 0}, {"guidance_scale": math.nan}, {"epsilon": 0.0}, {"guidance_interval": (0.0, 2.0)}):
        with pytest.raises(InputError, match=f"^{next(iter(given))}=.*must be at least"):
            Sampling(**given)
