"""Score over time: draw, time and score models at every combination of a grid, and say which settings are worth taking.

    settings.json           first: images of a point, their block, and the device with its threads; a command with
                            others is refused
    samples/MODEL/POINT/    a folder of samples for each seed, with its scores in frontier.metrics.json
    times.jsonl             a line for each block that was drawn: what it took, and the digest of its samples' settings
    frontier.json .md .png  last

Every file is whole or not there, so the same command goes on where it was stopped, and a grid may grow.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sit_atconv.bench.choosing import error_of, estimate, is_better, markdown, pareto, recommended, with_error
from sit_atconv.bench.grid import OTHERS, Stated, in_words, label_of
from sit_atconv.bench.plots import plot_frontier
from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import commit, device_name, memory_kept, source_digest, warm_up
from sit_atconv.flow.sde import SDE_SAMPLERS
from sit_atconv.runtime.claims import check_place, claim, clear_leftovers, writing
from sit_atconv.runtime.comparison import compared
from sit_atconv.runtime.console import Progress, say
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import InputError, check_choice, named, option, told
from sit_atconv.runtime.files import LOCK, library_versions, lock, resolved, sha256, shown, write_atomic
from sit_atconv.runtime.reading import COUNT, SHA256, Malformed, as_stored, read_json, read_rows
from sit_atconv.runtime.signals import Interruptions, stops_told
from sit_atconv.sampling.generate import Work, stopped
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.samples import MANIFEST, PLACES
from sit_atconv.sampling.settings import in_short
from sit_atconv.sampling.setup import Setup, setup
from sit_atconv.sampling.trained import describe_guide, describe_trained
from sit_atconv.scoring import GIVES, METRICS
from sit_atconv.scoring.extractor import Extractor, kind_of, load_extractor
from sit_atconv.scoring.frechet import FRECHET
from sit_atconv.scoring.refs import Reference, check_recorded, check_shape, read_reference, reference_spec
from sit_atconv.scoring.result import BARS_FORM, bars_told, features_told, own
from sit_atconv.scoring.score import check_labels, check_metric, score

WHAT = "a frontier"  # as messages call what the folder holds
FILES = ("frontier.json", "frontier.md", "frontier.png")
KEYS = ("grid", "models", "points", "recommended")  # by which its JSON is known
TIMES, METRICS_FILE = "times.jsonl", "frontier.metrics.json"
TIME_FORM = {
    "model": str, "point": str, "seed": COUNT, "block": COUNT, "settings": SHA256, "seconds": float, "warm": bool,
    "sitting": COUNT,
}  # fmt: skip
OF_EXTRACTOR = "classifier_heldout_accuracy"  # which stands among the metrics, and is no score of a point
METRIC_FORM = {"value": float, "se": (float, None)}
SCORES_FORM = {
    "pixels_sha256": str, "error_bars": BARS_FORM, "extractors": [{"name": str, "protocol": str}], "warnings": [str],
}  # fmt: skip
STOCHASTIC = {*SDE_SAMPLERS, "flow-match-lcm"}  # samplers and schedulers that draw noise on their way
FEWEST = 3  # blocks that a time is the median of


@dataclass(frozen=True)
class Asked:
    """A model, a combination of the grid, and for each seed the arguments of `generate` that draw its images; out is
    set here. commands: the lines that draw those of the first seed into a folder, and score them."""

    model: str
    stated: Stated
    seeds: Sequence[argparse.Namespace]
    commands: Callable[[str], list[str]]

    @property
    def name(self) -> str:
        """Of the point's folder."""
        named_by = (str(self.stated[key]) for key in ("sampler", "scheduler", "steps") if key in self.stated)
        return "-".join([*named_by, _digest(self.stated)[:8]])

    @property
    def line(self) -> str:
        """What points that differ in their steps alone have in common."""
        return in_words({key: value for key, value in self.stated.items() if key != "steps"})


