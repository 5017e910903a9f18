"""Write a cache of latents: every image of a recipe through its autoencoder, both flips; go on where it was stopped."""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

from sit_atconv.commands.options import add_recipe, override, pasted
from sit_atconv.config import Recipe, load_recipe
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import add_force
from sit_atconv.runtime.fields import WHEN
from sit_atconv.runtime.precision import OF_CACHES

GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of a cache to go on with")
    add_force(parser)
    parser.add_argument("--dtype", choices=OF_CACHES, default="fp16", help="of the stored moments (default: fp16)")
    parser.add_argument(
        "--shard-images", **limits.SHARD_IMAGES.flag, default=4096, metavar="N", help="images per file (default: 4096)"
    )


def run(args: argparse.Namespace) -> None:
    """Encode, and say how to train from the cache."""
    recipe = load_recipe(args.recipe, args.overrides)

    from sit_atconv.latents.encode import encode
    from sit_atconv.runtime.processes import is_main

    index = encode(recipe, Path(args.out), args.dtype, args.shard_images, args.force)
    if is_main():
        size = sum(shard["bytes"] for shard in index["shards"])
        print(f"{args.out}: {index['num_images']:,} images, {len(index['shards'])} shards, {size / 1e9:.2f} GB")
        print(f"train from it with: {pasted('train', args.recipe, *args.overrides, *from_cache(recipe, args.out))}")


def from_cache(recipe: Recipe, cache: str) -> list[str]:
    """What is laid over the recipe of a cache's images to train from the cache; what a cache has no use for is null."""
    cached = SimpleNamespace(**vars(recipe.data) | {"kind": "latents"})
    idle = [
        f"data.{entry.name}=null"
        for entry in dataclasses.fields(recipe.data)
        if WHEN in entry.metadata
        and not entry.metadata[WHEN].holds(cached)
        and getattr(recipe.data, entry.name) not in (None, entry.default)
    ]
    idle += ["latents.precision=null"] if recipe.latents.precision is not None else []
    return ["data.kind=latents", override("data.root", cache), *idle]
