"""Training of a SiT: from a recipe to its data, its objective and the loop that runs it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sit_atconv import config
from sit_atconv.config import Recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.held_out import split
from sit_atconv.latents.codecs import open_codec
from sit_atconv.runtime.devices import check_bf16, numerics
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import first, is_main, lost_ones_told, together
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.training.activities import Announcement, Previews, Scorer, Scores, Snapshots, Validations
from sit_atconv.training.drawing import open_drawing
from sit_atconv.training.facts import check_stated, describe, measured_facts
from sit_atconv.training.folder import check_place, check_run_folder, claim, told_of
from sit_atconv.training.launch import make_accelerator
from sit_atconv.training.objectives import FROZEN, objective_of
from sit_atconv.training.origin import opened
from sit_atconv.training.plan import plan
from sit_atconv.training.resolved import resolved
from sit_atconv.training.trainer import Activity, Trainer


def train(
    recipe: Recipe,
    must_resume: bool = False,
    scorer: Scorer | None = None,
    force: bool = False,
    announce: Callable[[str], None] | None = None,
    activities: Sequence[Activity] = (),
) -> Path:
    """Train until `train.max_steps`, going on from the newest valid checkpoint in `run.out`; returns the last one.

    SIGTERM and SIGINT end it early, after the step and a checkpoint, which is then what it returns.
    must_resume: refuse to begin anew. scorer: what `score.every` asks for; called on the main process. force: what is
    at `run.out` and is no run to go on from is set aside. announce: called on the main process with the plan, see
    `plan.plan`, when the first samples are there. activities: more that is done beside the steps.

    Raises InputError for whatever the user can mend. What is wrong from the start, images of the first step included,
    leaves nothing behind; data that go bad later leave a checkpoint of the steps before.
    """
    precise = numerics(tf32=recipe.train.precision == "tf32")
    with lost_ones_told(), StopSignals() as signals, precise:
        check_place(recipe.run.out, force)  # in all processes, before the first of them can have made it
        accelerator = make_accelerator(recipe)
        if recipe.encoding_precision == "bf16":
            check_bf16("latents.precision=bf16", accelerator.device)
        dataset = open_dataset(recipe.data)
        training, held_out = split(dataset, recipe.data.held_out)
        codec = open_codec(recipe.latents, dataset)
        facts = measured_facts(training, codec, held_out)
        if origin := opened(recipe):
            recipe = origin.completed(recipe)
            origin.tell_of_data(recipe, dataset.class_names)
        check_stated(recipe, facts)
        recipe = resolved(recipe, facts)
        if recipe.score.every and scorer is None and is_main():
            raise InputError("score.every needs a scorer, which `sit-atconv train` brings; leave it out")
        if recipe.score.every:
            first(lambda: scorer.check(codec.image_shape(facts.latent_shape), dataset.class_names, recipe.score.num))
        kind = objective_of(recipe)
        kind.check_launch(accelerator)
        objective = kind(recipe, facts, origin)
        measured = describe(training, codec, held_out)
        opening = partial(open_drawing, recipe, objective.model, measured["codec"], dataset.class_names)
        drawing = together(opening)  # where the guide's run is being trained, one process may fail alone
        drawing.check_shared()
        drawing.to(accelerator.device)
        if accelerator.is_fsdp2 and recipe.preview.sampler == "dopri5" and recipe.preview.every + recipe.score.every:
            raise InputError("preview.sampler=dopri5 takes steps of its own in every process, FSDP needs equal ones")
        objective.open(codec)
        described = {
            "recipe": config.to_dict(recipe),
            **measured,
            **dict.fromkeys(FROZEN),
            **objective.describe(),
            "processes": accelerator.num_processes,
        }
        encoded = dataset.index["data"] if dataset.moments else None
        look = partial(check_run_folder, recipe=recipe, described=described, encoded=encoded)
        claimed = claim(recipe.run.out, described, look, must_resume, force)
        beside = [Previews(codec, drawing), Scores(codec, drawing, scorer), Snapshots(), *activities]
        if recipe.validation.every:
            beside.append(Validations(objective.make_validation_samples(held_out)))
        if announce is not None and is_main():
            begins = told_of(claimed.run, claimed.found, recipe.train.max_steps)
            beside.append(Announcement(plan(recipe, facts, objective, dataset.class_names, begins), announce))
        samples = objective.make_samples(training)
        return Trainer(accelerator, recipe, claimed, objective, samples, beside).run_to_the_end(signals)
