"""A folder of samples: it says first what it is going to be, grows by whole blocks, and its manifest comes last.

    settings.json    first: all that decides the images; a command with others is refused
    000000.png ...   the images, where the format is png
    blocks/          a record of each block that is there (JSON), and its images where the format is npz
    samples.npz      the images, where the format is npz: arr_0 uint8 (N, H, W, C), arr_1 int64 labels (N,)
    manifest.json    last: with it the samples are complete, and settings.json, blocks/ and .lock go
    .lock            of the command that is at work there

A block counts when its record is there and has the digest of its images.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sit_atconv.runtime.claims import REMEDY, SETTINGS, clear_the_way
from sit_atconv.runtime.comparison import differences
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import (
    LEFTOVER,
    LOCK,
    check_out,
    clear_leftovers,
    lock,
    resolved,
    sync,
    whole,
    write_atomic,
)
from sit_atconv.runtime.pictures import to_pil
from sit_atconv.runtime.reading import COUNT, POSITIVE, SHA256, Malformed, as_stored, read_json
from sit_atconv.version import __version__

if TYPE_CHECKING:
    import torch

MANIFEST, BLOCKS, NPZ = "manifest.json", "blocks", "samples.npz"
BLOCK_FILE = re.compile(r"\d{6,}\.(json|npy)(\.tmp)?")  # .tmp: what earlier versions left of a kill
RECORD_FORM = {"image_shape": [POSITIVE], "sha256": SHA256, "nfe": COUNT, "guide_nfe?": COUNT, "seconds": float}
# Of the settings: where things lie, which does not decide the images.
PLACES = {"checkpoint", "codec.vae", "lora", "training", "guide.checkpoint", "guide.training"}
SAMPLES_MARK = {"num", "block", "format", "labels"}  # keys of the settings of samples, by every version
SAME_IMAGES = ("0.1.0", "0.2.0")  # versions of this package that draw the same to the bit, see tests/test_bits.py


def check_place(path: str | Path, force: bool = False, name: str | None = None, remedy: str = REMEDY) -> None:
    """Raise InputError where a folder is not one that samples go into, whatever their settings; nothing is changed
    there. A command that was killed at once has left nothing in it. name, remedy: as `Samples` takes them."""
    path = resolved(path, name)
    try:
        begun = path.is_dir() and any((path / name).is_file() for name in (MANIFEST, SETTINGS))
        empty = path.is_dir() and all(each.name == LOCK or LEFTOVER.fullmatch(each.name) for each in path.iterdir())
    except OSError as error:
        raise InputError(f"{name or option('out')} {str(path)!r} cannot be read: {error.strerror}; {remedy}") from None
    if not (begun or empty):
        check_out(path, name, force)


class Samples:
    """The samples at `path`, made in blocks; nothing is touched before `claim`.

    settings: what decides the images, as the manifest will have it: num, block, format and labels among them.
    force: what is there and is something else is set aside. name: what messages call the folder, by default as the
    argument; remedy: what they say to do where it is something else.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], force: bool = False, name: str | None = None, remedy: str = REMEDY
    ):  # fmt: skip
        self.path, self.force = resolved(path, name), force
        self.name, self.remedy = name, remedy
        self.settings = as_stored(settings)
        self.num, self.block = settings["num"], settings["block"]
        self._lock = None

    @property
    def _where(self) -> str:
        return f"{self.name or option('out')} {str(self.path)!r}"

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return math.ceil(self.num / self.block)

    def indices(self, number: int) -> range:
        """The images that block `number` keeps."""
        return range(number * self.block, min((number + 1) * self.block, self.num))

    def claim(self) -> list[int] | None:
        """Begin the folder, or take it over where the same settings began it; the blocks that are missing.

        None: the samples are complete. Raises InputError for a folder of something else or with other settings, and
        where another command is at work; this one has the folder until `close`.
        """
        try:
            return self._taken_over()
        except InputError:
            if self._lock is not None or not self.force or not os.path.lexists(self.path):
                raise
            clear_the_way(self.path, self.name)
        return self._taken_over()

    def _taken_over(self) -> list[int] | None:
        try:
            if self._is_complete():
                return None
            check_place(self.path, name=self.name, remedy=self.remedy)
            if self.force and (self.path / SETTINGS).is_file():  # set aside, a folder is no other command's
                self._check_same(SETTINGS, versions=True)
            self._lock = lock(self.path, self._where)
            if self._is_complete():  # meanwhile
                return None
            if (self.path / SETTINGS).is_file():
                self._check_same(SETTINGS, versions=True)
            else:
                write_atomic(self.path / SETTINGS, json.dumps(self.settings, indent=1))
            (self.path / BLOCKS).mkdir(exist_ok=True)
            for folder in (self.path, self.path / BLOCKS):
                clear_leftovers(folder)
        except OSError as error:
            raise self._unwritten(error, "mend it, or choose another place") from None
        with ThreadPoolExecutor() as pool:
            records = list(pool.map(self._record, range(self.blocks)))
        return [number for number, record in enumerate(records) if record is None]

    def _is_complete(self) -> bool:
        """Whether these samples are complete. Raises InputError where others are, or some of these are lost."""
        if not (self.path.is_dir() and (self.path / MANIFEST).exists()):
            return False
        self._check_same(MANIFEST, versions=False)
        self._check_complete()
        self._clear()
        return True

    def close(self) -> None:
        """Let other commands have the folder."""
        if self._lock is not None:
            self._lock.close()

    def write(self, number: int, images: torch.Tensor, **measured: Any) -> None:
        """Put a block's images, uint8 (B, C, H, W), in their place, and then its record with what was measured.

        Raises InputError where the disk does not take them.
        """
        if self.settings["format"] == "png":
            contents = [_png(image) for image in images]
        else:
            contents = [_npy(images.permute(0, 2, 3, 1).numpy())]
        digest = hashlib.sha256()
        with self._disk():
            for path, content in zip(self._files(number), contents, strict=True):
                with whole(path, synced=False) as unfinished:  # its digest tells what a crash of the machine cuts
                    unfinished.write_bytes(content)
                digest.update(content)
            record = {"image_shape": list(images.shape[1:]), "sha256": digest.hexdigest(), **measured}
            with whole(self._record_path(number), synced=False) as unfinished:
                unfinished.write_text(json.dumps(record))

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Complete the samples: the npz, where asked for, then manifest.json; returns the manifest.

        facts: what the manifest says beside the settings and the blocks' measurements.
        Raises InputError where the disk does not take it, or a block is not to be seen.
        """
        with self._disk():
            records = [self._read_record(number) for number in range(self.blocks)]
            if None in records:
                raise InputError(
                    f"{self._where}: block {records.index(None)} is not there; all machines must share the "
                    "file system: run the same command again on one that does"
                )
            if self.settings["format"] == "npz":
                self._write_npz(records[0]["image_shape"])
            else:
                for number in range(self.blocks):
                    for path in self._files(number):
                        sync(path)
            nfe, of_guide = (
                sum(record.get(key, 0) * len(self.indices(number)) for number, record in enumerate(records)) / self.num
                for key in ("nfe", "guide_nfe")
            )
            seconds = sum(record["seconds"] for record in records)
            manifest = {
                **self.settings,
                "nfe": nfe,
                **({"guide_nfe": of_guide} if self.settings.get("guide") else {}),
                "seconds_per_image": seconds / (self.blocks * self.block),
                "image_shape": records[0]["image_shape"],
                **facts,
            }
            lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
            write_atomic(self.path / MANIFEST, f"{{\n {lines}\n}}\n")
            self._clear()
        return manifest

    def _clear(self) -> None:
        """Remove what only unfinished samples need; another command may be doing the same."""
        blocks = self.path / BLOCKS
        if blocks.is_dir():
            clear_leftovers(blocks)
            for path in blocks.iterdir():
                if BLOCK_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: there are other people's files in it
                blocks.rmdir()
        clear_leftovers(self.path)
        if self._is_begun():
            (self.path / SETTINGS).unlink(missing_ok=True)
        (self.path / LOCK).unlink(missing_ok=True)

    def _is_begun(self) -> bool:
        """Whether there is a settings.json, and it is one of samples."""
        try:
            return read_json(self.path / SETTINGS).keys() >= SAMPLES_MARK
        except (OSError, Malformed):
            return False

    def _check_same(self, name: str, versions: bool) -> None:
        try:
            stored = read_json(self.path / name)
        except (OSError, Malformed) as error:
            raise InputError(f"{self._where}: its {name} is damaged ({error}); {self.remedy}") from None
        # What is complete stays as good when a library is renewed; half of it by another version would not be one set.
        passed_over = PLACES if versions else PLACES | {"versions"}
        stored = {key: stored.get(key) for key in self.settings}
        makers = stored["versions"] if isinstance(stored.get("versions"), dict) else {}
        if makers.get("sit_atconv") in SAME_IMAGES and __version__ in SAME_IMAGES:
            passed_over = passed_over | {"versions.sit_atconv"}
        changed = differences(stored, self.settings, passed_over)
        if changed:
            raise InputError(
                f"{self._where} holds samples with other settings, {changed[0]}; state it as it was, or {self.remedy}"
            )

    def _check_complete(self) -> None:
        if self.settings["format"] == "npz":
            wanted = [NPZ]
        else:
            wanted = [path.name for number in range(self.blocks) for path in self._files(number)]
        present = {path.name for path in self.path.iterdir()}
        lost = next((name for name in wanted if name not in present), None)
        if lost is not None:
            raise InputError(
                f"{self._where}: {MANIFEST} says it is complete, and {lost} is missing; remove the folder and run again"
            )

    def _files(self, number: int) -> list[Path]:
        """Where the images of a block lie."""
        if self.settings["format"] == "npz":
            return [self._record_path(number).with_suffix(".npy")]
        return [self.path / f"{index:06d}.png" for index in self.indices(number)]

    def _record_path(self, number: int) -> Path:
        return self.path / BLOCKS / f"{number:06d}.json"

    def _read_record(self, number: int) -> dict[str, Any] | None:
        try:
            return read_json(self._record_path(number), RECORD_FORM)
        except (OSError, Malformed):
            return None

    def _record(self, number: int) -> dict[str, Any] | None:
        """The record of a block whose files are what it says, else None."""
        record, digest = self._read_record(number), hashlib.sha256()
        if record is None:
            return None
        try:
            for path in self._files(number):
                digest.update(path.read_bytes())
        except OSError:
            return None
        return record if digest.hexdigest() == record["sha256"] else None

    def _write_npz(self, image_shape: list[int]) -> None:
        """One pass over the blocks, of which one is in memory at a time; stored, as numpy's own savez does it."""
        channels, height, width = image_shape
        labels = np.array(self.settings["labels"], np.int64)
        with (
            whole(self.path / NPZ) as unfinished,
            zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                _write_header(member, np.dtype(np.uint8), (self.num, height, width, channels))
                for number in Progress(range(self.blocks), desc=NPZ, unit="block", delay=1):
                    block = np.load(self._files(number)[0], allow_pickle=False)
                    if block.shape != (len(self.indices(number)), height, width, channels):
                        raise InputError(f"{str(self._files(number)[0])!r} is {block.shape}; remove it, run again")
                    member.write(block.tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                _write_header(member, labels.dtype, labels.shape)
                member.write(labels.tobytes())

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            going_on = "the blocks that are there are whole: mend it, and the same command goes on from them"
            raise self._unwritten(error, going_on) from None

    def _unwritten(self, error: OSError, remedy: str) -> InputError:
        return InputError(f"{self._where} cannot be written: {error.strerror or error}; {remedy}")


def _png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "png")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _write_header(file, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
