"""Augmented images to learn from, and the held-out ones: what is random belongs to (step, sample)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode

from sit_atconv.classification.recipe import ClassifierRecipe, Data, Model
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.held_out import split
from sit_atconv.data.order import Shuffled
from sit_atconv.data.samples import Batch, Samples
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError, named, told


def open_datasets(data: Data) -> tuple[Dataset, Dataset]:
    """The training and the held-out images, with `picture`, `labels` and `class_names`.

    Raises InputError when they are not there, or not of the same classes.
    """
    if data.held_out is not None:
        return split(_open_learnt_from(data), data.held_out)
    train, held_out = _open_learnt_from(data), open_held_out(data)
    if train.class_names != held_out.class_names:
        strange = sorted({*train.class_names} ^ {*held_out.class_names})[:3] or "their order"
        raise InputError(f"data.root={data.root!r} and the held-out images are of different classes: {strange}")
    return train, held_out


def open_held_out(data: Data) -> Dataset:
    """The held-out images alone. Raises InputError when they are not there."""
    if data.held_out is not None:
        return split(_open_learnt_from(data), data.held_out)[1]
    if data.kind == "digits":
        return Digits("test", data.channels)
    with named("the held-out images (data.val_root, data.val_split)"):
        return open_dataset(data.open_as()[1])


def _open_learnt_from(data: Data) -> Dataset:
    """The images to learn from, those that `data.held_out` holds out among them."""
    return Digits("train", data.channels) if data.kind == "digits" else open_dataset(data.open_as()[0])


def seed_generators(seed: int, stream: Stream, *index: int, devices: bool = False) -> None:
    """Begin the global generators of Python, NumPy and torch anew from a draw: torch's of the CPU, or of all devices.

    Before a device is in use, torch formats the call stack at every seed for it: too slow to do for every image.
    """
    number = int(draws.generator(seed, stream, *index).integers(1 << 32))
    random.seed(number)
    np.random.seed(number)
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(number)


@contextmanager
def generators_kept() -> Iterator[None]:
    """The global generators of Python, NumPy and the CPU are left as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


class RepeatAugmented(Shuffled):
    """Every epoch a part of the images, each `repeats` times in a row, as timm's RepeatAugSampler picks them.

    An epoch is as long as without repeats.
    """

    def __init__(self, num_images: int, repeats: int, seed: int):
        super().__init__(num_images, seed)
        self.sampler = RepeatAugSampler(range(num_images), 1, 0, num_repeats=repeats, selected_round=0)

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.num_images)
        if epoch != self._epoch:
            self.sampler.set_epoch(int(draws.generator(self.seed, Stream.ORDER, epoch).integers(1 << 62)))
            self._epoch, self._order = epoch, list(self.sampler)
        return self._order[place]


class ClassifierSamples(Samples):
    """Images (C, S, S), augmented and normalised, and labels. What happens to a sample is drawn for (step, sample).

    No thread makes them: timm draws from the generators of the process, which a step draws from too. size: of the
    centre that is cut from an image before, None for the whole image.
    """

    def __init__(
        self, dataset: Dataset, transform, batch_size: int, seed: int, repeats: int = 1, size: int | None = None
    ):
        number = len(dataset)
        order = Shuffled(number, seed) if repeats == 1 else RepeatAugmented(number, repeats, seed)
        super().__init__(dataset, order, batch_size, seed)
        self.transform, self.size = transform, size

    def _item(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset.picture(index, self.size)

    def fetch(self, positions: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        bad: dict[int, str] = {}
        images, labels = [], []
        try:
            with generators_kept():
                for position, (step, sample) in zip(positions, self._indices(positions).tolist(), strict=True):
                    picture, label = self._load(int(position), bad)
                    seed_generators(self.seed, Stream.AUGMENT, step, sample)
                    images.append(self.transform(picture))
                    labels.append(label)
        except InputError as error:
            return error, bad
        return {"image": torch.stack(images), "label": torch.tensor(labels)}, bad


class HeldOut(Dataset):
    """Held-out images, resized, cropped and normalised, their labels, and their height and width before that; of one
    process: every `world`-th. size: as of `ClassifierSamples`; height and width are those after it."""

    in_thread = True

    def __init__(self, dataset: Dataset, transform, rank: int = 0, world: int = 1, size: int | None = None):
        self.dataset, self.transform, self.size = dataset, transform, size
        self.indices = range(rank, len(dataset), world)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, places: Sequence[int]) -> tuple[Batch | InputError, dict[int, str]]:
        """The batch of places in a row, those past the end left out, or what is wrong with it, as of `Samples.fetch`.

        None is passed over: an accuracy on the others would be another figure.
        """
        try:
            indices = self.indices[places[0] : places[-1] + 1]
            items = [self.dataset.picture(index, self.size) for index in indices]
        except InputError as error:
            return error, {}
        images, labels = zip(*items, strict=True)
        return {
            "image": torch.stack([self.transform(image) for image in images]),
            "label": torch.tensor(labels),
            "size": torch.tensor([(image.height, image.width) for image in images]),
        }, {}


def _mend_posterize(transform) -> None:
    """timm asks Pillow to keep no bits of a colour at its strongest level, for which Pillow 13 raises ValueError.

    Earlier ones gave a black image, and so does this.
    """
    for part in transform.transforms:
        operations = [*getattr(part, "ops", []), *chain.from_iterable(getattr(part, "policy", []))]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits else image.point(lambda _: 0)


def preprocessing(model: Model, channels: int) -> dict:
    """What evaluation does to an image, as timm's create_transform and a checkpoint's data configuration have it."""
    return {
        "input_size": (channels, model.input_size, model.input_size), "mean": tuple(model.mean),
        "std": tuple(model.std), "crop_pct": model.crop_pct, "interpolation": InterpolationMode.BICUBIC.value,
    }  # fmt: skip


def transforms(recipe: ClassifierRecipe, evaluation: dict) -> tuple:
    """timm's transforms of training and of evaluation (`preprocessing`): PIL image -> (C, S, S).

    Raises InputError for augmentation that timm does not know.
    """
    augment = recipe.augment
    unknown = f"augment.auto_augment={augment.auto_augment!r} is nothing that timm knows"
    with told(unknown, AssertionError, ValueError, LookupError):
        training = create_transform(
            **{key: evaluation[key] for key in ("input_size", "mean", "std")},
            **{key: getattr(augment, key) for key in ("hflip", "vflip", "auto_augment", "interpolation")},
            is_training=True,
            scale=tuple(augment.scale),
            ratio=tuple(augment.ratio),
            color_jitter=augment.color_jitter or None,
            re_prob=augment.erasing,
            re_mode=augment.erasing_mode,
        )
    if augment.auto_augment is not None and evaluation["input_size"][0] != 3:
        raise InputError(f"augment.auto_augment={augment.auto_augment!r} is for colours; leave it out for grey images")
    _mend_posterize(training)
    return training, create_transform(**evaluation)
