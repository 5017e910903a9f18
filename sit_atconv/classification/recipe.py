"""The recipe of a classifier: its schema over that of `sit_atconv.config`."""

import math
from dataclasses import dataclass, field
from typing import Any

from sit_atconv import config
from sit_atconv.config import Checkpoint, Loading, Optimisation, Run, at_least, expand_home
from sit_atconv.errors import InputError, check_choice

DATA_KINDS = ("digits", "imagefolder", "zip", "lmdb", "hf")
INTERPOLATIONS = ("bilinear", "bicubic", "random")
ERASING_MODES = ("const", "rand", "pixel")


@dataclass
class Data(Loading):
    """The images: those to learn from, and those held out."""

    kind: str = "digits"
    root: str | None = None  # all kinds but digits: folder, zip file, LMDB, or hub id of the training images
    val_root: str | None = None  # the same of the held-out images; hf: left out, root
    split: str | None = None  # hf: left out, "train"
    val_split: str | None = None  # hf: left out, "validation"
    subset: str | None = None  # hf: the configuration of a dataset that has several
    revision: str | None = None  # hf: branch, tag or commit; left out, the newest
    image_key: str | None = None  # hf: the column of the images; left out, "image"
    label_key: str | None = None  # hf: the column of the classes; left out, "label"
    repeats: int = 1  # of every image of an epoch, each augmented anew, and as many times fewer images in it

    def __post_init__(self):
        super().__post_init__()
        expand_home(self, "root", "val_root")
        check_choice("data.kind", self.kind, DATA_KINDS)
        at_least("data", repeats=(self.repeats, 1))
        for name in ("root", "val_root"):
            value = getattr(self, name)
            if self.kind == "digits" and value is not None:
                raise InputError(f"data.{name}={value}: data.kind=digits has its own; leave it out")
            if value is None and self.kind != "digits" and (self.kind, name) != ("hf", "val_root"):
                raise InputError(f"data.{name} is missing; data.kind={self.kind} needs it")
        for name in ("split", "val_split", "subset", "revision", "image_key", "label_key"):
            if getattr(self, name) is not None and self.kind != "hf":
                raise InputError(f"data.{name}={getattr(self, name)} goes with data.kind=hf; leave it out")
        if self.label_key == "":
            raise InputError("data.label_key='': a classifier needs classes; name their column")

    def open_as(self) -> tuple[config.Data, config.Data]:
        """The training and the held-out images, as `sit_atconv.data` opens all but digits.

        Their size is that of the model's crops, which are cut from the whole image: the one that is stated acts on
        nothing.
        """
        held_out = (self.val_split or "validation") if self.kind == "hf" else None
        return tuple(
            config.Data(
                kind=self.kind, root=root, image_size=1, split=split, subset=self.subset, revision=self.revision,
                image_key=self.image_key, label_key=self.label_key, max_pixels=self.max_pixels,
            )
            for root, split in ((self.root, self.split), (self.val_root or self.root, held_out))
        )  # fmt: skip


