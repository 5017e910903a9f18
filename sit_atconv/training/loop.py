"""The training loop: images, latents, flow loss, AdamW, EMA, and checkpoints that a restart goes on from."""

import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from sit_atconv import checkpoint, config, sharding
from sit_atconv.config import Recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.loading import TrainingBatches, check_bad
from sit_atconv.data.samples import RankPositions, TrainingSamples
from sit_atconv.ema import Averages
from sit_atconv.errors import InputError, speaks
from sit_atconv.files import DiskFull, write_atomic
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.generation import generate, save_grid
from sit_atconv.latents.codecs import open_codec
from sit_atconv.layers.projectors import Projectors
from sit_atconv.models.cost import count_macs
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.plan import Facts, build_model, check_stated, measured_facts, preview_sampling, time_sampling
from sit_atconv.training.faults import StopSignals, agree
from sit_atconv.training.folder import check_run_folder, lock
from sit_atconv.training.launch import make_accelerator
from sit_atconv.training.log import Log, Means, Trackers, peak_flops, peak_memory
from sit_atconv.training.optimizer import learning_rate, make_optimizer, step_and_weight_squares

SCORE_BLOCK = 100  # images drawn at once for a score, by each process

# From uint8 images (N, C, H, W) and their labels to scores by name.
Scorer = Callable[[torch.Tensor, list[int]], dict[str, float]]


def train(recipe: Recipe, must_resume: bool = False, scorer: Scorer | None = None) -> Path:
    """Train until `train.max_steps`, going on from the newest valid checkpoint in `run.out`; returns the last one.

    SIGTERM and SIGINT end it early, after the step and a checkpoint, which is then what it returns.
    must_resume: refuse to begin anew. scorer: what `score.every` asks for; called on the main process.

    Raises InputError for whatever the user can mend. What is wrong from the start, images of the first step included,
    leaves nothing behind; data that go bad later leave a checkpoint of the steps before.
    """
    with StopSignals() as signals:
        accelerator = make_accelerator(recipe)
        dataset = open_dataset(recipe.data)
        codec = open_codec(recipe.latents, dataset)
        facts = measured_facts(dataset, codec)
        check_stated(recipe, facts)
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
        run = Path(recipe.run.out)
        start = [None, None, None]  # what the main process found: checkpoint, whether the folder is new, error
        held = None
        if accelerator.is_main_process:
            try:
                # Before looking: another process may be at work there.
                held = lock(run) if (run / "recipe.yaml").exists() else None
                encoded = dataset.index["data"] if dataset.moments else None
                start = [check_run_folder(run, recipe, described, encoded), not run.exists(), None]
            except InputError as error:
                start[2] = error
        found, new, error = broadcast_object_list(start)
        if error is not None:
            raise error
        if must_resume and not found:
            raise InputError(f"--resume: there is no checkpoint in {str(run)!r} to go on from")
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
            accelerator, recipe, described, samples, codec, model, aligned, distillation, encoder, preview, found, new,
            held,
        )  # fmt: skip
        return trainer.run_to_the_end(signals, scorer)


def build_alignment(recipe: Recipe, model: SiTTransformer2DModel) -> tuple[nn.Module | None, nn.Module | None]:
    """REPA's part of a run: the model with its projectors, and the frozen encoder; nothing without `repa.encoder`."""
    if recipe.repa.encoder is None:
        return None, None
    from sit_atconv.repa import ImageEncoder, align  # with timm, which takes seconds

    encoder = ImageEncoder(recipe.repa.encoder)
    return align(model, encoder, recipe.repa, recipe.run.seed), encoder


