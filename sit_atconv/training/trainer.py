"""The one loop: steps of an objective, faults, reports, and checkpoints to go on from. It knows no kind of them."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator

from sit_atconv.data.loading import TrainingBatches, check_bad
from sit_atconv.data.samples import RankPositions, Samples
from sit_atconv.layers.atconv import check_backend
from sit_atconv.runtime import processes, sharding
from sit_atconv.runtime.console import Progress, say
from sit_atconv.runtime.errors import InputError, reason
from sit_atconv.runtime.files import DiskFull, Made, clear_leftovers, write_atomic
from sit_atconv.runtime.reading import COUNT, read_json
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.training import checkpoint
from sit_atconv.training.folder import Claimed, lock, usable
from sit_atconv.training.log import Log, Means, Trackers, peak_flops, peak_memory
from sit_atconv.training.objectives.objective import Forward, Objective
from sit_atconv.training.optimizer import step_and_weight_squares
from sit_atconv.training.verdict import AtOnce, Late, Verdict

SCALER_FORM = {
    "scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": COUNT, "_growth_tracker": COUNT,
}  # fmt: skip
TRAINER_FORM = {
    "skipped": COUNT,
    "skipped_in_a_row": COUNT,
    "scaler": (SCALER_FORM, None),
    "means": [[float]],
    "bad": {re.compile("[0-9]{1,18}"): str},
}


class Pending(NamedTuple):
    """A step that is not counted yet. squares: of its change and of the weights before it, where it reports."""

    verdict: Verdict
    rate: float
    squares: torch.Tensor | None


class Activity:
    """Something beside the steps of a run, which the trainer calls."""

    def clear(self, trainer: "Trainer") -> None:
        """Remove what a killed run left half written, before anything new is written: on the main process."""

    def open(self, trainer: "Trainer") -> None:
        """Open what is written in the run's folder: on the main process."""

    def begin(self, trainer: "Trainer") -> None:
        """What comes before the first step of this start."""

    def at_first_samples(self, trainer: "Trainer") -> None:
        """What comes before the first step of this start, when its samples are there."""

    def after_step(self, trainer: "Trainer") -> None:
        """What comes after a step, before its checkpoint.

        Counts of skipped steps and averages may lack this step: `Trainer.settle` is called before they are looked at.
        """


class Measured(Activity):
    """Figures of held-out images in a file of their own. file: its name in the run folder.

    Where they failed, the run ended after the checkpoint of their step; the next start makes up for them.
    """

    file: str

    def open(self, trainer: "Trainer") -> None:
        self.log = Log(trainer.run / self.file, trainer.step)

    def begin(self, trainer: "Trainer") -> None:
        (missing,) = processes.agree(processes.is_main() and self.log.last != trainer.step)
        if missing and trainer.step:
            self.after_step(trainer)


