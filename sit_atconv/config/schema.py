"""The recipe: its sections, and which settings go together.

A null in it is a choice of its own ("no clipping"), or leaves a thing to where it lies, or is of a setting that does
nothing beside the others; what it stands for elsewhere takes its place when the section is made, see `When`. What the
data, the codec or a preset of the model decide is left to them here, and put in by `training.resolved`.
"""

import dataclasses
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from omegaconf import MISSING
from PIL import ImageColor

from sit_atconv.flow.loss import WEIGHTS
from sit_atconv.flow.meanflow import Guidance
from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.flow.times import TIME_SAMPLINGS, TimeSampling, training_interval
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, named
from sit_atconv.runtime.fields import MUTABLE, PATH, Section, When, chosen, idle, setting
from sit_atconv.runtime.limits import Range, number, ranged
from sit_atconv.runtime.reading import fault_of
from sit_atconv.sampling.settings import Sampling

DATA_KINDS = ("digits", "imagefolder", "zip", "lmdb", "hf", "npz", "latents")
MAX_PIXELS = 178_956_970
PARTS = Range(1, "batch_size", "each takes a share of the batch")
HELD_OUT = number(0, 0.5, "it is the smaller part of the images, and of a share of 0 there is none", over=True)
CLIPPING = number(
    1e-6, 1e6, "AdamW adds 1e-8 to a gradient's size: clipped to less it trains nothing; left out, none is clipped"
)

HUB = When("data.kind=hf", lambda data: data.kind == "hf")
STREAMED = When("data.streaming=true", lambda data: data.kind == "hf" and data.streaming)
VAE = When("latents.codec=vae", lambda latents: latents.codec == "vae")
CACHED = When("data.kind=latents", lambda data: data.kind == "latents")
LOGIT_NORMAL = When("flow.time_sampling=logit-normal", lambda flow: flow.time_sampling == "logit-normal")
ONE_DECAY = When("ema.kind=constant or warmup", lambda ema: ema.kind != "power")
SCORED = When("score.every", lambda score: score.every > 0)
POWER = When("ema.kind=power", lambda ema: ema.kind == "power")
MEANFLOW = When("meanflow.share", lambda meanflow: meanflow.share is not None)


@dataclass
class Run(Section):
    """Where a run lies, what its randomness starts from, and what it reports."""

    out: str = field(default=MISSING, metadata=MUTABLE | PATH)  # folder of the run: recipe, log, checkpoints, previews
    seed: int = ranged(0, limits.SEED)
    log_every: int = ranged(10, limits.STEPS, **MUTABLE)  # steps between two lines of log.jsonl
    trackers: list[str] = chosen([], ("tensorboard", "wandb"), **MUTABLE)  # besides log.jsonl


@dataclass
class Loading(Section):
    """Which images there are, and how they are read, whatever they are for: a part of a section `data`."""

    kind: str = chosen("digits", DATA_KINDS)
    # all kinds but digits: folder, zip file, LMDB, hub id, npz (a classifier's to learn from), or cache of latents
    root: str | None = field(default=None, metadata=MUTABLE | PATH)
    _: KW_ONLY
    split: str | None = setting(HUB, "train")
    subset: str | None = setting(HUB)  # the configuration of a dataset that has several
    revision: str | None = setting(HUB)  # branch, tag or commit; left out, the newest
    image_key: str | None = setting(HUB, "image")  # the column of the images
    label_key: str | None = setting(HUB, "label")  # the column of the classes; "" for a single class
    workers: int = ranged(0, limits.WORKERS, **MUTABLE)  # loader processes per training process
    # seconds without a batch after which a loader process counts as hung
    worker_timeout: float = ranged(
        600.0, number(1, 86_400, "a batch may take a second, and nobody waits a day"), **MUTABLE
    )
    # share of every class that is kept from training, by the order of the images; null: none
    held_out: float | None = ranged(None, HELD_OUT)
    # of the images: how many may turn out unreadable before training stops
    max_bad_share: float = ranged(0.001, limits.SHARE, **MUTABLE)
    # of an image: a larger one counts as unreadable before it is decoded
    max_pixels: int = ranged(89_478_485, number(1, MAX_PIXELS, "Pillow goes no further"), **MUTABLE)
    # null: as many as the data have, 1 of digits, those of an npz, 3 of all others
    channels: int | None = ranged(None, Range(1, 3, "grey has 1, RGB has 3"), choices=(1, 3))
    # the colour that transparent images are composited on, by name or #rrggbb; null: transparency is left out. digits
    # and npz have none, and a cache of latents has that of its images: there it becomes null
    background: str | None = "white"

    def __post_init__(self):
        super().__post_init__()
        if self.background is None:
            return
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise InputError(f"data.background={self.background!r} is no opaque colour; give a name, or #rrggbb")
        if self.kind in ("digits", "npz", "latents") and self.background == Loading.background:
            self.background = None
        elif self.kind in ("digits", "npz"):
            raise InputError(
                f"data.background={self.background}: data.kind={self.kind} has no transparency; "
                f"{idle('data.background', Loading.background)}"
            )

    def _check_needed(self, *names: str, but: tuple[str, str]) -> None:
        """Raise InputError for a setting that digits have no use for, and where one is missing that other kinds need;
        but: the kind, and the setting that it does without."""
        for name in names:
            value = getattr(self, name)
            if self.kind == "digits" and value is not None:
                raise InputError(f"data.{name}={value}: data.kind=digits has its own; {idle(f'data.{name}')}")
            if value is None and self.kind != "digits" and (self.kind, name) != but:
                raise InputError(f"data.{name} is missing; data.kind={self.kind} needs it")


