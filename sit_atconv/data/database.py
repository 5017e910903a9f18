"""Images in an LMDB, in the layout of the widespread folder2lmdb scripts: every value is a pickle.

    __len__     the number of images
    __keys__    a list of their keys, bytes
    a key       (bytes of an image file, label)

The pickles are read, not run (plain_pickle). classes.txt beside the database, a class name a line, names the classes;
without it they are numbers, and all records are passed over once to count them.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sit_atconv.data.images import MOST_BYTES, MOST_CLASSES, EncodedImages, Packed, Reader, Unreadable, of_extra
from sit_atconv.data.plain_pickle import load_plain
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.processes import is_main

CLASSES = "classes.txt"
_OPEN: dict[str, tuple[int, Any]] = {}  # by root: the process that opened it, and the LMDB


class Lmdb(EncodedImages):
    """root: the folder of an LMDB, or its one file. Raises InputError for one that is not there or of another layout.

    The file is mapped: it must not be cut while it is read, which would end the process with SIGBUS. One that is cut
    already is refused.
    """

    def __init__(self, root: str, image_size: int, reader: Reader | None = None):
        lmdb = of_extra("lmdb", "lmdb")
        where = f"data.root={root!r}"
        self.root, self._error = root, lmdb.Error
        path = Path(root)
        if not (path / "data.mdb" if path.is_dir() else path).is_file():
            raise InputError(f"{where}: no such LMDB; give its file, or the folder that holds data.mdb")
        with told(f"{where} is no LMDB, or damaged", lmdb.Error), _environment(root).begin(buffers=True) as transaction:
            length, keys = (self._header(transaction, key) for key in (b"__len__", b"__keys__"))
        if not (isinstance(keys, list) and keys and all(isinstance(key, bytes) for key in keys)):
            raise InputError(f"{where}: __keys__ is not a list of bytes; write the database anew")
        if length != len(keys):
            raise InputError(f"{where}: __len__ is {length}, __keys__ lists {len(keys)}; write the database anew")
        self._keys = Packed(keys)
        names = (path if path.is_dir() else path.parent) / CLASSES
        if names.is_file():
            with told(f"{str(names)!r} cannot be read", OSError, UnicodeDecodeError):
                class_names = [line.strip() for line in names.read_text().splitlines() if line.strip()]
        else:
            class_names = [str(label) for label in range(self._stored.max() + 1)]
        super().__init__(image_size, class_names, reader)
        if not class_names:
            self.encoded(0)  # raises: none can be read
            raise InputError(f"{str(names)!r} is empty; write a class name a line, or remove it")

    def _header(self, transaction: Any, key: bytes) -> Any:
        where, value = f"data.root={self.root!r}: {key.decode()}", transaction.get(key)
        if value is None:
            raise InputError(f"{where} is not there; the layout of folder2lmdb is needed")
        with told(f"{where} refused, and nothing in it was run", ValueError):
            return load_plain(bytes(value))

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every record, -1 of one that cannot be read, or is of none of the classes."""
        return np.where(self._stored < len(self.class_names), self._stored, -1)

    @cached_property
    def _stored(self) -> np.ndarray:
        """The label that every record states, -1 of one that cannot be read."""
        labels = np.full(len(self), -1)
        bar = Progress(range(len(self)), desc="labels", unit="image", delay=2, leave=False, disable=not is_main())
        for index in bar:
            try:
                labels[index] = self._record(index, lambda image, label: label)
            except Unreadable:
                continue
        return labels

    def _record(self, index: int, take: Any) -> Any:
        """take(image, label) of a record, while it is mapped. Raises Unreadable."""
        try:
            with _environment(self.root).begin(buffers=True) as transaction:
                value = transaction.get(self._keys[index])
                if value is None:
                    raise ValueError("it is not there")
                record = load_plain(value)
                if not (isinstance(record, tuple | list) and len(record) == 2):
                    raise ValueError("it is not (image file, label)")
                image, label = record
                if not isinstance(image, bytes | memoryview | bytearray):
                    raise ValueError("its image is not the bytes of a file")
                if not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
                    raise ValueError(f"its label is {label!r:.20}, not an integer from 0 to {MOST_CLASSES - 1:,}")
                if len(image) > MOST_BYTES:
                    raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
                return take(image, label)
        except InputError:  # of all the images
            raise
        except (ValueError, self._error) as error:
            raise Unreadable(
                f"image {self.name(index)!r} cannot be read ({error}); write the database anew, labels as plain int"
            ) from None

    def name(self, index: int) -> str:
        return f"{self.root}:{self._keys[index].decode(errors='backslashreplace')}"

    def encoded(self, index: int) -> tuple[bytes, int]:
        return self._record(index, lambda image, label: (bytes(image), label))


def _environment(root: str) -> Any:
    """The open LMDB. LMDB allows a process to open one once: it stays open, and one from before a fork is closed."""
    import lmdb

    process, environment = _OPEN.get(root, (None, None))
    if process != os.getpid():
        if environment is not None:
            environment.close()
        options = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
        environment = lmdb.open(root, subdir=Path(root).is_dir(), **options)
        path = Path(root, "data.mdb") if Path(root).is_dir() else Path(root)
        used, there = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"], path.stat().st_size
        if there < used:  # reading what is missing would end the process with SIGBUS
            environment.close()
            raise InputError(f"data.root={root!r} is cut: {there:,} bytes of {used:,}; copy it anew", every_rank=True)
        _OPEN[root] = os.getpid(), environment
    return environment
