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
    parser.add_argument(
        "--adm", metavar="FOLDER", help="ADM's samples and reference (see docs/scoring.md): score them too"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--batch", **limits.BATCH.flag, default=BATCH, metavar="B", help=f"images at once (default: {BATCH})"
    )
    add_features_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Print what was found. Raises InputError, so exit status 2, for what is not as published, or as it was written."""
    if (args.cache is None) == (args.weights is None):
        raise InputError("give either CACHE, or --weights FILE")
    if args.cache is None:
        _verify_protocol(args)
        return
    for name in ("adm", "device", "features"):
        if (value := getattr(args, name)) is not None:
            raise InputError(f"--{name} {value} goes with --weights; leave it out")
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


def _verify_protocol(args: argparse.Namespace) -> None:
    from sit_atconv.runtime.processes import is_main
    from sit_atconv.scoring.extractor import load_extractor
    from sit_atconv.scoring.score import score, table
    from sit_atconv.scoring.verify import (
        PUBLISHED,
        REFERENCE,
        SAMPLES,
        URL_ADM,
        check_published,
        check_weights,
        checksum,
        synthetic_images,
    )

    folder = Path(args.adm) if args.adm is not None else None
    for name in (SAMPLES, REFERENCE) if folder else ():
        if not (folder / name).is_file():
            raise InputError(f"--adm {args.adm!r}: {name} is not there; {URL_ADM} says where it is to be had")
    digest = check_weights(args.weights)
    extractor = load_extractor("inception", args.weights, args.device)
    streams = extractor(synthetic_images())
    if is_main():
        print(f"{'weights':<28} SHA-256 {digest}")
        for name, rows in streams.items():
            print(f"{name:<28} {checksum(rows)}")
    if folder is None:
        return
    scored = score(
        str(folder / SAMPLES), str(folder / REFERENCE), "fid,sfid,is,pr", weights=args.weights, device=args.device,
        batch=args.batch, root=args.features,
    )  # fmt: skip
    if scored is not None:
        metrics = scored[0]["metrics"]
        print(table(metrics))
        check_published(metrics)
        print("all as published: " + ", ".join(f"{name} {value}" for name, (value, _) in PUBLISHED.items()))
