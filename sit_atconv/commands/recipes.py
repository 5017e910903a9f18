"""List the recipes that come with the package, or print one, with its comments."""

import argparse

from sit_atconv.config.shipped import about, recipe_names, recipe_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print (default: list all)")


def run(args: argparse.Namespace) -> None:
    """Print the list, or the recipe."""
    if args.name is not None:
        print(recipe_text(args.name), end="")
        return
    names = recipe_names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {about(name)}")
