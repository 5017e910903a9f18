"""Score samples against a reference: numbers with error bars, and all that is needed to repeat them, as JSON."""

import argparse
import json
from pathlib import Path

from sit_atconv.commands.options import add_extractor_arguments, add_features_argument, is_alone, register_extractors
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import check_out, write_out
from sit_atconv.scoring import STREAMS
from sit_atconv.scoring.result import RESULT, bars_told, features_told
from sit_atconv.scoring.sources import check_root, check_there

GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="SRC", help="folder of samples, npz with arr_0, or folder of their features")
    parser.add_argument(
        "--ref", required=True,
        help="npz with mu and sigma (ADM's, or of build-ref), npz or folder of images, a recipe (.yaml) for what it "
        "trains on, folder of features, or digits for the real ones in their own classifier's features",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", metavar="LIST",
        help=f"of {', '.join(STREAMS)}, parted by commas; default: all that extractor and reference allow, but fdd",
    )  # fmt: skip
    add_extractor_arguments(parser, default=None)
    add_features_argument(parser)
    parser.add_argument("--dinov2", metavar="NAME", help="the ViT for fdd beside fid, as --extractor dinov2:NAME")
    parser.add_argument("--out", metavar="JSON", help="default: metrics.json in the folder, or STEM.metrics.json")
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Score, write the JSON, print the scores. Raises InputError for what cannot be scored; then nothing is written."""
    path = Path(args.samples)
    default = path / "metrics.json" if path.is_dir() else path.with_suffix(".metrics.json")
    out = Path(args.out) if args.out else default
    check_out(out, force=args.force, ours=RESULT)
    check_root(args.features)
    if is_alone():
        check_there(path)
        if args.ref != "digits" and not Path(args.ref).exists():
            raise InputError(f'reference {args.ref!r}: no such file or folder; give one, or "digits"')

    from sit_atconv.scoring.score import score, table

    register_extractors()
    scored = score(
        args.samples, args.ref, args.metrics, args.extractor, args.weights, args.dinov2, args.device, args.batch,
        args.allow_lossy, args.features, args.overrides,
    )  # fmt: skip
    if scored is None:
        return
    result, notes = scored
    write_out(out, json.dumps(result, indent=1, allow_nan=False), force=args.force, ours=RESULT)
    print(table(result["metrics"], result["error_bars"]["upper_bound"]))
    for warning in result["warnings"]:
        say(f"warning: {warning}")
    for note in (features_told(result["metrics"], result["extractors"]), *notes):
        if note is not None:
            print(note)
    print(bars_told(result["error_bars"]))
    print(f"written to {out}")
