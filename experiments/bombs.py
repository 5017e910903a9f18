"""Files that ask for far more memory than they are large: what reading each takes, in a process of its own.

    python -m experiments.bombs

A bomb is right when it ends in an InputError; the table says what it took until then.
"""

import io
import json
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from PIL import Image
from timm.models import save_for_hf

from sit_atconv.config import Data, load_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.archive import Zip
from sit_atconv.data.database import Lmdb
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import decode
from sit_atconv.latents.codecs import VaeCodec
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines import export
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.report.runs import read_runs
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, InputError, command
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.vit import load_vit
from sit_atconv.sampling import FLOW
from sit_atconv.sampling.labels import sample_labels
from sit_atconv.scoring.extractor import Extractor
from sit_atconv.scoring.refs import read_moments
from sit_atconv.scoring.sources import open_source
from sit_atconv.scoring.table import tabulate
from sit_atconv.training.checkpoint import load_trained

Read = Callable[[Path], object]
forks = multiprocessing.get_context("fork")
NESTED = "[" * 100_000
SMALL = {"sample_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 2, "in_channels": 1}


@dataclass(frozen=True)
class Taken:
    """What reading took. memory: the most, in bytes beyond what the process had before. said: the InputError."""

    name: str
    stored: int
    memory: int
    seconds: float
    said: str | None


def png(width: int, height: int) -> bytes:
    """A black image, of two colours so that this process takes no more than a byte a pixel."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "png")
    return buffer.getvalue()


def npy(dtype: str, shape: tuple[int, ...], zeros: int = 0) -> bytes:
    """A .npy that says this shape and holds that many bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(zeros)


def archive(path: Path, **members: bytes) -> Path:
    """A compressed zip of these members, each a .npy."""
    path = path.with_suffix(".npz")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def lying_zip(path: Path, size: int) -> Path:
    """A zip of images whose first entry states `size` bytes in its zip64 field."""
    with zipfile.ZipFile(path, "w") as file:
        for number in range(2):
            file.writestr(f"a/{number}.png", png(8, 8))
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    name = struct.unpack_from("<H", content, entry + 28)[0]
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    struct.pack_into("<II", content, entry + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", content, entry + 30, len(extra))
    content[entry + 46 + name : entry + 46 + name] = extra
    end = content.rfind(b"PK\x05\x06")
    struct.pack_into("<I", content, end + 12, struct.unpack_from("<I", content, end + 12)[0] + len(extra))
    path.write_bytes(content)
    return path


def lmdb_of(path: Path, label: int) -> Path:
    """An LMDB of one image with that label."""
    import lmdb

    image, number = png(8, 8), struct.Struct("<BiB")  # a pickle's BININT, and what follows it
    records = {
        b"0": b"\x80\3B" + struct.pack("<I", len(image)) + image + number.pack(ord("J"), label, 0x86) + b".",
        b"__len__": b"\x80\3" + number.pack(ord("J"), 1, ord(".")),
        b"__keys__": b"\x80\3]C\x010a.",
    }
    with lmdb.open(str(path), map_size=1 << 20) as environment, environment.begin(write=True) as put:
        for key, value in records.items():
            put.put(key, value)
    return path


def model(path: Path, **options) -> Path:
    """A small model whose config.json says something else."""
    SiTTransformer2DModel(**SMALL).save_pretrained(path)
    return changed(path / "config.json", **options).parent


def autoencoder(path: Path, **options) -> Path:
    """A small autoencoder whose config.json says something else."""
    small = {"block_out_channels": [4], "norm_num_groups": 2, "latent_channels": 1, "sample_size": 8}
    AutoencoderKL(**small).save_pretrained(path)
    return changed(path / "config.json", **options).parent


def pipeline(path: Path, **options) -> Path:
    """A small pipeline whose scheduler_config.json says something else."""
    scheduler = DPMSolverMultistepScheduler(**FLOW)
    SiTPipeline(SiTTransformer2DModel(**SMALL), scheduler=scheduler).save_pretrained(path)
    return changed(path / "scheduler" / "scheduler_config.json", **options).parents[1]


def classifier(path: Path, **options) -> Path:
    """A small ViT of timm whose config.json asks for another one."""
    save_for_hf(timm.create_model("test_vit"), str(path), safe_serialization=True)
    return changed(path / "config.json", model_args=options).parent


def card(path: Path, content: str) -> Path:
    """A folder of a dataset that tells this of itself."""
    return text(path / "README.md", f"---\n{content}\n---\n").parent


def changed(path: Path, **options) -> Path:
    """The JSON file with these options, or 100,000 brackets where there are none."""
    content = json.dumps(read_json(path) | options) if options else NESTED
    path.write_text(content)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def families(here: Path) -> Iterator[tuple[str, Callable[..., Path], dict[str, dict[str, Any]], Read]]:
    """Bombs of one kind: what they are called, what makes a file or folder, with which options each, what reads it."""

    def open_hub(path: Path) -> object:
        return open_dataset(Data("hf", str(path), 8))

    def read_labels(path: Path) -> object:
        return sample_labels(str(path), 2, 2, 0, Classes(2))

    with suppress(InputError):
        open_hub(here)  # the library itself is no part of what its files take

    brackets, zeros, small, tb = {"content": NESTED}, 1 << 26, npy("|u1", (2, 8, 8, 1), 128), 1 << 40
    aliases = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
    yamls = {"100,000 brackets": brackets, "10^11 aliases": {"content": aliases}}
    sizes = {f"{size:.3g}": {"size": size} for size in (2**50, 2**64 - 1)}
    yield "zip entry that states {} bytes", lying_zip, sizes, lambda path: Zip(str(path), 8)[0, False]
    npz = {
        "arr_0 of 2^65 bytes": {"arr_0": npy("|u1", (2, 2**32, 2**32, 1))},
        "images of 2^27 pixels": {"arr_0": npy("|u1", (2, 1 << 14, 1 << 13, 1), 4 * zeros)},
        "labels of 8 TB": {"arr_0": small, "arr_1": npy("<i8", (tb,))},
        "labels of 64 MB for 2 images": {"arr_0": small, "arr_1": npy("<i8", (zeros // 8,), zeros)},
    }
    yield "npz, {}", archive, npz, open_source
    moments = {
        "mu of 8 TB": {"mu": npy("<f8", (tb,)), "sigma": npy("<f8", (2, 2), 32)},
        "sigma of 64 MB for 2 features": {"mu": npy("<f8", (2,), 16), "sigma": npy("<f8", (zeros // 8, 1), zeros)},
        "meta of 64 MB": {"mu": npy("<f8", (2,), 16), "meta": npy("<U1", (zeros // 4 + 1,), zeros + 4)},
    }
    extractor = Extractor("none", "none", torch.nn.Identity(), {}, torch.device("cpu"))
    yield "npz, {}", archive, moments, lambda path: read_moments(path, extractor)
    results = {"100,000 brackets": brackets, "3 million lists": {"content": f"[{'[],' * 3_000_000}0]"}}
    yield "result of {}", text, results, lambda path: tabulate([path])
    yield "recipe of {}", text, yamls, load_recipe
    yield "README.md of a dataset, {}", card, yamls, open_hub
    yield "--labels of {}", text, {"100,000 brackets": brackets}, read_labels
    configs = {"depth": 10**5, "sample_size": 10**6, "num_classes": 10**12, "mlp_ratio": 1e30}
    yield "config.json, {}", model, each_alone(configs), load_trained
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5000, "up_block_types": ["UpDecoderBlock2D"] * 5000}
    autoencoders = {
        "100,000 brackets": {}, "sample_size 10^6": {"sample_size": 10**6},
        "a million wide": {"block_out_channels": [10**6]}, "65,536 wide": {"block_out_channels": [1 << 16]},
        "5,000 blocks": {"block_out_channels": [4] * 5000, **blocks},
        "layers_per_block 10^6": {"layers_per_block": 10**6},
    }  # fmt: skip
    yield "config.json of a VAE, {}", autoencoder, autoencoders, lambda path: VaeCodec(str(path), 1)
    schedulers = {"100,000 brackets": {}, **each_alone({"num_train_timesteps": 10**9, "solver_order": 10**9})}
    yield "scheduler_config.json, {}", pipeline, schedulers, export.open_source
    vits = each_alone({"depth": 10**5, "embed_dim": 1 << 16, "img_size": 10**5})
    yield "config.json of timm, {}", classifier, vits, lambda path: load_vit(f"local-dir:{path}", "encoder", "")


def each_alone(options: dict[str, float]) -> dict[str, dict[str, float]]:
    return {f"{name} {value:.3g}": {name: value} for name, value in options.items()}


def bombs(here: Path) -> dict[str, tuple[Path, Read]]:
    """What each is called, its file, and what reads it."""
    linked, square = here / "linked", here / "square.png"
    (linked / "a").mkdir(parents=True)
    (linked / "a" / "0.png").symlink_to("/dev/zero")
    os.mkfifo(linked / "a" / "1.png")
    square.write_bytes(png(13_000, 13_000))
    told = text(here / "told" / "manifest.json", NESTED).parent
    logged = text(here / "logged" / "log.jsonl", '"' + "x" * (1 << 26)).parent
    found = {
        "PNG of 13,000 x 13,000 pixels": (square, lambda path: decode(path.read_bytes(), 64, False, path.name)),
        "image that is /dev/zero": (linked, lambda path: Folder(str(path), 8)[0, False]),
        "image that is a FIFO": (linked, lambda path: Folder(str(path), 8)[1, False]),
        "LMDB with the label 2^31 - 1": (lmdb_of(here / "lmdb", 2**31 - 1), lambda path: Lmdb(str(path), 8)[0, False]),
        "manifest.json of 100,000 brackets": (told, open_source),
        "log.jsonl of a line of 64 MB": (logged, lambda path: read_runs([str(path)])),
    }
    for family, (called, make, each, read) in enumerate(families(here)):
        for number, (name, options) in enumerate(each.items()):
            found[called.format(name)] = make(here / f"{family}-{number}", **options), read
    return found


def measure(name: str, path: Path, read: Read) -> Taken:
    """Read a bomb in a child process. Linux alone: a child's peak begins with the memory that it was born with."""

    def reading() -> None:
        said, before, began = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            read(path)
        except InputError as error:
            said = str(error)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        took = time.perf_counter() - began
        its.send(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, took, said))

    ours, its = forks.Pipe()
    child = forks.Process(target=reading)
    child.start()
    its.close()
    memory, seconds, said = ours.recv()
    child.join()
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file() and not each.is_symlink()]
    return Taken(name, sum(each.stat().st_size for each in files), memory, seconds, said)


@command
def main(argv: list[str] | None = None) -> None:
    ArgumentParser(prog="python -m experiments.bombs", description=__doc__.split("\n")[0]).parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, read) in Progress(bombs(Path(folder)).items(), "bombs", unit="bomb", delay=1):
            taken = measure(name, path, read)
            figures = f"{taken.stored / 1e3:,.0f}", f"{taken.memory / 1e6:,.0f}", f"{taken.seconds:.2f}"
            rows.append([name, *figures, "no" if taken.said is None else "yes"])
    print(markdown_table(["bomb", "stored (kB)", "memory (MB)", "seconds", "refused"], rows, text=("bomb", "refused")))


if __name__ == "__main__":
    main()
