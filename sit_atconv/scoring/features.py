"""A folder of features: shards of consecutive images, and features.json, which is written last."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.reading import COUNT, FILE, POSITIVE, SHA256, SHAPE, Malformed, read_json
from sit_atconv.scoring.extractor import Extractor
from sit_atconv.scoring.sources import Source, begun_as, class_histogram

INDEX = "features.json"
TOLD = 5  # folders that a message names
FORM = {
    "n": POSITIVE, "labels": bool, "class_histogram": ({re.compile("[0-9]+"): COUNT}, None),
    "shards": {FILE: SHA256}, "streams": {str: POSITIVE}, "image_shape": SHAPE, "device": str, "batch": POSITIVE,
    "extractor": {"name": str, "protocol": str},
    "source": {
        "pixels_sha256": SHA256, "labels_sha256": (SHA256, None), "lossy": object, "manifest": (dict, None),
        "manifest_sha256": (SHA256, None), "background?": re.compile(r"[#\w(),.% ]{1,40}", re.ASCII), "data?": dict,
        "class_names?": ([str], None),
    },
}  # fmt: skip


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def is_features(path: str | Path) -> bool:
    """Whether `path` is a folder of features, whole or not."""
    return (Path(path) / INDEX).is_file() or "extractor" in begun_as(Path(path))


def check_no_parent(path: str | Path) -> None:
    """Raise InputError for a folder that holds nothing but folders of features, one of which is meant."""
    path = Path(path)
    try:
        inner = sorted(path.iterdir()) if path.is_dir() and not is_features(path) else []
    except OSError:  # who reads it says so
        return
    if inner and all(map(is_features, inner)):
        names = ", ".join(repr(str(each)) for each in inner[:TOLD]) + ", ..." * (len(inner) > TOLD)
        raise InputError(f"{str(path)!r} holds folders of features; give one of them: {names}")


class Features:
    """The features that `extract` wrote to a folder.

    n: images. info: features.json. labels: int64 (n,) in the order of the images, or None. streams: dimension of each
    stream by name. image_shape: (C, H, W) of the images.
    verify: compare the SHA-256 of every shard, which reads all of them; else sizes, shapes and indices alone.
    Raises InputError for a folder that is not whole: one line names the shard.
    """

    def __init__(self, path: str | Path, verify: bool = False):
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise InputError(
                f"features {str(self.path)!r}: no {INDEX}, so they are not whole; run `extract` again, which goes on"
            )
        try:
            self.info = read_json(self.path / INDEX, FORM, finite=True)
        except (OSError, Malformed) as error:
            raise self._broken(INDEX, str(error)) from None
        self.n, self.streams = self.info["n"], self.info["streams"]
        self.image_shape = tuple(self.info["image_shape"])
        self._shards = list(self.info["shards"])
        self._starts, labels = [], []
        first = 0
        for file, digest in self.info["shards"].items():
            try:
                index, ids, streams = read_head(self.path / file)
            except (OSError, SafetensorError) as error:
                raise self._broken(file, str(error)) from None
            if streams != self.streams or not np.array_equal(index, np.arange(first, first + len(index))):
                raise self._broken(file, "it holds other images or streams")
            if self.info["labels"] != (ids is not None):
                raise self._broken(file, "labels" + " are missing" * (ids is None))
            self._starts.append(first)
            labels.append(ids)
            first += len(index)
            if verify and sha256(self.path / file) != digest:
                raise self._broken(file, "its SHA-256 is not that of features.json")
        if first != self.n:
            raise self._broken(INDEX, f"its shards hold {first} images, and it says {self.n}")
        self.labels = np.concatenate(labels) if self.info["labels"] else None
        if class_histogram(self.labels) != self.info["class_histogram"]:
            raise self._broken(INDEX, "its class histogram is not that of the labels")

    def _broken(self, file: str, reason: str) -> InputError:
        return InputError(
            f"features {str(self.path)!r}: {file} is damaged ({reason}); delete the folder, extract anew",
            every_rank=True,
        )

    def batches(self, stream: str, shards: Iterable[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first image, its features and the next ones' (n, D) fp32) of each shard.

        shards: numbers of those wanted, 0 to len(features) - 1 (default: all, in order). Raises InputError for a stream
        that is not there.
        """
        if stream not in self.streams:
            raise InputError(f"features {str(self.path)!r} have no {stream!r}, but {sorted(self.streams)}")
        for number in range(len(self)) if shards is None else shards:
            try:
                with safe_open(self.path / self._shards[number], framework="np") as file:
                    yield self._starts[number], file.get_tensor(stream)
            except (OSError, SafetensorError) as error:
                raise self._broken(self._shards[number], str(error)) from None

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def load(self, stream: str, indices: np.ndarray | None = None) -> np.ndarray:
        """All features of a stream, (n, D) fp32; or of some images, by ascending indices (M,): (M, D)."""
        indices = np.arange(self.n) if indices is None else indices
        cuts = np.searchsorted(indices, [*self._starts, self.n])
        if stream in self.streams:  # else `batches` says so
            out = np.empty((len(indices), self.streams[stream]), np.float32)
        wanted = [number for number in range(len(self)) if cuts[number] < cuts[number + 1]]
        for number, (first, part) in zip(wanted, self.batches(stream, wanted), strict=True):
            rows = slice(cuts[number], cuts[number + 1])
            out[rows] = part[indices[rows] - first]
        return out


class Held:
    """Features in memory, (n, D) of each stream, with the face of a folder of them."""

    def __init__(
        self, arrays: dict[str, np.ndarray], labels: np.ndarray | None, image_shape: tuple[int, int, int] | None = None
    ):  # fmt: skip
        self.n, self.labels, self.image_shape = len(next(iter(arrays.values()))), labels, image_shape
        self.streams = {name: array.shape[1] for name, array in arrays.items()}
        self._arrays = arrays

    def __len__(self) -> int:
        return 1

    def batches(self, stream: str, shards: Iterable[int] = (0,)) -> Iterator[tuple[int, np.ndarray]]:
        return ((0, self._arrays[stream]) for _ in shards)

    def load(self, stream: str, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        return self._arrays[stream][indices]


def held(source: Source, extractor: Extractor, batch: int) -> Held:
    """The features of images, in memory. Raises InputError for images that cannot be read."""
    total = -(-source.n // batch)
    batches = Progress(source.batches(size=batch), desc="features", total=total, unit="batch", leave=False, delay=1)
    parts = [extractor(pixels) for pixels in batches]
    arrays = {name: torch.cat([part[name] for part in parts]).numpy() for name in extractor.streams}
    return Held(arrays, source.labels, source.image_shape)


def read_head(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
    """Indices, labels if there are any, and the dimension of each stream of a shard.

    Raises OSError or SafetensorError for a file that is not whole.
    """
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        if "index" not in names:
            raise SafetensorError("no index in it")
        index, labels = file.get_tensor("index"), file.get_tensor("labels") if "labels" in names else None
        shapes = {name: file.get_slice(name).get_shape() for name in sorted(names - {"index", "labels"})}
    if any(len(shape) != 2 or shape[0] != len(index) for shape in shapes.values()):
        raise SafetensorError("streams of other lengths")
    return index, labels, {name: shape[1] for name, shape in shapes.items()}
