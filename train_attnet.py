"""accelerate launch train_attnet.py RECIPE [key=value ...] [--dry-run | --resume | --force]: train AttNet, or go on."""

from pathlib import Path

from sit_atconv.checkpoint import read_manifest
from sit_atconv.classification import train
from sit_atconv.classification.evaluation import last_evaluation
from sit_atconv.classification.plan import dry_run, steps_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe
from sit_atconv.errors import command
from sit_atconv.processes import is_main
from sit_atconv.training.launch import training_arguments


@command
def main(argv: list[str] | None = None) -> None:
    args = training_arguments("train_attnet.py", __doc__, argv)
    recipe = load_recipe(args.recipe, args.overrides, ClassifierRecipe)
    if args.dry_run:
        plan, last = dry_run(recipe), None
    else:
        plan, last = None, train(recipe, must_resume=args.resume, force=args.force)
    if is_main():
        print(plan or report(last, recipe))


def report(last: Path, recipe: ClassifierRecipe) -> str:
    """The accuracy that the run ended with, and where it lies."""
    manifest, found = read_manifest(last, under="trainer.json"), last_evaluation(last.parent)
    step, total = manifest["step"], steps_of(recipe, recipe.train.epochs, manifest["data"]["num_images"])
    if step < total or found is None or found["step"] != step:  # it may have been stopped in a step that was evaluated
        return f"stopped at step {step:,}, saved as {last}; the same command goes on from there"
    ema, raw = (
        "not finite" if (top1 := found[f"{which}_top1"]) is None else f"{top1:.2f}%" for which in ("ema", "model")
    )
    name = f"local-dir:{last / 'ema'}"
    return (
        f"top-1 on {found['num']:,} held-out images: EMA {ema}, raw {raw}; "
        f"load with timm.create_model({name!r}, pretrained=True)"
    )


if __name__ == "__main__":
    main()
