"""Score a folder or npz of samples against a reference."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from eval import digits, extractor
from eval.frechet import frechet_distance, moments
from eval.refs import read_moments
from eval.sources import Images, read_images
from sit_atconv.data import Digits
from sit_atconv.devices import resolve_device
from sit_atconv.errors import InputError
from sit_atconv.files import library_versions, sha256, write_atomic
from sit_atconv.images import to_uint8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", help="folder of images (with its manifest.json), or npz with arr_0 and arr_1")
    parser.add_argument(
        "--ref", required=True,
        help='npz with mu and sigma, npz or folder of images, or "digits" for the embedded digits',
    )  # fmt: skip
    parser.add_argument("--weights", metavar="FILE", help="Inception weights (default: torch's hub cache)")
    parser.add_argument("--device", help="for Inception; default: cuda where there is one")
    parser.add_argument("--out", metavar="JSON", help="default: metrics.json in the folder, or NAME.metrics.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Score, write the JSON, print the scores. Raises InputError for what cannot be scored."""
    samples = read_images(args.samples)
    if len(samples.pixels) < 2:
        raise InputError(
            f"samples {args.samples!r}: {len(samples.pixels)} image is not a distribution; give at least 2"
        )
    if args.ref == "digits":
        if args.weights or args.device:
            raise InputError("--weights and --device belong to Inception; --ref digits has a classifier of its own")
        result = score_digits(samples)
    else:
        result = score_inception(samples, args.ref, args.weights, args.device)
    path = Path(args.samples)
    manifest = path / "manifest.json"
    result |= {
        "n": len(samples.pixels),
        "samples": str(path.absolute()),
        "samples_manifest": {key: value for key, value in (samples.manifest or {}).items() if key != "labels"},
        "samples_manifest_sha256": sha256(manifest) if manifest.is_file() else None,
        "versions": library_versions("torch-fidelity", "scipy"),
    }
    default = path / "metrics.json" if path.is_dir() else path.with_suffix(".metrics.json")
    out = Path(args.out) if args.out else default
    write_atomic(out, json.dumps(result, indent=1))
    for name, value in result["metrics"].items():
        print(f"{name:<28} {value:.4f}")
    print(f"written to {out}")


def score_digits(samples: Images) -> dict:
    """Fréchet distance in the classifier's features to the real train split, and the share of classes recognised."""
    if samples.pixels.shape[1:] != (1, 8, 8):
        raise InputError(f"samples are {tuple(samples.pixels.shape[1:])}, the embedded digits (1, 8, 8)")
    if samples.labels is None:
        raise InputError("samples without labels: --ref digits needs a manifest.json with labels, or arr_1 in the npz")
    classifier, accuracy = digits.train_classifier()
    reference = to_uint8(Digits("train").images)
    real, _ = digits.extract(classifier, reference)
    features, logits = digits.extract(classifier, samples.pixels)
    recognised = float((logits.argmax(1) == samples.labels.numpy()).mean())
    return {
        "protocol": digits.PROTOCOL,
        "metrics": {
            "frechet_distance": frechet_distance(moments(features), moments(real)),
            "recognised": recognised,
            "classifier_heldout_accuracy": accuracy,
        },
        "reference": {"name": "digits train split", "n": len(reference), "sha256": _digest(reference)},
    }


def score_inception(samples: Images, ref: str, weights: str | None, device: str | None) -> dict:
    """FID against mu and sigma, or against images that are put through the same network."""
    path = Path(ref)
    if not path.exists():
        raise InputError(f"reference {ref!r}: no such file or folder")
    reference = read_moments(path) if path.is_file() else None
    images = read_images(path) if reference is None else None
    if images is not None and len(images.pixels) < 2:
        raise InputError(f"reference {ref!r}: one image is not a distribution; give at least 2")
    if reference is not None and (reference.mu.shape, reference.sigma.shape) != ((2048,), (2048, 2048)):
        shapes = f"mu {reference.mu.shape} and sigma {reference.sigma.shape}"
        raise InputError(f"reference {ref!r} has {shapes}; Inception's pool has 2048 features")
    if reference is not None and not (np.isfinite(reference.mu).all() and np.isfinite(reference.sigma).all()):
        raise InputError(f"reference {ref!r}: mu or sigma is not finite; take the statistics again")
    file = extractor.inception_weights(weights)
    model = extractor.load_inception(file, resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if images is not None:
        reference = moments(extractor.extract(model, images.pixels))
    return {
        "protocol": extractor.PROTOCOL,
        "metrics": {"fid": frechet_distance(moments(extractor.extract(model, samples.pixels)), reference)},
        "reference": {
            "name": str(path.absolute()),
            "n": None if images is None else len(images.pixels),
            "sha256": _digest(images.pixels) if images is not None else sha256(path),
        },
        "weights_sha256": sha256(file),
    }


def _digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
