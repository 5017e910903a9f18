"""Write samples by index, with a manifest that says how they were made."""

import argparse
import json
import math
import shutil
from pathlib import Path

from tqdm import tqdm

from sampling.options import Setup, add_sampling_options, setup
from sit_atconv.errors import InputError
from sit_atconv.files import library_versions
from sit_atconv.generation import generate, random_label
from sit_atconv.images import UINT8_RULE, to_pil


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling_options(parser)
    parser.add_argument("--num", type=int, required=True, help="number of images")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the images")
    parser.add_argument(
        "--labels", choices=("balanced", "random"), default="balanced",
        help="image i has class i mod classes, or one drawn from (seed, i) (default: balanced)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write `--out`/000000.png ... and manifest.json; the folder appears whole or not at all.

    Raises InputError for a folder that exists, and whatever `setup` finds.
    """
    out = Path(args.out)
    if args.num < 1:
        raise InputError(f"--num {args.num}: must be at least 1")
    if out.exists():
        raise InputError(f"--out {args.out}: exists already; choose a new folder")
    ready = setup(args)
    sampling, trained = ready.sampling, ready.trained
    classes = trained.model.config.num_classes
    block = min(args.batch, args.num)
    indices = range(math.ceil(args.num / block) * block)
    if args.labels == "balanced":
        labels = [index % classes for index in indices]
    else:
        labels = [random_label(sampling.seed, index, classes) for index in indices]

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        nfe = write_images(ready, labels, args.num, block, unfinished)
        write_manifest(unfinished, args, ready, labels[: args.num], block, nfe)
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    print(f"{args.num} images in {out}, NFE {nfe:g}")


def write_images(ready: Setup, labels: list[int], num: int, block: int, folder: Path) -> float:
    """Write image i < num, of class labels[i], as `folder`/00000i.png; returns the mean NFE per image.

    `labels` fills whole blocks: every network call has one, and what is beyond `num` is dropped, so that for
    one block size an image has the same bits however many follow it.
    """
    nfe = 0
    with tqdm(total=num, desc="generate", unit="image") as bar:
        for first in range(0, num, block):
            indices, wanted = range(first, first + block), labels[first : first + block]
            images, evaluations = generate(ready.trained.model, ready.codec, indices, wanted, ready.sampling)
            kept = min(block, num - first)
            for index, image in zip(indices[:kept], images[:kept], strict=True):
                to_pil(image).save(folder / f"{index:06d}.png")
            nfe += evaluations * kept
            bar.update(kept)
    return nfe / num


def write_manifest(
    folder: Path, args: argparse.Namespace, ready: Setup, labels: list[int], block: int, nfe: float
) -> None:
    """Write manifest.json: all that decides the images, and what they came from."""
    trained = ready.trained
    manifest = {
        "num": args.num,
        "labels": labels,
        **ready.sampling.describe(trained.model),
        "path": trained.model.config.path,
        "prediction": trained.model.config.prediction,
        "time_interval": ready.sampling.interval(trained.model),
        "nfe": nfe,
        "block": block,
        "dtype": args.dtype,
        "device": args.device,
        "codec": ready.codec.describe(),
        "uint8_rule": UINT8_RULE,
        "checkpoint": str(trained.folder),
        "weights": trained.which,
        "checkpoint_sha256": trained.files,
        "step": trained.manifest["step"],
        "versions": library_versions(),
    }
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    (folder / "manifest.json").write_text(f"{{\n {lines}\n}}\n")
