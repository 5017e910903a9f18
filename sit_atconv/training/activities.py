"""What a run does beside its steps, when it is due: previews, scores, validations, snapshots."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import ValidationSamples
from sit_atconv.runtime import sharding
from sit_atconv.runtime.console import Progress, say
from sit_atconv.runtime.errors import InputError, reason
from sit_atconv.runtime.files import clear_leftovers, png, step_name, write_atomic
from sit_atconv.runtime.pictures import NotFinite
from sit_atconv.runtime.processes import first, gathered, is_main, raise_together
from sit_atconv.sampling.sampling import caption_of, generate, grid
from sit_atconv.training import checkpoint
from sit_atconv.training.drawing import Drawing
from sit_atconv.training.ema import SAMPLED, SNAPSHOTS
from sit_atconv.training.log import TIME_BINS, Log
from sit_atconv.training.objectives.objective import Forward
from sit_atconv.training.trainer import Activity, Measured, Trainer

PREVIEWS, VALIDATION = "previews", "validation.jsonl"
SCORE_BLOCK = 100  # images drawn at once for a score, by each process


class Scorer(Protocol):
    """What scores images while a model trains. about: what it is, as a line of scores.jsonl states it."""

    about: dict[str, Any]

    def check(self, image_shape: tuple[int, int, int], class_names: Sequence[str], num: int) -> None:
        """Raise InputError where `num` images (C, H, W) of these classes cannot be scored."""

    def __call__(self, images: torch.Tensor, labels: list[int]) -> dict[str, float]:
        """Scores by name, of uint8 images (N, C, H, W) and their labels."""


class Announcement(Activity):
    """A text that is told once, when the first samples are there: an error in these is the only line.

    tell: what it is told by.
    """

    def __init__(self, text: str, tell: Callable[[str], None]):
        self.text, self.tell = text, tell

    def at_first_samples(self, trainer: Trainer) -> None:
        self.tell(self.text)


class Draws(Activity):
    """Images of the sampled average, drawn by all processes together, as the recipe's `preview` says, by `drawing`.

    `take` is called every so many steps as the recipe's `section` says.
    """

    section: str

    def __init__(self, codec: nn.Module, drawing: Drawing):
        self.codec, self.drawing = codec, drawing

    def after_step(self, trainer: Trainer) -> None:
        every = getattr(trainer.recipe, self.section).every
        if every and trainer.step % every == 0:
            trainer.settle()
            self.take(trainer)

    def draw(self, trainer: Trainer, what: str, count: int, block: int) -> tuple[torch.Tensor, list[int]] | None:
        """Images 0 to count - 1 of the classes in turn, shared out over the processes: uint8 images, labels.

        None where one of them, in any process, is not finite; a warning names it, and that there is no `what`.
        block: images at once. Every process draws equally many, the last one again where there are too few: a sharded
        EMA is evaluated by all of them together.
        """
        accelerator, model = trainer.accelerator, trainer.objective.averages.models[SAMPLED]
        sampling, seed = self.drawing.sampling, trainer.recipe.run.seed
        share = math.ceil(count / accelerator.num_processes)
        first = accelerator.process_index * share
        indices = [min(index, count - 1) for index in range(first, first + share)]
        images, fault = [], None
        with Progress(total=share, desc=self.section, unit="image", delay=2, leave=False, disable=not is_main()) as bar:
            for start in range(0, share, block):
                part = indices[start : start + block]
                labels = [index % model.config.num_classes for index in part]
                try:
                    # Without CUDA graphs: their memory would stand beside training's, for a few images.
                    images.append(generate(model, self.codec, part, labels, sampling, seed)[0])
                except NotFinite as error:  # and on, as the others do
                    fault = fault or error
                bar.update(len(part))
        if said := next((str(error) for error in gathered(fault) if error is not None), None):
            if is_main():
                say(f"warning: step {trainer.step}, {what} is left out: {said}")
            return None
        together = accelerator.gather(torch.cat(images).to(accelerator.device))
        return together[:count].cpu(), [index % model.config.num_classes for index in range(count)]


class Previews(Draws):
    """A grid of images every `preview.every` steps, each with its class below it, in previews/ and in the trackers."""

    section = "preview"

    def clear(self, trainer: Trainer) -> None:
        if (folder := trainer.run / PREVIEWS).is_dir():
            clear_leftovers(folder)

    def take(self, trainer: Trainer) -> None:
        """Draw one, write it, and pass it on."""
        count = trainer.recipe.preview.num
        drawn = self.draw(trainer, "its preview", count, count)
        if drawn and is_main():
            (images, labels), names = drawn, trainer.described["data"]["classes"]
            captions = [caption_of(label, names) for label in labels]
            picture = grid(images, math.ceil(math.sqrt(count)), captions)
            trainer.trackers.show("preview", picture, trainer.step)
            file = trainer.run / PREVIEWS / f"{step_name(trainer.step)}.png"
            try:
                write_atomic(file, png(picture))
            except OSError as error:
                say(f"warning: preview {str(file)!r} cannot be written: {reason(error)}")


class Scores(Draws):
    """Scores of `score.num` images every `score.every` steps, in scores.jsonl. scorer: the main process's."""

    section = "score"

    def __init__(self, codec: nn.Module, drawing: Drawing, scorer: Scorer | None):
        super().__init__(codec, drawing)
        self.scorer = scorer

    def open(self, trainer: Trainer) -> None:
        if trainer.recipe.score.every:
            self.log = Log(trainer.run / "scores.jsonl", trainer.step)

    def take(self, trainer: Trainer) -> None:
        """Draw, score and log. Raises InputError in every process where the scorer does."""
        drawn = self.draw(trainer, "its score", trainer.recipe.score.num, SCORE_BLOCK)
        if drawn is None:
            return
        images, labels = drawn
        values = first(lambda: self.scorer(images, labels))
        if is_main():
            sampling = self.drawing.describe(trainer.objective.model)
            sampling["seed"] = trainer.recipe.run.seed
            about = {"num": len(images), "extractor": self.scorer.about, "sampling": sampling}
            self.log.write({"step": trainer.step, **values, **about})
            trainer.trackers.log({f"score/{name}": value for name, value in values.items()}, trainer.step)