def _start(distillation: nn.Module, recipe: Recipe, samples: TrainingSamples, codec) -> None:
    """Warm-start the student on the first training samples, the same in every process."""
    path, size = PATHS[recipe.flow.path](), recipe.train.batch_size
    inputs = []
    for first in range(0, recipe.distill.calib, size):
        batch, _ = samples.fetch(range(first, min(first + size, recipe.distill.calib)))
        if isinstance(batch, InputError):
            raise batch
        latents = codec.encode(batch["image"], batch.get("posterior"))
        inputs.append((path.interpolate(latents, batch["noise"], batch["t"]), batch["t"], batch["label"]))
    errors = distillation.start(inputs)
    if errors and speaks():
        mean = sum(errors.values()) / len(errors)
        tqdm.write(f"swapped {len(errors)} layers; relative error at the start: {mean:.3f}", file=sys.stderr)


def build_distillation(recipe: Recipe, facts: Facts) -> nn.Module | None:
    """A distillation's part of a run: the model, beside its teacher; nothing without `distill.teacher`."""
    if recipe.distill.teacher is None:
        return None
    from sit_atconv.distill import Distillation, load_teacher, student_of  # with diffusers' models, which take seconds

    teacher = load_teacher(recipe, facts.latent_shape, facts.num_classes)
    return Distillation(student_of(teacher, recipe.distill, recipe.run.seed), teacher, recipe.distill)


