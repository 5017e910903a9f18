"""Training of a classifier: from a recipe to its images, its objective and the loop that runs it."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from sit_atconv.classification.evaluation import Evaluation
from sit_atconv.classification.objective import ClassificationObjective
from sit_atconv.classification.plan import describe, facts_of, look_at, plan
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.resolved import resolved
from sit_atconv.classification.samples import ClassifierSamples, HeldOut, open_datasets, preprocessing, transforms
from sit_atconv.runtime.devices import numerics
from sit_atconv.runtime.processes import is_main, lost_ones_told
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.training.activities import Announcement
from sit_atconv.training.folder import check_place, claim, told_of
from sit_atconv.training.launch import make_accelerator
from sit_atconv.training.trainer import Trainer


def train(
    recipe: ClassifierRecipe,
    must_resume: bool = False,
    force: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """Train to the end of `train.epochs`, going on from the newest valid checkpoint in `run.out`; the last one.

    A checkpoint's ema/ and model/ are what `timm.create_model("local-dir:...", pretrained=True)` loads.
    SIGTERM and SIGINT end it early, after the step and a checkpoint. must_resume: refuse to begin anew. force: what is
    at `run.out` and is no run to go on from is set aside. announce: called on the main process with the plan, see
    `plan.plan`, when the first samples are there.
    Raises InputError for whatever the user can mend; what is wrong from the start leaves nothing behind.
    """
    precise = numerics(tf32=recipe.train.precision == "tf32")
    with lost_ones_told(), StopSignals() as signals, precise, ExitStack() as stack:
        check_place(recipe.run.out, force)  # in all processes, before the first of them can have made it
        accelerator = make_accelerator(recipe)
        drawing = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(drawing))  # stochastic depth draws there, from seeds of its own
        ClassificationObjective.check_launch(accelerator)
        recipe.check_pairs(accelerator.num_processes)
        recipe = resolved(recipe)
        dataset, held_out = open_datasets(recipe.data)
        facts = facts_of(recipe, dataset, held_out)
        training, evaluation = transforms(recipe, preprocessing(recipe.model, facts.channels))
        objective = ClassificationObjective(recipe, facts)
        described = {**describe(recipe, facts), "processes": accelerator.num_processes}
        look = partial(look_at, described=described)
        claimed = claim(recipe.run.out, described, look, must_resume, force)
        size, settings = recipe.data.image_size, (recipe.train.batch_size, recipe.run.seed, recipe.data.repeats)
        samples = ClassifierSamples(dataset, training, *settings, size)
        held_out = HeldOut(held_out, evaluation, accelerator.process_index, accelerator.num_processes, size)
        activities = [Evaluation(recipe, facts, held_out)]
        if announce is not None and is_main():
            begins = told_of(claimed.run, claimed.found, facts.steps)
            text = plan(recipe, facts, objective.parameters, objective.macs, begins)
            activities.append(Announcement(text, announce))
        return Trainer(accelerator, recipe, claimed, objective, samples, activities).run_to_the_end(signals)
