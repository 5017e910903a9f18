"""Measure the paper's two principles, adaptive routing and lateral inhibition, in any model, layer by layer.

Besides those, how redundant kernels and channels are, and how far every layer sees.
"""

import argparse
import json
import shlex
from pathlib import Path

from sit_atconv.commands.options import add_number, add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.files import check_out, library_versions, made_here, write_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="CKPT_OR_MODEL", help="a run, a checkpoint, or a name of timm")
    parser.add_argument("--data", help="digits, a folder of images, or a recipe (default: that of the checkpoint)")
    parser.add_argument("--weights", help="safetensors for a name of timm (default: drawn at random)")
    parser.add_argument("--vae", help="a SiT's autoencoder, if not where it was (default: as the checkpoint says)")
    images = limits.Range(2, 100_000, "a spread needs two, and all of them are held in memory")
    times = limits.Range(1, 1_000, "every image passes the network at each")
    add_number(parser, "--num", images, 64, "images")
    add_number(parser, "--times", times, 5, "values of t, for a SiT")
    add_number(parser, "--seed", limits.SEED, 0, "of which images, noise and random weights")
    add_number(parser, "--batch", limits.BATCH, 8, "images at once")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    add_out(parser, "folder (default: runs/principles)", type=Path, default=Path("runs/principles"))


def run(args: argparse.Namespace) -> None:
    """Measure, write the numbers and the figures, print the tables."""
    from sit_atconv.bench.timing import commit, device_name
    from sit_atconv.principles import plots
    from sit_atconv.principles.layers import find_layers
    from sit_atconv.principles.report import measure, table
    from sit_atconv.principles.targets import load, show
    from sit_atconv.runtime.devices import numerics, resolve_device

    with numerics():
        device = resolve_device(args.device)
        ours = made_here("command", "commit", "targets")
        for name in ("principles.json", "principles.md", *plots.FIGURES):
            check_out(args.out / name, force=args.force, ours=ours)
        targets = [load(target, args.weights, args.seed) for target in args.targets]
        for target in targets:
            find_layers(target.model)  # before anything is measured: a model without any is refused here
        shown = [show(target, args.data, args.num, args.seed, args.vae) for target in targets]
        reports = [measure(target, args.times, args.batch, device) for target in shown]
        names = plots.distinct([report["target"] for report in reports])
        reports = [{**report, "target": name} for report, name in zip(reports, names, strict=True)]
        words = ["sit-atconv", "principles", *args.words]
        facts = {
            "command": shlex.join(words), "seed": args.seed, "batch": args.batch, "device": device_name(device),
            "commit": commit(), "versions": library_versions("timm", "matplotlib"), "targets": reports,
        }  # fmt: skip
        write_out(args.out / "principles.json", json.dumps(facts, allow_nan=False), force=args.force, ours=ours)
        text = "\n\n".join(f"## {report['target']}\n\n{table(report)}" for report in reports)
        write_out(args.out / "principles.md", f"# Routing and inhibition, layer by layer\n\n{text}\n", force=args.force)
        figures = plots.draw(reports, args.out, args.force)
        print(f"{text}\n\nwritten to {args.out}: principles.json, principles.md, {', '.join(figures)}")
