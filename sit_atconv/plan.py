"""From a recipe to what it decides: the facts of its data, its model, its cost."""

import dataclasses
from dataclasses import dataclass

import torch

from sit_atconv.config import Flow, Recipe
from sit_atconv.data import open_dataset
from sit_atconv.ema import SAMPLED, describe
from sit_atconv.errors import InputError
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.times import TimeSampling, training_interval
from sit_atconv.generation import Sampling
from sit_atconv.latents.codecs import open_codec
from sit_atconv.limits import check_kernel
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import SiTTransformer2DModel, create_model


@dataclass(frozen=True)
class Facts:
    """What data and codec decide about a run: latent shape (C, H, W), classes and images."""

    latent_shape: tuple[int, int, int]
    num_classes: int
    num_images: int


def measured_facts(dataset, codec) -> Facts:
    """The facts of an opened dataset and codec. Raises InputError when the codec does not take such images."""
    return Facts(codec.latent_shape(dataset.channels, dataset.image_size), len(dataset.class_names), len(dataset))


def _opened_facts(recipe: Recipe) -> Facts:
    # A plan needs no proof of what is in a cache.
    dataset = open_dataset(dataclasses.replace(recipe.data, verify=recipe.data.kind != "latents"))
    return measured_facts(dataset, open_codec(recipe.latents, dataset))


def stated_facts(recipe: Recipe) -> Facts | None:
    """The facts as the recipe states them, or None where it leaves one to the data."""
    model = recipe.model
    if None in (model.sample_size, model.in_channels, model.num_classes, recipe.data.num_images):
        return None
    size = model.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Facts((model.in_channels, height, width), model.num_classes, recipe.data.num_images)


def check_stated(recipe: Recipe, facts: Facts) -> None:
    """Raise InputError where the recipe states something else than data and codec say."""
    channels, height, width = facts.latent_shape
    size = recipe.model.sample_size
    for key, stated, measured in (
        ("model.in_channels", recipe.model.in_channels, channels),
        ("model.sample_size", [size, size] if isinstance(size, int) else size, [height, width]),
        ("model.num_classes", recipe.model.num_classes, facts.num_classes),
        ("data.num_images", recipe.data.num_images, facts.num_images),
    ):
        if stated is not None and stated != measured:
            raise InputError(
                f"{key}: the recipe says {stated}, data and codec say {measured}; correct it or leave it out"
            )


def build_model(recipe: Recipe, facts: Facts) -> SiTTransformer2DModel:
    """The recipe's model for these facts, with the weights that `run.seed` draws; to distil, a student not yet started.

    Raises InputError for options that do not make a model, and where it lacks the block that REPA looks at.
    """
    channels, height, width = facts.latent_shape
    if recipe.distill.teacher is not None:
        from sit_atconv.distill import load_teacher, student_of  # with diffusers' models, which take seconds

        teacher = load_teacher(recipe, facts.latent_shape, facts.num_classes)
        check_kernel("distill.kernel_size", recipe.distill.kernel_size, grid_of(teacher))
        return student_of(teacher, recipe.distill, recipe.run.seed)
    size = height if height == width else (height, width)
    options = recipe.model.options() | {
        "sample_size": size,
        "in_channels": channels,
        "num_classes": facts.num_classes,
        "path": recipe.flow.path,
        "prediction": recipe.flow.prediction,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.run.seed)
        model = create_model(recipe.model.name, **options)
    check_kernel("model.kernel_size", recipe.model.kernel_size, grid_of(model))
    if recipe.repa.encoder is not None and recipe.repa.depth > len(model.blocks):
        raise InputError(
            f"repa.depth={recipe.repa.depth}: the model has {len(model.blocks)} blocks; choose one of them"
        )
    return model


