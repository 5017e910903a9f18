"""Images and labels. A dataset gives item `(index, flip)` as an image (C, H, W) in [-1, 1] and a label."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder

from sit_atconv import draws
from sit_atconv.config import Data
from sit_atconv.draws import Stream
from sit_atconv.errors import InputError
from sit_atconv.flow.times import UNIFORM, TimeSampling


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size: halve with a box filter while possible, scale bicubically, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, 17 grey levels: a fixed stratified 80/20 split.

    split: "train" (1,437 images) or "test" (360).
    """

    channels = 1
    image_size = 8
    class_names = tuple("0123456789")

    def __init__(self, split: str = "train"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
        )
        chosen = np.sort({"train": train, "test": test}[split])
        self.images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 8 - 1
        self.labels = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        return self.images[index].flip(2) if flip else self.images[index], self.labels[index]


class Folder(Dataset):
    """One folder per class, RGB, ADM centre crop. Raises InputError for a missing or empty folder, or a bad image."""

    channels = 3

    def __init__(self, root: str, image_size: int):
        if not Path(root).is_dir():
            raise InputError(f"data.root={root!r}: no such folder; give one with a subfolder of images per class")
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            raise InputError(f"data.root={root!r}: {error}") from None
        self.files, self.image_size, self.class_names = folder.samples, image_size, tuple(folder.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[torch.Tensor, int]:
        index, flip = key
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                pixels = np.array(center_crop(image.convert("RGB"), self.image_size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"image {path!r} does not decode ({error}); repair or remove it"
            raise InputError(message, every_rank=True) from None
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        return tensor.flip(2) if flip else tensor, label


def open_dataset(data: Data) -> Digits | Folder:
    """The training images that a recipe names. Raises InputError when they are not there."""
    return DATASETS[data.kind](data)


DATASETS = {
    "digits": lambda data: Digits("train"),
    "imagefolder": lambda data: Folder(data.root, data.image_size),
}


class TrainingSamples(Dataset):
    """Everything that sample j of optimisation step s needs, found at position s * batch_size + j.

    dataset: gives (image, label) for (index, flip). flip: whether half of the images are mirrored.
    latent_shape: (C, H, W) of the noise. drop: share of labels replaced by `null_label`.
    posterior: whether the codec draws from a posterior and wants noise for it. time: the distribution of t.
    Images come in a new random order every epoch, and epochs follow one another without a gap.
    Items: image (C, H, W), label, t, noise and, if wanted, posterior (both of the latent's shape).
    A bad image comes back as the InputError itself: raised in a loader's worker it would lose its words.
    """

    def __init__(
        self,
        dataset: Dataset,
        latent_shape: tuple[int, int, int],
        batch_size: int,
        seed: int,
        flip: bool = False,
        drop: float = 0.0,
        null_label: int | None = None,
        posterior: bool = False,
        time: TimeSampling = UNIFORM,
    ):
        self.dataset, self.latent_shape, self.batch_size, self.seed = dataset, latent_shape, batch_size, seed
        self.flip, self.drop, self.null_label, self.posterior = flip, drop, null_label, posterior
        self.time = time
        self._epoch, self._order = -1, None

    def image_index(self, position: int) -> int:
        """Which image of the dataset stands at this position."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._order = draws.generator(self.seed, Stream.ORDER, epoch).permutation(len(self.dataset))
            self._epoch = epoch
        return int(self._order[place])

    def __getitem__(self, position: int) -> dict[str, torch.Tensor | int] | InputError:
        index = divmod(position, self.batch_size)  # (step, sample)
        flip = self.flip and draws.uniform(self.seed, Stream.FLIP, *index) < 0.5
        try:
            image, label = self.dataset[self.image_index(position), flip]
        except InputError as error:
            return error
        dropped = draws.uniform(self.seed, Stream.LABEL_DROP, *index) < self.drop
        item = {
            "image": image,
            "label": self.null_label if dropped else label,
            "t": self.time(torch.tensor(draws.uniform(self.seed, Stream.TIME, *index))),
            "noise": draws.normal(self.latent_shape, self.seed, Stream.NOISE, *index),
        }
        if self.posterior:
            item["posterior"] = draws.normal(self.latent_shape, self.seed, Stream.POSTERIOR, *index)
        return item


class RankPositions:
    """Batch sampler: the positions of one process, micro-batch by micro-batch, for steps [start, stop).

    Process r of W takes the r-th of W equal runs of every global batch, cut into `accumulation` micro-batches.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, accumulation: int = 1):
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.rank, self.world, self.accumulation = rank, world, accumulation

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // self.world // self.accumulation
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * micro * self.accumulation
            for part in range(self.accumulation):
                yield list(range(first + part * micro, first + (part + 1) * micro))


def collate(items: list) -> dict[str, torch.Tensor] | InputError:
    """A batch of items, or the first error among them."""
    errors = [item for item in items if isinstance(item, InputError)]
    return errors[0] if errors else default_collate(items)


def training_batches(samples: TrainingSamples, positions: RankPositions, workers: int, pin_memory: bool):
    """Yields the batches of one process in order. Raises the InputError of an image that does not decode."""
    loader = DataLoader(
        samples, batch_sampler=positions, num_workers=workers, collate_fn=collate, pin_memory=pin_memory
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
