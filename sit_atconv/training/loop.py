"""The training loop: images, latents, flow loss, AdamW, EMA, and checkpoints that a restart goes on from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from sit_atconv import checkpoint, config, sharding
from sit_atconv.config import Recipe
from sit_atconv.console import say
from sit_atconv.data import open_dataset
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.samples import RankPositions, TrainingSamples
from sit_atconv.devices import import_compiler, numerics
from sit_atconv.ema import Averages
from sit_atconv.errors import InputError, speaks
from sit_atconv.files import step_name, write_atomic
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.generation import generate, grid_png
from sit_atconv.images import NotFinite
from sit_atconv.latents.codecs import open_codec
from sit_atconv.layers.projectors import Projectors
from sit_atconv.limits import check_kernel
from sit_atconv.models.cost import count_macs
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.plan import (
    Facts,
    build_model,
    check_stated,
    grid_of,
    measured_facts,
    preview_sampling,
    time_sampling,
)
from sit_atconv.training.faults import StopSignals
from sit_atconv.training.folder import check_place, check_run_folder, claim
from sit_atconv.training.launch import make_accelerator
from sit_atconv.training.log import Log, Means
from sit_atconv.training.optimizer import learning_rate, make_optimizer
from sit_atconv.training.resolved import resolved
from sit_atconv.training.trainer import PREVIEWS, Trainer

SCORE_BLOCK = 100  # images drawn at once for a score, by each process

# From uint8 images (N, C, H, W) and their labels to scores by name.
Scorer = Callable[[torch.Tensor, list[int]], dict[str, float]]


def train(
    recipe: Recipe, must_resume: bool = False, scorer: Scorer | None = None, force: bool = False
) -> Path:  # fmt: skip
    """Train until `train.max_steps`, going on from the newest valid checkpoint in `run.out`; returns the last one.

    SIGTERM and SIGINT end it early, after the step and a checkpoint, which is then what it returns.
    must_resume: refuse to begin anew. scorer: what `score.every` asks for; called on the main process. force: what is
    at `run.out` and is no run to go on from is set aside.

    Raises InputError for whatever the user can mend. What is wrong from the start, images of the first step included,
    leaves nothing behind; data that go bad later leave a checkpoint of the steps before.
    """
    precise = numerics(tf32=recipe.train.precision == "tf32")
    with sharding.lost_processes_told(), StopSignals() as signals, precise:
        check_place(recipe.run.out, force)  # in all processes, before the first of them can have made it
        accelerator = make_accelerator(recipe)
        dataset = open_dataset(recipe.data)
        codec = open_codec(recipe.latents, dataset)
        facts = measured_facts(dataset, codec)
        check_stated(recipe, facts)
        recipe = resolved(recipe, facts)
        if recipe.score.every and scorer is None and accelerator.is_main_process:
            raise InputError("score.every needs a scorer, which train_sit.py brings; leave it out")
        distillation = build_distillation(recipe, facts)
        model = distillation.model if distillation else build_model(recipe, facts)
        aligned, encoder = build_alignment(recipe, model)
        preview = preview_sampling(recipe, model)
        described = {
            "recipe": config.to_dict(recipe),
            "data": {"num_images": facts.num_images, "classes": list(dataset.class_names)},
            "codec": codec.describe(),
            "encoder": encoder.describe() if encoder else None,
            "teacher": distillation.describe() if distillation else None,
            "processes": accelerator.num_processes,
        }
        encoded = dataset.index["data"] if dataset.moments else None
        found, held = claim(
            accelerator, recipe.run.out, lambda run: check_run_folder(run, recipe, described, encoded), must_resume,
            force,
        )  # fmt: skip
        samples = TrainingSamples(
            dataset,
            facts.latent_shape,
            recipe.train.batch_size,
            recipe.run.seed,
            flip=recipe.data.flip,
            drop=model.config.class_dropout_prob,
            null_label=model.null_label,
            posterior=codec.draws_posterior,
            time=time_sampling(recipe.flow),
            sampling=recipe.data.sampling,
            with_image=encoder is not None,
            stratified=recipe.flow.time_stratified,
        )
        if distillation is not None and not found:
            _start(distillation, recipe, samples, codec)
        trainer = _Trainer(
            accelerator, recipe, described, samples, codec, model, aligned, distillation, encoder, preview, found,
            held, scorer,
        )  # fmt: skip
        return trainer.run_to_the_end(signals)


def build_alignment(recipe: Recipe, model: SiTTransformer2DModel) -> tuple[nn.Module | None, nn.Module | None]:
    """REPA's part of a run: the model with its projectors, and the frozen encoder; nothing without `repa.encoder`."""
    if recipe.repa.encoder is None:
        return None, None
    from sit_atconv.repa import ImageEncoder, align  # with timm, which takes seconds

    encoder = ImageEncoder(recipe.repa.encoder)
    return align(model, encoder, recipe.repa, recipe.run.seed), encoder


