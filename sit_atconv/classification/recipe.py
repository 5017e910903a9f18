"""The recipe of a classifier: its schema over that of `sit_atconv.config`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sit_atconv import config
from sit_atconv.config import PARTS, Checkpoint, Loading, Optimisation, Run
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.fields import MUTABLE, PATH, Section, When, chosen, setting
from sit_atconv.runtime.limits import Range, number, ranged

DATA_KINDS = tuple(kind for kind in config.DATA_KINDS if kind != "latents")
PROBABILITY = number(0, 1, "it is a probability")
MIXING = number(0, 1_000, "with a larger alpha all images are mixed half and half")
# Mean and deviation of pixels in [0, 1]: of ImageNet's colours, and what takes grey levels to [-1, 1].
COLOUR, GREY = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.5,))

ERASING = When("augment.erasing", lambda augment: augment.erasing > 0)
MIXED = When("augment.mixup or cutmix", lambda augment: augment.mixup > 0 or augment.cutmix > 0)
MIXED_BOTH_WAYS = When("both augment.mixup and cutmix", lambda augment: augment.mixup > 0 and augment.cutmix > 0)
VALIDATED_BY_SPLIT = When("data.kind=hf and no data.held_out", lambda data: data.kind == "hf" and data.held_out is None)
WARMED_UP = When("train.warmup_epochs", lambda train: train.warmup_epochs > 0)


@dataclass
class Data(Loading):
    """The images: those to learn from, and those held out."""

    kind: str = chosen("digits", DATA_KINDS)
    # as root, of the held-out images; hf: left out, root; none where data.held_out takes them from root
    val_root: str | None = field(default=None, metadata=MUTABLE | PATH)
    val_split: str | None = setting(VALIDATED_BY_SPLIT, "validation")
    # of every image of an epoch, each augmented anew, and as many times fewer images in it
    repeats: int = ranged(1, Range(1, 1_000, "an epoch shows as many times fewer images"))

    def __post_init__(self):
        super().__post_init__()
        if self.held_out is None:
            self._check_needed("root", "val_root", but=("hf", "val_root"))
        else:
            self._check_needed("root", but=("hf", "val_root"))
            if self.val_root is not None:
                raise InputError(
                    f"data.val_root={self.val_root} beside data.held_out={self.held_out:g}, which holds out images of "
                    "data.root; leave one out, or state it =null"
                )
        if self.label_key == "":
            raise InputError("data.label_key='': a classifier needs classes; name their column")

    def open_as(self) -> tuple[config.Data, config.Data]:
        """The training and the held-out images, as `sit_atconv.data` opens all but digits.

        Their size is that of the model's crops, which are cut from the whole image: the one that is stated acts on
        nothing.
        """
        shared = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(Loading)} | {"image_size": 1}
        held_out = {"root": self.val_root or self.root, "split": self.val_split}
        return config.Data(**shared), config.Data(**shared | held_out)


@dataclass
class Augment(Section):
    """What training does to an image, by timm's create_transform and Mixup."""

    # share of the image's area in a crop
    scale: list[float] = ranged(
        [0.08, 1.0], number(0, 1, "it is a share of the image, and a crop is some of it", over=True)
    )
    # of a crop's width to its height
    ratio: list[float] = ranged([3 / 4, 4 / 3], number(0.01, 100, "a crop would be a line"))
    hflip: float = ranged(0.5, PROBABILITY)
    vflip: float = ranged(0.0, PROBABILITY)
    # brightness, contrast, saturation; not beside auto_augment
    color_jitter: float = ranged(0.0, number(0, 10, "they are multiplied by up to 1 and that"))
    auto_augment: str | None = None  # as timm writes it, e.g. rand-m9-mstd0.5-inc1
    interpolation: str = chosen("bicubic", ("bilinear", "bicubic", "random"))  # of a crop; random for either
    erasing: float = ranged(0.0, PROBABILITY)  # probability that a rectangle is erased
    # filled with 0, one random colour, or a value per pixel
    erasing_mode: str | None = setting(ERASING, "pixel", choices=("const", "rand", "pixel"))
    mixup: float = ranged(0.0, MIXING)  # alpha of the beta distribution; 0 mixes none
    cutmix: float = ranged(0.0, MIXING)
    mix_prob: float | None = setting(MIXED, 1.0, PROBABILITY)  # that a batch is mixed at all
    switch_prob: float | None = setting(MIXED_BOTH_WAYS, 0.5, PROBABILITY)  # of cutmix, where both are on
    smoothing: float = ranged(0.1, limits.SHARE_UNDER_1)  # share of the target that all classes have alike

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("scale", self.scale), ("ratio", self.ratio)):
            if len(values) != 2 or not values[0] <= values[1]:
                raise InputError(f"augment.{name}={values}: give two rising numbers")
        if self.auto_augment is not None and self.color_jitter:
            raise InputError(
                f"augment.color_jitter={self.color_jitter} beside augment.auto_augment={self.auto_augment}, which has "
                "colours of its own; leave one out"
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return MIXED.holds(self)


@dataclass
class Model:
    """A timm model by name; see `sit_atconv.models.attnet` for ours and their options."""

    name: str = "attnet_t2"
    input_size: int = ranged(224, limits.PIXELS)  # pixels, of training and evaluation
    drop_path_rate: float | None = ranged(None, limits.SHARE_UNDER_1)  # left out, the model's own
    # dropout before the classifier; left out, the model's own
    drop_rate: float | None = ranged(None, limits.SHARE_UNDER_1)
    options: dict[str, Any] = ranged({}, limits.OPTION)  # of the model's constructor, over those of its name
    # evaluation: input_size is this share of the resized image
    crop_pct: float = ranged(
        0.875, number(0.01, 1, "the image is made as many times larger, and no crop is larger than it")
    )
    # that images are normalised by, of [0, 1]; left out, ImageNet's, and 0.5 for digits
    mean: list[float] | None = ranged(None, number(-100, 100, "pixels are numbers from 0 to 1"))
    std: list[float] | None = ranged(None, number(1e-4, 1e4, "pixels are numbers from 0 to 1, and are divided by it"))

    def __post_init__(self):
        elsewhere = dict.fromkeys(("in_chans", "num_classes"), "it follows from the data")
        elsewhere |= {name: f"it is model.{name}" for name in ("drop_path_rate", "drop_rate")}
        elsewhere |= dict.fromkeys(("pretrained", "checkpoint_path"), "a run begins with new weights")
        if name := next((name for name in elsewhere if name in self.options), None):
            raise InputError(f"model.options.{name}: {elsewhere[name]}; leave it out")


@dataclass
class Train(Optimisation):
    """The optimisation: AdamW, linear warm-up, cosine."""

    epochs: float = ranged(300, limits.EPOCHS)
    warmup_epochs: float = ranged(5, number(0, "epochs", "a longer warm-up never gets to train.lr", under=True))
    batch_size: int = ranged(4096, limits.GLOBAL_BATCH)
    # not to be changed: images are mixed, and their statistics taken, within a part
    gradient_accumulation_steps: int = ranged(1, PARTS)
    lr: float = ranged(4e-3, limits.LEARNING_RATE)
    min_lr: float = ranged(1e-6, number(0, "lr", "it is what train.lr falls to"))  # at the end
    # at the start
    warmup_lr: float | None = setting(WARMED_UP, 1e-6, dataclasses.replace(limits.LEARNING_RATE, least=0))
    weight_decay: float = ranged(0.05, limits.WEIGHT_DECAY)


@dataclass
class Ema:
    """The moving average of weights and statistics, timm's ModelEmaV3."""

    decay: float = ranged(0.99995, limits.SHARE_UNDER_1)
    warmup: bool = False  # the decay grows to its value


@dataclass
class Eval:
    """Accuracy on the held-out images while training; at the end in any case."""

    every_epochs: float = ranged(1.0, limits.EPOCHS)
    batch_size: int = ranged(256, limits.BATCH)  # of every process


@dataclass
class ClassifierRecipe:
    """All that decides a classifier's run."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    ema: Ema = field(default_factory=Ema)
    eval: Eval = field(default_factory=Eval, metadata=MUTABLE)
    checkpoint: Checkpoint = field(default_factory=Checkpoint, metadata=MUTABLE)

    def __post_init__(self):
        grey = (self.data.channels or (1 if self.data.kind == "digits" else 3)) == 1
        mean, std = GREY if grey else COLOUR
        self.model.mean = list(mean) if self.model.mean is None else self.model.mean
        self.model.std = list(std) if self.model.std is None else self.model.std
        self.check_pairs()

    def check_pairs(self, processes: int = 1) -> None:
        """Raises InputError where images are mixed in pairs, and a micro-batch of a process is odd."""
        parts = processes * self.train.gradient_accumulation_steps
        if self.augment.mixes and self.train.batch_size % (2 * parts):
            raise InputError(
                f"train.batch_size={self.train.batch_size} in {parts} parts, with augment.mixup or cutmix, which mix "
                f"images in pairs; choose a multiple of {2 * parts}"
            )
