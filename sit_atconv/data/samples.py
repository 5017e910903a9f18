"""What every sample of every optimisation step is made of, and which process makes it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from sit_atconv.config import Recipe
from sit_atconv.data.images import Unreadable
from sit_atconv.data.order import MAX_ATTEMPTS, Balanced, InOrder, Shuffled
from sit_atconv.flow.times import TimeSampling
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError

# Times are computed in multiples of this many: torch rounds what is left over from its vectors another way, and t must
# not depend on the size of a batch.
TIMES_AT_ONCE = 64
VALIDATION_SEED = 0  # of every run: the losses of two are of the same noise

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
    and pixels (C, H, W) where the image is something else. For average velocities t is the smaller of two times, and
    there is s, the larger one of so many samples as the recipe says, evenly spread over the run, and t of the others;
    and apart (n,), the places of those in the batch, which may be none.
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
        self.share = recipe.meanflow.share

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
            **self._times(indices),
            "noise": draws.normal_batch(self.latent_shape, self.seed, Stream.NOISE, indices),
        }
        if self.posterior:
            batch["posterior"] = draws.normal_batch(self.latent_shape, self.seed, Stream.POSTERIOR, indices)
        if pixels:
            batch["pixels"] = torch.stack(pixels[0])
        return batch, bad

    def _times(self, indices: np.ndarray) -> Batch:
        t = times(self.time, self._uniform(indices))
        if self.share is None:
            return {"t": t}
        end = times(self.time, draws.uniform_batch(self.seed, Stream.END_TIME, indices))
        t, s = torch.minimum(t, end), torch.maximum(t, end)
        among = (indices[:, 0] * self.batch_size + indices[:, 1]).astype(np.float64)
        apart = torch.from_numpy(np.floor((among + 1) * self.share) > np.floor(among * self.share))
        return {"t": t, "s": torch.where(apart, s, t), "apart": apart.nonzero()[:, 0]}

    def _uniform(self, indices: np.ndarray) -> np.ndarray:
        uniform = draws.uniform_batch(self.seed, Stream.TIME, indices)
        if not self.stratified:
            return uniform
        return within_parts(indices[:, 1], uniform, self.batch_size)

    def _item(self, index: int, flip: bool = False) -> tuple:
        item = self.dataset[index, flip]
        return (*item, self.dataset.pixels(index, flip)) if self.pixels else item


class ValidationSamples(Dataset):
    """What the loss of held-out images is computed from: the same at every validation, and in every run of the same
    dataset, time and num.

    dataset: the held-out images. latent_shape (C, H, W), posterior: as of TrainingSamples. time: how t is drawn. num:
    images at most, evenly spread over those of every class; None is all.
    Noise, posterior and t belong to the held-out image, not to run.seed, a step or a process. t is stratified over the
    images: of n, each has another of n equal parts of the distribution, in a random order. No image is mirrored, and no
    label dropped.
    Items, by the place among the chosen images: as of TrainingSamples. An image that cannot be read is zeros.
    """

    in_thread = True

    def __init__(
        self,
        dataset: Dataset,
        latent_shape: tuple[int, int, int],
        time: TimeSampling,
        posterior: bool = False,
        num: int | None = None,
    ):
        count = len(dataset) if num is None else min(num, len(dataset))
        self.dataset, self.latent_shape, self.posterior = dataset, latent_shape, posterior
        by_class = np.argsort(dataset.labels, kind="stable")
        self.images = np.sort(by_class[np.arange(count) * len(dataset) // count])
        order = draws.generator(VALIDATION_SEED, Stream.VALIDATION, 0, count).permutation(count)
        uniform = draws.uniform_batch(VALIDATION_SEED, Stream.VALIDATION, _of(1, self.images))
        self.t = times(time, within_parts(order, uniform, count))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        """The batch of these places, and what is wrong with images, by place; or an error, as of `Samples.fetch`."""
        images, bad, items = self.images[places], {}, []
        for place, image in zip(places, images.tolist(), strict=True):
            try:
                items.append(self.dataset[image, False][0])
            except Unreadable as error:
                bad[place] = str(error)
                items.append(None)
            except InputError as error:
                return error, bad
        blank = next((torch.zeros_like(item) for item in items if item is not None), None)
        blank = self._blank() if blank is None else blank
        batch = {
            "image": torch.stack([blank if item is None else item for item in items]),
            "label": torch.from_numpy(self.dataset.labels[images].astype(np.int64)),
            "t": self.t[list(places)],
            "noise": self._normal(2, images),
        }
        if self.posterior:
            batch["posterior"] = self._normal(3, images)
        return batch, bad

    def _normal(self, what: int, images: np.ndarray) -> torch.Tensor:
        return draws.normal_batch(self.latent_shape, VALIDATION_SEED, Stream.VALIDATION, _of(what, images))

    def _blank(self) -> torch.Tensor:
        """What stands for an item where none of a batch can be read."""
        if self.dataset.moments:
            return torch.zeros(2 * self.latent_shape[0], *self.latent_shape[1:])
        return torch.zeros(self.dataset.channels, self.dataset.image_size, self.dataset.image_size, dtype=torch.uint8)


def _of(what: int, images: np.ndarray) -> np.ndarray:
    """The indices (N, 2) of draws of the stream VALIDATION."""
    return np.stack([np.full(len(images), what), images], 1)


def within_parts(parts: np.ndarray, uniform: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), fp32 (N,): in the given of `count` equal parts, where in it by numbers in [0, 1)."""
    within = (parts + uniform.astype(np.float64)) / count
    return np.minimum(within.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))


def times(time: TimeSampling, uniform: np.ndarray) -> torch.Tensor:
    """t of numbers in [0, 1), fp32 (N,), each the same whatever others there are."""
    padded = np.zeros(-(-len(uniform) // TIMES_AT_ONCE) * TIMES_AT_ONCE, np.float32)
    padded[: len(uniform)] = uniform
    return time(torch.from_numpy(padded))[: len(uniform)].clone()


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
