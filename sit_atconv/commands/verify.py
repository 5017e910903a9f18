"""Check Inception's weights and this machine, with ADM's files the whole protocol; or a cache of latents."""

import argparse
import sys
from pathlib import Path

from sit_atconv.commands.options import add_features_argument
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring import BATCH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", nargs="?", metavar="CACHE", help="a cache of latents, whose shards have hashes")
    parser.add_argument("--weights", metavar="FILE", help="Inception weights of torch-fidelity")
    parser.add_argument("--adm", metavar="FOLDER", help="folder of ADM's samples and reference: score them too")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--batch", **limits.BATCH.flag, metavar="B", help=f"images at once (default: {BATCH})")
    add_features_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was found. Raises InputError, so exit status 2, for what is not as published, or as it was written."""
    if (args.cache is None) == (args.weights is None):
        raise InputError("give either CACHE, or --weights FILE")
    if args.cache is None:
        args.batch = args.batch or BATCH

        from sit_atconv.scoring.verify import run as verify

        verify(args)
        return
    for name in ("adm", "device", "batch", "features"):
        if (value := getattr(args, name)) is not None:
            raise InputError(f"--{name} {value} goes with --weights; leave it out")
    if not Path(args.cache).is_dir():
        raise InputError(f"cache {args.cache!r}: no such folder")
    _verify_cache(Path(args.cache))


def _verify_cache(root: Path) -> None:
    from sit_atconv.data.latent_cache import read_index, shard_problems

    index = read_index(root)
    problems = list(shard_problems(root, index, hashes=True))
    for problem in problems:
        print(f"error: {root}: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)
    print(f"{root}: {index['num_images']:,} images, all {len(index['shards'])} shards as its index has them")
