"""Training of a classifier: timm's model, augmentation, schedule and averages in this library's loop."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import Dataset

from sit_atconv import checkpoint, config, limits, sharding
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.classification.resolved import resolved
from sit_atconv.classification.samples import (
    ClassifierSamples,
    HeldOut,
    generators_kept,
    open_datasets,
    preprocessing,
    seed_generators,
    transforms,
)
from sit_atconv.console import say
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import RankPositions
from sit_atconv.devices import import_compiler, numerics
from sit_atconv.draws import Stream
from sit_atconv.errors import InputError, check_choice
from sit_atconv.limits import check_kernel
from sit_atconv.models.attnet import AttNet  # which registers the family
from sit_atconv.models.cost import count_forward_macs
from sit_atconv.reading import COUNT, POSITIVE, Malformed, read_rows
from sit_atconv.training.faults import StopSignals, agree
from sit_atconv.training.folder import Found, check_place, check_same_data, claim, stored_run
from sit_atconv.training.launch import make_accelerator
from sit_atconv.training.log import Log, Means
from sit_atconv.training.trainer import Trainer

WEIGHTS = "model.safetensors"  # as timm names them
EVALS = "evals.jsonl"
FIGURE = (float, None)  # None where it is not finite
EVAL_FORM = {"step": COUNT, "num": POSITIVE, "ema_loss": FIGURE, "ema_top1": FIGURE, "model_top1": FIGURE}


@dataclass
class Facts:
    """What a recipe and its images come to; mean and std are of values in [0, 1], a number for each channel."""

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    num_images: int
    held_out: int
    steps: int
    warmup_steps: int
    eval_every: int  # steps


def steps_of(recipe: ClassifierRecipe, epochs: float, num_images: int) -> int:
    """How many optimisation steps come closest to so many epochs, at least one."""
    return max(1, round(epochs * num_images / recipe.train.batch_size))


def facts_of(recipe: ClassifierRecipe, dataset: Dataset, held_out: Dataset) -> Facts:
    """What the recipe comes to with these images. Raises InputError where mean or std do not fit their channels."""
    train, channels, number = recipe.train, dataset.channels, len(dataset)
    mean, std = recipe.model.mean, recipe.model.std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InputError(f"model.{name}={values}: the images have {channels} channels; one number for each")

    steps = steps_of(recipe, train.epochs, number)
    limits.STEPS.check(f"train.epochs={train.epochs:g} of {number:,} images, steps: ", steps)
    return Facts(
        channels,
        tuple(mean),
        tuple(std),
        tuple(dataset.class_names),
        number,
        len(held_out),
        steps,
        steps_of(recipe, train.warmup_epochs, number) if train.warmup_epochs else 0,
        steps_of(recipe, recipe.eval.every_epochs, number),
    )


def build_classifier(recipe: ClassifierRecipe, facts: Facts, device: str = "cpu") -> nn.Module:
    """The recipe's model with new weights, drawn for `run.seed`. Raises InputError for a model that is none."""
    settings = recipe.model
    check_choice("model.name", settings.name, timm.list_models())
    options = {"num_classes": len(facts.class_names), "in_chans": facts.channels, **settings.options}
    for name in ("drop_rate", "drop_path_rate"):  # not every model of timm has them
        if (value := getattr(settings, name)) is not None:
            options[name] = value
    with generators_kept(), torch.device(device):
        torch.default_generator.manual_seed(recipe.run.seed)
        try:
            model = timm.create_model(settings.name, **options)
        except InputError:
            raise
        except (TypeError, AssertionError, KeyError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"model.name={settings.name} refuses its options {options}: {error}") from None
    if isinstance(model, AttNet):
        side = settings.input_size // model.feature_info[-1]["reduction"]  # of the last stage
        check_kernel("model.options.kernel_size", settings.options.get("kernel_size"), (side, side))
    if recipe.train.gradient_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise InputError(f"train.gradient_checkpointing: {settings.name} cannot: {error}; leave it out") from None
    return model


