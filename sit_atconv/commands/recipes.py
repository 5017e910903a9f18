"""List the recipes that come with the package, and the sets of keys that are laid over a recipe; or print one, with its
comments, or every key that a recipe may have."""

import argparse

from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe
from sit_atconv.config.keys import keys_text
from sit_atconv.config.shipped import about, recipe_names, recipe_text, set_names
from sit_atconv.runtime.errors import InputError

SCHEMAS = {"train": Recipe, "classify": ClassifierRecipe}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe or the set to print (default: list all)")
    parser.add_argument(
        "--keys", nargs="?", const="train", choices=SCHEMAS,
        help="print every key of the recipes of this command (train), with its default and what it does",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the list, the recipe, or the keys."""
    if args.keys is not None:
        if args.name is not None:
            raise InputError(f"--keys prints the keys of all recipes; leave {args.name} out")
        print(keys_text(SCHEMAS[args.keys]))
        return
    if args.name is not None:
        print(recipe_text(args.name), end="")
        return
    names, sets = recipe_names(), set_names()
    width = max(map(len, [*names, *sets]))
    for name in names:
        print(f"{name:<{width}}  {about(name)}")
    print(f"\nlaid over a recipe, as in `sit-atconv train {names[0]} {sets[0]}`:")
    for name in sets:
        print(f"{name:<{width}}  {about(name)}")
