"""Folders of the drill: what is in them, a small disk at one, and data to train on in one."""

import os
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image


def files_in(folder: Path, apart: Collection[str] = (".lock",)) -> dict[str, bytes]:
    """The files of a folder, by their paths there, but for those of these names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in apart)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[Path]:
    """A disk with room for so many bytes, until the file is removed that this yields; where none can be mounted, a
    folder, and no such file."""
    folder.mkdir(parents=True)
    mount, filler = ["mount", "-t", "tmpfs", "-o", f"size={64 << 20}", "tmpfs", str(folder)], folder / "filler"
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        if mounted:
            disk = os.statvfs(folder)
            filler.write_bytes(bytes(disk.f_bavail * disk.f_bsize - room))
        yield filler
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def save_latent_data(folder: Path) -> dict[str, dict[str, Any]]:
    """Images and an autoencoder in a folder: the sections of a recipe that trains on their latents."""
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    images = save_images(folder / "images", 48, 0)
    return {
        "data": {"kind": "imagefolder", "root": str(images), "image_size": 16},
        "latents": {"codec": "vae", "vae": str(folder / "vae")},
    }


def save_images(folder: Path, number: int, seed: int) -> Path:
    """Noise of two classes, 16 x 16."""
    for index, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (number, 16, 16, 3), np.uint8)):
        image = folder / "ab"[index % 2] / f"{index:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(image)
    return folder
