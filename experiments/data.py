"""Data sets that other packages install, as image folders to train on: nothing is downloaded, and nothing is shipped.

    python -m experiments.data fashion-mnist --from /usr/share/datasets/fashion-mnist --out data/fashion

Fashion-MNIST is in Debian's package dataset-fashion-mnist: 28 x 28 pixels, grey, 60,000 images to train on and 10,000
to test by, of ten classes. OUT becomes OUT/train and OUT/test, each with a folder per class.
"""

import argparse
import gzip
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sit_atconv.runtime.bounded import bounded, opened
from sit_atconv.runtime.console import Progress, say
from sit_atconv.runtime.errors import ArgumentParser, InputError, add_force, command, told
from sit_atconv.runtime.files import check_out, new_path

PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat", "5_sandal", "6_shirt", "7_sneaker", "8_bag",
    "9_ankle_boot",
)  # fmt: skip
PARTS = {"train": "train", "test": "t10k"}  # what a part is called here, and in the names of the files
SIDE = 28
MOST_BYTES = 1 << 28  # of a file without its compression


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes in a compressed file of the IDX format, uint8 of so many dimensions.

    The format: 0, 0, 8 for bytes, the number of dimensions; each dimension as a big-endian uint32; the values.
    Raises InputError for a file that is not there, is damaged, or holds anything else.
    """
    wrong = f"{str(path)!r} is not a file of {PACKAGE}"
    with told(wrong, OSError, EOFError, ValueError, zlib.error, remedy="give the folder that the package installs"):
        with opened(path) as compressed, gzip.GzipFile(fileobj=compressed) as file:
            content = bounded(file, MOST_BYTES)
        head = 4 + 4 * dimensions
        if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it does not begin as bytes of {dimensions} dimensions do")
        shape = [int(each) for each in np.frombuffer(content, ">u4", dimensions, 4)]
        size = int(np.prod(shape, dtype=object))
        if len(content) != head + size:
            raise ValueError(f"it says {' x '.join(map(str, shape))} bytes, and holds {len(content) - head:,}")
        return np.frombuffer(content, np.uint8, size, head).reshape(shape)


def read_part(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of a part. Raises InputError for files of another kind."""
    file = folder / f"{stem}-images-idx3-ubyte.gz"
    images, labels = read_idx(file, 3), read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels) or not len(labels):
        raise InputError(
            f"{str(file)!r} holds images of the shape {images.shape}, and there are {len(labels):,} labels; give the "
            f"folder that {PACKAGE} installs, with as many labels as images of {SIDE} x {SIDE} pixels"
        )
    if labels.max() >= len(CLASSES):
        raise InputError(f"{str(folder)!r}: {stem} has the label {labels.max()}, and classes are 0 to 9; give others")
    return images, labels


def fashion_mnist(source: Path, out: Path, force: bool = False) -> dict[str, int]:
    """Write OUT/train and OUT/test, of PNGs in a folder per class; how many images each has.

    source: the folder with the four files of the package. force: what is at `out` is set aside.
    An image is named by its number in its file. OUT is there whole or not at all, and forced to the disk, which takes
    longer than writing.
    Raises InputError where something is there, and for files of another kind, before anything is written.
    """
    check_out(out, force=force, ours=lambda path: False)
    if not source.is_dir():
        raise InputError(f"--from {str(source)!r}: no such folder; install {PACKAGE}, or say where its files lie")
    parts = {name: read_part(source, stem) for name, stem in PARTS.items()}
    total = sum(len(labels) for _, labels in parts.values())
    with new_path(out, force=force) as unfinished, Progress(total=total, desc="write", unit="image") as bar:
        for name, (images, labels) in parts.items():
            for each in CLASSES:
                (unfinished / name / each).mkdir(parents=True)
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(unfinished / name / CLASSES[label] / f"{index:05d}.png")
                bar.update()
        say("all images are forced to the disk now, which may take minutes")
    return {name: len(labels) for name, (_, labels) in parts.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    one = sets.add_parser("fashion-mnist", help=f"grey clothes of 28 x 28 pixels, from Debian's {PACKAGE}")
    one.add_argument(
        "--from", dest="source", required=True, type=Path, metavar="FOLDER",
        help="with the files of the package: /usr/share/datasets/fashion-mnist where it is installed",
    )  # fmt: skip
    one.add_argument("--out", required=True, type=Path, metavar="IMAGES", help="new folder: IMAGES/train, IMAGES/test")
    add_force(one)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.data", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    counts = fashion_mnist(args.source, args.out, args.force)
    told_counts = ", ".join(f"{count:,} in {args.out / name}" for name, count in counts.items())
    print(f"{told_counts}; grey, {SIDE} x {SIDE} pixels, {len(CLASSES)} classes")


if __name__ == "__main__":
    main()