def cost_of(recipe: ClassifierRecipe, facts: Facts) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image. Raises InputError as `build_classifier`."""
    size = recipe.model.input_size
    model = build_classifier(recipe, facts, device="meta").eval().requires_grad_(False)
    try:
        macs = count_forward_macs(model, torch.zeros(1, facts.channels, size, size, device="meta"))
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"model.input_size={size}: {recipe.model.name} does not take such images: {error}") from None
    return sum(parameter.numel() for parameter in model.parameters()), macs


def train(recipe: ClassifierRecipe, must_resume: bool = False, force: bool = False) -> Path:
    """Train to the end of `train.epochs`, going on from the newest valid checkpoint in `run.out`; the last one.

    A checkpoint's ema/ and model/ are what `timm.create_model("local-dir:...", pretrained=True)` loads.
    SIGTERM and SIGINT end it early, after the step and a checkpoint. must_resume: refuse to begin anew. force: what is
    at `run.out` and is no run to go on from is set aside.
    Raises InputError for whatever the user can mend; what is wrong from the start leaves nothing behind.
    """
    precise = numerics(tf32=recipe.train.precision == "tf32")
    with sharding.lost_processes_told(), StopSignals() as signals, precise, ExitStack() as stack:
        check_place(recipe.run.out, force)  # in all processes, before the first of them can have made it
        accelerator = make_accelerator(recipe)
        drawing = [accelerator.device] if accelerator.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(drawing))  # stochastic depth draws there, from seeds of its own
        if accelerator.is_fsdp2:
            raise InputError("a classifier trains under DDP or on one process; launch it without FSDP")
        recipe.check_pairs(accelerator.num_processes)
        recipe = resolved(recipe)
        dataset, held_out = open_datasets(recipe.data)
        facts = facts_of(recipe, dataset, held_out)
        shown = preprocessing(recipe, facts.mean, facts.std, facts.channels)
        training, evaluation = transforms(recipe, shown)
        macs = cost_of(recipe, facts)[1]
        model = build_classifier(recipe, facts)
        described = {
            "recipe": config.to_dict(recipe),
            "data": {"num_images": facts.num_images, "classes": list(facts.class_names)},
            "processes": accelerator.num_processes,
        }

        def look(run: Path) -> Found:
            def changed(stored: dict[str, Any], last: Path | None) -> list[str]:
                return config.differences(stored, described["recipe"], ClassifierRecipe, resolved)

            found = stored_run(run, changed)
            if found:
                check_same_data(run, found[1], described)
            return found

        claimed = claim(accelerator, recipe.run.out, look, must_resume, force)
        samples = ClassifierSamples(dataset, training, recipe.train.batch_size, recipe.run.seed, recipe.data.repeats)
        held_out = HeldOut(held_out, evaluation, accelerator.process_index, accelerator.num_processes)
        trainer = _Classifier(accelerator, recipe, described, facts, shown, samples, held_out, model, macs, claimed)
        return trainer.run_to_the_end(signals)


class _Classifier(Trainer):
    def __init__(
        self,
        accelerator: Accelerator,
        recipe: ClassifierRecipe,
        described: dict[str, Any],
        facts: Facts,
        shown: dict[str, Any],
        samples: ClassifierSamples,
        held_out: HeldOut,
        model: nn.Module,
        macs: int,
        claimed: tuple,
    ):
        super().__init__(accelerator, recipe, described, *claimed, facts.steps)
        settings, augment, found = recipe.train, recipe.augment, claimed[0]
        self.facts, self.shown, self.bare, self.trained = facts, shown, model, model
        self.flops_per_image = 3 * 2 * macs  # forward, and twice that backward
        self.average = ModelEmaV3(model, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
        if found:
            model.load_state_dict(load_file(found[0] / "model" / WEIGHTS))
            self.average.module.load_state_dict(load_file(found[0] / "ema" / WEIGHTS))
        self.average.requires_grad_(False).to(accelerator.device)
        optimizer = create_optimizer_v2(
            model, "adamw", lr=settings.lr, weight_decay=settings.weight_decay, betas=tuple(settings.betas)
        )
        if settings.compile:
            import_compiler()
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer.optimizer,
            t_initial=facts.steps,
            lr_min=settings.min_lr,
            warmup_t=facts.warmup_steps,
            warmup_lr_init=settings.warmup_lr,
            t_in_epochs=False,
        )
        self.weights = {"loss": 1.0}
        self.means = Means(["loss"], accelerator.device, bins=0)
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
        if found:
            self._load_trainer_state(found[0], samples)
        positions = RankPositions(
            self.step,
            self.total,
            settings.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            settings.gradient_accumulation_steps,
        )
        pin = accelerator.device.type == "cuda"
        loading = recipe.data.workers, pin, recipe.data.worker_timeout
        self.batches = TrainingBatches(samples, positions, *loading)
        places = RankPositions(0, math.ceil(len(held_out) / recipe.eval.batch_size), recipe.eval.batch_size)
        self.held_out = partial(TrainingBatches, held_out, places, *loading)  # once through, for one evaluation
        self.part = 0  # of the step's micro-batches, over all processes

    def _open_logs(self) -> None:
        self.evals = Log(self.run / EVALS, self.step)

    def _begin(self) -> None:
        super()._begin()
        # An evaluation that failed ended the run after the checkpoint of its step.
        (missing,) = agree(self.accelerator, self.accelerator.is_main_process and self.evals.last != self.step)
        if missing and self.step:
            self._after_step()

    def _begin_step(self) -> None:
        self.part = self.accelerator.process_index * self.recipe.train.gradient_accumulation_steps
        self.statistics = [buffer.clone() for buffer in self.bare.buffers()]

    def _take_back(self) -> None:
        for buffer, before in zip(self.bare.buffers(), self.statistics, strict=True):
            buffer.copy_(before)  # of a batch that is not finite they never recover

    def _learning_rates(self) -> list[float]:
        self.schedule.step_update(self.step)
        return [group["lr"] for group in self.optimizer.param_groups]

    def _losses(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        image, label, seed = batch["image"], batch["label"], self.recipe.run.seed
        with generators_kept():
            if self.mix is None:
                target = mixup_target(label, len(self.facts.class_names), smoothing=self.recipe.augment.smoothing)
            else:
                seed_generators(seed, Stream.MIX, self.step, self.part)
                image, target = self.mix(image, label)
            seed_generators(seed, Stream.DROP_PATH, self.step, self.part)
            with self.accelerator.autocast():
                logits = self.model(image)
        self.part += 1
        return [F.cross_entropy(logits.float(), target, reduction="none")]

    def _average(self) -> None:
        if self.accelerator.num_processes > 1:  # each has statistics of its own batches; a checkpoint has the first's
            broadcast(list(self.bare.buffers()))
        self.average.update(self.bare, self.step - self.skipped)

    def _after_step(self) -> None:
        if self.step % self.facts.eval_every == 0 or self.step == self.total:
            row = {"step": self.step, "epoch": self.step * self.recipe.train.batch_size / self.num_images}
            try:
                for name, model in (("model", self.bare), ("ema", self.average.module)):
                    row |= {f"{name}_{key}": value for key, value in self._evaluate(model).items()}
            except InputError:
                self._keep_trained()
                raise
            if self.accelerator.is_main_process:
                for name in [name for name in ("model", "ema") if row[f"{name}_loss"] is None]:
                    say(f"warning: step {self.step}, {name}/: the loss of held-out images is not finite; no accuracy")
                self.evals.write(row | {"num": self.facts.held_out})
            self.trackers.log({f"eval/{key}": value for key, value in row.items()}, self.step)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """Loss, and the shares of the held-out images whose class is the first, or among the first five, in percent.

        Each is None where the loss is not finite.
        Raises InputError where one of them cannot be read: an accuracy on the others would be another figure.
        """
        training, device, classes = model.training, self.accelerator.device, len(self.facts.class_names)
        sums, error = torch.zeros(3, dtype=torch.float64, device=device), None
        model.eval()
        try:
            for batch in self.held_out():
                image, label = batch["image"].to(device), batch["label"].to(device)
                with self.accelerator.autocast():
                    logits = model(image).float()
                found = logits.topk(min(5, classes)).indices == label[:, None]
                loss = F.cross_entropy(logits, label, reduction="sum")
                sums += torch.stack([loss, found[:, 0].sum(), found.sum()]).double()
        except InputError as fault:
            error = InputError(f"held out: {fault}")
        model.train(training)
        sharding.raise_together(error)
        loss, first, five = (self.accelerator.reduce(sums, "sum") / self.facts.held_out).tolist()
        if not math.isfinite(loss):  # of NaN there is a greatest, too, but it says nothing of a class
            return dict.fromkeys(("loss", "top1", "top5"))
        return {"loss": loss, "top1": 100 * first, "top5": 100 * five}

    def _write_checkpoint(self, trainer: dict[str, Any], facts: dict[str, Any]) -> Path:
        models = {"model": self.bare, "ema": self.average.module}

        def write(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
            labels = {"label_names": list(self.facts.class_names)}
            save_for_hf(model, str(folder), labels, safe_serialization=True, data_config=self.shown)

        optimizer = self.optimizer.optimizer
        return checkpoint.save(self.run, self.step, models, None, self.trained, optimizer, trainer, facts, write)


def last_evaluation(run: Path) -> dict[str, Any] | None:
    """What a run has written of its last evaluation, None of one that has made none. Raises InputError where that
    cannot be read."""
    try:
        return next(reversed(read_rows(run / EVALS, EVAL_FORM)), None)
    except (OSError, Malformed) as error:
        said = f"{error.strerror or error}" if isinstance(error, OSError) else error
        raise InputError(
            f"{str(run / EVALS)!r} cannot be read: {said}; take that line away, and the same command evaluates anew"
        ) from None


def dry_run(recipe: ClassifierRecipe) -> str:
    """What a recipe comes to, in lines: model, data, schedule, averages. Reads the list of images, and no image."""
    dataset, held_out = open_datasets(recipe.data)
    facts, settings = facts_of(recipe, dataset, held_out), recipe.train
    transforms(recipe, preprocessing(recipe, facts.mean, facts.std, facts.channels))
    (parameters, macs), size = cost_of(recipe, facts), recipe.model.input_size
    flops = 6 * macs * facts.steps * settings.batch_size
    rows = {
        "model": f"{recipe.model.name}, {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3g} GMACs at {size} px",
        "data": f"{facts.num_images:,} images of {len(facts.class_names)} classes, {facts.held_out:,} held out",
        "schedule": f"{facts.steps:,} steps of {settings.batch_size:,} = {settings.epochs:g} epochs; lr "
        f"{settings.lr:g}, {facts.warmup_steps:,} steps of warm-up, cosine to {settings.min_lr:g}",
        "averages": f"EMA, decay {recipe.ema.decay}{' with warm-up' if recipe.ema.warmup else ''}",
        "compute": f"{flops:.3g} FLOP, and the evaluation every {facts.eval_every:,} steps",
        "memory": f"weights, gradients, AdamW and EMA {5 * 4 * parameters / 1e9:.2f} GB, and the activations",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items())
