"""accelerate launch train_attnet.py RECIPE [key=value ...] [--dry-run | --resume | --force]: train AttNet, or go on."""

from pathlib import Path

from sit_atconv.checkpoint import MANIFEST
from sit_atconv.classification import train
from sit_atconv.classification.loop import dry_run, steps_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe
from sit_atconv.errors import InputError, command, speaks
from sit_atconv.reading import COUNT, Malformed, parse_json, read_json
from sit_atconv.training.launch import training_arguments

EVALUATION = {"step": COUNT, "num": COUNT, "ema_top1": (float, None), "model_top1": (float, None)}


@command
def main(argv: list[str] | None = None) -> None:
    args = training_arguments("train_attnet.py", __doc__, argv)
    recipe = load_recipe(args.recipe, args.overrides, ClassifierRecipe)
    if args.dry_run:
        plan, last = dry_run(recipe), None
    else:
        plan, last = None, train(recipe, must_resume=args.resume, force=args.force)
    if speaks():
        print(plan or report(last, recipe))


def report(last: Path, recipe: ClassifierRecipe) -> str:
    """The accuracy that the run ended with, and where it lies."""
    manifest, file = read_json(last / MANIFEST), last.parent / "evals.jsonl"
    step, total = manifest["step"], steps_of(recipe, recipe.train.epochs, manifest["data"]["num_images"])
    lines = file.read_text().splitlines()
    try:
        found = parse_json(lines[-1], "its last line", EVALUATION) if lines else {"step": None}
    except Malformed as error:
        raise InputError(f"{str(file)!r}: {error}; take that line away, and the same command evaluates anew") from None
    if step < total or found["step"] != step:  # it may have been stopped in a step that was evaluated
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
