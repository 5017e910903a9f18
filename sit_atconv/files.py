"""Files that are there whole or not at all, and what identifies them."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

from sit_atconv.version import __version__


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions(*more: str) -> dict[str, str]:
    """Versions of what decides a result: this library, Python, the numerical libraries, and `more` distributions."""
    names = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "safetensors", *more)
    return {
        "sit_atconv": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