class Validations(Measured):
    """The loss of the sampled average on held-out images every `validation.every` steps, and after the last one, in
    validation.jsonl. samples: of these images."""

    file = VALIDATION

    def __init__(self, samples: ValidationSamples):
        self.samples, self.warned = samples, False

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % trainer.recipe.validation.every and trainer.step != trainer.objective.steps:
            return
        trainer.settle()
        try:
            losses, bad = self.losses(trainer)
        except InputError:
            trainer.keep_trained()
            raise
        row = {"step": trainer.step, "seconds": trainer.seconds, **self.figures(losses, bad), "bad_images": len(bad)}
        if is_main():
            if bad and not self.warned:
                some = f"{len(bad)} of {len(losses)} held-out images are left out of the validation loss"
                say(f"warning: step {trainer.step}: {some}, at first: {next(iter(bad.values()))}")
                self.warned = True
            if row["num"] and not math.isfinite(row["loss"]):
                say(f"warning: step {trainer.step}: the loss of held-out images is not finite")
            self.log.write(row)
        trainer.trackers.log({f"validation/{name}": value for name, value in row.items()}, trainer.step)

    @torch.no_grad()
    def losses(self, trainer: Trainer) -> tuple[np.ndarray, dict[int, str]]:
        """The loss of every image, fp64 (N,), and by their places what is wrong with those that cannot be read.

        The processes share the images out, and each evaluates equally often: a sharded EMA is evaluated by all of them
        together. Raises InputError in every process where the dataset is gone.
        """
        accelerator, objective, settings = trainer.accelerator, trainer.objective, trainer.recipe.validation
        forward = Forward(objective.averages.models[SAMPLED], accelerator.autocast, trainer.step, 0)
        number = len(self.samples)
        share = math.ceil(number / accelerator.num_processes)
        begin = accelerator.process_index * share
        places = [min(place, number - 1) for place in range(begin, begin + share)]
        parts = [places[start : start + settings.batch_size] for start in range(0, share, settings.batch_size)]
        batches = TrainingBatches(self.samples, parts, trainer.recipe.data, accelerator.device.type == "cuda")
        found = []
        for _ in Progress(parts, "validation", unit="batch", delay=2, leave=False, disable=not is_main()):
            batch, fault = None, None
            try:
                batch = next(batches)
            except InputError as error:
                fault = InputError(f"held out: {error}")
            raise_together(fault)
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
            found.append(objective.held_out_loss(batch, forward).double())
        together = gathered((torch.cat(found).tolist(), batches.pop_bad()))
        losses = np.concatenate([losses for losses, _ in together])[:number]
        return losses, dict(sorted({place: what for _, bad in together for place, what in bad.items()}.items()))

    def figures(self, losses: np.ndarray, bad: Collection[int]) -> dict[str, Any]:
        """The mean of the losses (N,) but those of `bad` places, its standard error over the images, the means by
        bins of t, and how many images they are of; None for a mean of none."""
        there = np.setdiff1d(np.arange(len(losses)), [*bad])
        losses, t = losses[there], self.samples.t.numpy()[there]
        bins = np.clip((t * TIME_BINS).astype(int), 0, TIME_BINS - 1)
        error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else None
        by_time = [_mean(losses[bins == each]) for each in range(TIME_BINS)]
        return {"loss": _mean(losses), "loss_se": error, "loss_by_time": by_time, "num": len(losses)}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


class Snapshots(Activity):
    """The power-function averages every `ema.snapshot_every` steps, in snapshots/."""

    def clear(self, trainer: Trainer) -> None:
        checkpoint.clear_unfinished(trainer.run / SNAPSHOTS)

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.recipe.ema.snapshot_every
        if every and trainer.due(every):
            trainer.keep(lambda: self.take(trainer))

    def take(self, trainer: Trainer) -> None:
        """Store one. Raises InputError in every process where it cannot be written."""
        averages = trainer.objective.averages
        stored = {part.folder: part.module for part in trainer.objective.parts() if part.folder in averages.models}
        checkpoint.check_finite(trainer.step, stored.values())
        tensors = {name: sharding.full_tensors(average) for name, average in stored.items()}
        first(lambda: averages.write_snapshot(trainer.run, trainer.step, tensors, trainer.updates))
