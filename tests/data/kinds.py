"""Writes the same few images as every kind of dataset."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
SIZE = 16


def write_folder(root: Path, counts: tuple[int, ...] = (3, 4, 2)) -> Path:
    """A folder per class, of random images of several sizes and formats."""
    random = np.random.default_rng(0)
    for name, number in zip(CLASSES, counts, strict=False):
        (root / name / "deeper").mkdir(parents=True)
        for index in range(number):
            array = random.integers(0, 256, (SIZE + 5 * index, SIZE + 3, 3), np.uint8)
            file = root / name / ("deeper" if index == 1 else ".") / f"{index}.{('png', 'jpg', 'webp')[index % 3]}"
            Image.fromarray(array).save(file)
    return root


def images(folder: Path) -> list[tuple[Path, int]]:
    """(file, label) in the order of a folder."""
    return [
        (file, label)
        for label, name in enumerate(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        for parent in sorted([folder / name, *(path for path in (folder / name).rglob("*") if path.is_dir())])
        for file in sorted(path for path in parent.iterdir() if path.is_file())
    ]


def write_zip(file: Path, folder: Path, method: int = zipfile.ZIP_STORED, inside: str = "") -> Path:
    """An archive in another order, with what archives also hold."""
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("__MACOSX/cat/._0.png", b"no image")
        archive.mkdir(f"{inside}cat")
        archive.writestr(f"{inside}cat/.hidden.png", b"no image")
        archive.writestr(f"{inside}cat/notes.txt", b"no image")
        for path, _ in reversed(images(folder)):
            archive.write(path, inside + str(path.relative_to(folder)))
    return file


def write_lmdb(root: Path, records: list[tuple], protocol: int = 4, subdir: bool = True, **headers) -> Path:
    """Records of (image file bytes, label); an entry that is bytes is stored as it is."""
    import lmdb

    keys = [str(index).encode() for index in range(len(records))]
    dumped = {key: pickle.dumps(value, protocol) for key, value in zip(keys, records, strict=True)}
    dumped |= {b"__len__": pickle.dumps(len(keys), protocol), b"__keys__": pickle.dumps(keys, protocol)}
    dumped |= {name.encode(): value for name, value in headers.items()}
    with lmdb.open(str(root), map_size=1 << 24, subdir=subdir) as environment, environment.begin(write=True) as put:
        for key, value in dumped.items():
            if value is not None:
                put.put(key, value)
    return root


def records(folder: Path) -> list[tuple[bytes, int]]:
    return [(file.read_bytes(), label) for file, label in images(folder)]
