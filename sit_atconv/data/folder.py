"""Images in folders, one per class."""

import os
from pathlib import Path

import numpy as np

from sit_atconv.data.images import (
    EncodedImages,
    Packed,
    Reader,
    Unreadable,
    check_classes,
    image_files,
    is_hidden,
    is_work,
    read_image,
)
from sit_atconv.runtime.errors import InputError


class Folder(EncodedImages):
    """One folder per class, of images at any depth. Raises InputError for a missing or empty folder."""

    def __init__(self, root: str, image_size: int, reader: Reader | None = None):
        where = f"data.root={root!r}"
        if not Path(root).is_dir():
            raise InputError(f"{where}: no such folder; give one with a subfolder of images per class")
        try:
            with os.scandir(root) as entries:
                folders = [each.path for each in entries if os.path.isdir(each.path) and not is_hidden(each.name)]
            classes = sorted(os.path.basename(folder) for folder in folders if not is_work(folder))
            # By the folder, then by the name: the order that os.walk has, sorted.
            found = [sorted(map(os.path.split, image_files(os.path.join(root, name)))) for name in classes]
        except OSError as error:
            raise InputError(f"{where}: {error}") from None
        check_classes(where, classes, {name for name, files in zip(classes, found, strict=True) if files})
        super().__init__(image_size, classes, reader)
        self.root = root
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
        paths = (os.path.join(*parts) for files in found for parts in files)
        self._paths = Packed(path.encode("utf-8", "surrogateescape") for path in paths)

    def name(self, index: int) -> str:
        return self._paths[index].decode("utf-8", "surrogateescape")

    def encoded(self, index: int) -> tuple[bytes, int]:
        try:
            return read_image(self.name(index)), int(self.labels[index])
        except Unreadable:
            if not Path(self.root).is_dir():
                raise InputError(
                    f"data.root={self.root!r} is no longer there; bring it back", every_rank=True
                ) from None
            raise
