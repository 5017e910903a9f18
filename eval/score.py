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
from sit_atconv.data.digits import Digits
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


class DigitsScore:
    """Fréchet distance in the classifier's features to the real train split, and the share of classes recognised."""

    def __init__(self):
        self.classifier, self.accuracy = digits.train_classifier()
        self.reference = to_uint8(Digits("train").images)
        self.moments = moments(digits.extract(self.classifier, self.reference)[0])

    def __call__(self, pixels: torch.Tensor, labels: list[int]) -> dict[str, float]:
        """Of uint8 digits (N, 1, 8, 8) of these classes."""
        features, logits = digits.extract(self.classifier, pixels)
        return {
            "frechet_distance": frechet_distance(moments(features), self.moments),
            "recognised": float((logits.argmax(1) == np.array(labels)).mean()),
        }


def score_digits(samples: Images) -> dict:
    """The scores of `DigitsScore`, how good its classifier is, and what they were taken against."""
    if samples.pixels.shape[1:] != (1, 8, 8):
        raise InputError(f"samples are {tuple(samples.pixels.shape[1:])}, the embedded digits (1, 8, 8)")
    if samples.labels is None:
        raise InputError("samples without labels: --ref digits needs a manifest.json with labels, or arr_1 in the npz")
    score = DigitsScore()
    return {
        "protocol": digits.PROTOCOL,
        "metrics": score(samples.pixels, samples.labels.tolist()) | {"classifier_heldout_accuracy": score.accuracy},
        "reference": {"name": "digits train split", "n": len(score.reference), "sha256": _digest(score.reference)},
    }


class InceptionScore:
    """FID against mu and sigma, or against images that are put through the same network.

    ref: an npz with mu and sigma, or an npz or folder of images. Raises InputError for what cannot be compared with.
    """

    def __init__(self, ref: str, weights: str | None, device: torch.device):
        path = Path(ref)
        if not path.exists():
            raise InputError(f"reference {ref!r}: no such file or folder")
        self.path, self.weights = path, extractor.inception_weights(weights)
        self.moments = read_moments(path) if path.is_file() else None
        self.images = read_images(path).pixels if self.moments is None else None
        if self.images is not None and len(self.images) < 2:
            raise InputError(f"reference {ref!r}: one image is not a distribution; give at least 2")
        if self.moments is not None and (self.moments.mu.shape, self.moments.sigma.shape) != ((2048,), (2048, 2048)):
            shapes = f"mu {self.moments.mu.shape} and sigma {self.moments.sigma.shape}"
            raise InputError(f"reference {ref!r} has {shapes}; Inception's pool has 2048 features")
        if self.moments is not None and not all(np.isfinite(part).all() for part in self.moments):
            raise InputError(f"reference {ref!r}: mu or sigma is not finite; take the statistics again")
        self.model = extractor.load_inception(self.weights, device)
        if self.images is not None:
            self.moments = moments(extractor.extract(self.model, self.images))

    def __call__(self, pixels: torch.Tensor, labels: list[int] | None = None) -> dict[str, float]:
        """Of uint8 images (N, C, H, W); the labels do not matter."""
        return {"fid": frechet_distance(moments(extractor.extract(self.model, pixels)), self.moments)}


def score_inception(samples: Images, ref: str, weights: str | None, device: str | None) -> dict:
    """The score of `InceptionScore`, and what it was taken against."""
    score = InceptionScore(ref, weights, resolve_device(device or _best_device()))
    return {
        "protocol": extractor.PROTOCOL,
        "metrics": score(samples.pixels),
        "reference": {
            "name": str(score.path.absolute()),
            "n": None if score.images is None else len(score.images),
            "sha256": _digest(score.images) if score.images is not None else sha256(score.path),
        },
        "weights_sha256": sha256(score.weights),
    }


def training_scorer(ref: str, weights: str | None) -> DigitsScore | InceptionScore:
    """What scores images while a model trains: called with uint8 images (N, C, H, W) and labels, gives numbers by name.

    ref, weights: as the command takes them. Raises InputError for what cannot be compared with.
    """
    if ref == "digits":
        if weights:
            raise InputError("score.weights belongs to Inception; score.ref=digits has a classifier of its own")
        return DigitsScore()
    # As the trainer's own device, without TF32 being switched off for it.
    return InceptionScore(ref, weights, torch.device(_best_device()))


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
