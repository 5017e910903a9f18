"""Images in a zip archive, one folder per class."""

import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from sit_atconv.data.images import (
    MOST_BYTES,
    EncodedImages,
    Packed,
    Reader,
    Unreadable,
    check_classes,
    is_hidden,
    is_image,
)
from sit_atconv.runtime.bounded import opened
from sit_atconv.runtime.errors import InputError, told

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field
DOS = 0  # the system that Windows' tools say they are; some write its backslashes


def _place(entry: zipfile.ZipInfo) -> str:
    """Where an unpacker would put an entry below a folder of its own; that of a folder ends with a slash."""
    name = entry.filename.replace("\\", "/") if entry.create_system == DOS else entry.filename
    return posixpath.normpath(f"/{name}").strip("/") + "/" * name.endswith("/")


def _folders(places: Iterable[str], wrap: tuple[str, ...]) -> set[str]:
    """The names of the folders right below `wrap`, those without a file too, hidden ones left out."""
    names = set()
    for place in places:
        parts = [part for part in place.split("/")[:-1] if part]  # of a folder, the last is empty
        if tuple(parts[: len(wrap)]) == wrap and len(parts) > len(wrap) and not any(map(is_hidden, parts)):
            names.add(parts[len(wrap)])
    return names


class Zip(EncodedImages):
    """The images of a zip archive, in the order and with the classes of the folder that it was made of.

    A folder that wraps all others, with no image of its own, is passed over: an archive of `imagenet/` is one of what
    lies in it. Of two entries at one place the later counts. Nothing is extracted. Of the archive's directory only
    numbers and names stay in memory: zipfile's own takes over half a kilobyte per image, in every loader process.
    Raises InputError for a file that is no such archive, or that is encrypted or compressed in a rare way.
    """

    def __init__(self, root: str, image_size: int, reader: Reader | None = None):
        where = f"data.root={root!r}"
        damaged = zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, MemoryError
        with (
            told(where, OSError, remedy="give a zip archive of a folder per class"),
            told(f"{where} is no zip archive, or damaged", *damaged),
            opened(root) as file,
            zipfile.ZipFile(file) as archive,
        ):
            listed = {_place(entry): entry for entry in archive.infolist()}
        images = [(tuple(place.split("/")), entry) for place, entry in listed.items() if is_image(place)]
        paths = [path for path, _ in images]
        wraps = 0
        while len({path[wraps] for path in paths}) == 1 and all(len(path) > wraps + 2 for path in paths):
            wraps += 1
        # As os.walk sorted by folder, then file: the order of `Folder`.
        order = sorted(
            (path[wraps], "/".join(path[:-1]), path[-1], number)
            for number, path in enumerate(paths)
            if len(path) > wraps + 1
        )
        classes = {path[wraps] for path in paths if len(path) > wraps + 1}
        check_classes(where, _folders(listed, paths[0][:wraps] if paths else ()), classes)
        entries = [images[number][1] for *_, number in order]
        for entry in entries:
            if entry.flag_bits & 1 or entry.compress_type not in METHODS:
                raise InputError(f"{where}: {entry.filename!r} is encrypted or compressed in a rare way; zip -0 anew")
        self.labels = np.unique([name for name, *_ in order], return_inverse=True)[1]
        super().__init__(image_size, sorted(classes), reader)
        self.root = root
        self._names = Packed(entry.filename.encode() for entry in entries)
        self._places = np.array(
            [
                (min(e.header_offset, 1 << 62), *(min(n, MOST_BYTES + 1) for n in (e.compress_size, e.file_size)),
                 e.CRC, e.compress_type)
                for e in entries
            ],
            np.int64,
        )  # fmt: skip
        self._file = None  # opened by the first read; `pread` moves no place that processes would share

    def name(self, index: int) -> str:
        return f"{self.root}/{self._names[index].decode()}"

    def encoded(self, index: int) -> tuple[bytes, int]:
        offset, compressed, size, crc, method = self._places[index].tolist()
        if max(compressed, size) > MOST_BYTES:
            raise Unreadable(f"image {self.name(index)!r} states more than {MOST_BYTES:,} bytes; make the archive anew")
        try:
            held = self._file  # of this thread too, should another one open the file as well
            if held is None:
                held = self._file = open(self.root, "rb", buffering=0)  # noqa: SIM115 (stays open)
            file = held.fileno()
            signature, *lengths = LOCAL_HEADER.unpack(os.pread(file, LOCAL_HEADER.size, offset))
            content = os.pread(file, compressed, offset + LOCAL_HEADER.size + sum(lengths))
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
            whole = signature == b"PK\3\4" and len(content) == size and zlib.crc32(content) == crc
            fault = None if whole else "damaged"
        except (OSError, struct.error, zlib.error, OverflowError) as error:
            fault = getattr(error, "strerror", None) or "damaged"
        if fault:
            raise Unreadable(f"image {self.name(index)!r} cannot be read ({fault}); make the archive anew")
        return content, int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
