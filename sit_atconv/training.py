"""The training loop: images, latents, flow loss, AdamW, EMA, and checkpoints that a restart goes on from."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    is_tensorboard_available,
    is_wandb_available,
)
from tqdm import tqdm

from sit_atconv import checkpoint, config
from sit_atconv.config import Recipe, Train
from sit_atconv.data import RankPositions, TrainingSamples, open_dataset, training_batches
from sit_atconv.ema import EMA
from sit_atconv.errors import InputError
from sit_atconv.files import write_atomic
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import PATHS
from sit_atconv.generation import generate, save_grid
from sit_atconv.latents import check_same_codec, open_codec
from sit_atconv.models.cost import count_macs
from sit_atconv.plan import build_model, check_stated, measured_facts, preview_sampling, time_sampling

MAX_SKIPPED = 20  # steps in a row without a finite gradient before training stops
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def learning_rate(step: int, train: Train) -> float:
    """Learning rate of optimisation step `step` (0-based): linear warm-up, then constant, linear or cosine to 0."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    share = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return train.lr * decay[train.lr_schedule]


def make_optimizer(model: torch.nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone, never on vectors such as biases and `difference_control`."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=tuple(train.betas))


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run. Raises InputError for what this machine or number of processes cannot do."""
    train, installed = recipe.train, {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    for tracker in recipe.run.trackers:
        if not installed[tracker]:
            raise InputError(f"run.trackers: {tracker!r} is not installed; pip install {tracker}")
    plugin = GradientAccumulationPlugin(num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(
            mixed_precision={"bf16": "bf16", "fp16": "fp16"}.get(train.precision, "no"),
            gradient_accumulation_plugin=plugin,
            log_with=recipe.run.trackers or None,
            project_dir=recipe.run.out,
        )
    except ValueError as error:
        raise InputError(f"accelerate refuses the launch with train.precision={train.precision}: {error}") from None
    if accelerator.distributed_type not in DISTRIBUTED:
        raise InputError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this trainer runs on one "
            "process, or under DDP on CPU or CUDA: run `accelerate config` again"
        )
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("train.precision=fp16 needs a GPU; use bf16 or fp32 on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    parts = accelerator.num_processes * train.gradient_accumulation_steps
    if train.batch_size % parts:
        raise InputError(
            f"train.batch_size={train.batch_size} is not divisible by {accelerator.num_processes} processes x "
            f"{train.gradient_accumulation_steps} accumulation steps; choose a multiple of {parts}"
        )
    return accelerator


def check_run_folder(run: Path, recipe: Recipe, described: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, with its manifest, or None for a new run.

    described: what this start would write into a manifest. Raises InputError for a folder that is not this run's.
    """
    if not run.exists():
        return None
    found = checkpoint.newest_valid(run) if run.is_dir() else None
    if found is None and checkpoint.step_folders(run):
        raise InputError(
            f"run.out={str(run)!r} has no whole checkpoint left; remove its step-... folders to begin anew"
        )
    try:
        stored = found[1]["recipe"] if found else yaml.safe_load((run / "recipe.yaml").read_text())
    except OSError:
        if run.is_dir() and all(path.name == "recipe.yaml.tmp" for path in run.iterdir()):  # killed at its first file
            return None
        raise InputError(f"run.out={str(run)!r} exists and is not a run; choose another folder") from None
    except yaml.YAMLError:
        raise InputError(f"run.out={str(run)!r}: its recipe.yaml is damaged; choose another folder") from None
    try:
        changed = "; ".join(config.differences(stored, described["recipe"]))
    except InputError as error:
        raise InputError(
            f"run.out={str(run)!r}: its own recipe is not valid here ({error}); choose another folder"
        ) from None
    if changed:
        raise InputError(f"run.out={str(run)!r} holds a run of another recipe ({changed}); choose another folder")
    if found:
        manifest = found[1]
        if manifest["step"] > recipe.train.max_steps:
            step = manifest["step"]
            raise InputError(f"train.max_steps={recipe.train.max_steps}: {str(run)!r} is already at step {step}")
        check_same_codec(manifest["codec"], described["codec"])
        if manifest.get("data") != described["data"]:
            raise InputError(
                f"the images are not those of run.out={str(run)!r}: other classes, or more or fewer images"
            )
    return found


class Log:
    """log.jsonl: a line of JSON per logged step. A restart drops the lines past the step that it goes on from."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept))
        self.file = open(path, "a")  # noqa: SIM115 (kept open for the run)

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def train(recipe: Recipe, must_resume: bool = False) -> Path:
    """Train until `train.max_steps`, going on from the newest valid checkpoint in `run.out`; returns the last one.

    must_resume: refuse to begin anew.

    Raises InputError for whatever the user can mend. What is wrong from the start, bad images before the first
    checkpoint included, leaves nothing behind.
    """
    accelerator = make_accelerator(recipe)
    dataset, codec = open_dataset(recipe.data), open_codec(recipe.latents)
    facts = measured_facts(dataset, codec)
    check_stated(recipe, facts)
    model = build_model(recipe, facts)
    preview = preview_sampling(recipe, model)
    described = {
        "recipe": config.to_dict(recipe),
        "data": {"num_images": facts.num_images, "classes": list(dataset.class_names)},
        "codec": codec.describe(),
        "processes": accelerator.num_processes,
    }
    run = Path(recipe.run.out)
    main = accelerator.is_main_process
    start = [None, None, None]  # what the main process found: checkpoint, whether the folder is new, error
    if main:
        try:
            start = [check_run_folder(run, recipe, described), not run.exists(), None]
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
    )
    try:
        return _Trainer(accelerator, recipe, described, samples, codec, model, preview, found).run_to_the_end()
    except InputError as error:
        # A bad image found before the first checkpoint: a restart repeats those steps, so nothing is lost.
        if error.every_rank and new and not checkpoint.step_folders(run):
            shutil.rmtree(run, ignore_errors=True)
        raise


class _Trainer:
    def __init__(self, accelerator, recipe, described, samples, codec, model, preview, found):
        self.accelerator, self.recipe, self.codec, self.preview = accelerator, recipe, codec, preview
        self.described = described
        self.run = Path(recipe.run.out)
        self.path = PATHS[recipe.flow.path]()
        self.bare = model
        self.flops_per_image = 3 * 2 * count_macs(model)  # forward, and twice that backward
        self.ema = EMA(model, recipe.ema.decay)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.images_here = 0  # seen by this process since this start
        self.last = found[0] if found else None
        optimizer = make_optimizer(model, recipe.train)
        self.bare_optimizer = optimizer
        if found:
            folder, manifest = found
            checkpoint.load_weights(folder / "model", model)
            checkpoint.load_weights(folder / "ema", self.ema.model)
            self.step = manifest["step"]
        self.images_before = self.step * recipe.train.batch_size
        if recipe.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if recipe.train.compile:
            model.compile_repeated_blocks()
        codec.to(accelerator.device)
        self.ema.model.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if found:
            self._load_trainer_state(found[0])
        positions = RankPositions(
            self.step,
            recipe.train.max_steps,
            recipe.train.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            recipe.train.gradient_accumulation_steps,
        )
        pin = accelerator.device.type == "cuda"
        self.batches = training_batches(samples, positions, recipe.data.workers, pin)

    def run_to_the_end(self) -> Path:
        recipe, accelerator = self.recipe, self.accelerator
        total, main = recipe.train.max_steps, accelerator.is_main_process
        if main:
            write_atomic(self.run / "recipe.yaml", yaml.safe_dump(self.described["recipe"], sort_keys=False))
            log = Log(self.run / "log.jsonl", self.step)
            checkpoint.prune(self.run, self.step, recipe.checkpoint.keep_last)
        settings = config.flatten(self.described["recipe"])
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        accelerator.init_trackers("sit_atconv", config=plain)
        accelerator.wait_for_everyone()  # a process that meets a bad image finds the folder complete, and removes it
        # Nothing is shown before the first step, so that an error at the first image is the only line.
        bar = tqdm(total=total, initial=self.step, desc="train", unit="step", disable=not main, delay=1e-9)
        since, timed = time.perf_counter(), 0
        while self.step < total:
            loss, grad_norm, lr = self._optimize()
            bar.update()
            timed += 1
            if self.step % recipe.run.log_every == 0 or self.step == total:
                loss = accelerator.reduce(loss, "mean").item()
                here = torch.tensor(self.images_here, device=accelerator.device)
                images_per_second = timed * recipe.train.batch_size / (time.perf_counter() - since)
                row = {
                    "step": self.step,
                    "images_seen": self.images_before + int(accelerator.reduce(here, "sum")),
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "lr": lr,
                    "images_per_second": images_per_second,
                    "flops_per_second": images_per_second * self.flops_per_image,
                    "skipped": self.skipped,
                }
                if main:
                    log.write(row)
                accelerator.log(row, step=self.step)
                bar.set_postfix(loss=f"{loss:.4f}")
            if recipe.preview.every and self.step % recipe.preview.every == 0:
                if main:
                    self._draw_preview()
                accelerator.wait_for_everyone()
            if self.step % recipe.checkpoint.every == 0 or self.step == total:
                self._save()
            if self.step % recipe.run.log_every == 0:
                since, timed = time.perf_counter(), 0
        bar.close()
        accelerator.end_training()
        return self.last

    def _optimize(self) -> tuple[torch.Tensor, float, float]:
        """One optimisation step; the mean loss of this process, the gradient norm and the learning rate."""
        recipe, accelerator = self.recipe, self.accelerator
        lr = learning_rate(self.step, recipe.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for _ in range(recipe.train.gradient_accumulation_steps):
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in next(self.batches).items()}
            latents = self.codec.encode(batch["image"], batch.get("posterior"))
            labels = batch["label"]
            self.images_here += len(labels)
            with accelerator.accumulate(self.model):
                loss = flow_loss(
                    lambda x, t, labels=labels: self.model(x, t, labels, return_dict=False)[0],
                    self.path,
                    latents,
                    batch["noise"],
                    batch["t"],
                    recipe.flow.prediction,
                    recipe.flow.loss_weight,
                ).mean()
                accelerator.backward(loss)
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.train.max_grad_norm or math.inf).item()
        # Under DDP every process has the same gradients, so all of them take the same branch.
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if math.isfinite(grad_norm) or accelerator.scaler is not None:  # a gradient scaler skips and adapts by itself
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise InputError(
                f"no finite gradient for {MAX_SKIPPED} steps, up to step {self.step}; start a run with a lower "
                "train.lr or with train.max_grad_norm"
            )
        if math.isfinite(grad_norm):
            self.ema.update(self.bare)
        return torch.stack(losses).mean(), grad_norm, lr

    def _draw_preview(self) -> None:
        count, classes = self.recipe.preview.num, self.bare.config.num_classes
        images, _ = generate(
            self.ema.model, self.codec, range(count), [i % classes for i in range(count)], self.preview
        )
        save_grid(images, math.ceil(math.sqrt(count)), self.run / "previews" / f"step-{self.step:07d}.png")

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            trainer = {
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoint.save(
                self.run,
                self.step,
                self.bare,
                self.ema.model,
                self.bare_optimizer,
                trainer,
                {"images_seen": self.step * self.recipe.train.batch_size, **self.described},
            )
            checkpoint.prune(self.run, self.step, self.recipe.checkpoint.keep_last)
        self.accelerator.wait_for_everyone()
        self.last = checkpoint.folder_of(self.run, self.step)

    def _load_trainer_state(self, folder: Path) -> None:
        tensors = checkpoint.load_tensors(folder / "optimizer.safetensors")
        checkpoint.load_optimizer_tensors(self.bare, self.bare_optimizer, tensors)
        trainer = json.loads((folder / "trainer.json").read_text())
        self.skipped, self.skipped_in_a_row = trainer["skipped"], trainer["skipped_in_a_row"]
        if self.accelerator.scaler is not None and trainer["scaler"]:
            self.accelerator.scaler.load_state_dict(trainer["scaler"])
