"""Write samples by index, with a manifest that says how they were made; goes on where it was stopped."""

import argparse
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch

from sit_atconv.flow.guidance import Evaluations
from sit_atconv.runtime import processes
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.comparison import differences
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.devices import numerics
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import library_versions, sha256, shown
from sit_atconv.runtime.pictures import UINT8_RULE
from sit_atconv.runtime.signals import Interruptions, stops_told
from sit_atconv.sampling.caches import MAG, parse
from sit_atconv.sampling.calibration import place_of
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.labels import labels_rule, sample_labels
from sit_atconv.sampling.samples import PLACES, Samples, check_place
from sit_atconv.sampling.sampling import noted, too_large
from sit_atconv.sampling.schedulers import drawing
from sit_atconv.sampling.settings import Sampling, in_short
from sit_atconv.sampling.setup import Setup, setup
from sit_atconv.sampling.trained import describe_guide, describe_trained

T = TypeVar("T")


@numerics(deterministic=True)
def run(args: argparse.Namespace) -> None:
    """Make the samples of `--out`, or what is missing of them; every process of a launch runs this.

    Raises InputError for a folder of something else or with other settings, samples that are not finite, a disk that
    does not take them, and whatever `setup` finds; the blocks made so far stay.
    """
    with Interruptions() as signals, processes.lost_ones_told():
        # What they tell each other is short, and goes over gloo whatever their networks are on.
        processes.join(cpu=True)
        work = Work(args, signals)
        try:
            with stops_told(lambda: stopped(work.done, f"{args.num:,}") if processes.is_main() else None):
                work.run()
        finally:
            processes.leave()


def stopped(done: int, num: str) -> str:
    """What a command says that a signal stopped as it drew so many images."""
    return f"stopped; {done:,} of {num} images are there, and the same command goes on from them"


