"""From a recipe to how it trains, and what that costs."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sit_atconv import config
from sit_atconv.config import Recipe
from sit_atconv.data import open_dataset
from sit_atconv.latents.codecs import open_codec
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime.errors import named
from sit_atconv.training import ema as averages
from sit_atconv.training.ema import SAMPLED
from sit_atconv.training.facts import Facts, check_stated, describe, measured_facts, stated_facts
from sit_atconv.training.folder import check_run_folder, foreseen
from sit_atconv.training.objectives import objective_of
from sit_atconv.training.resolved import resolved

if TYPE_CHECKING:
    from sit_atconv.training.objectives.flow import FlowObjective


def check_preview(recipe: Recipe, model: SiTTransformer2DModel) -> None:
    """Raise InputError where previews are to be drawn, and the model cannot be sampled as they say."""
    if recipe.preview.every:
        with named("preview"):
            recipe.preview.for_model(model)


def dry_run(recipe: Recipe) -> str:
    """The recipe's plan, see `plan`; the model is built on the meta device, data and VAE are not opened if the recipe
    states what they decide. Raises InputError for a recipe that cannot be trained."""
    stated, dataset, measured = stated_facts(recipe), None, {}
    # A cache says of which images it is, and a run of these goes on from it.
    if stated is None or (recipe.data.kind == "latents" and Path(recipe.run.out).exists()):
        # A plan needs no proof of what is in a cache.
        dataset = open_dataset(dataclasses.replace(recipe.data, verify=recipe.data.kind != "latents"))
    if stated is None:
        codec = open_codec(recipe.latents, dataset)
        facts, measured = measured_facts(dataset, codec), describe(dataset, codec)
    facts = stated or facts
    check_stated(recipe, facts)
    kind = objective_of(recipe)  # imported on no device but the CPU
    with torch.device("meta"):
        objective = kind(recipe, facts)
    check_preview(recipe, objective.model)
    described = {"recipe": config.to_dict(resolved(recipe, facts)), **measured}
    encoded = dataset.index["data"] if dataset is not None and dataset.moments else None
    look = partial(check_run_folder, recipe=recipe, described=described, encoded=encoded)
    return plan(recipe, facts, objective, stated is not None, foreseen(recipe.run.out, look, recipe.train.max_steps))


def plan(recipe: Recipe, facts: Facts, objective: "FlowObjective", stated: bool, run: str) -> str:
    """What a training would cost, or costs, as text.

    stated: the facts are the recipe's, and nothing was measured. run: what happens at `run.out`.
    """
    model = objective.model
    train = recipe.train
    parameters, macs = count_parameters(model), count_macs(model)
    trainable = sum(p.numel() for p in model.parameters())
    gib = 4 / 2**30
    epoch = facts.num_images / train.batch_size
    ema = recipe.ema
    copies = len(ema.stds or [SAMPLED])
    decay = "" if train.lr_schedule == "constant" else f" to 0 at step {train.max_steps:,}"
    longer = ", longer than the run" if train.warmup_steps > train.max_steps else ""
    rows = {
        "model": recipe.model.name or f"{model.config.token_mixer}, depth {model.config.depth}",
        "parameters": f"{parameters / 1e6:.1f} M",
        "compute per image": (f"{macs / 1e9:.1f} GMACs" if macs >= 1e9 else f"{macs / 1e6:.1f} MMACs")
        + " (one network evaluation)",
        **objective.rows(),
        "latent": " x ".join(map(str, facts.latent_shape)) + f", {facts.num_classes} classes",
        "data": f"{recipe.data.kind}, "
        + (f"{recipe.data.image_size} px; " if recipe.data.image_size else "")
        + ("latent, classes and images as the recipe states; checked when training starts" if stated else "measured"),
        "memory, fp32": f"weights {parameters * gib:.2f} GiB, gradients {trainable * gib:.2f} GiB, "
        f"optimiser {2 * trainable * gib:.2f} GiB, EMA {copies * parameters * gib:.2f} GiB (activations come on top"
        f"{objective.besides})",
        "steps per epoch": f"{epoch:.1f} ({facts.num_images:,} images, global batch {train.batch_size})",
        "schedule": f"{train.max_steps:,} steps = {train.max_steps / epoch:.1f} epochs; lr {train.lr:g} "
        f"{train.lr_schedule}{decay}, warm-up {train.warmup_steps:,} steps{longer}; {train.precision}",
        "EMA": averages.describe(recipe.ema),
        "checkpoints": f"every {recipe.checkpoint.every:,} steps, the last {recipe.checkpoint.keep_last} kept, "
        f"{((1 + copies) * parameters + 2 * trainable) * gib:.2f} GiB each, in {recipe.run.out}",
    }
    if ema.snapshot_every:
        taken = train.max_steps // ema.snapshot_every
        rows["EMA snapshots"] = (
            f"every {ema.snapshot_every:,} steps, {taken:,} of {copies * parameters * gib:.2f} GiB each, "
            f"{taken * copies * parameters * gib:.1f} GiB at the end"
        )
    rows["run"] = run
    return "\n".join(f"{name:<18} {text}" for name, text in rows.items())
