"""Hugging Face datasets: by the id of a repository, or from a local folder; stored, or streamed."""

import hashlib
import lzma
import os
import reprlib
import tarfile
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sit_atconv.config import Data
from sit_atconv.data.images import (
    MOST_BYTES,
    ONE_CLASS,
    EncodedImages,
    Reader,
    Unreadable,
    check_labels,
    of_extra,
)
from sit_atconv.data.order import MAX_ATTEMPTS
from sit_atconv.runtime.bounded import bounded, read_bytes
from sit_atconv.runtime.console import bars_of
from sit_atconv.runtime.errors import InputError, check_choice, reason, told
from sit_atconv.runtime.reading import FILE, INSIDE, Malformed, read_card, read_json

ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")  # of fsspec and `datasets`: files in a file
CARDS = ("README.md", ".huggingface.yaml")  # what `datasets` reads of a folder before its files
NAMING = ("data_files", "data_dir")  # the keys of a configuration there that name files
# What `save_to_disk` writes.
SPLITS, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
SPLITS_FORM, STATE_FORM = {"splits": [FILE]}, {"_data_files": [{"filename": INSIDE}]}
# What `datasets` raises over a description of any content.
ANY = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)
BACKENDS = (
    OSError, ValueError, LookupError, RuntimeError, EOFError, ImportError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError, tarfile.TarError,
)  # fmt: skip


