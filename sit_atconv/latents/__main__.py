"""python -m sit_atconv.latents encode RECIPE --out DIR | verify DIR: make a cache of latents, or prove it whole."""

import sys
from pathlib import Path

from sit_atconv import limits
from sit_atconv.config import load_recipe
from sit_atconv.data.latent_cache import DTYPES, read_index, shard_problems
from sit_atconv.errors import ArgumentParser, add_force, command
from sit_atconv.latents.encode import encode
from sit_atconv.processes import is_main


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m sit_atconv.latents", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("encode", help="encode every image of a recipe, both flips; goes on where it was killed")
    make.add_argument("recipe", help="YAML file with the images and the vae, see experiments/recipes")
    make.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe, e.g. latents.vae=DIR")
    make.add_argument("--out", required=True, metavar="DIR", help="new folder, or that of a cache to go on with")
    add_force(make)
    make.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored moments (default: fp16)")
    make.add_argument(
        "--shard-images", **limits.SHARD_IMAGES.flag, default=4096, metavar="N", help="images per file (default: 4096)"
    )
    verify = commands.add_parser("verify", help="compare every shard with its SHA-256; exit status 2 if one differs")
    verify.add_argument("cache", metavar="DIR")
    args, late = parser.parse_known_args(argv)  # late: overrides after an option, which argparse does not place
    if late and (args.command == "verify" or any(text.startswith("-") for text in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if args.command == "verify":
        _verify(Path(args.cache))
        return
    recipe = load_recipe(args.recipe, [*args.overrides, *late])
    index = encode(recipe, Path(args.out), args.dtype, args.shard_images, args.force)
    if is_main():
        size = sum(shard["bytes"] for shard in index["shards"])
        print(f"{args.out}: {index['num_images']:,} images, {len(index['shards'])} shards, {size / 1e9:.2f} GB")
        print(f"train from it with: data.kind=latents data.root={args.out}")


def _verify(root: Path) -> None:
    index = read_index(root)
    problems = list(shard_problems(root, index, hashes=True))
    for problem in problems:
        print(f"error: {root}: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)
    print(f"{root}: {index['num_images']:,} images, all {len(index['shards'])} shards as its index has them")


if __name__ == "__main__":
    main()