@dataclass
class Data(Loading):
    """The training images."""

    # pixels after the centre crop; digits and latents have their own
    image_size: int | None = ranged(None, limits.PIXELS)
    # read the dataset in its order, shuffled within a buffer, instead of storing it
    streaming: bool = setting(HUB, idle=False)
    # images in the buffer
    shuffle_buffer: int | None = setting(STREAMED, 10_000, Range(1, 1_000_000, "all of them are held in memory"))
    # every image once an epoch, or every class equally often
    sampling: str = chosen("natural", ("natural", "balanced"))
    flip: bool = False  # mirror half of the images
    # of all images, held-out ones too; checked against the data; lets --dry-run work without them, if none is held out
    num_images: int | None = ranged(None, Range(1, 10**9, "the order of an epoch is held in memory"), **MUTABLE)
    # where a loss needs the images: their root today, if it has moved
    source: str | None = setting(CACHED, **MUTABLE, **PATH)
    verify: bool = setting(CACHED, idle=True, **MUTABLE)  # compare every shard with its SHA-256 at the start

    def __post_init__(self):
        super().__post_init__()
        # A cache of latents knows the size of its images, which is checked against this.
        self._check_needed("root", "image_size", but=("latents", "image_size"))
        if self.streaming and self.sampling == "balanced":
            raise InputError("data.sampling=balanced needs to reach every image; leave data.streaming out")
        if self.streaming and self.held_out is not None:
            raise InputError(f"data.held_out={self.held_out:g} needs to reach every image; leave data.streaming out")


@dataclass
class Latents(Section):
    """The codec between images and latents."""

    codec: str = chosen("identity", ("identity", "vae"))  # pixels are the latents, or a diffusers AutoencoderKL's are
    # hub id or local folder; a cache of latents (data.kind=latents) needs it for decoding alone
    vae: str | None = setting(VAE, **MUTABLE, **PATH)
    batch_size: int = ranged(16, limits.BATCH, **MUTABLE)  # images per pass through the VAE
    # of the VAE where it encodes: tf32 concerns CUDA, bf16 is autocast. null: in training fp32 with
    # train.precision=fp32, tf32 with any other; in `sit-atconv encode` fp32
    precision: str | None = setting(
        VAE, choices=("fp32", "tf32", "bf16"), mutable=lambda latents: latents["precision"] is None
    )


