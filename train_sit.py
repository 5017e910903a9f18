"""accelerate launch train_sit.py RECIPE [key=value ...] [--dry-run | --resume]: train a SiT, or go on with a run."""

from eval.score import training_scorer
from sit_atconv.checkpoint import step_of
from sit_atconv.config import load_recipe
from sit_atconv.errors import ArgumentParser, command, speaks
from sit_atconv.plan import dry_run
from sit_atconv.training import train


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="train_sit.py", description=__doc__)
    parser.add_argument("recipe", help="YAML file, see experiments/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe, e.g. train.lr=2e-4")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print size, compute, memory and schedule, then stop")
    mode.add_argument("--resume", action="store_true", help="refuse to begin anew; a run goes on anyway")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        report = dry_run(recipe)
    else:
        # Scores are the first process's business alone, and so are its reference and weights.
        scorer = training_scorer(recipe.score.ref, recipe.score.weights) if recipe.score.every and speaks() else None
        last = train(recipe, must_resume=args.resume, scorer=scorer)
        report = f"trained to step {recipe.train.max_steps:,}; sample with: python sample.py --ckpt {last}"
        if step_of(last) < recipe.train.max_steps:
            report = f"stopped at step {step_of(last):,}, saved as {last}; the same command goes on from there"
    if speaks():
        print(report)


if __name__ == "__main__":
    main()
