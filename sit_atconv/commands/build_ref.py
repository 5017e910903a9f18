"""Write the reference that samples are scored against: statistics of images, and features of some of them."""

import argparse
from pathlib import Path

from sit_atconv.commands.options import add_extractor_arguments, add_features_argument, is_alone, register_extractors
from sit_atconv.runtime.errors import add_force
from sit_atconv.runtime.files import check_out
from sit_atconv.scoring.sources import check_root, check_there

GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", metavar="IMAGES",
        help="folder or npz of images, a recipe (.yaml) for what it trains on, or a folder of features",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="REF", help="new npz file; one that is there is refused")
    add_force(parser)
    add_extractor_arguments(parser, default=None)
    add_features_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Write the reference. Raises InputError for what `build_reference` finds."""
    check_out(args.out, force=args.force)
    check_root(args.features)
    if is_alone():
        check_there(args.images)

    from sit_atconv.runtime.processes import is_main, leave
    from sit_atconv.scoring.extract import read_as
    from sit_atconv.scoring.extractor import load_extractor
    from sit_atconv.scoring.refs import build_reference, reference_spec

    register_extractors()
    spec = args.extractor or reference_spec(args.images, args.overrides)  # of images, Inception
    extractor = load_extractor(spec, args.weights, args.device)
    meta = build_reference(
        args.images, Path(args.out), extractor, args.batch, args.allow_lossy, args.features, args.force, args.overrides
    )
    leave()
    if is_main():
        print(f"{args.out}: statistics of {meta['n']:,} images in {extractor.name}'s features, {meta['kept']:,} kept")
        for note in read_as(meta["source"]):
            print(note)
