"""What every sample of every optimisation step is made of, and which process makes it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from sit_atconv.config import Recipe
from sit_atconv.data.images import Unreadable
from sit_atconv.data.order import MAX_ATTEMPTS, Balanced, InOrder, Shuffled
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError

# Times are computed in multiples of this many: torch rounds what is left over from its vectors another way, and t must
# not depend on the size of a batch.
TIMES_AT_ONCE = 64

Batch = dict[str, torch.Tensor]


class Samples(Dataset):
    """Batches of samples by position, sample j of optimisation step s at position s * batch_size + j.

    order: which image stands at a position, see data.order. A subclass makes the batch, of what its `_item` reads.
    In the place of an image that cannot be read comes another one, with its own label: the first that can be read
    among MAX_ATTEMPTS that are drawn for this sample; of a stream, among those that follow.
    in_thread: whether a thread may make batches beside what the process does: they set and draw nothing that belongs
    to the process, such as its generators.
    """

    in_thread = False

    def __init__(self, dataset: Dataset, order: Shuffled | Balanced | InOrder, batch_size: int, seed: int):
        self.dataset, self.order, self.batch_size, self.seed = dataset, order, batch_size, seed

    def fetch(self, positions: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        """The batch of these positions, and what was wrong with images on the way, by index.

        An error comes in the place of the batch: raised in a loader's process it would lose its words.
        """
        raise NotImplementedError

    def __getitems__(self, positions: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        """`fetch`, by the name that torch's loader calls."""
        return self.fetch(positions)

    def still_bad(self, bad: dict[int, str]) -> dict[int, str]:
        """Of images that could not be read once, by index, those that cannot be read now, with what is wrong now.

        Those of a stream, which goes back to none, stay.
        """
        if isinstance(self.order, InOrder):
            return bad
        now = {}
        for index in bad:
            try:
                self._item(index)
            except Unreadable as error:
                now[index] = str(error)
        return now

    def _indices(self, positions: Sequence[int]) -> np.ndarray:
        """(step, sample) of every position."""
        return np.stack(np.divmod(np.asarray(positions), self.batch_size), 1)

    def _item(self, index: int, *how) -> tuple:
        """What an image gives. Raises Unreadable."""
        raise NotImplementedError

    def _load(self, position: int, bad: dict[int, str], *how) -> tuple:
        """The item at a position, read as `how` says; adds to `bad` what was passed over."""
        step, sample = divmod(position, self.batch_size)
        index = self.order.index(position)
        for attempt in range(MAX_ATTEMPTS + 1):
            try:
                return self._item(index, *how)
            except Unreadable as error:
                last = error
                bad[index if error.image is None else error.image] = str(error)
            random = draws.generator(self.seed, Stream.SUBSTITUTE, step, sample, attempt)
            index = self.order.substitute(position, attempt, random)
        raise InputError(f"{MAX_ATTEMPTS} images in a row cannot be read, at last: {last}", every_rank=True)


class TrainingSamples(Samples):
    """Everything that sample j of optimisation step s needs, found at position s * batch_size + j.

    dataset: gives (image, label) for (index, flip). latent_shape: (C, H, W) of the noise.
    recipe: says the seed, the size of a batch, the order of the images, whether half of them are mirrored, and how t is
    drawn; stratified, sample j of a batch of B takes it from the j-th of B equal parts of the distribution.
    drop: share of labels replaced by that of the null class, which comes after the dataset's.
    posterior: whether the codec draws from a posterior and wants noise for it.
    with_image: the image is needed besides the moments that a dataset gives in its place.
    Items: image (C, H, W) as the dataset gives it, label, t, noise, if wanted posterior (both of the latent's shape),
    and pixels (C, H, W) where the image is something else.
    """

    in_thread = True

    def __init__(
        self,
        dataset: Dataset,
        latent_shape: tuple[int, int, int],
        recipe: Recipe,
        drop: float = 0.0,
        posterior: bool = False,
        with_image: bool = False,
    ):
        seed = recipe.run.seed
        if getattr(dataset, "in_order", False):
            dataset, order = dataset.shuffled(seed), InOrder()
        elif recipe.data.sampling == "balanced":
            order = Balanced(dataset.labels, dataset.class_names, seed)
        else:
            order = Shuffled(len(dataset), seed)
        super().__init__(dataset, order, recipe.train.batch_size, seed)
        self.latent_shape, self.drop, self.posterior = latent_shape, drop, posterior
        self.flip, self.stratified, self.time = recipe.data.flip, recipe.flow.time_stratified, recipe.flow.times()
        self.pixels = with_image and dataset.moments

    def fetch(self, positions: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        indices = self._indices(positions)
        flips = np.zeros(len(positions), bool)
        if self.flip:
            flips = draws.uniform_batch(self.seed, Stream.FLIP, indices) < 0.5
        bad: dict[int, str] = {}
        try:
            items = [
                self._load(int(position), bad, bool(flip)) for position, flip in zip(positions, flips, strict=True)
            ]
        except InputError as error:
            return error, bad
        images, labels, *pixels = zip(*items, strict=True)
        labels = np.array(labels)
        if self.drop:
            dropped = draws.uniform_batch(self.seed, Stream.LABEL_DROP, indices) < self.drop
            labels[dropped] = len(self.dataset.class_names)
        batch = {
            "image": torch.stack(images),
            "label": torch.from_numpy(labels),
            "t": self._times(self._uniform(indices)),
            "noise": draws.normal_batch(self.latent_shape, self.seed, Stream.NOISE, indices),
        }
        if self.posterior:
            batch["posterior"] = draws.normal_batch(self.latent_shape, self.seed, Stream.POSTERIOR, indices)
        if pixels:
            batch["pixels"] = torch.stack(pixels[0])
        return batch, bad

    def _uniform(self, indices: np.ndarray) -> np.ndarray:
        uniform = draws.uniform_batch(self.seed, Stream.TIME, indices)
        if not self.stratified:
            return uniform
        within = (indices[:, 1] + uniform.astype(np.float64)) / self.batch_size
        return np.minimum(within.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))

    def _times(self, uniform: np.ndarray) -> torch.Tensor:
        padded = np.zeros(-(-len(uniform) // TIMES_AT_ONCE) * TIMES_AT_ONCE, np.float32)
        padded[: len(uniform)] = uniform
        return self.time(torch.from_numpy(padded))[: len(uniform)].clone()

    def _item(self, index: int, flip: bool = False) -> tuple:
        item = self.dataset[index, flip]
        return (*item, self.dataset.pixels(index, flip)) if self.pixels else item


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
