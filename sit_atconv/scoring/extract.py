"""Write the features of images to a folder: shards dealt out to processes, each there whole or not at all.

The folder says from its first file on what it is going to be (settings.json), and refuses to become something else; a
kill costs the shards that were under way. A batch never reaches over the end of a shard.
"""

import ctypes
import hashlib
import json
import platform
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from sit_atconv.runtime import limits, processes
from sit_atconv.runtime.claims import claim, clear_leftovers, writing
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import library_versions, lock, resolved, sha256, write_atomic
from sit_atconv.runtime.reading import Malformed, read_json
from sit_atconv.scoring import BATCH, FOLDER, REMEDY, SHARD
from sit_atconv.scoring.extractor import BESIDE, Extractor
from sit_atconv.scoring.features import INDEX, Features, read_head, shard_name
from sit_atconv.scoring.sources import Source, begun_as, class_histogram, open_source

T = TypeVar("T")
AHEAD = 3  # batches that are read before they are wanted
# Of the settings: what moves no feature beyond rounding, and where images and weights lay.
NOT_COMPARED = (
    "batch", "device", "versions", "source.path", "source.data.root", "source.manifest", "source.class_names",
    "extractor_spec", *(f"extractor.{name}" for name in BESIDE),
)  # fmt: skip


def read_as(source: dict[str, Any]) -> list[str]:
    """What is to be said of how images were read, of `Source.describe`."""
    return [f"transparent images were composited on {source['background']}"] if source.get("background") else []


def features_of(
    path: str | Path | Source, extractor: Extractor, shard: int | None = None, batch: int = BATCH,
    out: str | Path | None = None, root: str | None = None, force: bool = False,
) -> Features:  # fmt: skip
    """The features of the images at `path`, extracted unless they are there, whole and of these images.

    path: as `open_source` takes it, or a Source. shard: images per file; default: as a folder that is there has them,
    or 1,000. batch: images at once; it moves features by float rounding alone. out: the folder; default
    the one of `default_folder`, below `root` where that is given. force: what is there and would be refused is set
    aside.
    Every process of a distributed launch calls this, and makes its part of the missing shards.
    Raises InputError for images that cannot be read, a folder with something else in it, or that another run writes to,
    and a full disk; in every process, whichever found it.
    """
    limits.SHARD_IMAGES.check("shard=", shard)
    limits.BATCH.check("batch=", batch)
    source = path if isinstance(path, Source) else open_source(path)
    out = resolved(out if out is not None else default_folder(source.place, extractor, root), FOLDER)
    extractor.check_source(source)
    with ExitStack() as held, processes.lost_ones_told():
        processes.join()

        def begin() -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
            stated = describe(source, extractor, shard or SHARD, batch)
            not_compared = NOT_COMPARED if shard else (*NOT_COMPARED, "shard")  # else it is as the folder has it
            settings = claim(out, stated, not_compared, "features", FOLDER, REMEDY, force)
            found = settings.get("shard")
            if type(found) is not int or found < 1:
                raise InputError(f"{FOLDER} {str(out)!r}: its settings.json has {found!r} images per file; {REMEDY}")
            if (out / INDEX).is_file() and not missing_shards(out, settings):
                return settings, []  # nothing to write: others may read at the same time, and the disk be read-only
            with writing(out, FOLDER):
                held.enter_context(lock(out, f"{FOLDER} {str(out)!r}"))
            clear_leftovers(out, FOLDER)
            missing = missing_shards(out, settings)
            if missing:  # it does not call itself whole until they are there
                with writing(out, FOLDER):
                    (out / INDEX).unlink(missing_ok=True)
            return settings, missing

        settings, missing = processes.first(begin)
        own = missing[processes.rank() :: processes.count()]
        processes.together(lambda: _make_shards(source, extractor, batch, out, own))
        if missing and platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # it keeps 400 MB of the network's that a score would come on top of
        processes.first(lambda: finish(out, settings))
    features = Features(out)
    extractor.streams = extractor.streams or features.streams  # of a module of one's own that had nothing to do
    return features


def default_folder(path: Path, extractor: Extractor, root: str | None = None) -> Path:
    """Where the features of images at `path`, by this extractor, go unless told: SRC/features/NAME for a folder,
    STEM.features/NAME for an npz, or below `root`, in a folder that is of this path alone. path: a Source's `place`;
    of a recipe, that is STEM and a digest of what it says of its images.

    NAME is the extractor's; where features by another of that name lie there, by other weights or code, a digest of all
    that this one's depend on follows it.
    """
    if root is not None:
        place = path.resolve()
        parent = Path(root) / f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    else:
        parent = path / "features" if path.is_dir() else path.with_suffix(".features")
    own = {key: value for key, value in extractor.describe().items() if key not in BESIDE}
    plain = parent / extractor.name
    there = begun_as(plain).get("extractor", own)
    if isinstance(there, dict) and {key: value for key, value in there.items() if key not in BESIDE} == own:
        return plain
    digest = hashlib.sha256(json.dumps(extractor.describe(), sort_keys=True).encode()).hexdigest()
    return parent / f"{extractor.name}-{digest[:8]}"


