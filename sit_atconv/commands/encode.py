"""Write a cache of latents: every image of a recipe through its autoencoder, both flips; go on where it was stopped."""

import argparse
from pathlib import Path

from sit_atconv.commands.options import add_recipe
from sit_atconv.config import load_recipe
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import add_force
from sit_atconv.runtime.precision import OF_CACHES


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
        print(f"train from it with: data.kind=latents data.root={args.out}")
