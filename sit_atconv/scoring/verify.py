"""Check Inception's weights and this machine; with ADM's files also the whole protocol, against ADM's own numbers."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.processes import is_main
from sit_atconv.scoring.extractor import inception_weights, load_extractor
from sit_atconv.scoring.score import score, table

DIGEST = Path(URL_INCEPTION_V3).stem.rpartition("-")[2]  # the published file's name ends in how its SHA-256 begins
IMAGES, SIZE = 8, 64
SAMPLES, REFERENCE = "admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz"
URL_ADM = "https://github.com/openai/guided-diffusion/tree/main/evaluations"
# ADM's evaluator on these two files, as published, and how far its arithmetic may be from ours: half of the last digit,
# and that features agree to 1e-4; its precision and recall compare distances in fp16, which has three digits.
PUBLISHED = {
    "is": (215.84, 0.5), "fid": (3.94, 0.02), "sfid": (6.14, 0.03), "precision": (0.827, 0.01), "recall": (0.531, 0.01),
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print what was found. Raises InputError for what is not as published."""
    folder = Path(args.adm) if args.adm is not None else None
    for name in (SAMPLES, REFERENCE) if folder else ():
        if not (folder / name).is_file():
            raise InputError(f"{option('adm', args.adm)}: {name} is not there; {URL_ADM} says where it is to be had")
    digest = check_weights(args.weights)
    extractor = load_extractor("inception", args.weights, args.device)
    streams = extractor(synthetic_images())
    if is_main():
        print(f"{'weights':<28} SHA-256 {digest}")
        for name, rows in streams.items():
            print(f"{name:<28} {checksum(rows)}")
    if folder is None:
        return
    scored = score(
        str(folder / SAMPLES), str(folder / REFERENCE), "fid,sfid,is,pr", weights=args.weights, device=args.device,
        batch=args.batch, root=args.features,
    )  # fmt: skip
    if scored is not None:
        metrics = scored[0]["metrics"]
        print(table(metrics))
        check_published(metrics)
        print("all as published: " + ", ".join(f"{name} {value}" for name, (value, _) in PUBLISHED.items()))


def check_weights(weights: str) -> str:
    """SHA-256 of the weights file. Raises InputError where it is not that of the published one."""
    path = inception_weights(weights)
    digest = sha256(path)
    if not digest.startswith(DIGEST):
        raise InputError(
            f"Inception weights {str(path)!r}: their SHA-256 begins with {digest[: len(DIGEST)]}, and that of the "
            f"published file with {DIGEST}; download {URL_INCEPTION_V3}"
        )
    return digest


def synthetic_images() -> torch.Tensor:
    """uint8 (8, 3, 64, 64): gradients under noise of a linear congruence, in whole numbers: the same everywhere."""
    index, channel, y, x = np.indices((IMAGES, 3, SIZE, SIZE), dtype=np.uint64)
    noise = ((index * 3 + channel) * SIZE * SIZE + y * SIZE + x) * np.uint64(2654435761) >> np.uint64(16)
    images = (x * (index + 1) + y * (channel + 2) + noise % np.uint64(64)) % np.uint64(256)
    return torch.from_numpy(images.astype(np.uint8))


def checksum(rows: torch.Tensor) -> str:
    """Mean and root mean square, to six digits, for other machines to compare; a digest of the bits for this one."""
    values = rows.double()
    digest = hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()
    return f"mean {values.mean():.5e}, rms {values.square().mean().sqrt():.5e}, bits {digest[:16]}"


def check_published(metrics: dict[str, dict[str, Any]]) -> None:
    """Raise InputError where a score is not ADM's within its tolerance."""
    off = [
        f"{name} {metrics[name]['value']:.5g} is not {value} ± {tolerance}"
        for name, (value, tolerance) in PUBLISHED.items()
        if not abs(metrics[name]["value"] - value) <= tolerance
    ]
    if off:
        raise InputError(f"not as published: {', '.join(off)}; other files, or this machine computes otherwise")
