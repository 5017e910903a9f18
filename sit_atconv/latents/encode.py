"""Making the cache of latents: shards dealt out to processes, each there whole or not at all, so a kill costs one.

A folder tells from its first file on what it is going to be (settings.json), and refuses to become something else. What
lies in it is a function of the settings and the images alone: a batch never reaches over the end of a shard, and no
clock or process number goes into a file.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import BatchSampler, Dataset, default_collate

from sit_atconv.config import Recipe
from sit_atconv.config.earlier import MEANT
from sit_atconv.data import IMAGE_KEYS, describe_images, open_dataset
from sit_atconv.data.images import Unreadable
from sit_atconv.data.latent_cache import CROP, DTYPES, FORMAT_VERSION, INDEX, shard_name, shard_ranges
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.latents.codecs import VaeCodec, open_codec
from sit_atconv.runtime import limits, processes
from sit_atconv.runtime.claims import check_place, claim, clear_leftovers, writing
from sit_atconv.runtime.comparison import compared
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.devices import check_bf16, computing, numerics
from sit_atconv.runtime.errors import InputError, check_choice, option, told
from sit_atconv.runtime.files import library_versions, resolved, sha256, whole, write_atomic
from sit_atconv.runtime.reading import read_tensors

EARLIER = {f"data.{key}": MEANT[key] for key in IMAGE_KEYS if key in MEANT} | {"precision": "fp32"}
# Of the settings: where autoencoder and images lay and what it ran on may be otherwise when a cache is gone on with.
NOT_COMPARED = ("codec.vae", "data.root", "versions")
WHOLE = (
    "a cache holds every image, and goes on when this one is whole again (without it the images are others, and a "
    "cache of them begins anew)"
)


@numerics(deterministic=True)
def encode(
    recipe: Recipe, out: Path, dtype: str = "fp16", shard_images: int = 4096, force: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Make the cache of a recipe's images at `out`, or what is missing of it; returns its index.

    dtype: "fp16" or "fp32". shard_images: images per shard. force: what is at `out` and would be
    refused is set aside. Every process of a distributed launch runs this, and makes
    its part of the missing shards; the first one makes the index, the others return without its shards.
    Raises InputError for a recipe without an autoencoder, a folder with something else in it, an image that cannot be
    read or encoded, and a full disk. The shards made so far stay.
    """
    out = resolved(out)
    check_choice("dtype", dtype, DTYPES)
    limits.SHARD_IMAGES.check("shard_images=", shard_images)
    if recipe.data.kind == "latents":
        raise InputError("data.kind=latents is encoded already; give the recipe of the images")
    if recipe.data.streaming:
        raise InputError("data.streaming=true: a cache needs to reach every image; leave it out")
    if recipe.latents.codec != "vae":
        raise InputError(f"latents.codec={recipe.latents.codec}: there is nothing to encode; a cache takes a vae")
    check_place(out, "latents", force=force)  # before anything is loaded
    with processes.lost_ones_told():
        device = processes.join().device
    if recipe.latents.precision == "bf16":
        check_bf16("latents.precision=bf16", device)
    dataset = open_dataset(recipe.data)
    codec = open_codec(recipe.latents)

    def begin() -> tuple[dict[str, Any], list[tuple[int, int]]]:
        stated = describe(recipe, dataset, codec, dtype, shard_images)
        settings = claim(out, stated, NOT_COMPARED, "latents", force=force, meant=EARLIER)
        return settings, missing_shards(out, settings)

    with processes.lost_ones_told():
        try:
            settings, missing = processes.first(begin)
            mine = missing[processes.rank() :: processes.count()]
            processes.together(lambda: _make_shards(recipe, dataset, codec.to(device), device, settings, out, mine))
        except InputError:  # which all have, where another error is of one process, and the others wait for it
            processes.leave()
            raise
        processes.leave()
    return finish(out, settings) if processes.is_main() else settings


def describe(recipe: Recipe, dataset: Dataset, codec: VaeCodec, dtype: str, shard_images: int) -> dict[str, Any]:
    """The settings of a cache: all of its index but the shards."""
    return {
        "format_version": FORMAT_VERSION,
        "codec": codec.describe(),
        "crop": CROP,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "latent_shape": list(codec.latent_shape(dataset.channels, dataset.image_size)),
        "dtype": dtype,
        "precision": recipe.latents.precision or "fp32",
        "flips": [False, True],
        "class_names": list(dataset.class_names),
        "num_images": len(dataset),
        "images_sha256": _identity(dataset, recipe.data.root),
        "shard_images": shard_images,
        "batch_size": recipe.latents.batch_size,
        "data": describe_images(recipe.data),
        "versions": library_versions(),
    }


