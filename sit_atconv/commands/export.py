"""Write a folder that diffusers loads as a pipeline, with the code it needs, where this package is not installed."""

import argparse

from sit_atconv.commands.push import lines_of_model
from sit_atconv.runtime.errors import add_force
from sit_atconv.runtime.files import check_checkpoint, check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="run, checkpoint, converted or model folder, or a pipeline's save_pretrained"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    add_force(parser)
    parser.add_argument("--vae", metavar="FOLDER", help="the autoencoder of a latent model that comes without")
    parser.add_argument("--variant", metavar="NAME", help="of the weights in the folder, such as fp16")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="of the weights, for the model card (default: unknown)"
    )
    parser.add_argument("--picture", metavar="PNG", help="for the model card (default: the run's newest preview)")


def run(args: argparse.Namespace) -> None:
    """Write the folder, and print its name."""
    check_out(args.out, force=args.force)
    check_checkpoint(args.source)

    from sit_atconv.hub.shown import shown_of
    from sit_atconv.pipelines.exporting import check_target, export, open_source

    check_target(args.out, args.license, args.force)  # before the weights are read
    opened = open_source(args.source, args.vae, args.variant)
    shown = shown_of(args.source, opened.files, lambda sets: lines_of_model(opened, sets), args.picture)
    export(opened, args.out, args.license, args.force, shown)
    print(args.out)