def grid_of(model: SiTTransformer2DModel) -> tuple[int, int]:
    """Height and width of the tokens that a model was made for."""
    height, width = (side // model.config.patch_size for side in model.latent_size)
    return height, width


def time_sampling(flow: Flow) -> TimeSampling:
    """How the recipe draws t, on the interval that its path and prediction can be trained on."""
    return TimeSampling(
        training_interval(PATHS[flow.path](), flow.prediction),
        flow.time_sampling,
        flow.time_mean,
        flow.time_std,
        flow.time_shift,
    )


def preview_sampling(recipe: Recipe, model: SiTTransformer2DModel) -> Sampling:
    """How previews are drawn. Raises InputError for settings that do not exist or that the model cannot follow."""
    preview = recipe.preview
    try:
        sampling = Sampling(
            preview.sampler,
            preview.steps,
            preview.guidance_scale,
            seed=recipe.run.seed,
            diffusion=preview.diffusion,
            diffusion_norm=preview.diffusion_norm,
            last_step=preview.last_step,
            last_step_size=preview.last_step_size,
        )
        if preview.every:
            sampling.check_model(model)
    except InputError as error:
        raise InputError(f"preview: {error}") from None
    return sampling


def _teacher_row(recipe: Recipe, facts: Facts) -> dict[str, str]:
    """What a distillation replaces; nothing without `distill.teacher`."""
    if recipe.distill.teacher is None:
        return {}
    from sit_atconv.distill import load_teacher, swapped_names  # with diffusers' models, which take seconds

    settings, teacher = recipe.distill, load_teacher(recipe, facts.latent_shape, facts.num_classes)
    names = swapped_names(teacher, settings)
    shown = ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
    into = "fresh attention (a control)" if settings.control else f"ATConv, started by {settings.init}"
    return {"teacher": f"{settings.teacher}; {len(names)} of {len(teacher.blocks)} layers to {into}: {shown}"}


def dry_run(recipe: Recipe) -> str:
    """What the recipe would cost, as text; the model is built on the meta device, data and VAE are not opened if the
    recipe states what they decide. Raises InputError for a recipe that cannot be trained."""
    stated = stated_facts(recipe)
    facts = stated or _opened_facts(recipe)
    check_stated(recipe, facts)
    with torch.device("meta"):
        model = build_model(recipe, facts)
    taught = _teacher_row(recipe, facts)
    preview_sampling(recipe, model)
    train = recipe.train
    parameters, macs = count_parameters(model), count_macs(model)
    trainable = sum(p.numel() for p in model.parameters())
    gib = 4 / 2**30
    epoch = facts.num_images / train.batch_size
    ema = recipe.ema
    copies = len(ema.stds or [SAMPLED])
    aligned = "; REPA's projectors and encoder come on top" if recipe.repa.encoder else ""
    decay = "" if train.lr_schedule == "constant" else f" to 0 at step {train.max_steps:,}"
    rows = {
        "model": recipe.model.name or f"{model.config.token_mixer}, depth {model.config.depth}",
        "parameters": f"{parameters / 1e6:.1f} M",
        "compute per image": (f"{macs / 1e9:.1f} GMACs" if macs >= 1e9 else f"{macs / 1e6:.1f} MMACs")
        + " (one network evaluation)",
        **taught,
        "latent": " x ".join(map(str, facts.latent_shape)) + f", {facts.num_classes} classes",
        "data": f"{recipe.data.kind}, "
        + (f"{recipe.data.image_size} px; " if recipe.data.image_size else "")
        + ("latent, classes and images as the recipe states; checked when training starts" if stated else "measured"),
        "memory, fp32": f"weights {parameters * gib:.2f} GiB, gradients {trainable * gib:.2f} GiB, "
        f"optimiser {2 * trainable * gib:.2f} GiB, EMA {copies * parameters * gib:.2f} GiB (activations come on top"
        f"{aligned})",
        "steps per epoch": f"{epoch:.1f} ({facts.num_images:,} images, global batch {train.batch_size})",
        "schedule": f"{train.max_steps:,} steps = {train.max_steps / epoch:.1f} epochs; lr {train.lr:g} "
        f"{train.lr_schedule}{decay}, warm-up {train.warmup_steps:,} steps; {train.precision}",
        "EMA": describe(recipe.ema),
        "checkpoints": f"every {recipe.checkpoint.every:,} steps, the last {recipe.checkpoint.keep_last} kept, "
        f"{((1 + copies) * parameters + 2 * trainable) * gib:.2f} GiB each, in {recipe.run.out}",
    }
    if ema.snapshot_every:
        taken = train.max_steps // ema.snapshot_every
        rows["EMA snapshots"] = (
            f"every {ema.snapshot_every:,} steps, {taken:,} of {copies * parameters * gib:.2f} GiB each, "
            f"{taken * copies * parameters * gib:.1f} GiB at the end"
        )
    return "\n".join(f"{name:<18} {text}" for name, text in rows.items())