@dataclass
class Model:
    """A preset by name, and options of SiTTransformer2DModel over it; what is left out keeps the preset's value.

    sample_size, in_channels and num_classes follow from data and codec; stated here they are checked against those,
    and let --dry-run work where neither is at hand.
    """

    name: str | None = None  # a preset, such as SiT-ATConv-S/2; null: none, and the options below say all
    # height and width of the latent, one number or [height, width]; from data and codec
    sample_size: Any = ranged(None, limits.PIXELS, **MUTABLE)
    patch_size: int | None = ranged(None, limits.PIXELS)  # side of the square that becomes a token
    in_channels: int | None = ranged(None, limits.CHANNELS, **MUTABLE)  # of the latent; from data and codec
    hidden_size: int | None = ranged(None, limits.CHANNELS)  # width of a token
    depth: int | None = ranged(None, limits.BLOCKS)  # blocks
    num_heads: int | None = ranged(None, limits.CHANNELS)  # of attention
    mlp_ratio: float | None = ranged(None, limits.MLP_RATIO)  # hidden units of an MLP, over hidden_size
    num_classes: int | None = ranged(None, limits.CLASSES, **MUTABLE)  # from the data
    # share of the labels that become "no class", for guidance
    class_dropout_prob: float | None = ranged(None, limits.SHARE_UNDER_1)
    learn_sigma: bool | None = None  # twice the output channels, of which half are dropped, as public checkpoints have
    token_mixer: Any = None  # attention (where no preset says otherwise), atconv, hybrid, or a list of one per block
    pos_embed: Any = None  # true, false, or auto: only with attention
    pool: str | None = None  # of ATConv: raster or grid, what tokens are averaged over
    routing: str | None = None  # of ATConv: adaptive (a kernel per sample) or static
    inhibition: str | None = None  # of ATConv: learned, full or none, the share of the kernel's mean that is subtracted
    kernel_size: int | None = ranged(None, limits.KERNEL)  # of ATConv: odd
    activation: str | None = None  # of ATConv: gelu_tanh, gelu or silu
    qk_norm: bool | None = None  # of attention: queries and keys are normalised

    def __post_init__(self):
        if fault_of(self.sample_size, (None, int, [int, int])):
            raise InputError(f"model.sample_size={self.sample_size!r}: give a number, or [height, width]")

    def options(self) -> dict[str, Any]:
        """What the recipe states, by the names of SiTTransformer2DModel."""
        stated = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        stated.pop("name", None)
        return stated


@dataclass
class Flow(Section):
    """The path from noise to data, what the network predicts on it, and where training looks."""

    path: str = chosen("linear", PATHS)
    prediction: str = chosen("velocity", PREDICTIONS)
    loss_weight: str = chosen("none", WEIGHTS)  # of score and noise prediction
    time_sampling: str = chosen("uniform", TIME_SAMPLINGS)
    # of logit(t), t = 1 is data
    time_mean: float | None = setting(
        LOGIT_NORMAL, 0.0, number(-10, 10, "beyond it nearly all t lie within 0.0001 of one end")
    )
    time_std: float | None = setting(LOGIT_NORMAL, 1.0, number(0.001, 100, "t would be one value, or 0 and 1 alone"))
    time_stratified: bool = False  # one t from every equal part of a batch's distribution, for less noise in the loss
    # s: noise level 1 - t becomes s (1 - t) / (1 + (s - 1) (1 - t)); over 1 is nearer to noise
    time_shift: float = ranged(1.0, limits.TIME_SHIFT)

    def __post_init__(self):
        super().__post_init__()
        if self.prediction == "velocity" and self.loss_weight != "none":
            raise InputError(
                f"flow.loss_weight={self.loss_weight}: flow.prediction=velocity has no weight; "
                f"{idle('flow.loss_weight', 'none')}, or predict score or noise"
            )

    def times(self) -> TimeSampling:
        """How t is drawn, on the interval that path and prediction can be trained on."""
        interval = training_interval(PATHS[self.path](), self.prediction)
        return TimeSampling(interval, self.time_sampling, self.time_mean, self.time_std, self.time_shift)


