"""Train a SiT from a recipe, or go on with its run; under `accelerate launch` on several processes.

The recipe is one of `sit-atconv recipes`, by its name, or a YAML file.
"""

import argparse

from sit_atconv.commands.options import add_recipe, add_training_mode, pasted, register_extractors, tell_plan
from sit_atconv.config import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_training_mode(parser)
    parser.set_defaults(check=lambda recipe: None)


def run(args: argparse.Namespace) -> None:
    """Train, and say where the run ended. args.check: raises InputError for a recipe that is not for this command."""
    recipe = load_recipe(args.recipe, args.overrides)
    args.check(recipe)

    from sit_atconv.runtime.processes import is_main

    if args.dry_run:
        from sit_atconv.training.plan import dry_run

        report = dry_run(recipe)
    else:
        from sit_atconv.training.checkpoint import step_of
        from sit_atconv.training.folder import check_place
        from sit_atconv.training.loop import train

        check_place(recipe.run.out, args.force)
        scorer = None
        if recipe.score.every and is_main():  # alone: the others need neither reference nor weights
            from sit_atconv.scoring.score import TrainingScorer

            register_extractors()
            scorer = TrainingScorer(recipe.score.ref, recipe.score.weights, recipe.score.extractor)
        last = train(recipe, must_resume=args.resume, scorer=scorer, force=args.force, announce=tell_plan)
        report = f"trained to step {recipe.train.max_steps:,}; sample with: {pasted('sample', '--ckpt', str(last))}"
        if step_of(last) < recipe.train.max_steps:
            report = f"stopped at step {step_of(last):,}, saved as {last}; the same command goes on from there"
    if is_main():
        print(report)