class _Trainer:
    def __init__(
        self, accelerator, recipe, described, samples, codec, model, aligned, distillation, encoder, preview, found,
        new, held,
    ):  # fmt: skip
        self.lock = held
        self.accelerator, self.recipe, self.codec, self.preview = accelerator, recipe, codec, preview
        self.described, self.encoder, self.new = described, encoder, new
        self.run = Path(recipe.run.out)
        self.path = PATHS[recipe.flow.path]()
        self.bare, self.projectors = model, aligned and aligned.projectors
        # What has the parameters: the model, with REPA's projectors, or beside its teacher.
        self.trained = aligned or distillation or model
        self.distillation = distillation
        self.num_images = described["data"]["num_images"]
        # Forward, and twice that backward; a step of distillation is not of one cost.
        self.flops_per_image = None if self.distillation else 3 * 2 * count_macs(model)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.bad: dict[int, str] = {}  # images that could not be read, by any process
        self.images_here = 0  # seen by this process since this start
        self.last = found[0] if found else None
        if found:
            folder, manifest = found
            checkpoint.load_weights(folder / "model", model)
            if self.projectors is not None:
                self.projectors.load_state_dict(Projectors.load(folder / "model").state_dict())
            self.step = manifest["step"]
        self.averages = Averages(model, recipe.ema)
        if found:
            for name, average in self.averages.models.items():
                checkpoint.load_weights(found[0] / name, average)
        self.images_before = self.step * recipe.train.batch_size
        optimizer = make_optimizer(self.trained, recipe.train)
        if accelerator.is_fsdp2:
            sharding.fit_plugin(accelerator.state.fsdp_plugin, model, recipe.train.precision == "bf16")
        if recipe.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if recipe.train.compile:
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
            self._load_trainer_state(found[0], samples)
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

    def run_to_the_end(self, signals: StopSignals, scorer: Scorer | None) -> Path:
        recipe, accelerator = self.recipe, self.accelerator
        total, main = recipe.train.max_steps, accelerator.is_main_process
        self._begin()
        steps, seconds, waited = 0, 0.0, 0.0  # since the last report, previews and checkpoints left out
        # Nothing is shown before the first step, so that an error at the first image is the only line.
        with tqdm(total=total, initial=self.step, desc="train", unit="step", disable=not main, delay=1e-3) as bar:
            while self.step < total:
                start = time.perf_counter()
                batches = self._fetch(signals)
                if batches is None:
                    break
                waited += time.perf_counter() - start
                reports = (self.step + 1) % recipe.run.log_every == 0 or self.step + 1 == total
                figures = self._optimize(batches, reports)
                bar.update()
                steps, seconds = steps + 1, seconds + time.perf_counter() - start
                if reports:
                    row = self._report(figures, steps, seconds, waited)
                    bar.set_postfix(loss=f"{row['loss'] or math.nan:.4f}")
                    steps, seconds, waited = 0, 0.0, 0.0
                if recipe.preview.every and self.step % recipe.preview.every == 0:
                    self._draw_preview()
                if recipe.score.every and self.step % recipe.score.every == 0:
                    self._score(scorer)
                if recipe.ema.snapshot_every and self.step % recipe.ema.snapshot_every == 0:
                    self._keep(self._snapshot)
                if self.step % recipe.checkpoint.every == 0 and self.step < total:
                    self._keep(self._save)
            if self.last != checkpoint.folder_of(self.run, self.step):  # at the end, or where a signal ends the run
                self._save()
        accelerator.end_training()
        return self.last

    def _begin(self) -> None:
        """Make the run's folder, or take it over, and start the trackers; what goes wrong leaves no new folder behind.

        A process that meets a bad image after this finds the folder complete, and removes it.
        """
        recipe, error = self.recipe, None
        try:
            if self.accelerator.is_main_process:
                self.lock = self.lock or lock(self.run)
                if self.last is None and checkpoint.step_folders(self.run):
                    self.new = False
                    raise InputError(f"run.out={str(self.run)!r} was begun by another process meanwhile; start again")
                write_atomic(self.run / "recipe.yaml", yaml.safe_dump(self.described["recipe"], sort_keys=False))
                self.log = Log(self.run / "log.jsonl", self.step)
                self.scores = Log(self.run / "scores.jsonl", self.step) if recipe.score.every else None
                checkpoint.prune(self.run, self.step, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every)
            self.trackers = Trackers(self.accelerator, recipe, self.step)
        except OSError as fault:
            reason = fault.strerror or fault
            error = InputError(f"run.out={str(self.run)!r} cannot be written: {reason}; choose another place")
        except InputError as fault:
            error = fault
        if error is not None and self.new and self.lock is not None:
            shutil.rmtree(self.run, ignore_errors=True)
        sharding.raise_together(error)

    def _fetch(self, signals: StopSignals) -> list[dict[str, torch.Tensor]] | None:
        """The micro-batches of a step, or None where a signal asks to stop. Raises in every process where one must."""
        batches, fault = [], None
        try:
            if signals.received is None:
                batches = [next(self.batches) for _ in range(self.recipe.train.gradient_accumulation_steps)]
        except InputError as error:
            fault = error
        found = self.batches.pop_bad()
        stop, faults, news = agree(self.accelerator, signals.received is not None, fault is not None, len(found))
        if news:
            fault = self._count_bad(found) or fault
            faults += fault is not None
        if faults:
            if self.step and self.last != checkpoint.folder_of(self.run, self.step):
                try:
                    self._save()  # what was trained until here is good
                except InputError as error:
                    if self.accelerator.is_main_process:
                        tqdm.write(f"warning: {error}", file=sys.stderr)
            elif self.new and not self.step and self.accelerator.is_main_process:
                shutil.rmtree(self.run, ignore_errors=True)
            raise fault or SystemExit(2)  # another process says why
        return None if stop else batches

    def _count_bad(self, found: dict[int, str]) -> InputError | None:
        """Add what all processes found to the unreadable images, name new ones, and say when there are too many."""
        new = {index: what for part in gather_object([found]) for index, what in part.items() if index not in self.bad}
        self.bad |= new
        try:
            check_bad(self.bad, self.num_images, self.recipe.data.max_bad_share)
        except InputError as error:
            return error
        if self.accelerator.is_main_process:
            for what, count in Counter(new.values()).items():  # of a lost disk, one text stands for many images
                images = "another image takes its place" if count == 1 else f"others take the place of {count} images"
                tqdm.write(f"warning: {what}; {images}", file=sys.stderr)
        return None

    def _optimize(self, batches: list[dict[str, torch.Tensor]], reports: bool) -> dict[str, Any]:
        """One optimisation step; its gradient norm, learning rate and, where it `reports`, update_ratio."""
        recipe, accelerator = self.recipe, self.accelerator
        lr = learning_rate(self.step, recipe.train)
        if self.distillation is not None and self.distillation.blockwise(self.step):
            lr = recipe.distill.blockwise_lr or lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = []
        for cpu_batch in batches:
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in cpu_batch.items()}
            self.images_here += len(batch["label"])
            with accelerator.accumulate(self.model):
                losses = self._losses(batch)
                weighed = zip(self.weights.values(), losses, strict=True)
                loss = sum(weight * each.mean() for weight, each in weighed if each is not None)
                accelerator.backward(loss)
            self.means.add(batch["t"], *losses)
            sums.append(loss.detach())
        norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.train.max_grad_norm or math.inf)
        loss, grad_norm = torch.stack([torch.stack(sums).sum(), sharding.full_scalar(norm)]).tolist()
        (failed,) = agree(accelerator, not (math.isfinite(loss) and math.isfinite(grad_norm)))
        self.skipped, self.skipped_in_a_row = self.skipped + (failed > 0), (self.skipped_in_a_row + 1) * (failed > 0)
        if self.distillation is not None:
            for parameter in self.distillation.idle(self.step):
                parameter.grad = None  # AdamW would go on with what it gathered of them before
        if not failed:
            self.optimizer.step()
        elif accelerator.scaler is not None:  # which knows of infinities since the clipping, and adapts
            accelerator.scaler.update()
        ratio = 0.0 if failed else self._update_ratio() if reports else None
        self.optimizer.zero_grad()
        self.step += 1
        if self.skipped_in_a_row >= recipe.train.max_skipped:
            raise InputError(
                f"no finite loss and gradient for {recipe.train.max_skipped} steps, up to step {self.step}; start a "
                "run with a lower train.lr or with train.max_grad_norm"
            )
        if not failed:
            self.averages.update(self.bare, self.step - self.skipped)
        return {"grad_norm": grad_norm, "lr": lr, "update_ratio": ratio}

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

    def _update_ratio(self) -> float:
        """|w' - w| / |w| of the step just taken, over all weights."""
        squares = step_and_weight_squares(self.optimizer.optimizer)
        if sharding.is_sharded(self.bare):
            squares = self.accelerator.reduce(squares, "sum")
        step, weights = squares.tolist()
        return math.sqrt(step / weights) if weights else 0.0

    def _report(self, figures: dict[str, Any], steps: int, seconds: float, waited: float) -> dict[str, Any]:
        """Write what the last `steps` steps were to the log and the trackers."""
        accelerator, train = self.accelerator, self.recipe.train
        here = torch.tensor(self.images_here, device=accelerator.device)
        images_per_second = steps * train.batch_size / seconds
        flops = self.flops_per_image and images_per_second * self.flops_per_image
        peak = peak_flops(accelerator.device, train.precision)
        row = {
            "step": self.step,
            "images_seen": self.images_before + int(accelerator.reduce(here, "sum")),
            **self.means.row(self.means.reduced(accelerator)),
            **figures,
            "skipped": self.skipped,
            "bad_images": len(self.bad),
            "images_per_second": images_per_second,
            "data_wait": waited / seconds,
            "flops_per_second": flops,
            "peak_share": flops / (peak * accelerator.num_processes) if peak and flops else None,
            "eta_seconds": (train.max_steps - self.step) * seconds / steps,
            "memory_bytes": peak_memory(accelerator.device),
        }
        self.means.reset()
        if accelerator.is_main_process:
            self.log.write(row)
        self.trackers.log(row, self.step)
        return row

    def _sample(self, count: int, block: int) -> tuple[torch.Tensor, list[int]]:
        """EMA samples 0 to count - 1 of the classes in turn, shared out over the processes: uint8 images, labels.

        block: images at once. Every process draws equally many, the last one again where there are too few: a sharded
        EMA is evaluated by all of them together.
        """
        accelerator, classes = self.accelerator, self.bare.config.num_classes
        share = math.ceil(count / accelerator.num_processes)
        first = accelerator.process_index * share
        indices = [min(index, count - 1) for index in range(first, first + share)]
        images = []
        for start in range(0, share, block):
            part = indices[start : start + block]
            labels = [index % classes for index in part]
            images.append(generate(self.averages.model, self.codec, part, labels, self.preview)[0])
        together = accelerator.gather(torch.cat(images).to(accelerator.device))
        return together[:count].cpu(), [index % classes for index in range(count)]

    def _draw_preview(self) -> None:
        count = self.recipe.preview.num
        images, _ = self._sample(count, count)
        if self.accelerator.is_main_process:
            file = self.run / "previews" / f"step-{self.step:07d}.png"
            try:
                save_grid(images, math.ceil(math.sqrt(count)), file)
            except OSError as error:
                tqdm.write(
                    f"warning: preview {str(file)!r} cannot be written: {error.strerror or error}", file=sys.stderr
                )

    def _score(self, scorer: Scorer) -> None:
        images, labels = self._sample(self.recipe.score.num, SCORE_BLOCK)
        error = None
        if self.accelerator.is_main_process:
            try:
                values = scorer(images, labels)
            except InputError as fault:
                error = fault
        sharding.raise_together(error)
        if self.accelerator.is_main_process:
            self.scores.write(
                {"step": self.step, **values, "num": len(images), "sampling": self.preview.describe(self.bare)}
            )
            self.trackers.log({f"score/{name}": value for name, value in values.items()}, self.step)

    def _keep(self, write: Callable[[], None]) -> None:
        """Write what the run keeps; by option, a full disk is a warning."""
        try:
            write()
        except DiskFull as error:
            if self.recipe.checkpoint.on_full_disk == "stop":
                raise
            if self.accelerator.is_main_process:
                tqdm.write(f"warning: {error}; training goes on from step {self.step}", file=sys.stderr)

    def _snapshot(self) -> None:
        tensors = {name: sharding.full_tensors(average) for name, average in self.averages.models.items()}
        error = None
        if self.accelerator.is_main_process:
            try:
                self.averages.write_snapshot(self.run, self.step, tensors, self.step - self.skipped)
            except InputError as fault:
                error = fault
        sharding.raise_together(error)

    def _save(self) -> None:
        sums = self.means.reduced(self.accelerator)
        scaler = self.accelerator.scaler
        trainer = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "means": sums.tolist(),
            "bad": {str(index): self.bad[index] for index in sorted(self.bad)},
        }
        self.last = checkpoint.save(
            self.run,
            self.step,
            {"model": self.bare, **self.averages.models},
            self.projectors,
            self.trained,
            self.optimizer.optimizer,
            trainer,
            {"images_seen": self.step * self.recipe.train.batch_size, **self.described},
        )
        if self.accelerator.is_main_process:
            keep = self.recipe.checkpoint
            try:
                checkpoint.prune(self.run, self.step, keep.keep_last, keep.keep_every)
            except OSError as error:
                reason = error.strerror or error
                tqdm.write(f"warning: older checkpoints stay, they cannot be removed: {reason}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _load_trainer_state(self, folder: Path, samples: TrainingSamples) -> None:
        untrained = self.distillation.idle(0) if self.distillation is not None else ()
        checkpoint.load_optimizer(folder, self.trained, self.optimizer.optimizer, untrained)
        trainer = json.loads((folder / "trainer.json").read_text())
        self.skipped, self.skipped_in_a_row = trainer["skipped"], trainer["skipped_in_a_row"]
        bad = {int(index): what for index, what in trainer["bad"].items()}
        self.bad = broadcast_object_list([samples.still_bad(bad) if self.accelerator.is_main_process else None])[0]
        if self.accelerator.is_main_process:  # the other processes' sums were added to these
            self.means.sums.copy_(torch.tensor(trainer["means"]))
        if self.accelerator.scaler is not None and trainer["scaler"]:
            self.accelerator.scaler.load_state_dict(trainer["scaler"])