@dataclass(kw_only=True)
class Optimisation(Section):
    """What every trainer has of a section `train`; each has its own defaults, and its own schedule."""

    batch_size: int = ranged(256, limits.GLOBAL_BATCH)  # global: all processes and accumulation steps together
    gradient_accumulation_steps: int = ranged(1, PARTS, **MUTABLE)  # parts that a batch is computed in, for less memory
    lr: float = ranged(1e-4, limits.LEARNING_RATE)  # of AdamW, after the warm-up
    betas: list[float] = ranged([0.9, 0.999], limits.SHARE_UNDER_1)  # of AdamW
    # on matrices; vectors (biases, norms, difference_control) are never decayed
    weight_decay: float = ranged(0.0, limits.WEIGHT_DECAY)
    max_grad_norm: float | None = ranged(None, CLIPPING)  # longer gradients are cut to it; null: none is
    # tf32 concerns CUDA; bf16 and fp16 are autocast over fp32 weights
    precision: str = chosen("fp32", ("fp32", "tf32", "bf16", "fp16"))
    # steps in a row without a finite loss and gradient after which training stops
    max_skipped: int = ranged(20, limits.STEPS, **MUTABLE)
    # compute activations again in the backward pass: less memory, more time
    gradient_checkpointing: bool = field(default=False, metadata=MUTABLE)
    compile: bool = field(default=False, metadata=MUTABLE)  # by torch.compile

    def __post_init__(self):
        super().__post_init__()
        if len(self.betas) != 2:
            raise InputError(f"train.betas={self.betas}: give two numbers in [0, 1)")


@dataclass
class Train(Optimisation):
    """The optimisation."""

    # a later start may change it with lr_schedule=constant alone: the rate of the others would jump
    max_steps: int = ranged(400_000, limits.STEPS, mutable=lambda train: train["lr_schedule"] == "constant")
    warmup_steps: int = ranged(0, limits.STEPS_OR_NONE)  # a run that ends before is one of the warm-up alone
    lr_schedule: str = chosen("constant", ("constant", "linear", "cosine"))  # the others go down to 0 at max_steps
    # what the weights begin from: a run, a checkpoint, a model's folder or a public file; null: they are drawn; what
    # is named may move, not change
    init: str | None = field(default=None, metadata=MUTABLE | PATH)
    # parts of the model that are drawn all the same, such as [y_embedder, blocks.3.attn]; whatever does not fit must be
    # among them, and in a name * stands for any part of it: blocks.*.attn
    init_anew: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        if self.init_anew and self.init is None:
            raise InputError(f"train.init_anew={self.init_anew} goes with train.init; {idle('train.init_anew', '[]')}")


@dataclass
class Ema(Section):
    """The moving average of the weights, which is what gets sampled."""

    # warmup: the decay grows to its value; power: by a power of the step, see sit_atconv.training.ema
    kind: str = chosen("constant", ("constant", "warmup", "power"))
    decay: float | None = setting(ONE_DECAY, 0.9999, limits.SHARE_UNDER_1)
    # widths relative to the step; the first is sampled
    stds: list[float] | None = setting(POWER, [0.05, 0.1], limits.EMA_STD)
    # steps between two snapshots for other widths post hoc; left out, none
    snapshot_every: int | None = setting(POWER, None, limits.STEPS, **MUTABLE)

    def __post_init__(self):
        super().__post_init__()
        if self.stds is not None and not (self.stds and len(set(self.stds)) == len(self.stds)):
            raise InputError(f"ema.stds={self.stds}: give different numbers")


@dataclass
class Repa:
    """REPA's loss: hidden tokens of one block, projected, point where a frozen image encoder's features point."""

    # a timm ViT by name, or a folder as timm's local-dir:; left out, no such loss
    encoder: str | None = field(default=None, metadata=MUTABLE)
    depth: int = ranged(8, limits.BLOCKS)  # the block (1-based) whose tokens are compared
    weight: float = ranged(0.5, limits.WEIGHT)  # of this loss
    projector_dim: int = ranged(2048, limits.CHANNELS)  # width inside the projector


