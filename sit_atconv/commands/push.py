"""Put a model, a swap's delta or a cache of latents on the Hugging Face hub, with a card that says what it is.

SRC is a run, checkpoint or model, which is exported on the way; a folder that `sit-atconv export` wrote; a delta of
swapped layers; or a cache of latents. The token is that of `hf auth login`, or HF_TOKEN in the environment.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sit_atconv.commands.options import pasted
from sit_atconv.runtime.errors import InputError, check_one_process
from sit_atconv.sampling.settings import Sampling, flag
from sit_atconv.scoring import DIGITS_TRAIN

HERE = "FOLDER"  # what the command lines of a card call the folder that it is pulled into


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="run, checkpoint, model, exported folder, delta or cache")
    parser.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME, or NAME for the token's owner")
    parser.add_argument("--private", action="store_true", help="a new repository is seen by its owner alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would go up, after all checks; ask nobody")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--license", metavar="ID", help="of weights or latents, for the card (default: unknown)")
    parser.add_argument("--picture", metavar="PNG", help="for the card (default: the run's newest preview)")
    parser.add_argument("--vae", metavar="FOLDER", help="the autoencoder of a latent model that comes without")
    parser.add_argument("--variant", metavar="NAME", help="of the weights in the folder, such as fp16")
    parser.add_argument("--base", metavar="NAME", help="OWNER/NAME of the model that a delta is for")


def run(args: argparse.Namespace) -> None:
    """Prove, send, and say where it is and how it is fetched."""
    check_one_process()
    if not Path(args.source).exists():
        raise InputError(f"SRC {args.source!r}: no such file or folder")

    from sit_atconv.hub.client import check_name, user

    repo = check_name(args.repo, f"--repo {args.repo!r}")
    if not args.dry_run:  # before the work; who may not write there is told by the hub
        owner = user(f"push to {repo!r}")
        repo = repo if "/" in repo else f"{owner}/{repo}"

    from sit_atconv.hub.kinds import Asked, contents_of
    from sit_atconv.hub.pushing import check, push

    stated = {name: getattr(args, name) for name in ("license", "vae", "variant", "picture", "base")}
    with tempfile.TemporaryDirectory() as scratch:
        contents = contents_of(
            args.source, Asked(repo, **stated, lines=lambda *told: _lines(repo, *told)), Path(scratch)
        )
        check(contents)
        if args.dry_run:
            for name, path in contents.files.items():
                print(f"{path.stat().st_size:>15,}  {name}")
            for name in contents.left_out:
                print(f"{'stays here':>15}  {name}")
            print(f"{contents.size / 1e6:,.2f} MB would go to the {contents.kind} {repo}; nothing was sent")
            return
        pushed = push(contents, repo, args.private, args.message)
    print(f"{pushed.page}, {len(contents.files):,} files at {pushed.commit}")
    print(pasted("pull", pushed.repo, "--out", HERE))


def _lines(repo: str, kind: str, told: Any) -> list[str]:
    """The command lines of a card. told: what the kind tells: of a model the opened pipeline, and the samples that were
    drawn from it and scored."""
    if kind == "cache":
        return [
            pasted("pull", f"datasets/{repo}", "--out", HERE),
            pasted("verify", HERE),
            pasted("train", "RECIPE", "data.kind=latents", f"data.root={HERE}", "latents.vae=VAE"),
        ]
    if kind == "delta":
        return [pasted("pull", repo, "--out", HERE)]
    return [pasted("pull", repo, "--out", HERE), *lines_of_model(*told)]


def lines_of_model(opened: Any, sets: Sequence[Any]) -> list[str]:
    """The command lines that draw from an opened pipeline, see `opening.Source`, and that draw and score those samples
    of it again."""
    classes = [str(label) for label in range(min(4, opened.pipeline.transformer.config.num_classes))]
    lines = [pasted("sample", "--ckpt", HERE, "--classes", *classes, "--out", "grid.png")]
    for each in sets:
        lines.append(pasted("generate", "--ckpt", HERE, *_drawn(each.manifest), "--out", each.name))
        reference = str((each.metrics.get("reference") or {}).get("name", "REF"))
        reference = "digits" if reference == DIGITS_TRAIN else Path(reference).name
        lines.append(pasted("score", each.name, "--ref", reference))
    return lines


def _drawn(manifest: dict[str, Any]) -> list[str]:
    """The options of `generate` that draw the samples of a manifest again, less places."""
    words = ["--num", str(manifest.get("num")), "--seed", str(manifest.get("seed", 0))]
    plain = Sampling()
    for name in [entry.name for entry in dataclasses.fields(Sampling)]:
        value = manifest.get(name)
        if name != "guide" and value is not None and value != getattr(plain, name):
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    for name, usual in (("scheduler", None), ("dtype", "fp32"), ("cache", None), ("format", "png")):
        if manifest.get(name) not in (None, usual):
            words += [f"--{name}", str(manifest[name])]
    if (block := manifest.get("block")) not in (None, 64, manifest.get("num")):
        words += ["--batch", str(block)]
    if (rule := manifest.get("labels_rule")) in ("random",):
        words += ["--labels", rule]
    return words