def _start(distillation: nn.Module, recipe: Recipe, samples: TrainingSamples, codec) -> None:
    """Warm-start the student on the first training samples, the same in every process; not one of a control."""
    if recipe.distill.control:
        return
    path, size = PATHS[recipe.flow.path](), recipe.train.batch_size
    inputs = []
    for first in range(0, recipe.distill.calib, size):
        batch, _ = samples.fetch(range(first, min(first + size, recipe.distill.calib)))
        if isinstance(batch, InputError):
            raise batch
        latents = codec.encode(batch["image"], batch.get("posterior"))
        inputs.append((path.interpolate(latents, batch["noise"], batch["t"]), batch["t"], batch["label"]))
    errors = distillation.start(inputs)
    if speaks():
        mean = sum(errors.values()) / len(errors)
        say(f"swapped {len(errors)} layers; relative error at the start: {mean:.3f}")


def build_distillation(recipe: Recipe, facts: Facts) -> nn.Module | None:
    """A distillation's part of a run: the model, beside its teacher; nothing without `distill.teacher`."""
    if recipe.distill.teacher is None:
        return None
    from sit_atconv.distill import Distillation, load_teacher, student_of  # with diffusers' models, which take seconds

    teacher = load_teacher(recipe, facts.latent_shape, facts.num_classes)
    check_kernel("distill.kernel_size", recipe.distill.kernel_size, grid_of(teacher))
    return Distillation(student_of(teacher, recipe.distill, recipe.run.seed), teacher, recipe.distill)