@dataclass
class Lora(Section):
    """Adapters of linear layers, which are trained in the place of the weights that train.init names."""

    # of the adapters, such as 8; null: no LoRA, all weights are trained
    rank: int | None = ranged(None, limits.CHANNELS)
    # the adapters count alpha / rank times; null: alpha is the rank
    alpha: float | None = ranged(None, number(0, 65_536, "at 0 the adapters do nothing", over=True))
    # names of linear layers, or ends of names, such as [attn.proj, mlp.fc1]; null: all of mixers and MLPs
    targets: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.rank is None:
            for name in ("alpha", "targets"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(f"lora.{name}={value} goes with lora.rank; {idle(f'lora.{name}')}")
        elif self.alpha is None:
            self.alpha = float(self.rank)
        if self.targets == []:
            raise InputError(f"lora.targets=[]: name a linear layer; {idle('lora.targets')}")


@dataclass
class Distill(Section):
    """A teacher whose attention is distilled into ATConv; see training.objectives.distill. The model is then a copy."""

    # a checkpoint, as `sit-atconv sample --ckpt` takes it; left out, no distillation
    teacher: str | None = field(default=None, metadata=MUTABLE | PATH)
    select: Any = "all"  # of the teacher's attentions: all, even, odd, a share, a regular expression or names
    exclude: list[str] = field(default_factory=list)  # names of attentions that stay
    init: str = chosen("closed_form", ("closed_form", "copy_vo", "random"))  # see swap_attention
    control: bool = False  # attention in the place of ATConv, fresh: what the recipe itself costs
    pool: str = "raster"  # of ATConv, as model.pool
    kernel_size: int = ranged(3, limits.KERNEL)  # of ATConv
    # training samples that a closed-form start is fitted to
    calib: int = ranged(256, Range(1, 1_000_000, "their latents are held in memory"))
    # at the beginning: the swapped layers alone, on the teacher's inputs
    blockwise_steps: int = ranged(1000, limits.STEPS_OR_NONE)
    # of those steps; left out, the schedule of train.lr
    blockwise_lr: float | None = ranged(None, limits.LEARNING_RATE)
    output_weight: float = ranged(0.5, limits.WEIGHT)  # of the loss against the teacher's output, in later steps
    feature_weight: float = ranged(0.5, limits.WEIGHT)  # of the loss against its hidden states
    # of the swapped layers that take part, in turn
    shares: list[float] = ranged([0.5, 1.0], number(0, 1, "it is a share of the layers, and 0 trains none", over=True))
    share_steps: int = ranged(500, limits.STEPS)  # steps of every share but the last

    def __post_init__(self):
        super().__post_init__()
        if self.select is None or isinstance(self.select, dict):
            raise InputError(
                f"distill.select={self.select!r}: give all, even, odd, a share, a regular expression or names"
            )
        if self.select == "auto" or isinstance(self.select, bool):
            raise InputError(f"distill.select={self.select!r}: a run does not depend on a clock; name the layers")
        if self.control and self.init != "random":
            raise InputError(f"distill.init={self.init} with distill.control: fresh attention starts at random; say so")
        if self.control and (self.pool, self.kernel_size) != ("raster", 3):
            raise InputError("distill.pool and distill.kernel_size do nothing with distill.control; leave them out")
        if not self.shares or sorted(self.shares) != self.shares:
            raise InputError(f"distill.shares={self.shares}: give rising shares")
        if self.shares[-1] != 1:
            raise InputError(f"distill.shares={self.shares}: the last must be 1, or layers stay that were not trained")


@dataclass
class Meanflow(Section):
    """The average velocity between two times, learned in the place of the velocity: images by one step, or few.

    Both times are drawn as the section flow says, the smaller is t; see sit_atconv.flow.meanflow.
    """

    # of the samples, with two different times, such as 0.25; the others learn the velocity. null: no MeanFlow
    share: float | None = ranged(
        None, number(0, 1, "without two different times nothing but the flow is learned", over=True)
    )
    # p: the squared error e of a sample is weighed by 1 / (e + offset)^p
    power: float | None = setting(
        MEANFLOW, 1.0, number(0, 4, "beyond it the samples of the smallest error alone count")
    )
    offset: float | None = setting(MEANFLOW, 1e-3, number(0, 1e6, "errors of 0 are divided by it", over=True))
    # guidance that is learned: the target's velocity is omega v + kappa u(class) + (1 - omega - kappa) u(no class); the
    # scale is omega / (1 - kappa), and 1 is none
    omega: float | None = setting(MEANFLOW, 1.0, number(0, 100, "it is the share of the sample's velocity", over=True))
    kappa: float | None = setting(MEANFLOW, 0.0, number(0, 1, "the scale is omega / (1 - kappa)", under=True))
    # what the change of the average velocity is taken along: the target's velocity (sample), or the network's own
    tangent: str | None = setting(MEANFLOW, "sample", choices=("sample", "network"))
    # a trained flow, as `sit-atconv sample --ckpt` takes it: its velocity in the place of the sample's, guided by omega
    teacher: str | None = setting(MEANFLOW, None, **MUTABLE, **PATH)

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is not None:
            for name, needed in (("kappa", 0), ("tangent", "sample")):
                if (value := getattr(self, name)) != needed:
                    raise InputError(
                        f"meanflow.{name}={value} with meanflow.teacher: the velocity is the teacher's alone; "
                        f"{idle(f'meanflow.{name}')}"
                    )

    @property
    def guidance(self) -> Guidance:
        """What is learned of it."""
        return Guidance() if self.share is None else Guidance(self.omega, self.kappa)


@dataclass
class Checkpoint(Section):
    """How often the run is saved, and how much of it is kept."""

    every: int = ranged(10_000, limits.STEPS)  # steps; the last step is always kept
    keep_last: int = ranged(3, limits.STEPS)  # so many newest checkpoints are kept
    keep_every: int | None = ranged(None, limits.STEPS)  # steps: checkpoints of its multiples are never removed
    on_full_disk: str = chosen("stop", ("stop", "continue"))  # continue: try at the next one

    def __post_init__(self):
        super().__post_init__()
        if self.keep_every is not None and self.keep_every % self.every:
            raise InputError(
                f"checkpoint.keep_every={self.keep_every}: must be a multiple of checkpoint.every={self.every}"
            )


@dataclass
class Preview(Sampling):
    """Grids of samples drawn while training, and how they are drawn."""

    every: int = ranged(10_000, limits.STEPS_OR_NONE)  # steps between two grids of EMA samples; 0 draws none
    num: int = ranged(16, limits.PICTURE)  # images in a grid
    # autoguidance: a weaker checkpoint of the same latents and classes, as `sit-atconv sample --guide` takes it
    guide: str | None = field(default=None, metadata=PATH)

    def __post_init__(self):
        with named("preview"):
            self._settle()  # ranges are checked where a recipe is read, all together


@dataclass
class Score(Section):
    """Scores of EMA samples while training, drawn as the previews are."""

    every: int = ranged(0, limits.STEPS_OR_NONE)  # steps between two scores; 0 computes none
    num: int = ranged(1000, Range(2, 100_000, "all of them are held in memory, and a spread needs two"))  # images
    ref: str = field(default="digits", metadata=PATH)  # as `sit-atconv score --ref` takes it
    weights: str | None = field(default=None, metadata=PATH)  # Inception weights; left out, torch's hub cache
    # as `sit-atconv score --extractor` takes it, such as attnet:RUN; null: what score.ref records, digits for the
    # digits, inception for images
    extractor: str | None = setting(SCORED)


@dataclass
class Validation(Section):
    """The loss of the sampled average on held-out images (data.held_out) while training."""

    every: int = ranged(0, limits.STEPS_OR_NONE)  # steps between two validations; 0 makes none
    # held-out images at most, evenly spread over those of every class; null: all
    num: int | None = ranged(None, Range(1, 10_000_000, "each has a loss in memory"))
    batch_size: int = ranged(64, limits.BATCH)  # of every process


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
    repa: Repa = field(default_factory=Repa)
    lora: Lora = field(default_factory=Lora)
    distill: Distill = field(default_factory=Distill)
    meanflow: Meanflow = field(default_factory=Meanflow)
    checkpoint: Checkpoint = field(default_factory=Checkpoint, metadata=MUTABLE)
    preview: Preview = field(default_factory=Preview, metadata=MUTABLE)
    score: Score = field(default_factory=Score, metadata=MUTABLE)
    validation: Validation = field(default_factory=Validation, metadata=MUTABLE)

    def __post_init__(self):
        self._check_codec()
        if self.distill.teacher is not None:
            self._check_distill()
        if self.lora.rank is not None:
            self._check_lora()
        if self.meanflow.share is not None:
            self._check_meanflow()
        if self.score.every and self.score.ref == "digits" and self.data.kind != "digits":
            raise InputError(f"score.ref=digits scores digits, and data.kind={self.data.kind}; give images or an npz")
        if self.validation.every and self.data.held_out is None:
            raise InputError(
                f"validation.every={self.validation.every} is of held-out images, and there are none: state "
                "data.held_out=0.1, or validation.every=0"
            )

    @property
    def encoding_precision(self) -> str | None:
        """Of the autoencoder in a training step: what `latents.precision` comes to; None where nothing is encoded."""
        if self.latents.codec != "vae" or self.data.kind == "latents":
            return None
        return self.latents.precision or ("fp32" if self.train.precision == "fp32" else "tf32")

    def _check_lora(self) -> None:
        if self.distill.teacher is not None or self.repa.encoder is not None:
            key = "distill.teacher" if self.distill.teacher is not None else "repa.encoder"
            raise InputError(f"lora.rank={self.lora.rank} with {key}: adapters learn the flow alone; {idle(key)}")
        if self.train.init is None:
            raise InputError(
                f"lora.rank={self.lora.rank}: adapters are of a trained model, and train.init is missing; name one, or "
                "train all weights with lora.rank=null"
            )

    def _check_meanflow(self) -> None:
        said = f"meanflow.share={self.meanflow.share:g}"
        others = {
            "distill.teacher": self.distill.teacher,
            "repa.encoder": self.repa.encoder,
            "lora.rank": self.lora.rank,
        }
        if key := next((key for key, value in others.items() if value is not None), None):
            raise InputError(f"{said} with {key}: one objective at a time; state {key}=null or meanflow.share=null")
        if self.flow.prediction != "velocity":
            raise InputError(
                f"{said} with flow.prediction={self.flow.prediction}: what is averaged is a velocity; "
                f"{idle('flow.prediction', 'velocity')}"
            )

    def _check_distill(self) -> None:
        decided = ("sample_size", "in_channels", "num_classes")  # by data and codec, and checked against the teacher
        stated = {"name": self.model.name, **self.model.options()}
        if name := next((name for name, value in stated.items() if value is not None and name not in decided), None):
            key = f"model.{name}"
            raise InputError(f"{key}: with distill.teacher the model is the teacher's copy; {idle(key)}")
        if self.train.init is not None:
            raise InputError(
                f"train.init={self.train.init!r} with distill.teacher: the model begins as the teacher's copy; "
                f"{idle('train.init')}"
            )
        if self.repa.encoder is not None:
            raise InputError(
                "repa.encoder with distill.teacher: one teacher at a time; leave one out, or state it =null"
            )
        if self.train.compile:
            raise InputError(
                f"train.compile with distill.teacher: its layers change places; {idle('train.compile', 'false')}"
            )
        if self.distill.blockwise_steps >= self.train.max_steps:
            raise InputError(
                f"distill.blockwise_steps={self.distill.blockwise_steps}: must be less than train.max_steps="
                f"{self.train.max_steps}, whose other steps train the whole model"
            )
        last = self.distill.blockwise_steps + self.distill.share_steps * (len(self.distill.shares) - 1)
        if last >= self.train.max_steps:
            raise InputError(
                f"distill.share_steps={self.distill.share_steps}: all layers would take part from step {last} on, and "
                f"train.max_steps={self.train.max_steps}; lower it, or train longer"
            )

    def _check_codec(self) -> None:
        codec, vae = self.latents.codec, self.latents.vae
        if self.data.kind != "latents":
            if codec == "vae" and vae is None:
                said = "latents.codec=vae with latents.vae=null: a vae codec takes a vae"
                raise InputError(f"{said}; name it, or train on pixels with latents.codec=identity")
            return
        if codec != "vae":
            raise InputError(f"latents.codec={codec}: data.kind=latents is what a vae made; state latents.codec=vae")
        if (precision := self.latents.precision) is not None:
            said = f"latents.precision={precision}: data.kind=latents is encoded already, and nothing is in training"
            raise InputError(f"{said}; {idle('latents.precision')}")
        for name, every in (("preview", self.preview.every), ("score", self.score.every)):
            if every and vae is None:
                raise InputError(
                    f"{name}.every={every} draws images, and latents.vae is missing: name the cache's vae, or set "
                    f"{name}.every=0"
                )
