"""From a classifier's recipe and its images to model, schedule and cost."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from sit_atconv import config
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.resolved import resolved
from sit_atconv.classification.samples import generators_kept, open_datasets, preprocessing, transforms
from sit_atconv.models.attnet import AttNet  # which registers the family
from sit_atconv.models.cost import count_forward_macs
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, check_choice, told
from sit_atconv.runtime.limits import check_kernel
from sit_atconv.training.folder import Found, foreseen, stored_run

# What models of timm raise over options and images that they do not take.
REFUSALS = AssertionError, RuntimeError, ValueError, LookupError, TypeError


@dataclass
class Facts:
    """What a recipe and its images come to."""

    channels: int
    class_names: tuple[str, ...]
    num_images: int
    held_out: int
    steps: int
    warmup_steps: int
    eval_every: int  # steps


def steps_of(recipe: ClassifierRecipe, epochs: float, num_images: int) -> int:
    """How many optimisation steps come closest to so many epochs, at least one."""
    return max(1, round(epochs * num_images / recipe.train.batch_size))


def facts_of(recipe: ClassifierRecipe, dataset: Dataset, held_out: Dataset) -> Facts:
    """What the recipe comes to with these images. Raises InputError where mean or std do not fit their channels."""
    train, channels, number = recipe.train, dataset.channels, len(dataset)
    for name, values in (("mean", recipe.model.mean), ("std", recipe.model.std)):
        if len(values) != channels:
            raise InputError(f"model.{name}={values}: the images have {channels} channels; one number for each")

    steps = steps_of(recipe, train.epochs, number)
    limits.STEPS.check(f"train.epochs={train.epochs:g} of {number:,} images, steps: ", steps)
    warmup = steps_of(recipe, train.warmup_epochs, number) if train.warmup_epochs else 0
    every = steps_of(recipe, recipe.eval.every_epochs, number)
    return Facts(channels, tuple(dataset.class_names), number, len(held_out), steps, warmup, every)


def build_classifier(recipe: ClassifierRecipe, facts: Facts, device: str = "cpu") -> nn.Module:
    """The recipe's model with new weights, drawn for `run.seed`. Raises InputError for a model that is none."""
    settings = recipe.model
    check_choice("model.name", settings.name, timm.list_models())
    options = {"num_classes": len(facts.class_names), "in_chans": facts.channels, **settings.options}
    for name in ("drop_rate", "drop_path_rate"):  # not every model of timm has them
        if (value := getattr(settings, name)) is not None:
            options[name] = value
    with (
        generators_kept(),
        torch.device(device),
        told(f"model.name={settings.name} refuses its options {options}", *REFUSALS),
    ):
        torch.default_generator.manual_seed(recipe.run.seed)
        model = timm.create_model(settings.name, **options)
    if isinstance(model, AttNet):
        side = settings.input_size // model.feature_info[-1]["reduction"]  # of the last stage
        check_kernel("model.options.kernel_size", settings.options.get("kernel_size"), (side, side))
    if recipe.train.gradient_checkpointing:
        cannot = f"train.gradient_checkpointing: {settings.name} cannot"
        with told(cannot, AssertionError, AttributeError, remedy="leave it out"):
            model.set_grad_checkpointing()
    return model


def cost_of(recipe: ClassifierRecipe, facts: Facts) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image. Raises InputError as `build_classifier`."""
    size = recipe.model.input_size
    model = build_classifier(recipe, facts, device="meta").eval().requires_grad_(False)
    with told(f"model.input_size={size}: {recipe.model.name} does not take such images", *REFUSALS):
        macs = count_forward_macs(model, torch.zeros(1, facts.channels, size, size, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), macs


def look_at(run: Path, described: dict[str, Any]) -> Found:
    """`folder.stored_run` for a classifier."""

    def changed(stored: dict[str, Any], last: Path | None) -> list[str]:
        return config.differences(stored, described["recipe"], ClassifierRecipe, resolved)

    return stored_run(run, described, changed)


def describe(recipe: ClassifierRecipe, facts: Facts) -> dict[str, Any]:
    """What a manifest says of a recipe with all that it runs with, and of its images."""
    data = {"num_images": facts.num_images, "classes": list(facts.class_names)}
    counted = {} if recipe.data.held_out is None else {"held_out": facts.held_out}
    return {"recipe": config.to_dict(recipe), "data": data | counted}


def dry_run(recipe: ClassifierRecipe) -> str:
    """The recipe's plan, see `plan`. Reads the list of images, and no image."""
    dataset, held_out = open_datasets(recipe.data)
    facts = facts_of(recipe, dataset, held_out)
    transforms(recipe, preprocessing(recipe.model, facts.channels))
    parameters, macs = cost_of(recipe, facts)
    look = partial(look_at, described=describe(resolved(recipe), facts))
    return plan(recipe, facts, parameters, macs, foreseen(recipe.run.out, look, facts.steps))


def plan(recipe: ClassifierRecipe, facts: Facts, parameters: int, macs: int, run: str) -> str:
    """What a recipe comes to, in lines: model, data, schedule, averages; parameters and macs: as `cost_of`; run: what
    happens at `run.out`."""
    settings, size = recipe.train, recipe.model.input_size
    flops = 6 * macs * facts.steps * settings.batch_size
    rows = {
        "model": f"{recipe.model.name}, {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3g} GMACs at {size} px",
        "data": f"{facts.num_images:,} images of {len(facts.class_names)} classes, {facts.held_out:,} held out",
        "schedule": f"{facts.steps:,} steps of {settings.batch_size:,} = {settings.epochs:g} epochs; lr "
        f"{settings.lr:g}, {facts.warmup_steps:,} steps of warm-up, cosine to {settings.min_lr:g}",
        "averages": f"EMA, decay {recipe.ema.decay}{' with warm-up' if recipe.ema.warmup else ''}",
        "compute": f"{flops:.3g} FLOP, and the evaluation every {facts.eval_every:,} steps",
        "memory": f"weights, gradients, AdamW and EMA {5 * 4 * parameters / 1e9:.2f} GB, and the activations",
        "run": run,
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items())
