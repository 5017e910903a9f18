"""Turn a public checkpoint into a folder of ours; --to public goes back."""

import argparse
from pathlib import Path

from sit_atconv.convert.kinds import FORMS, WEIGHTS
from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, add_force
from sit_atconv.runtime.files import check_checkpoint, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="public file or folder; with --to public, a model or run of ours")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="new folder; with --to public, .pt or .safetensors"
    )
    add_force(parser)
    parser.add_argument("--to", choices=("ours", "public"), default="ours", help="default: ours")
    parser.add_argument(
        "--form", choices=FORMS,
        help="sit, repa or dit (a DiT file looks like a SiT file); with --to public sit or repa (default: as it came)",
    )  # fmt: skip
    parser.add_argument("--variant", metavar="NAME", help="of the weights in a diffusers folder, such as fp16")
    reading = parser.add_argument_group("reading a public checkpoint")
    reading.add_argument("--weights", choices=WEIGHTS, help="default: ema where there is one")
    reading.add_argument(
        "--num-heads", **limits.CHANNELS.flag, metavar="N", help="where the width is none of the published ones"
    )
    reading.add_argument(
        "--sample-size", **limits.PIXELS.flag, nargs="+", metavar="SIZE",
        help="latent size, or height and width, where no position embedding gives it",
    )  # fmt: skip
    reading.add_argument("--path", choices=PATHS, help="default: as stored, else linear")
    reading.add_argument("--prediction", choices=PREDICTIONS, help="default: as stored, else velocity")
    reading.add_argument("--projectors", choices=("keep", "drop"), help="REPA's, beside the model (default: keep)")
    reading.add_argument(
        "--encoder-depth", **limits.BLOCKS.flag, metavar="N", help="blocks before them (default: as stored, else 8)"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was found and done."""
    told = {name: getattr(args, name) for name in ("weights", "num_heads", "path", "prediction", "encoder_depth")}
    told["sample_size"] = _size(args.sample_size)
    idle = [name for name, value in {**told, "projectors": args.projectors}.items() if value is not None]
    if args.to == "public" and idle:
        raise InputError(f"--{idle[0].replace('_', '-')} is for reading a public checkpoint; leave it out")
    check_out(args.out, force=args.force)
    if args.to == "public":
        check_checkpoint(args.source)
    elif not Path(args.source).exists():
        raise InputError(f"checkpoint {args.source!r}: no such file or folder")

    from sit_atconv.convert.writing import convert, export_public

    if args.to == "public":
        export_public(args.source, args.out, form=args.form, variant=args.variant, force=args.force)
        print(args.out)
        return
    keep = args.projectors != "drop"
    told |= {"form": args.form, "variant": args.variant, "keep_projectors": keep}
    record = convert(args.source, args.out, args.force, **told)
    print(f"{args.out}: {record['form']} checkpoint, {record['weights'] or 'its only'} weights")
    for line in [f"folded: {line}" for line in record["folded"]] + [f"note: {line}" for line in record["notes"]]:
        print(line)


def _size(sides: list[int] | None) -> int | tuple[int, int] | None:
    if sides is not None and len(sides) > 2:
        raise InputError(f"--sample-size {' '.join(map(str, sides))}: give one number, or height and width")
    return sides if sides is None else sides[0] if len(sides) == 1 else tuple(sides)
