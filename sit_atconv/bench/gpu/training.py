"""Training images a second and the share of the device's peak, by the trainer itself, on a cache of random latents."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from sit_atconv.bench.baselines import attention_twin
from sit_atconv.bench.gpu.model import NAME
from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.config import load_recipe
from sit_atconv.data.latent_cache import CROP, FORMAT_VERSION, shard_name
from sit_atconv.latents.encode import finish, write_shard
from sit_atconv.runtime.claims import claim
from sit_atconv.runtime.files import resolved
from sit_atconv.runtime.reading import read_rows
from sit_atconv.training import train
from sit_atconv.training.trainer import Activity, Trainer
from sit_atconv.training.verdict import AtOnce

LATENT, IMAGES, CLASSES = 32, 4096, 1000
NONE = hashlib.sha256(b"none").hexdigest()  # of the autoencoder
TINY_LATENT, FEW_IMAGES = 4, 16
# Model, batch, compiled, optimizer, loader processes; the ones that say most first, and the last for 24 GiB.
SETTINGS = (
    (NAME, 64, True, "fused", 2), (attention_twin(NAME), 64, True, "fused", 2), (NAME, 64, True, "foreach", 2),
    (NAME, 64, True, "fused", 0), (NAME, 64, False, "fused", 2), (NAME, 32, True, "fused", 2),
    (NAME, 8, True, "fused", 2),
)  # fmt: skip
TINY = ((NAME, 2, False, "fused", 2), (NAME, 2, False, "foreach", 0))
TINY_MODEL = (
    "model.name=null", "model.token_mixer=atconv", "model.depth=1", "model.hidden_size=16", "model.num_heads=2",
    f"model.sample_size={TINY_LATENT}", f"data.num_images={FEW_IMAGES}",
)  # fmt: skip
EVERY, REPORTS = 10, 4  # steps between two lines of the log, and lines; the first one has compilation in it


class Done(Exception):
    """The steps that are measured are over; nothing is saved."""


class Measured(Activity):
    """Ends a run after so many steps, without a checkpoint; the optimizer is told how it works.

    optimizer: "fused" as the trainer has it on CUDA; "foreach", whose steps are decided on at once.
    """

    def __init__(self, steps: int, optimizer: str):
        self.steps, self.optimizer = steps, optimizer

    def begin(self, trainer: Trainer) -> None:
        if self.optimizer == "foreach":  # which skips no step by itself
            trainer.verdict_on = partial(AtOnce, scaler=trainer.accelerator.scaler)
            for group in trainer.optimizer.param_groups:
                group.update(fused=False, foreach=True)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.steps:
            raise Done


def run(bench: Bench) -> None:
    side, images = (TINY_LATENT, FEW_IMAGES) if bench.rehearsal else (LATENT, IMAGES)
    cache = bench.attempt("a cache of random latents", lambda: random_cache(bench.scratch / "cache", side, images))
    if cache is None:
        return
    for number, (name, batch, compiled, optimizer, workers) in enumerate(TINY if bench.rehearsal else SETTINGS):
        mode = "compiled" if compiled else "eager"
        overrides = [
            f"model.name={name}", "data.kind=latents", f"data.root={cache}", "data.image_size=null",
            f"data.workers={workers}", f"data.num_images={images}", "latents.vae=null",
            f"run.out={bench.scratch / f'run-{number}'}",
            f"train.batch_size={batch}", "train.precision=bf16", f"train.compile={str(compiled).lower()}",
            f"run.log_every={1 if bench.rehearsal else EVERY}", "preview.every=0", "checkpoint.every=1000000",
            *(TINY_MODEL if bench.rehearsal else ()),
        ]  # fmt: skip
        needs = 0 if bench.rehearsal else 14e9 + 0.7e9 * batch
        what = f"{name}, batch {batch}, {mode}, {optimizer}, {workers} loader processes"
        bench.attempt(what, lambda o=overrides, k=optimizer, w=what: measure(bench, o, k, w), needs)


def random_cache(out: Path, side: int, images: int) -> Path:
    """A cache of latents (4, side, side) as `sit-atconv encode` makes one, of noise in the place of images."""
    out, generator = resolved(out), torch.Generator().manual_seed(0)
    labels = torch.arange(images) % CLASSES
    settings = {
        "format_version": FORMAT_VERSION,
        "codec": {"codec": "vae", "vae": "none", "sha256": NONE, "scale": 1.0, "shift": 0.0},
        "crop": CROP, "image_size": 8 * side, "channels": 3, "latent_shape": [4, side, side], "dtype": "fp16",
        "flips": [False, True], "class_names": [str(label) for label in range(CLASSES)], "num_images": images,
        "images_sha256": "none", "shard_images": images, "batch_size": 1, "data": {}, "versions": {},
    }  # fmt: skip
    settings = claim(out, settings, (), "latents")
    moments = torch.randn(images, 2, 8, side, side, generator=generator).half()
    write_shard(out / shard_name(0, images), settings, moments, labels)
    finish(out, settings)
    return out


def measure(bench: Bench, overrides: list[str], optimizer: str, what: str) -> None:
    recipe = load_recipe("imagenet256", overrides)
    steps = recipe.run.log_every * (2 if bench.rehearsal else REPORTS)
    with suppress(Done):
        train(recipe, activities=[Measured(steps, optimizer)])
    rows = list(later(Path(recipe.run.out)))
    mean = {key: _mean(row[key] for row in rows) for key in ("images_per_second", "peak_share", "data_wait")}
    memory = {"peak_gib": rows[-1]["memory_bytes"] / 2**30}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    ms = 1e3 * recipe.train.batch_size / mean["images_per_second"]
    bench.row("training", what=what, **mean, ms_per_step=ms, **memory, loss=rows[-1]["loss"])


def later(run: Path) -> Iterator[dict]:
    """The lines of a run's log but the first, whose steps include compilation."""
    yield from read_rows(run / "log.jsonl")[1:]


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