def describe(source: Source, extractor: Extractor, shard: int, batch: int) -> dict[str, Any]:
    """settings.json; reads all images once, so that one that cannot be read is found before anything is written."""
    return {
        "source": source.describe(),
        "n": source.n,
        "image_shape": list(source.image_shape),
        "class_histogram": class_histogram(source.labels),
        "extractor": extractor.describe(),
        "extractor_spec": extractor.spec,
        "shard": shard,
        "batch": batch,
        "device": extractor.device.type,
        "versions": library_versions("timm", "torch-fidelity"),
    }


def missing_shards(out: Path, settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(number, first, stop) of every shard that is not there, or not whole; or not the one that features.json names."""
    n, shard = settings["n"], settings["shard"]
    spans = [(number, first, min(first + shard, n)) for number, first in enumerate(range(0, n, shard))]
    try:
        digests = read_json(out / INDEX, {"shards": {str: str}})["shards"]
    except (OSError, Malformed):
        digests = {}

    def is_whole(span: tuple[int, int, int]) -> bool:
        number, first, stop = span
        path = out / shard_name(number)
        try:
            index = read_head(path)[0]
            return index.tolist() == list(range(first, stop)) and digests.get(path.name) in (None, sha256(path))
        except (OSError, SafetensorError):
            return False

    with ThreadPoolExecutor() as pool:
        return [span for span, whole in zip(spans, pool.map(is_whole, spans), strict=True) if not whole]


def _make_shards(
    source: Source, extractor: Extractor, batch: int, out: Path, spans: list[tuple[int, int, int]]
) -> None:  # fmt: skip
    """One thread reads ahead, another writes, and the device has its next batch before the last is fetched."""
    pixels = (each for _, first, stop in spans for each in source.batches(first, stop, batch))
    if extractor.device.type == "cuda":
        pixels = (each.pin_memory() for each in pixels)
    total = sum(stop - first for _, first, stop in spans)
    label = "features" if processes.count() == 1 else f"features (1 of {processes.count()} processes)"
    pending = None
    with (
        Progress(total=total, desc=label, unit="image", delay=1e-9, disable=not (spans and processes.is_main())) as bar,
        ThreadPoolExecutor(1, "shards") as writer,
        closing(ahead(pixels)) as batches,
    ):
        launched = map(extractor.launch, batches)
        fetched = (extractor.fetch(streams) for streams, _ in pairwise(chain(launched, [None])))
        for span in spans:
            parts = []
            for streams in islice(fetched, -(-(span[2] - span[1]) // batch)):
                parts.append(streams)
                bar.update(len(next(iter(streams.values()))))
            if pending is not None:
                pending.result()
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            assert all(len(each) == span[2] - span[1] for each in tensors.values()), "batches of other sizes"
            pending = writer.submit(_write_shard, out, span, tensors, source.labels)
        if pending is not None:
            pending.result()


def ahead(items: Iterable[T], depth: int = AHEAD) -> Iterator[T]:
    """The items, each made by a thread up to `depth` before it is wanted."""
    items, end = iter(items), object()
    reader = ThreadPoolExecutor(1, "ahead")
    try:
        waiting = deque(reader.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)


def _write_shard(out: Path, span: tuple[int, int, int], tensors: dict[str, torch.Tensor], labels) -> None:
    """Write a shard whole or not at all, even where two processes do. Raises InputError where the disk is full."""
    number, first, stop = span
    tensors = {**tensors, "index": torch.arange(first, stop)}
    if labels is not None:
        tensors["labels"] = torch.from_numpy(labels[first:stop].copy())
    with writing(out, FOLDER):
        write_atomic(out / shard_name(number), save(tensors))


def finish(out: Path, settings: dict[str, Any]) -> None:
    """Write features.json of a folder with all of its shards, unless it is there."""
    if (out / INDEX).is_file():
        return
    names = [shard_name(number) for number in range(-(-settings["n"] // settings["shard"]))]
    with writing(out, FOLDER), ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, [out / name for name in names])
        info = {
            "n": settings["n"],
            "shards": dict(zip(names, digests, strict=True)),
            "streams": read_head(out / names[0])[2],
            "class_histogram": settings["class_histogram"],
            "labels": settings["class_histogram"] is not None,
            "extractor_spec": settings.get("extractor_spec"),
            **{key: settings[key] for key in ("source", "extractor", "image_shape", "batch", "device", "versions")},
        }
        write_atomic(out / INDEX, json.dumps(info, indent=1))
