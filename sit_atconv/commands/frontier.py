"""Draw, time and score models at every combination of a grid of settings; say which is the cheapest that is as good.

A grid is a YAML file: a list of blocks, each of which maps settings to a value or a list of values, such as
`- {sampler: [euler, heun], steps: [4, 8], guidance_scale: 1}`. The combinations of all blocks are the points. A block
with `models: [NAME, ...]` is for these alone.
"""

import argparse
import os
import re
from functools import partial
from pathlib import Path

from sit_atconv.bench.grid import KEYS, OTHERS, Stated, in_words, read_grid, words_of
from sit_atconv.commands.options import add_device, add_number, add_out, check_models, pasted, sampling_asked
from sit_atconv.runtime import limits
from sit_atconv.runtime.claims import check_place
from sit_atconv.runtime.errors import ArgumentParser, InputError, check_one_process, named

GOES_ON = True
NAME = re.compile(r"\w[\w.+-]*")  # of a folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ckpts", nargs="+", metavar="CKPT", help="run folder, checkpoint or model; NAME=CKPT says what it is called"
    )
    parser.add_argument("--grid", required=True, metavar="FILE", help=f"YAML; its settings are {', '.join(KEYS)}")
    parser.add_argument("--ref", required=True, help="what samples are scored against, as `score` takes it")
    num = limits.Range(2, limits.IMAGES.most, "one image makes no distribution")
    parser.add_argument("--num", **num.flag, required=True, help="images of each point and seed")
    parser.add_argument(
        "--seeds", nargs="+", **limits.SEED.flag, default=[0], help="each draws samples of its own (default: 0)"
    )
    add_number(parser, "--batch", limits.BATCH, 64, "images per network call", metavar="N")
    parser.add_argument("--prune", action="store_true", help="leave out more steps where some more did not help")
    parser.add_argument(
        "--metrics",
        metavar="LIST",
        help="as `score` takes them (default: Fréchet distance, and share recognised where the classes fit)",
    )
    parser.add_argument("--extractor", metavar="SPEC", help="as `score` takes it")
    parser.add_argument("--weights", metavar="FILE", help="Inception weights (default: torch's hub cache)")
    parser.add_argument("--vae", metavar="PATH", help="the autoencoder of models alone, or of one that moved")
    add_device(parser)
    add_out(parser, "new folder, or one that this command began", required=True, metavar="DIR")


def run(args: argparse.Namespace) -> None:
    """Draw, time and score what is missing; write frontier.json, frontier.md and frontier.png; print the table."""
    check_one_process()
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: the same one twice; give different ones")
    if not args.out:
        raise InputError("--out '': give the name of a new folder, or of one that the same command began")
    check_place(args.out, "a frontier", force=args.force)
    models = _models(args.ckpts)
    grid = read_grid(args.grid, models)
    if args.ref != "digits" and not Path(args.ref).exists():
        raise InputError(f'reference {args.ref!r}: no such file or folder; give one, or "digits"')
    points = [_parsed(args, name, models[name], stated) for name, own in grid.items() for stated in own]

    from sit_atconv.bench.frontier import Asked
    from sit_atconv.bench.frontier import run as measure
    from sit_atconv.commands.options import register_extractors

    register_extractors()
    args.command = pasted("frontier", *args.words)
    args.asked, seen = [], []
    for name, stated, seeds in points:
        drawn = name, *((each.sampling, *(vars(each).get(key) for key in OTHERS)) for each in seeds)
        if drawn not in seen:  # a block may state what is another's default
            seen.append(drawn)
            args.asked.append(Asked(name, stated, seeds, partial(_commands, args, seeds[0])))
    measure(args)


def _models(ckpts: list[str]) -> dict[str, str]:
    """The checkpoints by what they are called: NAME before the first =, where that is no path, else their folder."""
    found: dict[str, str] = {}
    for each in ckpts:
        name, _, ckpt = each.partition("=")
        if not ckpt or not NAME.fullmatch(name) or Path(each).is_dir():
            name, ckpt = "", each
        ckpt = os.path.expanduser(ckpt)
        name = name or Path(ckpt).resolve().name
        if not NAME.fullmatch(name) or name in found:
            rule = "two models are called so" if name in found else "no name of a folder"
            raise InputError(f"CKPT {each!r}: {name!r}: {rule}; say NAME=CKPT")
        found[name] = ckpt
    return found


def _parsed(
    args: argparse.Namespace, name: str, ckpt: str, stated: Stated
) -> tuple[str, Stated, list[argparse.Namespace]]:
    """The arguments of `generate` that draw a point of a model, for each seed; `words` are as they are written."""
    from sit_atconv.commands.generate import add_arguments as of_generate

    parser = ArgumentParser(prog="sit-atconv generate")
    of_generate(parser)
    seeds = []
    with named(f"{name}, {in_words(stated)}"):
        for seed in args.seeds:
            words = ["--ckpt", ckpt, *words_of(stated), "--num", str(args.num), "--batch", str(args.batch)]
            words += ["--seed", str(seed), "--format", "npz"]
            for option in ("vae", "device"):
                words += [f"--{option}", value] if (value := getattr(args, option)) is not None else []
            each = parser.parse_args([*words, "--out", args.out])
            each.words, each.sampling = words, sampling_asked(each)
            check_models(each)
            seeds.append(each)
    return name, stated, seeds


def _commands(args: argparse.Namespace, first: argparse.Namespace, out: str) -> list[str]:
    """The lines that draw the images of a point into a folder, and score them."""
    scored = ["--ref", args.ref]
    for option in ("metrics", "extractor", "weights", "device"):
        scored += [f"--{option}", value] if (value := getattr(args, option)) is not None else []
    return [pasted("generate", *first.words, "--out", out), pasted("score", out, *scored)]
