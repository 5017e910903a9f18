"""List the recipes that come with the package, or print one, with its comments, or every key that a recipe may have."""

import argparse

from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import Recipe
from sit_atconv.config.keys import keys_text
from sit_atconv.config.shipped import about, recipe_names, recipe_text
from sit_atconv.runtime.errors import InputError

SCHEMAS = {"train": Recipe, "classify": ClassifierRecipe}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print (default: list all)")
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
    names = recipe_names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {about(name)}")