class Work:
    """What one process does, in step with the others: a round is a block of each.

    ready: what it works with; None, and `prepare` loads what the options name. graphs: those that its networks are
    replayed by; None, and they are its own. With `--no-cuda-graphs` there are none. place: name and remedy of the
    folder, as `Samples` takes them.
    """

    def __init__(
        self, args: argparse.Namespace, signals: Interruptions, ready: Setup | None = None,
        graphs: Graphs | None = None, **place: str,
    ):  # fmt: skip
        self.args, self.signals, self.done = args, signals, 0
        self.ready, self.graphs, self.place = ready, graphs, place

    def run(self) -> None:
        self._check_equal(self._each(self.prepare))
        with closing(self.samples):
            self._make_missing()

    def _each(self, task: Callable[[], T]) -> list[T]:
        """`processes.each`, of a task that a signal ends at once."""

        def endable() -> T:
            with self.signals.working():
                return task()

        return processes.each(endable)

    def _first(self, task: Callable[[], T]) -> T:
        return self._each(task if processes.is_main() else lambda: None)[0]

    def _make_missing(self) -> None:
        args = self.args
        missing = self._first(self.samples.claim)
        if missing is None:
            self._say(f"{args.num} images in {args.out}: complete already, with these settings")
            return
        self.done = args.num - sum(len(self.samples.indices(number)) for number in missing)
        main = processes.is_main()
        with Progress(total=args.num, initial=self.done, desc="generate", unit="image", disable=not main) as bar:
            for start in range(0, len(missing), processes.count()):
                mine = missing[start + processes.rank() :][:1]
                made = sum(self._each(lambda mine=mine: sum(self.make(number, bar) for number in mine)))
                self.done += made
                bar.update(made)
        manifest = self._first(self.finish)
        guides = f" ({manifest['guide_nfe']:g} of the guide)" if "guide_nfe" in manifest else ""
        self._say(f"{args.num} images in {args.out}, NFE {manifest['nfe']:g}{guides}")

    def _say(self, text: str) -> None:
        if processes.is_main():
            print(text)

    def finish(self) -> dict[str, Any]:
        """Complete the samples, of which every block is there; their manifest."""
        names = self.ready.trained.id2label
        facts = {"processes": processes.count(), "class_names": names and [names[label] for label in sorted(names)]}
        return self.samples.finish(facts)

    def prepare(self) -> dict[str, Any]:
        """Load what the options name; the settings of the samples."""
        args = self.args
        check_place(args.out, args.force, **self.place)
        self.graphs = (self.graphs or Graphs()) if args.graphs and not args.scheduler else None
        if self.ready is None:
            more = {"launched": True, "lora": args.lora, "cache": args.cache}
            self.ready = setup(args.ckpt, args.sampling, args.dtype, args.device, args.vae, args.compile, **more)
        with in_short():
            self.draw = drawing(args.scheduler, self.ready, self.graphs)
        config, block = self.ready.trained.model.config, stated(args)["block"]
        total = math.ceil(args.num / block) * block
        classes = Classes(config.num_classes, self.ready.trained.id2label)
        self.labels = sample_labels(args.labels, args.num, total, args.seed, classes)
        settings = describe(args, self.ready, self.labels[: args.num])
        self.samples = Samples(Path(args.out), settings, args.force, **self.place)
        return self.samples.settings

    def _check_equal(self, settings: list[dict[str, Any]]) -> None:
        """Raise InputError where the processes have loaded different things, such as a run that is being trained."""
        for other in settings[1:]:
            if found := differences(settings[0], other, PLACES):
                raise InputError(f"the processes do not sample the same: {found[0]}; name a checkpoint that stays")

    def make(self, number: int, bar: Progress) -> int:
        """Make a block. Returns how many of its images are kept."""
        start = time.perf_counter()
        images, nfe = self.images_of(number, bar)
        self.samples.write(number, images, nfe=nfe, guide_nfe=nfe.of_guide, seconds=time.perf_counter() - start)
        return len(images)

    def images_of(self, number: int, bar: Progress) -> tuple[torch.Tensor, Evaluations]:
        """The images of a block that are kept, and their evaluations. As many are drawn as of all other blocks: for one
        block size an image has the same bits however many follow it."""
        first, block, kept = number * self.samples.block, self.samples.block, self.samples.indices(number)
        labels = self.labels[first : first + block]
        ready, indices = self.ready, range(first, first + block)
        try:
            model, seed = ready.trained.model, self.args.seed
            watch = noted(bar, len(kept) * processes.count())  # the others are about as far
            return self.draw(model, ready.codec, indices, labels, ready.sampling, seed, len(kept), watch)
        except torch.OutOfMemoryError:
            remedy = "a smaller one, and a new folder"
            raise too_large(self.args.batch, model.device, remedy, self.graphs) from None


def stated(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line alone says of the settings, under their names there; the model may move the epsilon."""
    return {
        "num": args.num,
        "format": args.format,
        "labels_rule": labels_rule(args.labels),
        "block": min(args.batch, args.num),
        "dtype": args.dtype,
        "compile": args.compile or None,  # earlier versions did not, and recorded nothing
        "cache": args.cache and str(parse(args.cache)),
        "seed": args.seed,
        **_describe_sampling(args.sampling, args.scheduler),
    }


def _describe_sampling(sampling: Sampling, scheduler: str | None) -> dict[str, Any]:
    return sampling.describe() | {"scheduler": scheduler} | ({} if scheduler is None else {"sampler": None})


def describe(args: argparse.Namespace, ready: Setup, labels: list[int]) -> dict[str, Any]:
    """All that decides the images, and what they came from."""
    trained = ready.trained
    return {
        **stated(args),
        "labels": labels,
        **_describe_sampling(ready.sampling, args.scheduler),
        "path": trained.model.config.path,
        "prediction": trained.model.config.prediction,
        "time_interval": ready.sampling.interval(trained.model),
        "device": trained.model.device.type,
        "codec": ready.codec.describe(),
        "uint8_rule": UINT8_RULE,
        **describe_trained(trained),
        "lora": None if args.lora is None else shown(Path(args.lora)),
        "guide": describe_guide(ready.guide),
        "mag_ratios": sha256(place_of(trained)) if ready.cache is not None and ready.cache.kind == MAG else None,
        "versions": library_versions(),
    }
