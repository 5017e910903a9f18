"""Images and training samples by what a test says of them."""

from sit_atconv.config import Data, Flow, Recipe, Run, Train
from sit_atconv.data.images import EncodedImages, Reader
from sit_atconv.data.samples import TrainingSamples
from sit_atconv.runtime.errors import InputError


class Scorer:
    """Scores of training by a function of images and labels, with the face of what `sit-atconv train` brings."""

    def __init__(self, function):
        self.function, self.checked, self.about = function, [], {"name": "x"}

    def check(self, *run):
        self.checked.append(run)

    def __call__(self, images, labels):
        return self.function(images, labels)


def sampled(
    dataset, latent_shape, batch_size, seed=0, drop=0.0, posterior=False, with_image=False, flow=None, **data
) -> TrainingSamples:
    """flow, data: settings of these sections of the recipe."""
    run, train = Run(out="unused", seed=seed), Train(batch_size=batch_size)
    recipe = Recipe(run=run, data=Data(**data), train=train, flow=Flow(**flow or {}))
    return TrainingSamples(dataset, latent_shape, recipe, drop, posterior, with_image)


def item(samples, position):
    """The sample at a position, or what is wrong with it, raised."""
    batch, _ = samples.fetch([position])
    if isinstance(batch, InputError):
        raise batch
    return {key: value[0] for key, value in batch.items()}


def decode(encoded, size, flip, name, reader=None):
    """The tensor (C, size, size) of an image file's bytes."""

    class One(EncodedImages):
        def encoded(self, index):
            return encoded, 0

        def name(self, index):
            return name

    return One(size, ["the one"], reader or Reader())[0, flip][0]
