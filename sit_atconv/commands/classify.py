"""Train an AttNet classifier from a recipe, or go on with its run; under `accelerate launch` on several processes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.commands.options import add_recipe, add_training_mode, tell_plan
from sit_atconv.config import load_recipe

if TYPE_CHECKING:
    from sit_atconv.classification.recipe import ClassifierRecipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_training_mode(parser)


def run(args: argparse.Namespace) -> None:
    """Train, and say how accurate the run ended."""
    from sit_atconv.classification.recipe import ClassifierRecipe

    recipe = load_recipe(args.recipe, args.overrides, ClassifierRecipe)

    from sit_atconv.classification.loop import train
    from sit_atconv.classification.plan import dry_run
    from sit_atconv.runtime.processes import is_main

    if args.dry_run:
        plan, last = dry_run(recipe), None
    else:
        plan, last = None, train(recipe, must_resume=args.resume, force=args.force, announce=tell_plan)
    if is_main():
        print(plan or report(last, recipe))


def report(last: Path, recipe: "ClassifierRecipe") -> str:
    """The accuracy that the run ended with, and where it lies."""
    from sit_atconv.classification.evaluation import last_evaluation
    from sit_atconv.classification.plan import steps_of
    from sit_atconv.training.checkpoint import read_manifest

    manifest, found = read_manifest(last, under="trainer.json"), last_evaluation(last.parent)
    step, total = manifest["step"], steps_of(recipe, recipe.train.epochs, manifest["data"]["num_images"])
    if step < total or found is None or found["step"] != step:  # it may have been stopped in a step that was evaluated
        return f"stopped at step {step:,}, saved as {last}; the same command goes on from there"
    ema, raw = (
        "not finite" if (top1 := found[f"{which}_top1"]) is None else f"{top1:.2f}%" for which in ("ema", "model")
    )
    place = f"local-dir:{last / 'ema'}"
    code = f"import timm, sit_atconv.models.attnet; model = timm.create_model({place!r}, pretrained=True)"
    return f"top-1 on {found['num']:,} held-out images: EMA {ema}, raw {raw}; load it in Python by: {code}"
