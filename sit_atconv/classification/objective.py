"""Classification: cross-entropy of augmented and mixed images, with timm's optimiser, schedule and average."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from sit_atconv.classification.plan import Facts, build_classifier, cost_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.samples import generators_kept, preprocessing, seed_generators
from sit_atconv.data.samples import Batch, Samples
from sit_atconv.runtime import processes
from sit_atconv.runtime.devices import import_compiler
from sit_atconv.runtime.draws import Stream
from sit_atconv.training.objectives.objective import Forward, Objective
from sit_atconv.training.verdict import Verdict

WEIGHTS = "model.safetensors"  # as timm names them


class TimmAverage:
    """timm's moving average of a model and of its statistics, in the folder ema/ of a checkpoint.

    statistics: of the model, by their names, as its last step left them.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool):
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self.models: Mapping[str, nn.Module] = {"ema": self.ema.module}
        self.statistics: dict[str, torch.Tensor] = {}

    def update(self, model: nn.Module, updates: int) -> None:
        """One step towards the model's weights and the statistics."""
        left = model.state_dict() | self.statistics
        self.ema.update(SimpleNamespace(state_dict=lambda: left), updates)  # timm asks for that alone, in that order


class ClassificationObjective(Objective):
    """Cross-entropy of a model of timm, with smoothed or mixed targets.

    A checkpoint's ema/ and model/ are what `timm.create_model("local-dir:...", pretrained=True)` loads.
    Raises InputError for a model that is none, or that does not take the recipe's images.
    """

    time_bins = 0
    no_fsdp = "a classifier trains under DDP or on one process; launch it without FSDP"

    def __init__(self, recipe: ClassifierRecipe, facts: Facts):
        self.recipe, self.facts, augment = recipe, facts, recipe.augment
        self.steps, self.weights = facts.steps, {"loss": 1.0}
        self.parameters, self.macs = cost_of(recipe, facts)
        self.flops_per_image = 3 * 2 * self.macs  # forward, and twice that backward
        self.model = self.trained = build_classifier(recipe, facts)
        self.mix = None
        if augment.mixes:
            self.mix = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.smoothing,
                num_classes=len(facts.class_names),
            )

    def begin(self, samples: Samples, checkpoint: Path | None) -> None:
        self.averages = TimmAverage(self.model, self.recipe.ema.decay, self.recipe.ema.warmup)
        if checkpoint is not None:
            for folder, model in (("model", self.model), ("ema", self.averages.models["ema"])):
                model.load_state_dict(load_file(checkpoint / folder / WEIGHTS))
        self.averages.ema.requires_grad_(False)

    def make_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        settings = self.recipe.train
        optimizer = create_optimizer_v2(
            self.model,
            "adamw",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=tuple(settings.betas),
            fused=fused or None,
        )
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=self.steps,
            lr_min=settings.min_lr,
            warmup_t=self.facts.warmup_steps,
            warmup_lr_init=settings.warmup_lr,
            t_in_epochs=False,
        )
        return optimizer

    def prepare(self) -> None:
        if self.recipe.train.compile:
            import_compiler()
            self.model.compile()

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        self.schedule.step_update(step)  # of every group by itself
        return optimizer.param_groups[0]["lr"]

    def begin_step(self) -> None:
        if not self.averages.statistics:  # of the start; from there on each step leaves its own
            self._keep_statistics()

    def _keep_statistics(self) -> None:
        self.averages.statistics = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def losses(self, batch: Batch, forward: Forward) -> list[torch.Tensor | None]:
        image, label, seed = batch["image"], batch["label"], self.recipe.run.seed
        with generators_kept():
            if self.mix is None:
                target = mixup_target(label, len(self.facts.class_names), smoothing=self.recipe.augment.smoothing)
            else:
                seed_generators(seed, Stream.MIX, forward.step, forward.part)
                image, target = self.mix(image, label)
            seed_generators(seed, Stream.DROP_PATH, forward.step, forward.part, devices=True)
            logits = forward(image)
        return [F.cross_entropy(logits.float(), target, reduction="none")]

    def end_step(self, verdict: Verdict) -> None:
        """Take statistics back that they never recover from; all processes have those of the first one, which a
        checkpoint has."""
        buffers = list(self.model.buffers())
        verdict.put_back(buffers, list(self.averages.statistics.values()))
        if processes.count() > 1:
            broadcast(buffers)
        self._keep_statistics()

    def write(self, model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        shown = preprocessing(self.recipe.model, self.facts.channels)
        labels = {"label_names": list(self.facts.class_names)}
        save_for_hf(model, str(folder), labels, safe_serialization=True, data_config=shown)