def _identity(dataset: Dataset, root: str | None) -> str:
    """SHA-256 of the images' names under `root` and of their labels: where files lie does not matter."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.labels, dtype=np.int64).tobytes())
    if root is not None and not Path(root).exists():  # the name of a dataset on the hub
        digest.update(root.encode())
    if hasattr(dataset, "name"):  # the digits have none
        for index in range(len(dataset)):
            digest.update(dataset.name(index).removeprefix(root or "").encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def missing_shards(out: Path, settings: dict[str, Any]) -> list[tuple[int, int]]:
    """(first, count) of every shard that is not there, or not whole: its seal does not fit what it holds.

    Clears away what killed processes were writing.
    """
    clear_leftovers(out)
    ranges = shard_ranges(settings["num_images"], settings["shard_images"])
    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(lambda span: _is_whole(out / shard_name(*span), settings), ranges))
    return [span for span, there in zip(ranges, whole, strict=True) if not there]


def _is_whole(path: Path, settings: dict[str, Any]) -> bool:
    try:
        tensors, metadata = read_tensors(path, "shard")
    except InputError:
        return False
    return metadata == {"seal": seal(path.name, settings, tensors)}


def seal(name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a shard's name, the settings that made it, and its tensors."""
    digest = hashlib.sha256(json.dumps([name, compared(settings, NOT_COMPARED)], sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Images(Dataset):
    """Batches of images with their labels, as TrainingBatches takes them: nothing is passed over."""

    in_thread = True

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> tuple[list[torch.Tensor] | InputError, dict[int, str]]:
        try:
            return default_collate([self.dataset[index, False] for index in indices]), {}
        except InputError as error:
            return error, {}


def _make_shards(recipe, dataset, codec: VaeCodec, device: torch.device, settings, out: Path, spans: list) -> None:
    size = recipe.latents.batch_size
    cut = {span: list(BatchSampler(range(span[0], sum(span)), size, drop_last=False)) for span in spans}
    lists = list(chain.from_iterable(cut.values()))
    batches = TrainingBatches(_Images(dataset), lists, recipe.data, device.type == "cuda")
    total = sum(count for _, count in spans)
    label = "encode" if processes.count() == 1 else f"encode (1 of {processes.count()} processes)"
    with Progress(total=total, desc=label, unit="image", delay=1e-9, disable=not processes.is_main()) as bar:
        for (first, count), parts in cut.items():
            shape = (count, 2, 2 * settings["latent_shape"][0], *settings["latent_shape"][1:])
            moments = torch.from_numpy(np.empty(shape, DTYPES[settings["dtype"]]))
            labels = torch.empty(count, dtype=torch.int64)
            for part in parts:
                rows = slice(part[0] - first, part[-1] + 1 - first)
                with told("", Unreadable, remedy=WHOLE, every_rank=True):
                    images, labels[rows] = next(batches)
                images = images.to(device, non_blocking=True)
                with computing(settings.get("precision", EARLIER["precision"]), device):
                    both = [codec.moments(images), codec.moments(images.flip(3))]  # each a pass of its own
                moments[rows] = torch.stack(both, dim=1).cpu()
                if not moments[rows].isfinite().all():
                    raise InputError(
                        f"latents.vae={codec.source!r} gives moments that {settings['dtype']} does not hold, of an "
                        f"image among {part[0]} to {part[-1]}; try {option('dtype', 'fp32')}, or another vae",
                        every_rank=True,
                    )
                bar.update(len(part))
            write_shard(out / shard_name(first, count), settings, moments, labels)


def write_shard(path: Path, settings: dict[str, Any], moments: torch.Tensor, labels: torch.Tensor) -> None:
    """Write a shard of moments (N, 2, 2C, h, w) and labels (N,), whole or not at all, even where two processes do.

    Raises InputError where the disk does not take it.
    """
    tensors = {"moments": moments, "labels": labels}
    # One key: of more the order is random.
    content = save(tensors, metadata={"seal": seal(path.name, settings, tensors)})
    with writing(path.parent), whole(path) as unfinished:  # whose folder is not made anew where it has gone
        unfinished.write_bytes(content)


def finish(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the index of a folder with all of its shards, and return it."""

    def entry(span: tuple[int, int]) -> dict[str, Any]:
        path = out / shard_name(*span)
        size, digest = path.stat().st_size, sha256(path)
        return {"file": path.name, "first": span[0], "count": span[1], "bytes": size, "sha256": digest}

    with writing(out), ThreadPoolExecutor() as pool:
        ranges = shard_ranges(settings["num_images"], settings["shard_images"])
        index = {**settings, "shards": list(pool.map(entry, ranges))}
        write_atomic(out / INDEX, json.dumps(index, indent=1))
    return index