class _Stopwatch:
    """A codec that notes when it is given latents: up to then the networks have worked."""

    def __init__(self, codec, device: torch.device):
        self._codec, self._device, self.reached = codec, device, 0.0

    def __getattr__(self, name: str):
        return getattr(self._codec, name)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.reached = self.now()
        return self._codec.decode(latents)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Models:
    """Models as they are needed, each loaded once for a checkpoint, dtype and whatever else changes the network."""

    def __init__(self, signals: Interruptions):
        self._signals = signals
        self._loaded: dict[tuple, tuple[Setup, Graphs]] = {}

    def work(self, args: argparse.Namespace) -> Work:
        # A cache is switched on for the times of a point, which has a model of its own then.
        key = (
            args.ckpt,
            args.dtype,
            args.compile,
            args.sampling.guide,
            *([args.cache, args.scheduler, repr(args.sampling)] if args.cache else []),
        )
        if key not in self._loaded:
            ready = setup(args.ckpt, args.sampling, args.dtype, args.device, args.vae, args.compile, cache=args.cache)
            ready.codec = _Stopwatch(ready.codec, ready.trained.model.device)
            self._loaded[key] = ready, Graphs()
        ready, graphs = self._loaded[key]
        sampling = args.sampling if ready.guide is None else replace(args.sampling, guide=ready.guide.model)
        with in_short():
            sampling = sampling.for_model(ready.trained.model)
        place = {"name": "samples", "remedy": f"remove this folder, or give {option('force', True)}"}
        return Work(args, self._signals, replace(ready, sampling=sampling), graphs, **place)


@dataclass
class _Point:
    asked: Asked
    works: list[Work]
    row: dict[str, Any] | None = None  # of the result, once it is drawn and scored

    @property
    def steps(self) -> int:
        return self.works[0].ready.sampling.steps

    def told(self) -> str:
        return f"{self.asked.model}, {in_words(self.asked.stated)}"


def run(args: argparse.Namespace) -> None:
    """Draw, time and score what is missing of every point; write frontier.json, its table and its picture.

    args: those of the command, and `asked`, a list of Asked. Raises InputError for a combination that a model does not
    take, a reference or an extractor that does not fit, and a folder of something else: all before the work.
    """
    out = resolved(args.out)
    check_place(out, WHAT, force=args.force)
    with Interruptions() as signals:
        frontier = _Frontier(args, out, signals)
        with stops_told(frontier.stopped), signals.working():
            _run(args, out, frontier)


def _run(args: argparse.Namespace, out: Path, frontier: "_Frontier") -> None:
    frontier.prepare()
    settings = {"num": args.num, "batch": args.batch, "device": device_name(frontier.device).split(", ")}
    claim(out, {"frontier": settings}, (), WHAT, force=args.force)
    results = Results([out / name for name in FILES], args.force, *KEYS)
    with closing(lock(out, f"{option('out')} {str(out)!r}")):
        clear_leftovers(out)
        frontier.measure()
        result = frontier.result()
        text = markdown(result)
        results.write(result, text, plot_frontier(result["points"], result["notes"][0], METRICS[result["metric"]][0]))
        (out / LOCK).unlink(missing_ok=True)
    print(text, end="")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_times(file: Path) -> list[dict[str, Any]]:
    with told(repr(str(file)), OSError, Malformed, remedy="remove it; the times are measured again"):
        rows = read_rows(file, TIME_FORM)
        for number, row in enumerate(rows, 1):
            if row["seconds"] <= 0:
                raise Malformed(f"{file.name}, line {number}: seconds is {row['seconds']:g}, and must be above 0")
    return rows


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _settings_of(work: Work) -> str:
    """The digest of all that decides the samples, and with it how long they take."""
    return _digest(compared(work.samples.settings, PLACES))


