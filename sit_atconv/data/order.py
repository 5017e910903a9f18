"""Which image stands at a position of training, in closed form: nothing that came before is needed to know it."""

from collections.abc import Sequence

import numpy as np

from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError

MAX_ATTEMPTS = 100  # substitutes that are tried for an image that cannot be read


class Shuffled:
    """Every image once an epoch, in a new random order every epoch; epochs follow one another without a gap."""

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        self._epoch, self._order = -1, None

    def index(self, position: int) -> int:
        epoch, place = divmod(position, self.num_images)
        if epoch != self._epoch:
            self._order = draws.generator(self.seed, Stream.ORDER, epoch).permutation(self.num_images)
            self._epoch = epoch
        return int(self._order[place])

    def substitute(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """Any image."""
        return int(random.integers(self.num_images))


class Balanced:
    """Every class once in each round of as many positions as there are classes, in a new random order every round.

    So the n-th visit of a class is in round n. Its images are visited in a random order of its own, which is a new
    one each time the class has been through.
    labels (N,): a negative one is of no class, and not visited. Raises InputError for a class without images.
    """

    def __init__(self, labels: np.ndarray, class_names: Sequence[str], seed: int):
        self.num_classes, self.seed = len(class_names), seed
        counts = np.bincount(labels[labels >= 0], minlength=self.num_classes)
        if empty := [class_names[number] for number in np.flatnonzero(counts == 0)]:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            raise InputError(
                f"data.sampling=balanced: no image is of class {', '.join(map(repr, empty[:5]))}{more}; use natural"
            )
        by_class = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
        self._images = np.split(by_class, np.cumsum(counts)[:-1])  # of every class
        self._round, self._classes = -1, None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of a class: which pass, and its order

    def _class(self, position: int) -> int:
        number, place = divmod(position, self.num_classes)
        if number != self._round:
            self._classes = draws.generator(self.seed, Stream.CLASS_ORDER, number).permutation(self.num_classes)
            self._round = number
        return int(self._classes[place])

    def index(self, position: int) -> int:
        label = self._class(position)
        images = self._images[label]
        through, place = divmod(position // self.num_classes, len(images))
        if self._orders.get(label, (-1, None))[0] != through:
            random = draws.generator(self.seed, Stream.CLASS_IMAGES, label, through)
            self._orders[label] = through, random.permutation(images)
        return int(self._orders[label][1][place])

    def substitute(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """An image of the same class, or of another that is drawn too where half of the attempts have failed."""
        label = self._class(position) if attempt < MAX_ATTEMPTS // 2 else int(random.integers(self.num_classes))
        return int(random.choice(self._images[label]))


class InOrder:
    """The dataset itself says what is at a position."""

    def index(self, position: int) -> int:
        return position

    def substitute(self, position: int, attempt: int, random: np.random.Generator) -> int:
        """The first image after it that can be read."""
        return position + 1 + attempt
