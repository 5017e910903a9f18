"""The cache of latents: the moments that an autoencoder gives for every image of a dataset, both flips, on disk.

    index.json                                what the cache is, and the SHA-256 of every shard
    moments-0000000-0004096.safetensors       of the images [0, 4096): `moments` (N, 2, 2C, h, w), `labels` (N,)

Why safetensors: `get_tensor` maps a file and copies nothing, so rows cost what they cost in numpy's memmap, and a file
says itself what it holds; `python -m experiments.bench.cache` compares it with what else there is. webdataset reads tar
files from front to back and shuffles within a buffer, so neither the image of an index nor the place where a run was
interrupted can be asked for.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sit_atconv.config import Data, Loading, make_recipe
from sit_atconv.data.images import Unreadable, check_labels
from sit_atconv.data.kinds import IMAGE_KEYS, open_images
from sit_atconv.runtime import precision
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.reading import COUNT, POSITIVE, SHA256, SHAPE, Malformed, read_json, read_tensors

FORMAT_VERSION = 1
INDEX = "index.json"
CROP = "ADM centre crop"
DTYPES = {name: np.dtype(precision.DTYPES[name]) for name in precision.OF_CACHES}
REMEDY = "give the same `sit-atconv encode` again, which makes only what is not whole"

SHARD = {"file": str, "first": COUNT, "count": POSITIVE, "bytes": COUNT, "sha256": SHA256}
FORM = {
    "codec": {"codec": str, "vae": str, "sha256": str, "scale": float, "shift": float},
    "crop": str, "image_size": POSITIVE, "channels": POSITIVE, "latent_shape": SHAPE, "dtype": tuple(DTYPES),
    "class_names": [str], "num_images": POSITIVE, "shard_images": POSITIVE, "data": dict, "shards": [SHARD],
}  # fmt: skip


def shard_name(first: int, count: int) -> str:
    """The file of the images [first, first + count)."""
    return f"moments-{first:07d}-{first + count:07d}.safetensors"


def shard_ranges(num_images: int, shard_images: int) -> list[tuple[int, int]]:
    """(first, count) of every shard."""
    return [(first, min(shard_images, num_images - first)) for first in range(0, num_images, shard_images)]


def read_index(root: Path) -> dict[str, Any]:
    """What a finished cache says of itself. Raises InputError where there is none, or none that this library reads."""
    where = f"cache of latents {str(root)!r}"
    unfinished = told(f"{where}: {INDEX}", OSError, remedy=f"if it is a cache yet to be finished, {REMEDY}")
    with unfinished, told(f"{where}: {INDEX} is damaged", Malformed, remedy=REMEDY):
        version = read_json(root / INDEX).get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{where} has format {version!r}; this library reads {FORMAT_VERSION}; encode it anew")
        index = read_json(root / INDEX, FORM)
    named = [(shard["file"], shard["first"], shard["count"]) for shard in index["shards"]]
    count = -(-index["num_images"] // index["shard_images"])
    ranges = shard_ranges(index["num_images"], index["shard_images"]) if count == len(named) else []
    if named != [(shard_name(*span), *span) for span in ranges]:
        raise InputError(f"{where}: {INDEX} does not list the shards of {index['num_images']:,} images; {REMEDY}")
    return index


def shard_problems(root: Path, index: dict[str, Any], hashes: bool) -> Iterator[str]:
    """A text per shard that is missing or has another size, or, with `hashes`, another SHA-256 than the index says.

    Hashing runs in as many threads as there are cores for this process; a bar shows it where it takes long.
    """
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    total = sum(shard["bytes"] for shard in index["shards"])
    bar = Progress(total=total, desc="verify", unit="B", unit_scale=True, delay=2, leave=False, disable=not is_main())
    with bar, ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda shard: _problem(root / shard["file"], shard, hashes), index["shards"])
        for shard, problem in zip(index["shards"], found, strict=True):
            bar.update(shard["bytes"])
            if problem:
                yield problem


def _problem(path: Path, shard: dict[str, Any], hashes: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != shard["bytes"]:
            return f"{path.name} has {size:,} bytes instead of {shard['bytes']:,}"
        if hashes and sha256(path) != shard["sha256"]:
            return f"{path.name} was changed: its SHA-256 is not the one in {INDEX}"
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return None


class LatentCache(Dataset):
    """The moments of a cache, in place of images. An item `(index, flip)` is a tensor (2C, h, w) and a label.

    The first C channels are the mean, the others the log-variance, in the stored dtype, without scale and shift.
    verify: compare every shard with its SHA-256 now.
    source: where the images themselves lie today, for `images`; None is where they were. max_pixels: of these.
    Raises InputError for a cache that is not there or not whole.
    """

    moments = True

    def __init__(
        self, root: str, verify: bool, source: str | None = None, max_pixels: int = Loading.max_pixels
    ):  # fmt: skip
        self.root, self.source, self.max_pixels = Path(root).absolute(), source, max_pixels
        self.index = index = read_index(self.root)
        problems = list(shard_problems(self.root, index, verify))
        if problems:
            more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
            raise InputError(f"cache of latents {root!r}: {problems[0]}{more}; {REMEDY}")
        self.channels, self.image_size = index["channels"], index["image_size"]
        self.background = index["data"].get("background")  # a cache that does not say left transparency out
        self.class_names, self.latent_shape = tuple(index["class_names"]), tuple(index["latent_shape"])
        channels, height, width = self.latent_shape
        self._item, self._dtype = (2 * channels, height, width), DTYPES[index["dtype"]]
        self._mapped: dict[int, np.ndarray] = {}  # shards that this process has opened
        self._images: Dataset | None = None
        try:
            self.labels = np.concatenate([self._open(number)[1] for number in range(len(index["shards"]))])
        except Unreadable as error:
            raise InputError(str(error)) from None
        check_labels(f"cache of latents {root!r}", self.labels, self.class_names)

    def check_stated(self, data: Data) -> None:
        """Raise InputError for a size, channels or a background, of a recipe, that the cache's images do not have."""
        for key in ("image_size", "channels", "background"):
            stated, own = getattr(data, key), getattr(self, key)
            if stated not in (None, own):
                raise InputError(
                    f"data.{key}={stated}: the cache {str(self.root)!r} is of images with {key} {own}; leave it out, "
                    "or encode another cache"
                )

    def __len__(self) -> int:
        return self.index["num_images"]

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        moments, labels = self.read([index], [flip])
        return moments[0], int(labels[0])

    def read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments (B, 2C, h, w), a copy, and labels (B,).

        Raises Unreadable for a shard that cannot be opened, InputError where the cache is gone. A shard stays open; one
        that is cut after that ends the process by SIGBUS.
        """
        # From numpy: what torch aligns in memory leaves holes in a loader process's heap, half a GB within an epoch.
        rows = np.empty((len(indices), *self._item), dtype=self._dtype)
        indices = np.asarray(indices, dtype=np.int64)
        numbers, places = (part.tolist() for part in np.divmod(indices, self.index["shard_images"]))
        for row, number, place, flip in zip(rows, numbers, places, flips, strict=True):
            row[:] = self._shard(number)[place, int(flip)]
        return torch.from_numpy(rows), torch.from_numpy(self.labels[indices])

    def pixels(self, index: int, flip: bool) -> torch.Tensor:
        """The image (C, H, W), as its dataset gives it, that the moments are of.

        Raises InputError when the images are not there.
        """
        if self._images is None:
            self._images = self.images()
        return self._images[index, flip][0]

    @property
    def images_data(self) -> Data:
        """The section `data` of a recipe of the images that the cache is of."""
        moved = {} if self.source is None else {"root": self.source}
        which = {key: value for key, value in self.index["data"].items() if key in IMAGE_KEYS}
        return replace(make_recipe(which, Data, stored=True), max_pixels=self.max_pixels, **moved)

    def images(self) -> Dataset:
        """The images that the cache is of. Raises InputError when they are not there."""
        with told("", InputError, remedy="data.source says where the images of the cache lie today"):
            data = self.images_data
            images = open_images(data)
        if (len(images), images.class_names) != (len(self), self.class_names):
            raise InputError(
                f"data.source={data.root!r}: the images are not those of the cache "
                f"{str(self.root)!r}: other classes, or more or fewer images"
            )
        return images

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            self._mapped[number] = self._open(number)[0]
        return self._mapped[number]

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Moments (N, 2, 2C, h, w), mapped, and labels (N,) of a shard."""
        shard = self.index["shards"][number]
        path = self.root / shard["file"]
        problem = _problem(path, shard, hashes=False)  # a page past a file's end would be a SIGBUS
        if not problem:
            try:
                tensors, _ = read_tensors(path, "shard")
                found = {name: (tensor.shape, tensor.numpy().dtype) for name, tensor in tensors.items()}
                count = shard["count"]
                if found == {"moments": ((count, 2, *self._item), self._dtype), "labels": ((count,), np.int64)}:
                    return tensors["moments"].numpy(), tensors["labels"].numpy()
                problem = f"{shard['file']} holds tensors of another form"
            except InputError as error:
                problem = str(error)
        if not self.root.is_dir():
            raise InputError(f"cache of latents {str(self.root)!r} is no longer there; bring it back", every_rank=True)
        raise Unreadable(f"cache of latents {str(self.root)!r}: {problem}; {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}, "_images": None}  # every process opens its own
