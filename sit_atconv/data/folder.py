"""Images in folders, one per class."""

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from sit_atconv.data.images import EncodedImages, Packed, Unreadable, check_classes, is_hidden, is_image
from sit_atconv.errors import InputError


class _Visible(ImageFolder):
    """Without hidden folders, such as notebooks leave behind."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(
            entry.name for entry in Path(directory).iterdir() if entry.is_dir() and not is_hidden(entry.name)
        )
        check_classes(f"data.root={directory!r}", names, names)
        return names, {name: label for label, name in enumerate(names)}


class Folder(EncodedImages):
    """One folder per class, of images at any depth. Raises InputError for a missing or empty folder."""

    def __init__(self, root: str, image_size: int):
        if not Path(root).is_dir():
            raise InputError(f"data.root={root!r}: no such folder; give one with a subfolder of images per class")
        try:
            folder = _Visible(root, is_valid_file=lambda path: is_image(path.removeprefix(root)), allow_empty=True)
        except OSError as error:
            raise InputError(f"data.root={root!r}: {error}") from None
        check_classes(f"data.root={root!r}", folder.classes, {folder.classes[label] for label in set(folder.targets)})
        super().__init__(image_size, folder.classes)
        self.root = root
        self.labels = np.array(folder.targets)
        self._paths = Packed(path.encode("utf-8", "surrogateescape") for path, _ in folder.samples)

    def name(self, index: int) -> str:
        return self._paths[index].decode("utf-8", "surrogateescape")

    def encoded(self, index: int) -> tuple[bytes, int]:
        try:
            return Path(self.name(index)).read_bytes(), int(self.labels[index])
        except OSError as error:
            if not Path(self.root).is_dir():
                raise InputError(
                    f"data.root={self.root!r} is no longer there; bring it back", every_rank=True
                ) from None
            raise Unreadable(f"image {self.name(index)!r} cannot be read ({error.strerror}); bring it back") from None
