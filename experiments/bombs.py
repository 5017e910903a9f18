"""Files that ask for far more memory than they are large: what reading each takes, in a process of its own.

    python -m experiments.bombs

A bomb is right when it ends in an InputError; the table says what it took until then.
"""

import io
import json
import os
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from timm.models import save_for_hf

from eval.extractor import Extractor
from eval.refs import read_moments
from eval.report.runs import read_runs
from eval.sources import open_source
from eval.table import tabulate
from sampling.labels import sample_labels
from sit_atconv.checkpoint import load_trained
from sit_atconv.config import Data, load_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.archive import Zip
from sit_atconv.data.database import Lmdb
from sit_atconv.data.folder import Folder
from sit_atconv.data.images import Reader
from sit_atconv.errors import ArgumentParser, InputError, command
from sit_atconv.latents.codecs import VaeCodec
from sit_atconv.markdown import markdown_table
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.pipelines import export
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.reading import parse_json, read_json
from sit_atconv.vit import load_vit

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
    """A black image, a megabyte of pixels to a kilobyte of file."""
    rows, deflate = b"\0" * (width * 3 + 1), zlib.compressobj(9)
    data = b"".join([*(deflate.compress(rows) for _ in range(height)), deflate.flush()])

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def npy(dtype: str, shape: tuple[int, ...], zeros: int = 0) -> bytes:
    """A .npy that says this shape and holds that many bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(zeros)


def archive(path: Path, **members: bytes) -> Path:
    """A compressed zip of these members, each a .npy."""
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
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    SiTPipeline(SiTTransformer2DModel(**SMALL), scheduler=scheduler).save_pretrained(path)
    return changed(path / "scheduler" / "scheduler_config.json", **options).parents[1]


def classifier(path: Path, **options) -> Path:
    """A small ViT of timm whose config.json asks for another one."""
    save_for_hf(timm.create_model("test_vit"), str(path), safe_serialization=True)
    return changed(path / "config.json", model_args=options).parent


def card(path: Path, content: str) -> Path:
    """A folder of a dataset that tells this of itself."""
    path.mkdir()
    return text(path / "README.md", f"---\n{content}\n---\n").parent


def changed(path: Path, **options) -> Path:
    """The JSON file with these options, or 100,000 brackets where there are none."""
    content = json.dumps(read_json(path) | options) if options else NESTED
    path.write_text(content)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def bombs(here: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """What each is called, its file, and what reads it."""
    linked = here / "linked" / "a"
    linked.mkdir(parents=True)
    (linked / "0.png").symlink_to("/dev/zero")
    os.mkfifo(linked / "1.png")
    told = here / "told"
    told.mkdir()
    square = here / "square.png"
    square.write_bytes(png(13_000, 13_000))
    aliases = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))])
    zeros = 1 << 26
    small, tb = npy("|u1", (2, 8, 8, 1), 128), 1 << 40
    npz = {
        "npz, arr_0 of 2^65 bytes": {"arr_0": npy("|u1", (2, 2**32, 2**32, 1))},
        "npz, images of 2^27 pixels": {"arr_0": npy("|u1", (2, 1 << 14, 1 << 13, 1), 4 * zeros)},
        "npz, labels of 8 TB": {"arr_0": small, "arr_1": npy("<i8", (tb,))},
        "npz, labels of 64 MB for 2 images": {"arr_0": small, "arr_1": npy("<i8", (zeros // 8,), zeros)},
    }
    statistics = {
        "npz, mu of 8 TB": {"mu": npy("<f8", (tb,)), "sigma": npy("<f8", (2, 2), 32)},
        "npz, sigma of 64 MB for 2 features": {"mu": npy("<f8", (2,), 16), "sigma": npy("<f8", (zeros // 8, 1), zeros)},
        "npz, meta of 64 MB": {"mu": npy("<f8", (2,), 16), "meta": npy("<U1", (zeros // 4 + 1,), zeros + 4)},
    }
    with suppress(InputError):
        _hub(here)  # the library itself is no part of what its files take
    cards = {"100,000 brackets": NESTED, "10^11 aliases": aliases}
    logged = here / "logged"
    logged.mkdir()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5000, "up_block_types": ["UpDecoderBlock2D"] * 5000}
    autoencoders = {
        "100,000 brackets": {}, "sample_size 10^6": {"sample_size": 10**6},
        "a million wide": {"block_out_channels": [10**6]}, "65,536 wide": {"block_out_channels": [1 << 16]},
        "5,000 blocks": {"block_out_channels": [4] * 5000, **blocks},
        "layers_per_block 10^6": {"layers_per_block": 10**6},
    }  # fmt: skip
    schedulers = {
        "100,000 brackets": {}, "num_train_timesteps 10^9": {"num_train_timesteps": 10**9},
        "solver_order 10^9": {"solver_order": 10**9},
    }  # fmt: skip
    configs = {"depth": 10**5, "sample_size": 10**6, "num_classes": 10**12, "mlp_ratio": 1e30}
    return {
        "PNG of 13,000 x 13,000 pixels": (square, lambda path: Reader()(path.read_bytes(), path.name, 64)),
        "image that is /dev/zero": (linked.parent, lambda path: Folder(str(path), 8)[0, False]),
        "image that is a FIFO": (linked.parent, lambda path: Folder(str(path), 8)[1, False]),
        **{
            f"zip entry that states {size:.3g} bytes": (
                lying_zip(here / f"{size}.zip", size),
                lambda path: Zip(str(path), 8)[0, False],
            )
            for size in (2**50, 2**64 - 1)
        },
        "LMDB with the label 2^31 - 1": (lmdb_of(here / "lmdb", 2**31 - 1), lambda path: Lmdb(str(path), 8)[0, False]),
        **{name: (archive(here / f"{name}.npz", **members), open_source) for name, members in npz.items()},
        **{name: (archive(here / f"{name}.npz", **members), _moments) for name, members in statistics.items()},
        "manifest.json of 100,000 brackets": (text(told / "manifest.json", NESTED).parent, open_source),
        "result of 100,000 brackets": (text(here / "brackets.json", NESTED), _table),
        "result of 3 million lists": (text(here / "lists.json", f"[{'[],' * 3_000_000}0]"), _table),
        "recipe of 100,000 brackets": (text(here / "brackets.yaml", NESTED), load_recipe),
        "recipe of 10^11 aliases": (text(here / "aliases.yaml", aliases), load_recipe),
        **{
            f"config.json, {name} {value:.3g}": (model(here / name, **{name: value}), load_trained)
            for name, value in configs.items()
        },
        **{
            f"config.json of a VAE, {name}": (autoencoder(here / f"vae-{number}", **options), _vae)
            for number, (name, options) in enumerate(autoencoders.items())
        },
        **{
            f"scheduler_config.json, {name}": (pipeline(here / f"scheduler-{number}", **options), export.open_source)
            for number, (name, options) in enumerate(schedulers.items())
        },
        **{
            f"config.json of timm, {name} {value:.3g}": (classifier(here / f"vit-{name}", **{name: value}), _vit)
            for name, value in {"depth": 10**5, "embed_dim": 1 << 16, "img_size": 10**5}.items()
        },
        **{
            f"README.md of a dataset, {name}": (card(here / f"card-{number}", content), _hub)
            for number, (name, content) in enumerate(cards.items())
        },
        "--labels of 100,000 brackets": (text(here / "labels", NESTED), _labels),
        "log.jsonl of a line of 64 MB": (text(logged / "log.jsonl", '"' + "x" * zeros).parent, _report),
    }


def _labels(path: Path) -> object:
    return sample_labels(str(path), 2, 2, 0, 2)


def _report(path: Path) -> object:
    return read_runs([str(path)])


def _vae(path: Path) -> object:
    return VaeCodec(str(path), 1)


def _vit(path: Path) -> object:
    return load_vit(f"local-dir:{path}", "encoder", "")


def _hub(path: Path) -> object:
    return open_dataset(Data("hf", str(path), 8))


def _table(path: Path) -> object:
    return tabulate([path])


def _moments(path: Path) -> object:
    return read_moments(path, Extractor("none", "none", torch.nn.Identity(), {}, torch.device("cpu")))


def measure(name: str, path: Path, read: Callable[[Path], object]) -> Taken:
    """Read a bomb in a child process. Linux alone: a child's peak begins with the memory that it was born with."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        said, before, began = None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            read(path)
        except InputError as error:
            said = str(error)
        except BaseException as error:
            said = None
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        took = time.perf_counter() - began
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(into, json.dumps([(most - before) * 1024, took, said]).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        memory, seconds, said = parse_json(file.read(), name, [object])
    os.waitpid(child, 0)
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file() and not each.is_symlink()]
    return Taken(name, sum(each.stat().st_size for each in files), memory, seconds, said)


@command
def main(argv: list[str] | None = None) -> None:
    ArgumentParser(prog="python -m experiments.bombs", description=__doc__.split("\n")[0]).parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, read) in bombs(Path(folder)).items():
            taken = measure(name, path, read)
            figures = f"{taken.stored / 1e3:,.0f}", f"{taken.memory / 1e6:,.0f}", f"{taken.seconds:.2f}"
            rows.append([name, *figures, "no" if taken.said is None else "yes"])
    print(markdown_table(["bomb", "stored (kB)", "memory (MB)", "seconds", "refused"], rows, text=("bomb", "refused")))


if __name__ == "__main__":
    main()