@dataclass
class Augment:
    """What training does to an image, by timm's create_transform and Mixup."""

    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the image's area in a crop
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # of a crop's width to its height
    hflip: float = 0.5  # probability
    vflip: float = 0.0
    color_jitter: float = 0.0  # brightness, contrast, saturation; not beside auto_augment
    auto_augment: str | None = None  # as timm writes it, e.g. rand-m9-mstd0.5-inc1
    interpolation: str = "bicubic"  # of a crop: bilinear, bicubic, or random for either
    erasing: float = 0.0  # probability that a rectangle is erased
    erasing_mode: str | None = None  # filled with const 0, one rand colour, or a random value per pixel (left out)
    mixup: float = 0.0  # alpha of the beta distribution; 0 mixes none
    cutmix: float = 0.0
    mix_prob: float | None = None  # that a batch is mixed at all; left out, 1
    switch_prob: float | None = None  # of cutmix, where both are on; left out, 0.5
    smoothing: float = 0.1  # share of the target that all classes have alike

    def __post_init__(self):
        for name, values in (("scale", self.scale), ("ratio", self.ratio)):
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                raise InputError(f"augment.{name}={values}: give two rising numbers over 0")
        for name in ("hflip", "vflip", "erasing", "mix_prob", "switch_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"augment.{name}={value}: a probability is in [0, 1]")
        at_least("augment", mixup=(self.mixup, 0), cutmix=(self.cutmix, 0), color_jitter=(self.color_jitter, 0))
        if not 0 <= self.smoothing < 1:
            raise InputError(f"augment.smoothing={self.smoothing}: choose a share in [0, 1)")
        check_choice("augment.interpolation", self.interpolation, INTERPOLATIONS)
        if self.erasing_mode is not None:
            check_choice("augment.erasing_mode", self.erasing_mode, ERASING_MODES)
        for name, acts, where in (
            ("erasing_mode", self.erasing > 0, "augment.erasing"),
            ("mix_prob", self.mixes, "augment.mixup or cutmix"),
            ("switch_prob", self.mixup > 0 and self.cutmix > 0, "both augment.mixup and cutmix"),
        ):
            if getattr(self, name) is not None and not acts:
                raise InputError(f"augment.{name}={getattr(self, name)} does nothing without {where}; leave it out")
        if self.auto_augment is not None and self.color_jitter:
            raise InputError(
                f"augment.color_jitter={self.color_jitter} beside augment.auto_augment={self.auto_augment}, which has "
                "colours of its own; leave one out"
            )

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class Model:
    """A timm model by name; see `sit_atconv.models.attnet` for ours and their options."""

    name: str = "attnet_t2"
    input_size: int = 224  # pixels, of training and evaluation
    drop_path_rate: float | None = None  # left out, the model's own
    drop_rate: float | None = None  # dropout before the classifier; left out, the model's own
    options: dict[str, Any] = field(default_factory=dict)  # of the model's constructor, over those of its name
    crop_pct: float = 0.875  # evaluation: input_size is this share of the resized image
    mean: list[float] | None = None  # that images are normalised by, of [0, 1]; left out, ImageNet's
    std: list[float] | None = None

    def __post_init__(self):
        at_least("model", input_size=(self.input_size, 1))
        for name in ("drop_path_rate", "drop_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"model.{name}={value}: choose a share in [0, 1)")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise InputError(f"model.std={self.std}: give numbers over 0")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise InputError(f"model.mean={self.mean}: give finite numbers")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"model.crop_pct={self.crop_pct}: choose a share in (0, 1]")
        for name in ("in_chans", "num_classes", "drop_path_rate", "drop_rate"):
            if name in self.options:
                where = "follows from the data" if name in ("in_chans", "num_classes") else f"is model.{name}"
                raise InputError(f"model.options.{name}: it {where}; leave it out")
        for name in ("pretrained", "checkpoint_path"):
            if name in self.options:
                raise InputError(f"model.options.{name}: a run begins with new weights; leave it out")


@dataclass
class Train(Optimisation):
    """The optimisation: AdamW, linear warm-up, cosine."""

    epochs: float = 300
    warmup_epochs: float = 5
    batch_size: int = 4096
    lr: float = 4e-3
    min_lr: float = 1e-6  # at the end
    warmup_lr: float | None = None  # at the beginning; left out, 1e-6
    weight_decay: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        at_least(
            "train",
            warmup_epochs=(self.warmup_epochs, 0),
            min_lr=(self.min_lr, 0),
        )
        if self.warmup_lr is not None:
            at_least("train", warmup_lr=(self.warmup_lr, 0))
            if not self.warmup_epochs:
                raise InputError(f"train.warmup_lr={self.warmup_lr} does nothing without train.warmup_epochs")
        if self.min_lr > self.lr:
            raise InputError(f"train.min_lr={self.min_lr} is more than train.lr={self.lr}, to which it is to fall")
        if not (math.isfinite(self.epochs) and self.epochs > self.warmup_epochs):
            raise InputError(
                f"train.epochs={self.epochs}: must be more than train.warmup_epochs={self.warmup_epochs}, and finite"
            )


@dataclass
class Ema:
    """The moving average of weights and statistics, timm's ModelEmaV3."""

    decay: float = 0.99995
    warmup: bool = False  # the decay grows to its value

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay={self.decay}: must be in [0, 1)")


@dataclass
class Eval:
    """Accuracy on the held-out images while training; at the end in any case."""

    every_epochs: float = 1.0
    batch_size: int = 256  # of every process

    def __post_init__(self):
        at_least("eval", batch_size=(self.batch_size, 1))
        if not 0 < self.every_epochs < math.inf:
            raise InputError(f"eval.every_epochs={self.every_epochs}: must be greater than 0, and finite")


@dataclass
class ClassifierRecipe:
    """All that decides a classifier's run."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    ema: Ema = field(default_factory=Ema)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def __post_init__(self):
        self.check_pairs()

    def check_pairs(self, processes: int = 1) -> None:
        """Raises InputError where images are mixed in pairs, and a micro-batch of a process is odd."""
        parts = processes * self.train.gradient_accumulation_steps
        if self.augment.mixes and self.train.batch_size % (2 * parts):
            raise InputError(
                f"train.batch_size={self.train.batch_size} in {parts} parts, with augment.mixup or cutmix, which mix "
                f"images in pairs; choose a multiple of {2 * parts}"
            )


# What a later start of the same run may state differently.
MUTABLE = (
    "run.out", "run.log_every", "run.trackers", "data.root", "data.val_root", "data.workers", "data.worker_timeout",
    "data.max_bad_share", "data.max_pixels", "train.max_skipped", "train.gradient_checkpointing", "train.compile",
)  # fmt: skip
MUTABLE_SECTIONS = ("checkpoint", "eval")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps two recipes from being the same run, see `config.differences`."""
    return config.changes(config.make_recipe(old, ClassifierRecipe), new, MUTABLE, MUTABLE_SECTIONS)
