"""accelerate launch train_sit.py RECIPE [key=value ...] [--dry-run | --resume | --force]: train a SiT, or go on."""

from collections.abc import Callable
from shlex import quote

from eval.score import training_scorer
from sit_atconv.checkpoint import step_of
from sit_atconv.config import Recipe, load_recipe
from sit_atconv.errors import command
from sit_atconv.processes import is_main
from sit_atconv.training import train
from sit_atconv.training.folder import check_place
from sit_atconv.training.launch import training_arguments
from sit_atconv.training.plan import dry_run


def run(prog: str, about: str, argv: list[str] | None, check: Callable[[Recipe], None] = lambda recipe: None) -> None:
    """The command line `prog` of training; check: raises InputError for a recipe that is not for it."""
    args = training_arguments(prog, about, argv)
    recipe = load_recipe(args.recipe, args.overrides)
    check(recipe)
    if args.dry_run:
        report = dry_run(recipe)
    else:
        check_place(recipe.run.out, args.force)
        # Scores are the first process's business alone, and so are its reference and weights.
        scorer = training_scorer(recipe.score.ref, recipe.score.weights) if recipe.score.every and is_main() else None
        last = train(recipe, must_resume=args.resume, scorer=scorer, force=args.force)
        report = f"trained to step {recipe.train.max_steps:,}; sample with: python sample.py --ckpt {quote(str(last))}"
        if step_of(last) < recipe.train.max_steps:
            report = f"stopped at step {step_of(last):,}, saved as {last}; the same command goes on from there"
    if is_main():
        print(report)


@command
def main(argv: list[str] | None = None) -> None:
    run("train_sit.py", __doc__, argv)


if __name__ == "__main__":
    main()
