"""From a recipe to how it trains, and what that costs."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sit_atconv import config
from sit_atconv.config import Recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.held_out import split
from sit_atconv.latents.codecs import open_codec
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import SiTTransformer2DModel, options_of
from sit_atconv.training import ema as averages
from sit_atconv.training.drawing import open_drawing
from sit_atconv.training.ema import SAMPLED
from sit_atconv.training.facts import Facts, check_stated, describe, measured_facts, stated_facts
from sit_atconv.training.folder import check_run_folder, foreseen
from sit_atconv.training.objectives import objective_of
from sit_atconv.training.origin import opened
from sit_atconv.training.resolved import FROM_DATA, FROM_FLOW, resolved

if TYPE_CHECKING:
    from sit_atconv.training.objectives.flow import FlowObjective

NAMED = 5  # classes of which a plan says the name


def dry_run(recipe: Recipe) -> str:
    """The recipe's plan, see `plan`; the model is built on the meta device, data and VAE are not opened if the recipe
    states what they decide. Raises InputError for a recipe that cannot be trained."""
    if origin := opened(recipe):
        recipe = origin.completed(recipe)
    stated, dataset, measured, names = stated_facts(recipe), None, {}, None
    # A cache says of which images it is, and a run of these goes on from it.
    if stated is None or (recipe.data.kind == "latents" and Path(recipe.run.out).exists()):
        # A plan needs no proof of what is in a cache.
        dataset = open_dataset(dataclasses.replace(recipe.data, verify=recipe.data.kind != "latents"))
    if stated is None:
        codec, names = open_codec(recipe.latents, dataset), dataset.class_names
        training, held_out = split(dataset, recipe.data.held_out)
        facts, measured = measured_facts(training, codec, held_out), describe(training, codec, held_out)
    facts = stated or facts
    check_stated(recipe, facts)
    kind = objective_of(recipe)  # imported on no device but the CPU
    with torch.device("meta"):
        objective = kind(recipe, facts, origin)
    open_drawing(recipe, objective.model, measured.get("codec"), names)
    described = {"recipe": config.to_dict(resolved(recipe, facts)), **measured}
    described["init"] = origin and origin.record
    encoded = dataset.index["data"] if dataset is not None and dataset.moments else None
    look = partial(check_run_folder, recipe=recipe, described=described, encoded=encoded)
    return plan(recipe, facts, objective, names, foreseen(recipe.run.out, look, recipe.train.max_steps))


def plan(recipe: Recipe, facts: Facts, objective: "FlowObjective", names: Sequence[str] | None, run: str) -> str:
    """What a training would cost, or costs, as text.

    names: of the classes; None where the facts are the recipe's, and nothing was measured. run: what happens at
    `run.out`.
    """
    model = objective.model
    train = recipe.train
    parameters, macs = count_parameters(model), count_macs(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = parameters - sum(p.numel() for p in model.parameters() if not p.requires_grad)
    epoch = facts.num_images / train.batch_size
    ema = recipe.ema
    copies = len(ema.stds or [SAMPLED])
    decay = "" if train.lr_schedule == "constant" else f" to 0 at step {train.max_steps:,}"
    longer = ", longer than the run" if train.warmup_steps > train.max_steps else ""
    rows = {
        "model": _model(recipe, model),
        "parameters": f"{parameters / 1e6:.1f} M",
        "compute per image": (f"{macs / 1e9:.1f} GMACs" if macs >= 1e9 else f"{macs / 1e6:.1f} MMACs")
        + " (one network evaluation)",
        **objective.rows(),
        "latent" if recipe.latents.codec == "vae" else "pixels": " x ".join(map(str, facts.latent_shape)),
        "data": f"{recipe.data.kind}, "
        + (f"{recipe.data.image_size} px; " if recipe.data.image_size else "")
        + f"{facts.all_images:,} images{_held_out(facts)} in {_classes(facts.num_classes, names)}",
        "memory": f"weights {_size(parameters)}, gradients {_size(trainable)}, optimiser {_size(2 * trainable)}, "
        f"EMA {_size(copies * kept)}, all in fp32 whatever the precision (activations come on top"
        f"{objective.besides})",
        "steps per epoch": f"{epoch:.1f} (global batch {train.batch_size})",
        "schedule": f"{train.max_steps:,} steps = {train.max_steps / epoch:.1f} epochs; lr {train.lr:g} "
        f"{train.lr_schedule}{decay}, warm-up {train.warmup_steps:,} steps{longer}; precision {train.precision}",
        "EMA": averages.describe(recipe.ema),
        "checkpoints": f"every {recipe.checkpoint.every:,} steps, the last {recipe.checkpoint.keep_last} kept, "
        f"{_size((1 + copies) * kept + 2 * trainable)} each, in {recipe.run.out}",
    }
    if ema.snapshot_every:
        taken = train.max_steps // ema.snapshot_every
        rows["EMA snapshots"] = (
            f"every {ema.snapshot_every:,} steps, {taken:,} of {_size(copies * kept)} each, "
            f"{_size(taken * copies * kept)} at the end"
        )
    if recipe.validation.every:
        number = min(facts.held_out, recipe.validation.num or facts.held_out)
        rows["validation"] = f"every {recipe.validation.every:,} steps, of {number:,} held-out images"
    rows["run"] = run
    return "\n".join(f"{name:<18} {text}" for name, text in rows.items())


def _model(recipe: Recipe, model: SiTTransformer2DModel) -> str:
    """The preset with what the recipe states over it, or what a model of no preset is."""
    name, made = recipe.model.name, model.config
    if name is None:
        return f"{made.token_mixer}, depth {made.depth}, hidden_size {made.hidden_size}, patch_size {made.patch_size}"
    preset, stated = options_of(name), recipe.model.options()
    changed = [key for key in stated if key not in (*FROM_FLOW, *FROM_DATA) and stated[key] != preset[key]]
    return ", ".join([name, *(f"{key}={stated[key]}" for key in changed)])


def _held_out(facts: Facts) -> str:
    return f", {facts.held_out:,} held out," if facts.held_out else ""


def _classes(number: int, names: Sequence[str] | None) -> str:
    """How many classes there are, and the first of their names; without names, whose word that is."""
    count = f"{number:,} class{'es' if number != 1 else ''}"
    if names is None:
        return f"{count}, as the recipe states; checked when training starts"
    first = [name if name.isprintable() else repr(name) for name in names[:NAMED]]
    return f"{count}: {', '.join(first)}{', ...' if number > NAMED else ''}"


def _size(numbers: int) -> str:
    """How much memory so many numbers take in fp32."""
    size = 4 * numbers
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.3g} MiB"