class _Trainer(Trainer):
    def __init__(
        self, accelerator, recipe, described, samples, codec, model, aligned, distillation, encoder, preview, found,
        held, scorer,
    ):  # fmt: skip
        super().__init__(accelerator, recipe, described, found, held, recipe.train.max_steps)
        self.codec, self.encoder, self.preview, self.scorer = codec, encoder, preview, scorer
        self.path = PATHS[recipe.flow.path]()
        self.bare, self.projectors = model, aligned and aligned.projectors
        # What has the parameters: the model, with REPA's projectors, or beside its teacher.
        self.trained = aligned or distillation or model
        self.distillation = distillation
        # Forward, and twice that backward; a step of distillation is not of one cost.
        self.flops_per_image = None if self.distillation else 3 * 2 * count_macs(model)
        if found:
            checkpoint.load_weights(found[0] / "model", model)
            if self.projectors is not None:
                self.projectors.load_state_dict(Projectors.load(found[0] / "model").state_dict())
        self.averages = Averages(model, recipe.ema)
        if found:
            for name, average in self.averages.models.items():
                checkpoint.load_weights(found[0] / name, average)
        optimizer = make_optimizer(self.trained, recipe.train)
        if accelerator.is_fsdp2:
            sharding.fit_plugin(accelerator.state.fsdp_plugin, model, recipe.train.precision == "bf16")
        if recipe.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if recipe.train.compile:
            import_compiler()
            model.compile_repeated_blocks()
        teacher = self.distillation and self.distillation.teacher
        if teacher is not None and accelerator.is_fsdp2:
            raise InputError("distill.teacher is not for FSDP: its layers are called apart from their blocks; use DDP")
        for module in (codec, encoder, teacher, *self.averages.models.values()):
            if module is not None:
                module.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(self.trained, optimizer)
        for average in self.averages.models.values():
            sharding.shard_like(average, model)
        if (
            sharding.is_sharded(model)
            and self.preview.sampler == "dopri5"
            and recipe.preview.every + recipe.score.every
        ):
            raise InputError("preview.sampler=dopri5 takes steps of its own in every process, FSDP needs equal ones")
        self.weights = {"loss": 1.0}  # of the losses, by name
        if encoder is not None:
            self.weights["repa_loss"] = recipe.repa.weight
        if self.distillation is not None:
            settings = recipe.distill
            self.weights |= {"output_loss": settings.output_weight, "feature_loss": settings.feature_weight}
            self.weights["layer_loss"] = 1.0
        self.means = Means([*self.weights], accelerator.device)
        if found:
            untrained = self.distillation.idle(0) if self.distillation is not None else ()
            self._load_trainer_state(found[0], samples, untrained)
        positions = RankPositions(
            self.step,
            recipe.train.max_steps,
            recipe.train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            recipe.train.gradient_accumulation_steps,
        )
        pin = accelerator.device.type == "cuda"
        self.batches = TrainingBatches(samples, positions, recipe.data.workers, pin, recipe.data.worker_timeout)

    def _open_logs(self) -> None:
        self.scores = Log(self.run / "scores.jsonl", self.step) if self.recipe.score.every else None

    def _learning_rates(self) -> list[float]:
        rate = learning_rate(self.step, self.recipe.train)
        if self.distillation is not None and self.distillation.blockwise(self.step):
            rate = self.recipe.distill.blockwise_lr or rate
        return [rate for _ in self.optimizer.param_groups]

    def _idle(self) -> list[nn.Parameter]:
        return self.distillation.idle(self.step) if self.distillation is not None else []

    def _average(self) -> None:
        self.averages.update(self.bare, self.step - self.skipped)

    def _after_step(self) -> None:
        recipe = self.recipe
        if recipe.preview.every and self.step % recipe.preview.every == 0:
            self._draw_preview()
        if recipe.score.every and self.step % recipe.score.every == 0:
            self._score()
        if recipe.ema.snapshot_every and self._due(recipe.ema.snapshot_every):
            self._keep(self._snapshot)

    def _losses(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """Of every sample (B,), in the order of `weights`: the flow loss, REPA's with an encoder, a teacher's."""
        latents = self.codec.encode(batch["image"], batch.get("posterior"))
        if self.distillation is not None:
            return self._distilled(latents, batch)
        hidden: list[torch.Tensor] = []

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():  # which `prepare` puts around the forward pass, but not under FSDP2
                velocity, *rest = self.model(x, t, batch["label"], return_dict=False)
            hidden.extend(rest)
            return velocity

        flow = self.recipe.flow
        loss = flow_loss(network, self.path, latents, batch["noise"], batch["t"], flow.prediction, flow.loss_weight)
        if self.encoder is None:
            return [loss]
        from sit_atconv.repa import repa_loss

        grid = tuple(side // self.bare.config.patch_size for side in latents.shape[-2:])
        with self.accelerator.autocast():
            features = self.encoder.features(batch.get("pixels", batch["image"]), grid)
        return [loss, repa_loss(hidden[0], features)]

    def _distilled(self, latents: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        x, flow = self.path.interpolate(latents, batch["noise"], batch["t"]), self.recipe.flow
        with self.accelerator.autocast():
            output, *losses = self.model(x, batch["t"], batch["label"], self.step)
        if output is None:
            return [None, *losses]
        own = flow_loss(
            lambda _, __: output, self.path, latents, batch["noise"], batch["t"], flow.prediction, flow.loss_weight
        )
        return [own, *losses]

    def _sample(self, what: str, count: int, block: int) -> tuple[torch.Tensor, list[int]] | None:
        """EMA samples 0 to count - 1 of the classes in turn, shared out over the processes: uint8 images, labels.

        None where one of them, in any process, is not finite; a warning names it, and that there is no `what`.
        block: images at once. Every process draws equally many, the last one again where there are too few: a sharded
        EMA is evaluated by all of them together.
        """
        accelerator, classes = self.accelerator, self.bare.config.num_classes
        share = math.ceil(count / accelerator.num_processes)
        first = accelerator.process_index * share
        indices = [min(index, count - 1) for index in range(first, first + share)]
        images, fault = [], None
        for start in range(0, share, block):
            part = indices[start : start + block]
            labels = [index % classes for index in part]
            try:
                images.append(generate(self.averages.model, self.codec, part, labels, self.preview)[0])
            except NotFinite as error:  # and on, as the others do
                fault = fault or error
        if said := next((str(error) for error in gather_object([fault]) if error is not None), None):
            if accelerator.is_main_process:
                say(f"warning: step {self.step}, {what} is left out: {said}")
            return None
        together = accelerator.gather(torch.cat(images).to(accelerator.device))
        return together[:count].cpu(), [index % classes for index in range(count)]

    def _draw_preview(self) -> None:
        count = self.recipe.preview.num
        drawn = self._sample("its preview", count, count)
        if drawn and self.accelerator.is_main_process:
            file = self.run / PREVIEWS / f"{step_name(self.step)}.png"
            try:
                write_atomic(file, grid_png(drawn[0], math.ceil(math.sqrt(count))))
            except OSError as error:
                say(f"warning: preview {str(file)!r} cannot be written: {error.strerror or error}")

    def _score(self) -> None:
        drawn = self._sample("its score", self.recipe.score.num, SCORE_BLOCK)
        if drawn is None:
            return
        (images, labels), error = drawn, None
        if self.accelerator.is_main_process:
            try:
                values = self.scorer(images, labels)
            except InputError as fault:
                error = fault
        sharding.raise_together(error)
        if self.accelerator.is_main_process:
            self.scores.write(
                {"step": self.step, **values, "num": len(images), "sampling": self.preview.describe(self.bare)}
            )
            self.trackers.log({f"score/{name}": value for name, value in values.items()}, self.step)

    def _snapshot(self) -> None:
        checkpoint.check_finite(self.step, self.averages.models)
        tensors = {name: sharding.full_tensors(average) for name, average in self.averages.models.items()}
        error = None
        if self.accelerator.is_main_process:
            try:
                self.averages.write_snapshot(self.run, self.step, tensors, self.step - self.skipped)
            except InputError as fault:
                error = fault
        sharding.raise_together(error)

    def _write_checkpoint(self, trainer: dict[str, Any], facts: dict[str, Any]) -> Path:
        models, optimizer = {"model": self.bare, **self.averages.models}, self.optimizer.optimizer
        return checkpoint.save(self.run, self.step, models, self.projectors, self.trained, optimizer, trainer, facts)
