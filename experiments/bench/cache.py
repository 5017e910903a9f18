"""Time shuffled reads of a cache of latents, as training makes them, against other storages of the same numbers.

A synthetic cache of ImageNet's shape is made in a temporary folder, under TMPDIR where that is set, and in the other
forms beside it. Every storage is read through a DataLoader, in the same random order, up to the batch of moments that
posterior draws would follow. All of it fits the page cache: what is compared is the way from there to a batch, not the
disk.
"""

import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import device_name
from sit_atconv.commands.options import add_number, add_out
from sit_atconv.data.latent_cache import CROP, FORMAT_VERSION, LatentCache, shard_name, shard_ranges
from sit_atconv.latents.encode import finish, write_shard
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table

SHAPE = (8, 32, 32)  # moments of a latent of ImageNet at 256 pixels
SHARD_IMAGES = 4096
CLASSES = 1000
GOAL = 20_000  # latents/s


Read = Callable[[list[int]], torch.Tensor]  # numbers of latents -> moments (B, *SHAPE)


def synthetic(rows: np.ndarray) -> np.ndarray:
    """Moments (N, *SHAPE) of latents by number, fp16: noise that is cheap to make, and the number itself in front."""
    noise = np.random.default_rng(int(rows[0])).standard_normal((len(rows), 1, *SHAPE[1:]), dtype=np.float32)
    moments = np.repeat(noise.astype(np.float16), SHAPE[0], axis=1)
    moments[:, 0, 0, 0], moments[:, 0, 0, 1] = np.divmod(rows, 1024)  # both of them numbers that fp16 holds
    return moments


def numbers(moments: np.ndarray) -> np.ndarray:
    """The numbers of the latents, from their moments."""
    return moments[:, 0, 0, 0].astype(np.int64) * 1024 + moments[:, 0, 0, 1].astype(np.int64)


def parts(total: int):
    for first in range(0, total, 2 * SHARD_IMAGES):
        yield np.arange(first, min(first + 2 * SHARD_IMAGES, total))


