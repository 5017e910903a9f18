"""Give real images their likelihood, in bits per dimension, under a pixel model."""

import argparse
import json
import math

import torch
from torch.utils.data import Dataset

from sit_atconv.config import make_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.held_out import describe_parts, split
from sit_atconv.data.images import in_range
from sit_atconv.flow.likelihood import LEVEL_8_BIT, bits_per_dim, log_likelihood
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.samplers import ATOL, RTOL, SAMPLERS
from sit_atconv.flow.times import sampling_interval, time_grid
from sit_atconv.layers.atconv import check_backend
from sit_atconv.runtime import draws
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import check_out, library_versions, new_path, shown
from sit_atconv.sampling.sampling import noted
from sit_atconv.sampling.settings import check_path
from sit_atconv.training.checkpoint import Trained, load_trained

LEVELS = {"digits": 1 / 8}  # between two neighbouring grey levels, in [-1, 1]; of image files LEVEL_8_BIT


def real_images(trained: Trained, which: str) -> tuple[Dataset, float]:
    """The images of a checkpoint's recipe, and the distance of their grey levels.

    which: "train", those that it trains on; "test", those that `data.held_out` keeps from that, or else digits' own.
    Raises InputError for a latent model or one outside a run, for held-out images that there are not, and where the
    images changed.
    """
    codec = trained.stated("codec")["codec"]
    if codec == "open":
        raise InputError("a model without its training checkpoint does not say what its images are; give a run")
    if codec != "identity":
        raise InputError("the likelihood of latents is not that of images; give the checkpoint of a pixel model")
    data = make_recipe(trained.stated("recipe"), stored=True).data
    level = LEVELS.get(data.kind, LEVEL_8_BIT)
    if which == "test" and data.held_out is None:
        if data.kind != "digits":
            raise InputError(f"{option('split', 'test')}: data.kind={data.kind} holds no images back; use train")
        return Digits("test", data.channels), level
    train, held_out = split(open_dataset(data), data.held_out)
    if trained.stated("data") != describe_parts(train, held_out):
        raise InputError(f"data.root={data.root!r}: the images are not those that the model was trained on")
    return (train if which == "train" else held_out), level


@numerics()
def run(args: argparse.Namespace) -> None:
    """Write the likelihood of every image, and print the mean; the model is given the class of every image, without
    guidance, in fp32.

    Raises InputError for a likelihood that is not finite, and for whatever checkpoint and data lack.
    """
    check_out(args.out, force=args.force)
    device = resolve_device(args.device)
    trained = load_trained(args.ckpt)
    check_path(trained.model)
    if (guidance := trained.model.config.trained_guidance) != 1:
        raise InputError(
            f"{option('ckpt', str(args.ckpt))} has guidance {guidance:g} in its weights: its flow does not end at the "
            "density of the data; give a model without"
        )
    dataset, level = real_images(trained, args.split)
    if args.num > len(dataset):
        raise InputError(f"{option('num', args.num)}: the split {args.split} has {len(dataset)} images")
    model = trained.model.to(device).requires_grad_(False)
    check_backend(model, device)
    path, prediction = PATHS[model.config.path](), model.config.prediction
    start, end = sampling_interval(path, prediction)
    times = time_grid(end, start, args.steps)

    bits, evaluations = [], 0
    with Progress(total=args.num, desc="likelihood", unit="image") as bar:
        for first in range(0, args.num, args.batch):
            indices = range(first, min(first + args.batch, args.num))
            items = [dataset[index, False] for index in indices]
            shape, labels = items[0][0].shape, torch.tensor([label for _, label in items], device=device)
            spread = [draws.uniforms(shape, args.seed, Stream.DEQUANTIZE, index) - 0.5 for index in indices]
            images = in_range(torch.stack([image for image, _ in items])) + level * torch.stack(spread)
            probes = [
                torch.stack([draws.signs(shape, args.seed, Stream.PROBE, index, probe) for index in indices])
                for probe in range(args.probes)
            ]
            calls = 0

            def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
                nonlocal calls
                calls += 1
                noted(bar, len(labels))(calls, (end - float(t)) / (end - start))
                return path.velocity_from(prediction, model(x, t, labels, return_dict=False)[0], x, t)

            nats = log_likelihood(
                velocity, images.to(device), times, torch.stack(probes).to(device), SAMPLERS[args.sampler]
            )
            found = bits_per_dim(nats, shape.numel(), level).tolist()
            for index, value in zip(indices, found, strict=True):
                if not math.isfinite(value):
                    raise InputError(
                        f"image {index}: its likelihood is {value}, since the network gives values that are not "
                        "finite; try more steps, another sampler, or another checkpoint"
                    )
            bits += found
            evaluations += calls * len(indices)
            bar.update(len(indices))

    values, adaptive = torch.tensor(bits, dtype=torch.float64), args.sampler == "dopri5"
    mean, error = values.mean().item(), (values.std() / args.num**0.5).item() if args.num > 1 else None
    result = {
        "bits_per_dim": mean,
        "standard_error": error,
        "num": args.num,
        "split": args.split,
        "level": level,
        "dequantization": "uniform over a grey level",
        "probes": args.probes,
        "sampler": args.sampler,
        "steps": None if adaptive else args.steps,
        "rtol": RTOL if adaptive else None,
        "atol": ATOL if adaptive else None,
        "nfe": evaluations / args.num,
        "path": model.config.path,
        "prediction": prediction,
        "time_interval": [start, end],
        "seed": args.seed,
        "batch": args.batch,
        "device": str(device),
        "checkpoint": shown(trained.folder),
        "weights": trained.which,
        "checkpoint_sha256": trained.files,
        "step": trained.manifest["step"],
        "versions": library_versions(),
        "each": bits,
    }
    with new_path(args.out, force=args.force) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1, allow_nan=False))
    spread = "" if error is None else f" +- {error:.4f}"
    print(f"{args.out}: {args.num} images of {args.split}, {mean:.4f}{spread} bits/dim, NFE {result['nfe']:g}")