class _Frontier:
    def __init__(self, args: argparse.Namespace, out: Path, signals: Interruptions):
        self.args, self.out, self.signals, self.device = args, out, signals, resolve_device(args.device)
        self.memory_kept = memory_kept(self.device)
        self.points = [_Point(asked, []) for asked in args.asked]
        self.done = 0  # images
        self.dropped: list[dict[str, str]] = []
        self.times: list[dict[str, Any]] = []
        self.sitting = 1
        self._warm: set[tuple[str, str]] = set()

    def stopped(self) -> str:
        """What is said of a signal."""
        args = self.args
        return stopped(self.done, f"{'up to ' * args.prune}{len(args.asked) * len(args.seeds) * args.num:,}")

    def prepare(self) -> None:
        """Load what the points need. Raises InputError for what cannot be drawn or scored."""
        args, out, models = self.args, self.out, _Models(self.signals)
        self.extractor = _extractor(args)
        for point in self.points:
            with named(point.told()):
                for each in point.asked.seeds:
                    each.force = args.force
                    each.out = str(out / "samples" / point.asked.model / point.asked.name / f"seed{each.seed}")
                    work = models.work(each)
                    work.prepare()
                    point.works.append(work)
        self.reference = self._checked()

    @property
    def given(self) -> list[str]:
        """The metrics of a point, by their names in a result."""
        given = {name for asked in _names(self.args.metrics) for name in GIVES.get(asked, (asked,))}
        return [name for name in METRICS if name in given and name != OF_EXTRACTOR]

    def _checked(self) -> Reference:
        """The reference; settles `metrics`. Raises InputError where images of a model cannot be scored as asked."""
        args, extractor = self.args, self.extractor
        works = {f"images of {point.asked.model}": point.works[0] for point in self.points}
        shapes = {name: _check_images(name, work.ready, extractor) for name, work in works.items()}
        reference = read_reference(args.ref, extractor, samples=next(iter(shapes.values())))
        if reference.image_shape is not None:
            for shape in shapes.values():
                check_shape(args.ref, reference.image_shape, shape)
        if args.metrics is None:
            offered = kind_of(extractor.protocol).offered
            classes = {work.ready.trained.model.config.num_classes for work in works.values()}
            fits = "recognised" in offered and classes == {extractor.streams["logits"]}
            args.metrics = ",".join([_distance(offered), *(["recognised"] if fits else [])])
        for metric in _names(args.metrics):
            check_metric(metric, args.num, True, extractor, reference)
            if metric == "recognised":
                for name, work in works.items():
                    check_labels(name, max(work.labels[: args.num]), extractor)
        return reference

    def measure(self) -> None:
        """Draw and score all points in turn; with `prune` those of the fewest steps first, and no more than is worth
        it."""
        if os.path.lexists(file := self.out / TIMES):
            self.times = _read_times(file)
            with writing(self.out):
                write_atomic(file, "".join(map(_line, self.times)))  # without a last line that was cut
            self.sitting = 1 + max((row["sitting"] for row in self.times), default=0)
        if not self.args.prune:
            self._make(self.points)
            return
        lines: dict[tuple[str, str], list[_Point]] = {}
        for point in sorted(self.points, key=lambda each: each.steps):
            lines.setdefault((point.asked.model, point.asked.line), []).append(point)
        for place in itertools.count():
            if not (some := [line[place] for line in lines.values() if place < len(line)]):
                break
            self._make(some)
            for line in lines.values():
                if 0 < place < len(line) and not is_better(line[place].row, line[place - 1].row):
                    self._drop(line, place)
        self.points = [point for point in self.points if point.row is not None]

    def _drop(self, line: list[_Point], place: int) -> None:
        """Leave out the points of a line that come after a place."""
        more, fewer = (
            f"{with_error(each.row['score']['value'], error_of(each.row))} at {each.steps} steps"
            for each in (line[place], line[place - 1])
        )
        why = f"{more} is not below {fewer} by more than the error of the difference"
        for point in line[place + 1 :]:
            self.dropped.append({"model": point.asked.model, "point": in_words(point.asked.stated), "why": why})
            say(f"dropped {point.told()}: {why}")
        del line[place + 1 :]

    def _make(self, points: Sequence[_Point]) -> None:
        """Draw the points a block of each in turn, so that a drift of the machine meets all alike; then score them."""
        seeds = len(self.args.seeds)
        with Progress(total=len(points) * seeds * self.args.num, desc="frontier", unit="image") as bar:
            for seed in range(seeds):
                self._draw(points, seed, bar)
        for _ in range(FEWEST + 1):
            if lacking := [point for point in points if len(self._times(point)) < FEWEST]:
                total = len(lacking) * self.args.batch
                with (
                    numerics(deterministic=True),
                    Progress(desc="times", total=total, unit="image", leave=False) as bar,
                ):
                    for point in lacking:
                        self._block(point, 0, 0, bar, keep=False)
                        bar.update(self.args.batch)
        for point in points:
            with named(point.told()):
                results = [self._score(work) for work in point.works]
                point.row = self._row(point, results)

    def _draw(self, points: Sequence[_Point], seed: int, bar: Progress) -> None:
        missing = {}
        for number, point in enumerate(points):
            with named(point.told()):
                samples = point.works[seed].samples
                missing[number] = samples.claim()
                samples.close()  # the lock of the whole folder holds
                self._told(bar, self.args.num - sum(len(samples.indices(block)) for block in missing[number] or ()))
        warm_up(self.device)
        blocks = points[0].works[seed].samples.blocks
        for block in range(blocks):
            for number in missing if (seed * blocks + block) % 2 == 0 else reversed(missing):
                if block in (missing[number] or ()):
                    with numerics(deterministic=True), named(points[number].told()):
                        self._told(bar, self._block(points[number], seed, block, bar))
        for number, point in enumerate(points):
            if missing[number] is not None:
                point.works[seed].finish()

    def _told(self, bar: Progress, images: int) -> None:
        """Count images that are there."""
        self.done += images
        bar.update(images)

    def _block(self, point: _Point, seed: int, block: int, bar: Progress, keep: bool = True) -> int:
        """Draw a block, and note what it took. The first one of a point in this process is not warm: kernels are
        compiled or recorded then."""
        work, name = point.works[seed], (point.asked.model, point.asked.name)
        watch = work.ready.codec
        start = watch.now()
        kept = work.make(block, bar) if keep else len(work.images_of(block, bar)[0])
        row = {
            "model": name[0], "point": name[1], "seed": work.args.seed, "block": block, "settings": _settings_of(work),
            "seconds": (watch.reached - start) / work.samples.block, "warm": name in self._warm,
            "sitting": self.sitting,
        }  # fmt: skip
        self._warm.add(name)
        self.times.append(row)
        with writing(self.out), open(self.out / TIMES, "a") as file:
            file.write(_line(row))
        return kept

    def _times(self, point: _Point) -> list[dict[str, Any]]:
        """The warm measurements of a point, of its samples as they are now and the seeds that are asked for."""
        own = {"model": point.asked.model, "point": point.asked.name, "warm": True}.items()
        settings = set(map(_settings_of, point.works))
        return [row for row in self.times if row["settings"] in settings and own <= row.items()]

    def _score(self, work: Work) -> dict[str, Any]:
        """The result of scoring samples: the one that lies with them, where it is of them and of this reference."""
        folder, args = work.samples.path, self.args
        file, manifest = folder / METRICS_FILE, sha256(folder / MANIFEST)
        extractor = as_stored(own(self.extractor.describe()))
        wanted = {
            "manifest": manifest, "reference": self.reference.sha256, "extractor": extractor, "metrics": args.metrics,
        }  # fmt: skip
        form = SCORES_FORM | {"metrics": dict.fromkeys(self.given, METRIC_FORM), "frontier": dict}
        try:
            stored = read_json(file, form)
            if stored["frontier"] == wanted:
                return stored
        except (OSError, Malformed):
            pass
        scored = score(str(folder), self.reference, args.metrics, self.extractor)
        result = as_stored(scored[0]) | {"frontier": wanted}
        with writing(self.out):
            write_atomic(file, json.dumps(result, indent=1, allow_nan=False))
        return result

    def _row(self, point: _Point, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A point as frontier.json has it, but for where it stands among the others."""
        work, times = point.works[0], self._times(point)
        manifests = [read_json(each.samples.path / MANIFEST) for each in point.works]
        seconds = [1e3 * row["seconds"] for row in times]
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        metrics = {}
        for name in self.given:
            each = [result["metrics"][name] for result in results]
            metrics[name] = estimate([one["value"] for one in each], [one["se"] for one in each])
        metric = next(name for name in FRECHET if name in metrics)
        return {
            "model": point.asked.model,
            "settings": point.asked.stated,
            "kind": "SDE" if {work.ready.sampling.sampler, point.asked.stated.get("scheduler")} & STOCHASTIC else "ODE",
            "sampling": {key: manifests[0].get(key) for key in (*work.ready.sampling.describe(), *OTHERS)},
            "guide": describe_guide(work.ready.guide),
            "nfe": statistics.fmean(manifest["nfe"] for manifest in manifests),
            "ms": statistics.median(seconds),
            "ms_quartiles": [low, high],
            "ms_blocks": seconds,
            "sittings": sorted({row["sitting"] for row in times}),
            "metric": metric,
            "score": metrics[metric],
            "metrics": metrics,
            "seeds": [
                {"seed": each.args.seed, "samples": shown(each.samples.path)}
                | {key: result[key] for key in ("pixels_sha256", "metrics")}
                for each, result in zip(point.works, results, strict=True)
            ],
            "error_bars": results[0]["error_bars"],
            "extractors": results[0]["extractors"],
            "warnings": results[0]["warnings"],
        }  # fmt: skip

    def result(self) -> dict[str, Any]:
        """What frontier.json holds."""
        args, rows = self.args, [point.row for point in self.points]
        by_model = {
            name: [row for row in rows if row["model"] == name] for name in dict.fromkeys(r["model"] for r in rows)
        }
        of_all = [id(row) for row in pareto(rows)]
        for own_rows in by_model.values():
            of_model = [id(row) for row in pareto(own_rows)]
            for row in own_rows:
                row["pareto"] = "all" if id(row) in of_all else "model" if id(row) in of_model else None
        common = {
            key: value
            for key, value in rows[0]["settings"].items()
            if all(r["settings"].get(key) == value for r in rows)
        }
        others = {key for row in rows for key in row["settings"]} - common.keys()
        for row in rows:  # by what tells points apart, or by all there is where nothing does
            row["label"] = label_of(_those(row["settings"], others))
            row["line"] = label_of(_those(row["settings"], others - {"steps"}, without="steps"))
        groups = [*by_model.items(), *([(None, rows)] if len(by_model) > 1 else [])]
        return {
            "command": args.command,
            "num": args.num,
            "batch": args.batch,
            "seeds": args.seeds,
            "grid": {"file": shown(Path(args.grid)), "sha256": sha256(Path(args.grid))},
            "models": {
                point.asked.model: describe_trained(point.works[0].ready.trained) for point in self.points
            },
            "reference": self.reference.describe(),
            "metric": rows[0]["metric"],
            "device": device_name(self.device),
            "memory_kept": self.memory_kept,
            "commit": commit(),
            "source": source_digest(),
            "versions": library_versions("timm", "torch-fidelity", "scipy", "matplotlib"),
            "common": common,
            "notes": self._notes(rows),
            "points": rows,
            "dropped": self.dropped,
            "recommended": [self._recommended(name, some) for name, some in groups],
        }  # fmt: skip

    def _notes(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """How the numbers came about, in sentences."""
        args, seeds = self.args, len(self.args.seeds)
        error = f"standard errors over {seeds} seeds of sampling; " if seeds > 1 else ""
        features = features_told(*((row["metrics"], row["extractors"]) for row in rows))
        sittings = sorted({each for row in rows for each in row["sittings"]})
        return [
            f"{device_name(self.device)}; {args.num:,} images, {seeds} seed{'s' * (seeds > 1)}, batch {args.batch}",
            f"scored against {Path(args.ref).name}; {'; '.join(features) or 'the distance is a FID'}",
            f"errors: {error}jackknife, {bars_told(rows[0]['error_bars'])}",
            "ms per image: what the networks took as these images were drawn, without decoding; a block of each point "
            "in turn, the median over the blocks and their middle half; the first one of a point in a process is left "
            "out",
            *([f"times were taken in {len(sittings)} sittings, between which the machine may have changed"]
              if len(sittings) > 1 else []),
            "an ODE and an SDE are two ways to draw from one model; they stand together here alone",
            *dict.fromkeys(warning for row in rows for warning in row["warnings"]),
        ]  # fmt: skip

    def _recommended(self, of: str | None, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        row = recommended(rows)
        asked = next(point.asked for point in self.points if point.row is row)
        command, score_command = asked.commands(f"{self.out}-{asked.model}-{asked.name}")
        first = row["seeds"][0]  # which the command draws
        value = first["metrics"][row["metric"]]["value"]
        told = f"{with_error(row['score']['value'], row['score']['error'])}, {row['ms']:.4g} ms per image"
        return {
            "of": of, "model": asked.model, "point": in_words(asked.stated),
            "told": f"{told}; the commands give {value:.5g}, that of seed {first['seed']}",
            "seed": first["seed"], "value": value, "command": command, "score_command": score_command,
        }  # fmt: skip


def _those(stated: Stated, keys: Collection[str], without: str | None = None) -> Stated:
    """What a combination says of these keys, or without any key, of all; never of the one to leave out."""
    return {key: value for key, value in stated.items() if key in (keys or stated) and key != without}


def _check_images(name: str, ready: Setup, extractor: Extractor) -> tuple[int, int, int]:
    """The shape (C, H, W) of a model's images. Raises InputError where they are not for the extractor."""
    model, names = ready.trained.model, ready.trained.id2label
    shape = ready.codec.image_shape((model.config.in_channels, *model.latent_size))
    extractor.check_images(name, shape)
    extractor.check_classes(name, names and [names[label] for label in sorted(names)])
    if not extractor.streams:  # of a module of one's own: what it gives decides which metrics there are
        extractor(torch.zeros((1, *shape), dtype=torch.uint8))
    return shape


def _extractor(args: argparse.Namespace) -> Extractor:
    """The extractor. Raises InputError where it is not that of the reference, or does not offer the metrics."""
    spec = args.extractor or reference_spec(args.ref)
    if args.extractor is not None:
        check_recorded(args.ref, spec)
    extractor = load_extractor(spec, args.weights, args.device)
    offered = kind_of(extractor.protocol).offered
    if args.metrics is not None:
        for each in _names(args.metrics):
            check_choice(option("metrics"), each, offered)
        if not set(_names(args.metrics)) & set(FRECHET):
            rule = f"points are compared by their Fréchet distance; add {_distance(offered)}"
            raise InputError(f"{option('metrics', args.metrics)}: {rule}")
    return extractor


def _names(metrics: str) -> list[str]:
    return [each.strip() for each in metrics.split(",")]


def _distance(offered: Sequence[str]) -> str:
    """The Fréchet distance among the metrics of an extractor."""
    return next(each for each in offered if each in FRECHET)
