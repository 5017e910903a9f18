"""Write the features of images, shard by shard; go on where the same command was stopped."""

import argparse

from sit_atconv.commands.options import add_extractor_arguments, is_alone, register_extractors
from sit_atconv.runtime import limits
from sit_atconv.runtime.claims import check_place
from sit_atconv.runtime.errors import add_force
from sit_atconv.scoring import FOLDER, REMEDY, SHARD
from sit_atconv.scoring.sources import check_there

GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="folder of images (with its manifest.json), npz with arr_0, or a recipe (.yaml)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder, or one to go on with")
    add_force(parser)
    parser.add_argument(
        "--shard", **limits.SHARD_IMAGES.flag, metavar="N", help=f"images per file (default: the folder's, or {SHARD})"
    )
    add_extractor_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Extract, and say what is there. Raises InputError for what cannot be extracted."""
    check_place(args.out, "features", FOLDER, REMEDY, args.force)
    if is_alone():
        check_there(args.source)

    from sit_atconv.runtime import processes
    from sit_atconv.scoring.extract import features_of, read_as
    from sit_atconv.scoring.extractor import load_extractor
    from sit_atconv.scoring.sources import open_source

    register_extractors()
    extractor = load_extractor(args.extractor, args.weights, args.device)
    source = open_source(args.source, args.allow_lossy, args.overrides)
    features = features_of(source, extractor, args.shard, args.batch, args.out, force=args.force)
    processes.leave()
    if processes.is_main():
        dimensions = ", ".join(f"{name} {dimension}" for name, dimension in features.streams.items())
        print(f"{args.out}: {features.n:,} images, {dimensions}, by {extractor.name}")
        for note in read_as(features.info["source"]):
            print(note)