def make_cache(folder: Path, total: int) -> None:
    """A cache as `encode` makes it; latent 2 i + f is image i with flip f."""
    channels, height, width = SHAPE
    codec = {"codec": "vae", "vae": "synthetic", "sha256": "0" * 64, "scale": 1.0, "shift": 0.0}
    settings = {
        "format_version": FORMAT_VERSION, "codec": codec, "crop": CROP,
        "image_size": 8 * height, "channels": 3, "latent_shape": [channels // 2, height, width], "dtype": "fp16",
        "flips": [False, True], "class_names": [str(n) for n in range(CLASSES)], "num_images": total // 2,
        "shard_images": SHARD_IMAGES, "data": {},
    }  # fmt: skip
    for (first, count), rows in zip(shard_ranges(total // 2, SHARD_IMAGES), parts(total), strict=True):
        moments = torch.from_numpy(synthetic(rows)).reshape(count, 2, *SHAPE)
        write_shard(folder / shard_name(first, count), settings, moments, torch.arange(first, first + count) % CLASSES)
    finish(folder, settings)


def open_cache(folder: Path) -> Read:
    cache = LatentCache(str(folder), verify=False)
    return lambda rows: cache.read([row // 2 for row in rows], [row % 2 == 1 for row in rows])[0]


def open_shards(folder: Path) -> Read:
    """The files of a cache mapped by numpy, past all that the library does: row by row, as LatentCache reads them."""
    mapped = []
    for path in sorted(folder.glob("*.safetensors")):
        first, stop = map(int, path.stem.split("-")[1:])
        shape = (stop - first, 2, *SHAPE)
        begin = path.stat().st_size - 2 * math.prod(shape)  # the moments come last
        mapped.append(np.memmap(path, np.float16, mode="r", offset=begin, shape=shape))

    def read(rows: list[int]) -> torch.Tensor:
        batch = np.empty((len(rows), *SHAPE), np.float16)
        for place, row in enumerate(rows):
            shard, image = divmod(row // 2, SHARD_IMAGES)
            batch[place] = mapped[shard][image, row % 2]
        return torch.from_numpy(batch)

    return read


def open_slices(folder: Path) -> Read:
    """The files of a cache through safetensors' slices, a latent at a time."""
    files, opened = sorted(folder.glob("*.safetensors")), {}

    def row(number: int) -> torch.Tensor:
        shard, place = divmod(number // 2, SHARD_IMAGES)
        if shard not in opened:
            opened[shard] = safe_open(files[shard], framework="pt").get_slice("moments")
        return opened[shard][place, number % 2]

    return lambda rows: torch.stack([row(number) for number in rows])


def make_memmap(folder: Path, total: int) -> None:
    """One .npy file."""
    array = np.lib.format.open_memmap(folder / "moments.npy", mode="w+", dtype=np.float16, shape=(total, *SHAPE))
    for rows in parts(total):
        array[rows[0] : rows[-1] + 1] = synthetic(rows)
    array.flush()


def open_memmap(folder: Path) -> Read:
    mapped = np.load(folder / "moments.npy", mmap_mode="r", allow_pickle=False)
    return lambda rows: torch.from_numpy(mapped[rows])


def make_arrow(folder: Path, total: int, as_bytes: bool) -> None:
    """A Hugging Face dataset with a column of arrays, or of their bytes."""
    import datasets

    def examples():
        for rows in parts(total):
            for moments in synthetic(rows):
                yield {"moments": moments.tobytes() if as_bytes else moments}

    column = datasets.Value("binary") if as_bytes else datasets.Array3D(SHAPE, "float16")
    features = datasets.Features({"moments": column})
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = datasets.Dataset.from_generator(examples, features=features, cache_dir=scratch, writer_batch_size=512)
        made.save_to_disk(folder)


def open_arrow(folder: Path) -> Read:
    import datasets

    stored = datasets.load_from_disk(str(folder))
    if stored.features["moments"] != datasets.Value("binary"):
        arrays = stored.with_format("torch")
        return lambda rows: arrays[rows]["moments"]

    def read(rows: list[int]) -> torch.Tensor:
        joined = bytearray(b"".join(stored[rows]["moments"]))
        return torch.frombuffer(joined, dtype=torch.float16).reshape(len(rows), *SHAPE)

    return read


FOLDERS = {
    "cache": make_cache,
    "memmap": make_memmap,
    "bytes": partial(make_arrow, as_bytes=True),
    "arrays": partial(make_arrow, as_bytes=False),
}
STORAGES = {
    "LatentCache": ("cache", open_cache),
    "numpy.memmap, one file": ("memmap", open_memmap),
    "numpy.memmap, the same files": ("cache", open_shards),
    "safetensors slices": ("cache", open_slices),
    "datasets, bytes": ("bytes", open_arrow),
    "datasets, arrays": ("arrays", open_arrow),
}


class Rows(Dataset):
    """Latents by number, a batch at a time."""

    def __init__(self, read: Read):
        self.read = read

    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        return self.read(rows)


def anonymous_bytes() -> Counter:
    """Resident memory of this process and its children that no file stands behind, in two counts.

    "pss": pages that processes share, as a forked worker those of its parent, are counted once. "rss": VmRSS - RssFile,
    in which every process counts them.
    """
    pss = rss = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        rollup, status = (_kibibytes(f"/proc/{pid}/{name}") for name in ("smaps_rollup", "status"))
        pss += 1024 * (rollup["Pss_Anon"] + rollup["Pss_Shmem"])
        rss += 1024 * (status["VmRSS"] - status["RssFile"])
    return Counter(pss=pss, rss=rss)


def _kibibytes(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def epoch(storage: str, folder: Path, total: int, batch: int, workers: int, seed: int) -> tuple[float, Counter]:
    """Latents per second over an epoch in random order, and the most anonymous memory meanwhile.

    Every batch is compared with what was asked for; the clock runs from the first batch on, past the start of workers.
    """
    torch.set_num_threads(1)
    place, opens = STORAGES[storage]
    order = np.random.default_rng(seed).permutation(total)
    batches = [order[start : start + batch].tolist() for start in range(0, total - batch + 1, batch)]
    context = "fork" if workers else None  # as loaders do by themselves, but not in a process that was spawned
    rows = Rows(opens(folder / place))
    loader = DataLoader(rows, None, sampler=batches, num_workers=workers, multiprocessing_context=context)
    peak, begin = Counter(), 0.0
    for number, moments in enumerate(loader):
        if not number:
            begin = time.perf_counter()
        if not np.array_equal(numbers(moments.numpy()), batches[number]):
            raise RuntimeError(f"{storage}: batch {number} holds other latents than those asked for; not timed")
        if number % 64 == 1:
            peak |= anonymous_bytes()  # of each count the larger one
    return batch * (len(batches) - 1) / (time.perf_counter() - begin), peak


def in_new_process(function: Callable, *arguments):
    """What a function returns, called in a process of its own: no storage finds what another left in memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def to_markdown(result: dict) -> str:
    lines = [
        f"Shuffled reads of {result['latents']:,} latents of {' x '.join(map(str, result['shape']))} fp16, batches of "
        f"{result['batch']}, {result['workers']} loader processes; {result['machine']}; median of {result['rounds']} "
        "interleaved epochs, from the page cache. Anonymous memory is of all processes together, what they import "
        "included: with pages that they share counted once, and as the sum of VmRSS - RssFile.",
        "",
    ]
    head = ["storage", "latents/s", "of LatentCache", "anonymous MB", "VmRSS - RssFile, MB"]
    rows = []
    for row in result["rows"]:
        rate, megabytes = row["latents_per_s"], (f"{row['anonymous_bytes'][key] / 1e6:,.0f}" for key in ("pss", "rss"))
        rows.append([row["storage"], f"{rate:,.0f}", f"{rate / result['rows'][0]['latents_per_s']:.2f}", *megabytes])
    return "\n".join([*lines, markdown_table(head, rows, text=("storage",)), ""])


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.cache", description=__doc__)
    latents = limits.Range(2, 10**9, "each takes 16 kB of the disk")
    add_number(parser, "--latents", latents, 100_000, "two per image, of 16 kB each")
    add_number(parser, "--batch", limits.BATCH, 256, "latents per batch")
    add_number(parser, "--workers", limits.WORKERS, 2, "loader processes")
    add_number(parser, "--rounds", limits.ROUNDS, 3, "epochs of each storage, in turn")
    add_out(parser, "writes STEM.json and .md", default="runs/cache", metavar="STEM")
    args = parser.parse_args(argv)
    if args.latents < 2 * args.batch or args.latents % 2:
        parser.error(f"--latents {args.latents}: an even number, at least two batches")
    files = Results(named(args.out, ".json", ".md"), args.force, "machine", "latents", "goal", "rows")
    rates, peaks = {name: [] for name in STORAGES}, {name: Counter() for name in STORAGES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, make in Progress(FOLDERS.items(), desc="make", unit="storage", leave=False):
            (folder / name).mkdir()
            in_new_process(make, folder / name, args.latents)
        turns = [(number, name) for number in range(args.rounds) for name in STORAGES]
        for number, name in Progress(turns, desc="read", unit="epoch", leave=False):
            rate, peak = in_new_process(epoch, name, folder, args.latents, args.batch, args.workers, number)
            rates[name].append(rate)
            peaks[name] |= peak
    result = {
        "machine": device_name(torch.device("cpu")), "cores": os.cpu_count(), "latents": args.latents, "shape": SHAPE,
        "batch": args.batch, "workers": args.workers, "rounds": args.rounds, "goal": GOAL,
        "rows": [
            {"storage": name, "latents_per_s": statistics.median(rates[name]), "anonymous_bytes": peaks[name]}
            for name in STORAGES
        ],
        "versions": library_versions("datasets"),
    }  # fmt: skip
    files.write(result, to_markdown(result))
    print(to_markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
