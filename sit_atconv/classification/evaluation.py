"""Accuracy on held-out images, of the model and of its average, while a classifier trains."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from sit_atconv.classification.plan import Facts
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.samples import HeldOut
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import RankPositions
from sit_atconv.runtime.console import Progress, say
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.processes import gathered, is_main, raise_together
from sit_atconv.runtime.reading import COUNT, POSITIVE, Malformed, read_rows
from sit_atconv.training.trainer import Measured, Trainer

EVALS = "evals.jsonl"
FIGURE = (float, None)  # None where it is not finite
EVAL_FORM = {
    "step": COUNT, "num": POSITIVE, "ema_loss": FIGURE, "ema_top1": FIGURE, "model_top1": FIGURE,
    "image_size?": ([POSITIVE, POSITIVE], None),
}  # fmt: skip


class Evaluation(Measured):
    """Evaluates every `Facts.eval_every` steps and after the last one, into evals.jsonl.

    held_out: this process's part of the images.
    """

    file = EVALS

    def __init__(self, recipe: ClassifierRecipe, facts: Facts, held_out: HeldOut):
        self.recipe, self.facts, self.held_out = recipe, facts, held_out
        self.sizes: set[tuple[int, int]] = set()  # (H, W) of the images before they are resized; two where they differ

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.facts.eval_every and trainer.step != self.facts.steps:
            return
        trainer.settle()
        objective = trainer.objective
        row = {"step": trainer.step, "epoch": trainer.step * self.recipe.train.batch_size / self.facts.num_images}
        try:
            for name, model in {"model": objective.model, **objective.averages.models}.items():
                row |= {f"{name}_{key}": value for key, value in self.evaluate(model, trainer.accelerator).items()}
        except InputError:
            trainer.keep_trained()
            raise
        sizes = set().union(*gathered(self.sizes))
        size = list(*sizes) if len(sizes) == 1 else None
        if is_main():
            for name in [name for name in ("model", "ema") if row[f"{name}_loss"] is None]:
                say(f"warning: step {trainer.step}, {name}/: the loss of held-out images is not finite; no accuracy")
            self.log.write(row | {"num": self.facts.held_out, "image_size": size})
        trainer.trackers.log({f"eval/{key}": value for key, value in row.items()}, trainer.step)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float | None]:
        """Loss, and the shares of the held-out images whose class is the first, or among the first five, in percent.

        Each is None where the loss is not finite.
        Raises InputError where one of them cannot be read: an accuracy on the others would be another figure.
        """
        training, device, classes = model.training, accelerator.device, len(self.facts.class_names)
        sums, error, size = torch.zeros(3, dtype=torch.float64, device=device), None, self.recipe.eval.batch_size
        places = RankPositions(0, math.ceil(len(self.held_out) / size), size)
        model.eval()
        try:
            batches = TrainingBatches(self.held_out, places, self.recipe.data, device.type == "cuda")
            total = math.ceil(len(self.held_out) / size)
            for batch in Progress(
                batches, "evaluation", total, unit="batch", delay=2, leave=False, disable=not is_main()
            ):
                if len(self.sizes) < 2:
                    self.sizes |= {*map(tuple, batch["size"].unique(dim=0)[:2].tolist())}
                image, label = batch["image"].to(device), batch["label"].to(device)
                with accelerator.autocast():
                    logits = model(image).float()
                found = logits.topk(min(5, classes)).indices == label[:, None]
                loss = F.cross_entropy(logits, label, reduction="sum")
                sums += torch.stack([loss, found[:, 0].sum(), found.sum()]).double()
        except InputError as fault:
            error = InputError(f"held out: {fault}")
        model.train(training)
        raise_together(error)
        loss, first, five = (accelerator.reduce(sums, "sum") / self.facts.held_out).tolist()
        if not math.isfinite(loss):  # of NaN there is a greatest, too, but it says nothing of a class
            return dict.fromkeys(("loss", "top1", "top5"))
        return {"loss": loss, "top1": 100 * first, "top5": 100 * five}


def last_evaluation(run: Path) -> dict[str, Any] | None:
    """What a run has written of its last evaluation, None of one that has made none. Raises InputError where that
    cannot be read."""
    return next(reversed(evaluations(run)), None)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """What a run has written of its evaluations, in their order. image_size: [H, W] of all held-out images, None where
    they differ. Raises InputError where that cannot be read."""
    remedy = "take that line away, and the same command evaluates anew"
    with told(f"{str(run / EVALS)!r} cannot be read", OSError, Malformed, remedy=remedy):
        return read_rows(run / EVALS, EVAL_FORM)