class Trainer:
    """A run of an objective's steps, from nothing or from a checkpoint, with what is to be done beside them.

    recipe: any with the sections run, data, train and checkpoint. samples: what the steps are made of.

    On CUDA no step waits for the device, fp16 excepted: whether a step is skipped is decided there, see
    `training.verdict`, and `pending` until the next step's forward and backward passes are on their way, or until
    `settle` is called. Then it is counted, and the averages follow the weights, which have stayed as that step left
    them. On a CPU it is settled before the next step begins.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe,
        claimed: Claimed,
        objective: Objective,
        samples: Samples,
        activities: Sequence[Activity] = (),
    ):
        self.accelerator, self.recipe, self.objective, self.activities = accelerator, recipe, objective, activities
        self.described = claimed.described | {"threads": torch.get_num_threads()}
        self.run, self.made, self.lock = claimed.run, Made(), claimed.lock
        self.num_images = self.described["data"]["num_images"]
        self.step, self.skipped = 0, 0
        self.skipped_in_a_row = 0  # the newest steps; what the gradient scaler alone has lost begins no row
        self.since_good = 1  # steps that the newest step is past the last one before it that was not skipped
        self.bad: dict[int, str] = {}  # images that could not be read, by any process
        self.images_here = 0  # seen by this process since this start
        self.pending: Pending | None = None
        self.figures: dict[str, Any] = {}  # of the newest step that is settled, as a report has them
        # spent in steps since the run began, over all its starts; None where an earlier version began it, and kept none
        self.seconds: float | None = 0.0
        self.last = None
        if claimed.found:
            self.last, self.step = claimed.found[0], claimed.found[1]["step"]
            self.seconds = claimed.found[1].get("seconds")
            self._tell_of_threads(claimed.found[1].get("threads"))
        self.images_before = self.step * recipe.train.batch_size
        self._place(samples)

    def _tell_of_threads(self, before: int | None) -> None:
        now = self.described["threads"]
        if before not in (None, now) and self.accelerator.device.type == "cpu" and processes.is_main():
            say(
                f"warning: until step {self.step:,} the run had {before} CPU threads, now {now}: it is that of "
                f"before to float rounding, to the bit with OMP_NUM_THREADS={before}"
            )

    def _place(self, samples: Samples) -> None:
        """Put model, averages and optimiser on the processes, in the state of the checkpoint, and open the loader."""
        accelerator, objective, recipe = self.accelerator, self.objective, self.recipe
        objective.begin(samples, self.last)
        optimizer = objective.make_optimizer(fused=accelerator.device.type == "cuda")
        if accelerator.is_fsdp2:
            sharding.fit_plugin(accelerator.state.fsdp_plugin, objective.model, recipe.train.precision == "bf16")
        self.flops_per_image = objective.flops_per_image  # of the model before it is compiled
        objective.prepare()
        averages = objective.averages.models.values()
        whole = () if accelerator.is_fsdp2 else (objective.trained,)
        for module in (*objective.frozen, *averages, *whole):
            torch.nn.Module.to(module, accelerator.device)  # diffusers' own loads all of its hooks, and peft
        placed = None if accelerator.is_fsdp2 else [False, False]
        self.network, self.optimizer = accelerator.prepare(objective.trained, optimizer, device_placement=placed)
        for average in averages:
            sharding.shard_like(average, objective.model)
        late = optimizer.defaults.get("fused") and accelerator.scaler is None
        self.verdict_on = Late if late else partial(AtOnce, scaler=accelerator.scaler)
        self.means = Means([*objective.weights], accelerator.device, objective.time_bins)
        if self.last is not None:
            self._load_state(self.last, samples)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        batch_size, accumulation = recipe.train.batch_size, recipe.train.gradient_accumulation_steps
        positions = RankPositions(self.step, objective.steps, batch_size, rank, world_size, accumulation)
        self.batches = TrainingBatches(samples, positions, recipe.data, accelerator.device.type == "cuda")

    def run_to_the_end(self, signals: StopSignals) -> Path:
        recipe, accelerator = self.recipe, self.accelerator
        total, main = self.objective.steps, processes.is_main()
        check_backend(self.objective.model, accelerator.device)
        self._begin()
        steps, seconds, waited = 0, 0.0, 0.0  # since the last report, previews and checkpoints left out
        begun = False
        # Nothing is shown before the first step, so that an error at the first image is the only line.
        with Progress(total=total, initial=self.step, desc="train", unit="step", disable=not main, delay=1e-3) as bar:
            while self.step < total:
                start = time.perf_counter()
                batches = self._fetch(signals)
                if batches is None:
                    break
                waited += time.perf_counter() - start
                if not begun:
                    for activity in self.activities:
                        activity.at_first_samples(self)
                    begun = True
                reports = (self.step + 1) % recipe.run.log_every == 0 or self.step + 1 == total
                self._optimize(batches, reports)
                bar.update()
                spent = time.perf_counter() - start
                steps, seconds = steps + 1, seconds + spent
                if self.seconds is not None:
                    self.seconds += spent
                if reports:
                    row = self._report(steps, seconds, waited)
                    losses = [name for name in self.objective.weights if row[name] is not None]
                    bar.note("".join(f"{name} {row[name]:.4f}" for name in losses[:1]))
                    steps, seconds, waited = 0, 0.0, 0.0
                for activity in self.activities:
                    activity.after_step(self)
                if self.due(recipe.checkpoint.every) and self.step < total:
                    self.keep(self._save)
            # At the end, or where a signal ends the run.
            self.settle()
            if self.last != checkpoint.folder_of(self.run, self.step) and not self.skipped_in_a_row:
                self._save()
        accelerator.end_training()
        self._check_trained()
        return self.last

    def due(self, every: int) -> bool:
        """Whether what is kept every so many steps is to be kept now: not before a step that is not skipped.

        The weights that skipped steps begin with are those that gave no finite loss. What falls due among them waits.
        """
        if self.step // every == (self.step - self.since_good) // every:
            return False
        self.settle()
        return not self.skipped_in_a_row

    def _check_trained(self) -> None:
        """Say what a run that ends among skipped steps, or with most of them skipped, is not."""
        row, lost = self.skipped_in_a_row, "steps were skipped, since loss or gradient was not finite"
        kept = f"the last checkpoint is {str(self.last)!r}" if self.last else "and there is none before"
        remedy = "begin a run with a lower train.lr or with train.max_grad_norm"
        if row and (self.step == self.objective.steps or self.last is None):
            raise InputError(
                f"the last {row:,} of {self.step:,} {lost}: no checkpoint is written of them, {kept}; {remedy}"
            )
        if self.step == self.objective.steps and 2 * self.skipped > self.step:
            raise InputError(f"{self.skipped:,} of {self.step:,} {lost}: this is no trained model, {kept}; {remedy}")
        if row and processes.is_main():
            say(f"warning: the last {row:,} steps, up to {self.step:,}, were skipped and are not saved; {kept}")

    def _begin(self) -> None:
        """Make the run's folder, or take it over, and start the trackers; what goes wrong leaves no new folder behind.

        A process that meets a bad image after this finds the folder complete, and removes it.
        """
        recipe, error, new = self.recipe, None, False
        try:
            with usable(self.run):
                if processes.is_main():
                    new = self.made.folder(self.run)
                    self.lock = self.lock or lock(self.run)
                    if self.last is None and checkpoint.step_folders(self.run):
                        new = False
                        raise InputError(
                            f"run.out={str(self.run)!r} was begun by another process meanwhile; start again"
                        )
                    clear_leftovers(self.run)
                    for activity in self.activities:
                        activity.clear(self)
                    write_atomic(self.run / "recipe.yaml", yaml.safe_dump(self.described["recipe"], sort_keys=False))
                    self.log = Log(self.run / "log.jsonl", self.step)
                    for activity in self.activities:
                        activity.open(self)
                    checkpoint.prune(self.run, self.step, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every)
                self.trackers = Trackers(self.accelerator, recipe, self.step)
        except InputError as fault:
            error = fault
        if new and self.lock is not None:  # what has come into it since is this process's, and its trackers'
            self.made.paths += sorted(self.run.rglob("*"))
        if error is not None:
            self._take_back_folder()
        processes.raise_together(error)
        for activity in self.activities:
            activity.begin(self)

    def _fetch(self, signals: StopSignals) -> list[dict[str, torch.Tensor]] | None:
        """The micro-batches of a step, or None where a signal asks to stop. Raises in every process where one must."""
        batches, fault = [], None
        try:
            if signals.received is None:
                batches = [next(self.batches) for _ in range(self.recipe.train.gradient_accumulation_steps)]
        except InputError as error:
            fault = error
        found = self.batches.pop_bad()
        stop, faults, news = processes.agree(signals.received is not None, fault is not None, len(found))
        if news:
            fault = self._count_bad(found) or fault
            faults += fault is not None
        if faults:
            self.keep_trained()
            raise fault or SystemExit(2)  # another process says why
        return None if stop else batches

    def keep_trained(self) -> None:
        """Save before a fault that is not the training's ends the run: what was trained until here is good.

        Raises InputError where what is settled first ends it.
        """
        self.settle()
        if self.step and self.last != checkpoint.folder_of(self.run, self.step) and not self.skipped_in_a_row:
            try:
                self._save()
            except InputError as error:
                if processes.is_main():
                    say(f"warning: {error}")
        elif not self.step:
            self._take_back_folder()

    def _take_back_folder(self) -> None:
        """Remove what this process made of a run that ends before its first step."""
        for folder in [path for path in self.made.paths if path.parent == self.run and path.is_dir()]:
            self.made.paths += sorted(folder.rglob("*"))  # a tracker's, which has gone on writing
        self.made.take_back()

    def _count_bad(self, found: dict[int, str]) -> InputError | None:
        """Add what all processes found to the unreadable images, name new ones, and say when there are too many."""
        new = {
            index: what for part in processes.gathered(found) for index, what in part.items() if index not in self.bad
        }
        self.bad |= new
        try:
            check_bad(self.bad, self.num_images, self.recipe.data.max_bad_share)
        except InputError as error:
            return error
        if processes.is_main():
            for what, count in Counter(new.values()).items():  # of a lost disk, one text stands for many images
                images = "another image takes its place" if count == 1 else f"others take the place of {count} images"
                say(f"warning: {what}; {images}")
        return None

    def _optimize(self, batches: list[dict[str, torch.Tensor]], reports: bool) -> None:
        """One optimisation step; it is settled where it `reports`."""
        accelerator, objective = self.accelerator, self.objective
        objective.begin_step()
        rate = objective.set_learning_rate(self.optimizer, self.step)
        sums = []
        for part, cpu_batch in enumerate(batches, accelerator.process_index * len(batches)):
            batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in cpu_batch.items()}
            self.images_here += len(batch["label"])
            with accelerator.accumulate(self.network):
                losses = objective.losses(batch, Forward(self.network, accelerator.autocast, self.step, part))
                weighed = zip(objective.weights.values(), losses, strict=True)
                loss = sum(weight * each.mean() for weight, each in weighed if each is not None)
                accelerator.backward(loss)
            self.means.add(batch.get("t"), *losses)
            sums.append(loss.detach())
        norm = self._gradient_norm()
        self.settle()  # the step before, while the device is at this one's passes
        verdict = self.verdict_on(torch.stack(sums).sum(), norm)
        self.since_good = self.skipped_in_a_row + 1
        for parameter in objective.idle(self.step):
            parameter.grad = None  # AdamW would go on with what it gathered of them before
        verdict.step(self.optimizer)
        objective.end_step(verdict)
        squares = self._squares() if reports else None
        self.optimizer.zero_grad()
        self.step += 1
        self.pending = Pending(verdict, rate, squares)
        if reports or not verdict.late:
            self.settle()

    def _gradient_norm(self) -> torch.Tensor:
        """The norm of all gradients before they are clipped, where the recipe asks for that."""
        accelerator, most = self.accelerator, self.recipe.train.max_grad_norm
        if most:
            return sharding.full_scalar(accelerator.clip_grad_norm_(self.network.parameters(), most))
        accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        return sharding.full_scalar(torch.nn.utils.get_total_norm(gradients))

    def settle(self) -> None:
        """Count the newest step, where that is pending, and have the averages follow it. It waits for the device.

        Raises InputError where it is one skipped step too many.
        """
        if self.pending is None:
            return
        (verdict, rate, squares), self.pending = self.pending, None
        found, most = verdict.outcome(), self.recipe.train.max_skipped
        ratio = 0.0 if found.skipped else _ratio(squares)
        self.figures = {"grad_norm": found.grad_norm, "lr": rate, "update_ratio": ratio}
        if not found.skipped:
            self.skipped_in_a_row = 0
            self.objective.averages.update(self.objective.model, self.updates)
            return
        self.skipped += 1
        if self.skipped_in_a_row or not found.excused:
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= most:
            raise InputError(
                f"no finite loss and gradient for {most} steps, up to step {self.step}; start a run with a lower "
                "train.lr or with train.max_grad_norm"
            )

    @property
    def updates(self) -> int:
        """Steps that were not skipped, of those that are settled."""
        return self.step - self.skipped

    def _squares(self) -> torch.Tensor:
        """Sums of squares (2,), of the step just taken and of all weights before it."""
        squares = step_and_weight_squares(self.optimizer.optimizer)
        return self.accelerator.reduce(squares, "sum") if sharding.is_sharded(self.objective.model) else squares

    def _report(self, steps: int, seconds: float, waited: float) -> dict[str, Any]:
        """Write what the last `steps` steps, which are settled, were to the log and the trackers."""
        accelerator, train = self.accelerator, self.recipe.train
        here = torch.tensor(self.images_here, device=accelerator.device)
        images_per_second = steps * train.batch_size / seconds
        flops = self.flops_per_image and images_per_second * self.flops_per_image
        peak = peak_flops(accelerator.device, train.precision)
        row = {
            "step": self.step,
            "images_seen": self.images_before + int(accelerator.reduce(here, "sum")),
            "seconds": self.seconds,
            **self.means.row(self.means.reduced(accelerator)),
            **self.figures,
            "skipped": self.skipped,
            "bad_images": len(self.bad),
            "images_per_second": images_per_second,
            "data_wait": waited / seconds,
            "flops_per_second": flops,
            "peak_share": flops / (peak * accelerator.num_processes) if peak and flops else None,
            "eta_seconds": (self.objective.steps - self.step) * seconds / steps,
            "memory_bytes": peak_memory(accelerator.device),
        }
        self.means.reset()
        if processes.is_main():
            self.log.write(row)
        self.trackers.log(row, self.step)
        return row

    def keep(self, write: Callable[[], None]) -> None:
        """Write what the run keeps; by option, a full disk is a warning."""
        try:
            write()
        except DiskFull as error:
            if self.recipe.checkpoint.on_full_disk == "stop":
                raise
            if processes.is_main():
                say(f"warning: {error}; training goes on from step {self.step}")

    def _save(self) -> None:
        sums = self.means.reduced(self.accelerator)
        scaler = self.accelerator.scaler
        trainer = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "means": sums.nan_to_num().tolist(),  # of finite losses, whose sum may be none
            "bad": {str(index): self.bad[index] for index in sorted(self.bad)},
        }
        images = self.step * self.recipe.train.batch_size
        facts = {"images_seen": images, "seconds": self.seconds, **self.described}
        objective, optimizer = self.objective, self.optimizer.optimizer
        parts = objective.parts()
        self.last = checkpoint.save(self.run, self.step, parts, objective.trained, optimizer, trainer, facts)
        if processes.is_main():
            keep = self.recipe.checkpoint
            try:
                checkpoint.prune(self.run, self.step, keep.keep_last, keep.keep_every)
            except OSError as error:
                say(f"warning: older checkpoints stay, they cannot be removed: {reason(error)}")
        self.accelerator.wait_for_everyone()

    def _load_state(self, folder: Path, samples: Samples) -> None:
        """Go on from a checkpoint: the optimiser, and what else a step leaves behind."""
        untrained = self.objective.idle(0)
        checkpoint.load_optimizer(folder, self.objective.trained, self.optimizer.optimizer, untrained)
        trainer = read_json(folder / "trainer.json", TRAINER_FORM)
        if [len(row) for row in trainer["means"]] != [self.means.sums.shape[1]] * 2:
            raise InputError(f"checkpoint {str(folder)!r}: the means in its trainer.json are of another run")
        self.skipped, self.skipped_in_a_row = trainer["skipped"], trainer["skipped_in_a_row"]
        bad = {int(index): what for index, what in trainer["bad"].items()}
        self.bad = processes.first(lambda: samples.still_bad(bad))
        if processes.is_main():  # the other processes' sums were added to these
            self.means.sums.copy_(torch.tensor(trainer["means"]))
        if self.accelerator.scaler is not None and trainer["scaler"]:
            self.accelerator.scaler.load_state_dict(trainer["scaler"])


def _ratio(squares: torch.Tensor | None) -> float | None:
    """|w' - w| / |w| of a step, from the squares of both."""
    if squares is None:
        return None
    step, weights = squares.tolist()
    return math.sqrt(step / weights) if weights else 0.0
