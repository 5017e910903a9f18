"""Write samples by index, with a manifest that says how they were made."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from sampling.options import add_sampling_options, setup
from sit_atconv.checkpoint import library_versions
from sit_atconv.data import UINT8_RULE
from sit_atconv.errors import InputError
from sit_atconv.generation import generate, random_label


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
    if args.labels == "balanced":
        labels = [index % classes for index in range(args.num)]
    else:
        labels = [random_label(sampling.seed, index, classes) for index in range(args.num)]

    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    nfe = 0
    with tqdm(total=args.num, desc="generate", unit="image") as bar:
        for first in range(0, args.num, args.batch):
            indices = range(first, min(first + args.batch, args.num))
            images, evaluations = generate(
                trained.model, ready.codec, indices, [labels[index] for index in indices], sampling
            )
            nfe += evaluations * len(indices)
            for index, image in zip(indices, images, strict=True):
                to_pil(image).save(unfinished / f"{index:06d}.png")
            bar.update(len(indices))
    manifest = {
        "num": args.num,
        "labels": labels,
        **dataclasses.asdict(sampling),
        "nfe": nfe / args.num,
        "block": args.batch,
        "dtype": args.dtype,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "device": args.device,
        "uint8_rule": UINT8_RULE,
        "checkpoint": str(trained.folder),
        "weights": trained.which,
        "checkpoint_sha256": trained.files,
        "step": trained.manifest["step"],
        "versions": library_versions(),
    }
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    (unfinished / "manifest.json").write_text(f"{{\n {lines}\n}}\n")
    unfinished.rename(out)
    print(f"{args.num} images in {out}, NFE {manifest['nfe']:g}")


def to_pil(image) -> Image.Image:
    """uint8 (1 or 3, H, W) -> a grey or RGB image."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