def open_hub(data: Data) -> "HubImages | HubStream":
    """The images of `data.kind=hf`. Raises InputError for a dataset that is not there, or has other columns."""
    datasets = of_extra("datasets", "hf")
    where, root = f"data.root={data.root!r}", Path(data.root)
    saved = any((root / name).is_file() for name in (STATE, SPLITS))
    for name, acts in (("revision", not root.exists()), ("subset", not saved)):
        if getattr(data, name) is not None and not acts:
            raise InputError(f"data.{name}={getattr(data, name)!r} does nothing for the folder {where}; leave it out")
    files = _Files.of(data.root)
    if root.is_dir():
        _check_described(root, where, files)
    asked = f"{where}, data.subset={data.subset}, data.split={data.split}"
    kinds = OSError, datasets.exceptions.DatasetsError, *ANY
    with bars_of(datasets), told(f"{asked}: cannot be opened", *kinds, in_full=True):
        if saved:
            found = datasets.load_from_disk(data.root)
            splits = found if isinstance(found, dict) else {str(found.split or "train"): found}
            table = _split(splits, data.split or "train")
            number, table = len(table), table.with_format(None)  # one that it was saved with gives other objects
            table = table.to_iterable_dataset() if data.streaming else table
        else:
            builder = datasets.load_dataset_builder(data.root, data.subset, revision=data.revision)
            for path in chain.from_iterable((builder.config.data_files or {}).values()):
                files.check(path, f"{where} consists of")
            if not data.streaming:
                builder.download_and_prepare()
            give = builder.as_streaming_dataset if data.streaming else builder.as_dataset
            table = give(split=data.split or "train")
            stated = (table.info.splits or {}).get(str(table.split))
            number = stated.num_examples if data.streaming and stated else None
    columns = table.features
    if columns is None:
        raise InputError(f"{where} does not say its columns; leave data.streaming out")
    image, label = data.image_key, data.label_key or None
    check_choice("data.image_key", image, columns)
    if label == "label" and label not in columns:  # the usual name, which nobody may have stated
        raise InputError(
            f"{where} has no column {label!r}, but {sorted(columns)}: name that of the classes by data.label_key, or "
            "state data.label_key='' to make all images one class"
        )
    if label is not None:
        check_choice("data.label_key", label, columns)
    if isinstance(columns[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    elif getattr(columns[image], "dtype", None) not in ("binary", "large_binary"):
        raise InputError(f"data.image_key={image!r}: the column is of {columns[image]}; one of images is needed")
    table = table.select_columns([key for key in (image, label) if key is not None])
    names = list(ONE_CLASS) if label is None else getattr(columns[label], "names", None)  # of a ClassLabel
    if not data.streaming:
        return HubImages(data, table, names)
    if names is None:
        raise InputError(f"data.label_key={label!r}: a stream tells its classes by a ClassLabel alone; leave it stored")
    number = number or data.num_images
    if number is None:
        raise InputError(f"{where} does not say how many images it has; state data.num_images")
    return HubStream(data, table, names, number)


def _check_described(root: Path, where: str, files: "_Files") -> None:
    """Raise InputError where a folder's own description cannot be read, or names files that do not lie in it.

    `datasets` would open these, URLs too.
    """
    folders, path = [root], root
    try:
        if (path := root / SPLITS).is_file():
            folders += [root / name for name in read_json(path, SPLITS_FORM)["splits"]]
        for folder in folders:
            for name, form in ((STATE, STATE_FORM), (INFO, dict), ("dataset_infos.json", dict)):
                if os.path.lexists(path := folder / name):
                    read_json(path, form)
        for path in (root / name for name in CARDS if os.path.lexists(root / name)):
            for named in _named_by(read_card(path)):
                *inside, place = named.split("::")
                place = place if "://" in place else os.path.join(root, place)
                files.check("::".join([*inside, place]), f"{where}: {path.name} names", named)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError) and not isinstance(error, Malformed):
            raise
        raise InputError(f"{where}: {path.name} cannot be read: {reason(error)}; mend it") from None


def _named_by(card: Any) -> Iterator[str]:
    """What the configurations in a card name as files; `datasets` itself refuses other forms of it."""
    configurations = card.get("configs") if isinstance(card, dict) else None
    for each in configurations if isinstance(configurations, list) else ():
        yield from _texts([each.get(key) for key in NAMING] if isinstance(each, dict) else None)


def _texts(value: Any) -> Iterator[str]:
    """The texts in lists and mappings."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _split(splits: dict[str, Any], wanted: str) -> Any:
    """What data.split asks for of the splits of a saved dataset: one of them, parts ("train[:10%]"), or a sum."""
    import datasets

    if wanted in splits:
        return splits[wanted]
    try:
        sizes = {name: len(table) for name, table in splits.items()}
        parts = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except (ValueError, AssertionError):
        check_choice("data.split", wanted, splits)
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


@dataclass(frozen=True)
class _Files:
    """Where the files of a dataset lie: what a record may name as its image, and nothing else.

    folders: local ones. repository: the beginnings of their addresses on the hub.
    """

    folders: tuple[str, ...] = ()
    repository: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: str) -> "_Files":
        """Of a local folder, what is in it; of a repository, its files, and what `datasets` has stored of them."""
        import datasets
        from huggingface_hub import constants

        if os.path.exists(root):
            return cls((os.path.abspath(root), os.path.realpath(root)))
        stored = Path(constants.HF_HUB_CACHE) / f"datasets--{root.replace('/', '--')}"
        folders = map(os.path.abspath, (stored, datasets.config.DOWNLOADED_DATASETS_PATH))
        name = root.removeprefix("hf://")
        address = name if name.startswith(("datasets/", "buckets/")) else f"datasets/{name}"
        return cls(tuple(folders), (f"hf://{address}/", f"hf://{address}@"))

    def has(self, path: str) -> bool:
        """Whether a path, as fsspec takes it, is that of a file of the dataset, or of one in an archive of it."""
        *inside, place = path.split("::")
        if ".." in place.split("/") or any(part.partition("://")[0] not in ARCHIVES for part in inside):
            return False
        if "://" in place:
            return place.startswith(self.repository) if self.repository else False
        return any(Path(os.path.abspath(place)).is_relative_to(folder) for folder in self.folders)

    def check(self, path: str, who: str, shown: str | None = None) -> None:
        """Raise InputError for a path that is none of the dataset's. who: says so. shown: as it stands there."""
        if not self.has(path):
            named = reprlib.repr(shown or path)
            raise InputError(f"{who} {named}, which is no file of the dataset, and is not opened; bring it there")


def _held(value: Any) -> tuple[bytes | None, str | None]:
    """(bytes, path) in what a column holds of an image: either, or both."""
    return (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)


def _file(value: Any, name: str, files: _Files = _Files()) -> bytes:
    """An image file's bytes, from what a column holds: the bytes, or their path in the dataset. Raises Unreadable."""
    import fsspec

    content, path = _held(value)
    if content is not None:
        return content
    if path is None:
        raise Unreadable(f"image {name!r} is missing: its record is empty")
    if not files.has(path):
        raise Unreadable(
            f"image {path!r} of {name!r} is no file of the dataset, and is not opened; put its bytes into the dataset"
        )
    try:
        if "://" not in path:
            return read_bytes(path, MOST_BYTES)
        with fsspec.open(path, "rb") as file:
            return bounded(file, MOST_BYTES)
    except BACKENDS as error:
        raise Unreadable(f"image {path!r} of {name!r} cannot be read ({error}); bring it back") from None


class HubImages(EncodedImages):
    """A stored dataset. Classes are those of a ClassLabel, or the distinct values of integers or strings, sorted."""

    def __init__(self, data: Data, table: Any, names: list[str] | None):
        key = data.label_key or None
        if not len(table):
            raise InputError(f"data.root={data.root!r} holds no images")
        stored = np.zeros(len(table), np.int64)
        if key is not None:
            stored = np.asarray(table.select_columns([key]).with_format("numpy")[:][key])
        if stored.ndim != 1 or stored.dtype.kind not in "iuUT":
            raise InputError(f"data.label_key={key!r}: the column must hold an integer or a string for every image")
        if names is None:
            names, stored = np.unique(stored, return_inverse=True)
        super().__init__(data.image_size, map(str, names), Reader.of(data))
        self.labels, self._files = stored.astype(np.int64), _Files.of(data.root)
        check_labels(f"data.root={data.root!r}, data.label_key={key!r}", self.labels, self.class_names)
        self._table, self._image_key = table, data.image_key
        self._name = f"{data.root}[{data.split}]"

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def encoded(self, index: int) -> tuple[bytes, int]:
        try:
            value = self._table[int(index)][self._image_key]
        except (OSError, ValueError) as error:
            raise Unreadable(f"image {self.name(index)!r} cannot be read ({error}); make the dataset anew") from None
        return _file(value, self.name(index), self._files), int(self.labels[index])


class HubStream(EncodedImages):
    """A dataset without access by index: its place n of epoch e is the n-th item of `shuffle(seed)`, `set_epoch(e)`.

    Item (position, flip), position = e * num_images + n, so `len` images make an epoch. Every reader walks the whole
    stream from the start of an epoch and decodes what it is asked for; going back further than substitutes lie ahead
    (MAX_ATTEMPTS) starts the epoch anew. So what is drawn is a matter of the position alone (and of the version of
    `datasets`, whose shuffle it is), but every loader process reads everything: few of them are best.
    An image has no index here: what is unreadable is counted by a digest of its content.
    """

    in_order, seed = True, 0

    def __init__(self, data: Data, table: Any, names: list[str], num_images: int):
        super().__init__(data.image_size, names, Reader.of(data))
        self.buffer, self._keys = data.shuffle_buffer, (data.image_key, data.label_key or None)
        self._table, self._num_images, self._root, self._files = table, num_images, data.root, _Files.of(data.root)
        self._walk: _Walk | None = None

    def shuffled(self, seed: int) -> "HubStream":
        """The same images in the order of this seed."""
        other = copy(self)
        other.seed, other._walk = seed, None
        return other

    def __len__(self) -> int:
        return self._num_images

    def name(self, position: int) -> str:
        return f"{self._root}[epoch {position // len(self)}, place {position % len(self)}]"

    def encoded(self, position: int) -> tuple[bytes, int]:
        value, label = self._row(position)
        return _file(value, self.name(position), self._files), label

    def picture(self, position: int, size: int | None = None) -> tuple[Image.Image, int]:
        try:
            return super().picture(position, size)
        except Unreadable as error:
            content, path = _held(self._row(position)[0])
            digest = hashlib.sha256((path or "").encode() if content is None else content).digest()
            error.image = int.from_bytes(digest[:8]) >> 1
            raise

    def _row(self, position: int) -> tuple[Any, Any]:
        """Image and label, undecoded. Raises InputError where the stream ends early or breaks."""
        epoch, walk = position // len(self), self._walk
        lost = walk is None or walk.process != os.getpid()
        if lost or position < walk.next - len(walk.recent) or epoch > walk.next // len(self):
            walk = self._walk = _Walk(self._rows(epoch), epoch * len(self))
            _WALKS.add(walk)
        while walk.next <= position:
            walk.recent.append(next(walk.rows))
            walk.next += 1
        return walk.recent[position - walk.next]

    def _rows(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The rows of all epochs from this one on."""
        for number in count(epoch):
            # One of its own for this walk: the epoch of a dataset is shared with the processes that forked off it.
            table = self._table.shuffle(seed=self.seed, buffer_size=self.buffer)
            table.set_epoch(number)
            # `iter` gives every loader process all of the stream, `__iter__` would share it out among them.
            rows = table.iter(batch_size=1)
            for place in range(len(self)):
                where = f"data.root={self._root!r}: the stream"
                broke = f"{where} broke at image {place:,} of epoch {number}"
                remedy = "start again to go on from the last checkpoint"
                with told(broke, OSError, ValueError, RuntimeError, remedy=remedy, every_rank=True):
                    row = next(rows, None)
                if row is None:
                    raise InputError(
                        f"{where} ends after {place:,} images, and data.num_images or the dataset itself says "
                        f"{len(self):,}; correct data.num_images",
                        every_rank=True,
                    )
                image, label = (0 if key is None else row[key][0] for key in self._keys)
                yield image, label

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_walk": None}


@dataclass(eq=False)
class _Walk:
    """rows: what is yet to come, from position `next` on. recent: those of the positions just before it. process: that
    can go on with it; one that is forked off lacks its threads."""

    rows: Iterator[tuple[Any, Any]]
    next: int
    recent: deque[tuple[Any, Any]] = field(default_factory=lambda: deque(maxlen=MAX_ATTEMPTS + 1))
    process: int = field(default_factory=os.getpid)


_WALKS: weakref.WeakSet[_Walk] = weakref.WeakSet()  # all that there are
_OF_PARENT: list[_Walk] = []


def _keep_those_of_the_parent() -> None:
    """In a process just forked off: a walk that ends waits for its threads, which are not here, be it that Python frees
    one that nobody refers to any more. So none ends."""
    _OF_PARENT.extend(_WALKS)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_those_of_the_parent)
