"""The recipe: its schema, and how a YAML file and key=value overrides become one."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_atconv.errors import InputError, check_choice
from sit_atconv.flow.loss import WEIGHTS
from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.flow.times import TIME_SAMPLINGS

DATA_KINDS = ("digits", "imagefolder")
CODECS = ("identity", "vae")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LR_SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("tensorboard", "wandb")


def _at_least(section: str, **limits) -> None:
    """Check fields of a section: name=(value, least allowed)."""
    for name, (value, least) in limits.items():
        if not (math.isfinite(value) and value >= least):
            raise InputError(f"{section}.{name}={value}: must be a finite number, at least {least}")


@dataclass
class Run:
    """Where a run lies, what its randomness starts from, and what it reports."""

    out: str = MISSING  # folder of the run: recipe, log, checkpoints, previews
    seed: int = 0
    log_every: int = 10  # steps between two lines of log.jsonl
    trackers: list[str] = field(default_factory=list)  # besides log.jsonl: tensorboard, wandb

    def __post_init__(self):
        _at_least("run", seed=(self.seed, 0), log_every=(self.log_every, 1))
        for tracker in self.trackers:
            check_choice("run.trackers", tracker, TRACKERS)


@dataclass
class Data:
    """The training images."""

    kind: str = "digits"
    root: str | None = None  # imagefolder: a folder with one subfolder per class
    image_size: int | None = None  # imagefolder: pixels after the centre crop
    flip: bool = False  # mirror half of the images
    num_images: int | None = None  # checked against the data; lets --dry-run work without them
    workers: int = 0  # loader processes per training process

    def __post_init__(self):
        check_choice("data.kind", self.kind, DATA_KINDS)
        _at_least("data", workers=(self.workers, 0))
        for name in ("image_size", "num_images"):
            if getattr(self, name) is not None:
                _at_least("data", **{name: (getattr(self, name), 1)})
        for name in ("root", "image_size"):
            value = getattr(self, name)
            if self.kind == "imagefolder" and value is None:
                raise InputError(f"data.{name} is missing; data.kind=imagefolder needs it")
            if self.kind == "digits" and value is not None:
                raise InputError(f"data.{name}={value}: data.kind=digits has its own; leave it out")


@dataclass
class Latents:
    """The codec between images and latents."""

    codec: str = "identity"  # identity: pixels are the latents; vae: a diffusers AutoencoderKL
    vae: str | None = None  # hub id or local folder
    batch_size: int = 16  # images per pass through the VAE

    def __post_init__(self):
        check_choice("latents.codec", self.codec, CODECS)
        _at_least("latents", batch_size=(self.batch_size, 1))
        if (self.codec == "vae") != (self.vae is not None):
            raise InputError(
                f"latents.codec={self.codec} with latents.vae={self.vae}: a vae codec takes a vae, no other"
            )


@dataclass
class Model:
    """A preset by name, and options of SiTTransformer2DModel over it; what is left out keeps the preset's value.

    sample_size, in_channels and num_classes follow from data and codec; stated here they are checked against those,
    and let --dry-run work where neither is at hand.
    """

    name: str | None = None
    sample_size: Any = None
    patch_size: int | None = None
    in_channels: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    num_classes: int | None = None
    class_dropout_prob: float | None = None
    learn_sigma: bool | None = None
    token_mixer: Any = None
    pos_embed: Any = None
    pool: str | None = None
    routing: str | None = None
    inhibition: str | None = None
    kernel_size: int | None = None
    activation: str | None = None
    qk_norm: bool | None = None

    def __post_init__(self):
        size = self.sample_size
        pair = [size, size] if isinstance(size, int) else size
        if size is not None and not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
        ):
            raise InputError(f"model.sample_size={size!r}: give a number, or [height, width]")

    def options(self) -> dict[str, Any]:
        """What the recipe states, by the names of SiTTransformer2DModel."""
        stated = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        stated.pop("name", None)
        return stated


@dataclass
class Flow:
    """The path from noise to data, what the network predicts on it, and where training looks."""

    path: str = "linear"
    prediction: str = "velocity"
    loss_weight: str = "none"  # of score and noise prediction: none, velocity, likelihood
    time_sampling: str = "uniform"  # or logit-normal
    time_mean: float | None = None  # logit-normal: of logit(t), t = 1 is data; left out, 0
    time_std: float | None = None  # logit-normal: left out, 1
    time_shift: float = 1.0  # s: noise level 1 - t becomes s (1 - t) / (1 + (s - 1) (1 - t)); over 1 is nearer to noise

    def __post_init__(self):
        check_choice("flow.path", self.path, PATHS)
        check_choice("flow.prediction", self.prediction, PREDICTIONS)
        check_choice("flow.loss_weight", self.loss_weight, WEIGHTS)
        check_choice("flow.time_sampling", self.time_sampling, TIME_SAMPLINGS)
        if self.prediction == "velocity" and self.loss_weight != "none":
            raise InputError(
                f"flow.loss_weight={self.loss_weight}: flow.prediction=velocity has no weight; leave it out, or "
                "predict score or noise"
            )
        for name in ("time_mean", "time_std"):
            value = getattr(self, name)
            if self.time_sampling == "uniform" and value is not None:
                raise InputError(f"flow.{name}={value} goes with flow.time_sampling=logit-normal; leave it out")
        if self.time_mean is not None and not math.isfinite(self.time_mean):
            raise InputError(f"flow.time_mean={self.time_mean}: must be a finite number")
        for name in ("time_std", "time_shift"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"flow.{name}={value}: must be a positive number")


@dataclass
class Train:
    """The optimisation."""

    max_steps: int = 400_000
    batch_size: int = 256  # global: all processes and accumulation steps together
    gradient_accumulation_steps: int = 1
    lr: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: str = "constant"  # after the warm-up: constant, or linear or cosine down to 0 at max_steps
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0  # on matrices; vectors (biases, difference_control) are never decayed
    max_grad_norm: float | None = None
    precision: str = "fp32"  # tf32 concerns CUDA; bf16 and fp16 are autocast over fp32 weights
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self):
        check_choice("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("train.precision", self.precision, PRECISIONS)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train.betas={self.betas}: give two numbers in [0, 1)")
        _at_least(
            "train",
            max_steps=(self.max_steps, 1),
            batch_size=(self.batch_size, 1),
            gradient_accumulation_steps=(self.gradient_accumulation_steps, 1),
            lr=(self.lr, 0),
            warmup_steps=(self.warmup_steps, 0),
            weight_decay=(self.weight_decay, 0),
        )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise InputError(
                f"train.max_grad_norm={self.max_grad_norm}: must be positive; leave it out for no clipping"
            )


@dataclass
class Ema:
    """The moving average of the weights, which is what gets sampled."""

    decay: float = 0.9999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay={self.decay}: must be in [0, 1)")


@dataclass
class Checkpoint:
    """How often the run is saved, and how much of it is kept."""

    every: int = 10_000  # steps; the last step is always kept
    keep_last: int = 3

    def __post_init__(self):
        _at_least("checkpoint", every=(self.every, 1), keep_last=(self.keep_last, 1))


@dataclass
class Preview:
    """Grids of samples drawn while training."""

    every: int = 10_000  # steps between two grids of EMA samples; 0 draws none
    num: int = 16
    sampler: str = "euler"
    steps: int = 50
    guidance_scale: float = 1.5
    diffusion: str | None = None  # this and the next three: SDE samplers alone, see generation.Sampling
    diffusion_norm: float | None = None
    last_step: str | None = None
    last_step_size: float | None = None

    def __post_init__(self):
        _at_least("preview", every=(self.every, 0), num=(self.num, 1))


@dataclass
class Recipe:
    """All that decides a run."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    latents: Latents = field(default_factory=Latents)
    model: Model = field(default_factory=Model)
    flow: Flow = field(default_factory=Flow)
    train: Train = field(default_factory=Train)
    ema: Ema = field(default_factory=Ema)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    preview: Preview = field(default_factory=Preview)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, lay `key=value` overrides over it, and validate. Raises InputError in one line.

    A file may name another with `base:`, relative to itself, whose keys it takes over and its own win against.
    """
    for override in overrides:
        if "=" not in override:
            raise InputError(f"override {override!r} is not of the form key=value")
    stated = _read_with_base(Path(path), ())
    try:
        stated = OmegaConf.merge(stated, OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError) as error:
        raise InputError(f"recipe {str(path)!r} cannot be read: {error}") from None
    return make_recipe(stated)


def _read_with_base(path: Path, above: tuple[Path, ...]) -> Any:
    """The keys of a recipe file over those of its base; above: the files that led here."""
    if path.resolve() in above:
        raise InputError(f"recipe {str(path)!r}: its base leads back to it; leave one `base` out")
    try:
        stated = OmegaConf.create(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise InputError(f"recipe {str(path)!r}: {reason}; see experiments/recipes") from None
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError) as error:
        raise InputError(f"recipe {str(path)!r} cannot be read: {error}") from None
    if not OmegaConf.is_dict(stated) or "base" not in stated:
        return stated
    base = stated.pop("base")
    if not isinstance(base, str):
        raise InputError(f"recipe {str(path)!r}: base={base!r}: give the path of one recipe file")
    return OmegaConf.merge(_read_with_base(path.parent / base, (*above, path.resolve())), stated)


def make_recipe(stated: Any) -> Recipe:
    """A validated Recipe from nested dictionaries. Raises InputError for unknown keys, wrong types, wrong values."""
    _check_keys(OmegaConf.to_container(OmegaConf.create(stated)), Recipe)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), stated))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"recipe: {key}{str(error).splitlines()[0]}") from None
    return recipe


def _check_keys(stated: Any, schema: type, prefix: str = "") -> None:
    if not isinstance(stated, dict):
        raise InputError(f"recipe: {prefix.rstrip('.') or 'the file'} must be a mapping, not {stated!r}")
    fields = {entry.name: entry.type for entry in dataclasses.fields(schema)}
    for key, value in stated.items():
        check_choice("recipe key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
        if dataclasses.is_dataclass(fields[key]):
            _check_keys(value, fields[key], f"{prefix}{key}.")


# What a later start of the same run may state differently.
MUTABLE = ("run.out", "run.log_every", "run.trackers", "train.max_steps")
MUTABLE_SECTIONS = ("checkpoint", "preview")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps two recipes (nested dictionaries) from being the same run: a text "key: old -> new" for each key.

    A key that `old` leaves out, as one stored before the key was there, has its default.
    """
    old_flat, new_flat = flatten(to_dict(make_recipe(old))), flatten(new)
    return [
        f"{key}: {old_flat[key]} -> {new_flat[key]}"
        for key in sorted(new_flat)
        if old_flat[key] != new_flat[key] and key not in MUTABLE and key.partition(".")[0] not in MUTABLE_SECTIONS
    ]


def flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """{"section": {"key": value}} -> {"section.key": value}."""
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as JSON and YAML store them."""
    return OmegaConf.to_container(OmegaConf.structured(recipe))
