"""Score samples against a reference: numbers with error bars, and all that is needed to repeat them, as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sit_atconv.data.images import ONE_CLASS
from sit_atconv.runtime.console import say
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import InputError, check_choice, option
from sit_atconv.runtime.files import library_versions, shown
from sit_atconv.runtime.processes import is_main, leave, together
from sit_atconv.scoring import BATCH, GIVES, HELD_OUT, METRICS, STREAMS
from sit_atconv.scoring.copying import copying_scores, few_near, reference_error
from sit_atconv.scoring.extract import (
    features_of,
    read_as,
)
from sit_atconv.scoring.extractor import Extractor, default_device, kind_of, load_extractor, parsed
from sit_atconv.scoring.features import Features, Held, check_no_parent, held, is_features
from sit_atconv.scoring.frechet import FRECHET, correction_needs, frechet_distances, too_few
from sit_atconv.scoring.inception_score import inception_scores
from sit_atconv.scoring.jackknife import Estimate, design_of, jackknife
from sit_atconv.scoring.kernel import kernel_distance
from sit_atconv.scoring.manifold import NEAREST, manifold_scores
from sit_atconv.scoring.moments import GroupSums, Moments, stream_sums
from sit_atconv.scoring.refs import (
    Reference,
    check_recorded,
    check_shape,
    read_moments,
    read_reference,
    recorded_extractor,
    reference_spec,
)
from sit_atconv.scoring.result import needs
from sit_atconv.scoring.sources import Source, check_root, from_arrays, open_source

ASKED_AS = {given: asked for asked, given_by in GIVES.items() for given in given_by}

Metric = dict[str, float | None]  # of a result: value, se and corrected, and perhaps corrected_needs


def table(metrics: dict[str, Metric], upper_bound: bool = False) -> str:
    """The metrics of a result as lines: value, standard error, and where there is a 1/N bias the value without it."""
    most, least = ("at most ", "at least ") if upper_bound else ("", "")
    lines = []
    for name, each in metrics.items():
        error = "" if each["se"] is None else f" ± {most}{each['se']:.2g}"
        if each["se"] == 0:
            error = " (no error bar: leaving out any group changes nothing; more images may tell)"
        corrected = "" if each["corrected"] is None else f", corrected {least}{each['corrected']:.5g}"
        if "corrected_needs" in each:
            corrected = f", corrected {needs(each['corrected_needs'])}"
        lines.append(f"{name:<28} {each['value']:.5g}{error}{corrected}")
    return "\n".join(lines)


@dataclass
class _Pass:
    """What one extractor gives: features of the samples, the reference in its features, and the metrics from both;
    left_out: why metrics that nobody asked for are not among them."""

    extractor: Extractor
    features: Features
    reference: Reference
    metrics: list[str]
    left_out: list[str]


@numerics()
def score(
    samples: str, ref: str | Reference, metrics: str | None = None, extractor: str | Extractor | None = None,
    weights: str | None = None,
    dinov2: str | None = None, device: str | None = None, batch: int = BATCH, allow_lossy: bool = False,
    root: str | None = None, overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]] | None:  # fmt: skip
    """The result of scoring, as metrics.json holds it, and what else is to be said: why metrics that nobody asked for
    are not in it, and whether samples and reference are the same.

    The arguments are those of the command; root: --features; overrides: laid over the recipe that `ref` names. Who
    scores often gives an extractor that is loaded, and with it a reference that is read, in the place of names. Every
    process of a distributed launch calls this; the first has the result, the others None. Raises InputError for what
    cannot be scored.
    """
    names = [each.strip() for each in metrics.split(",")] if metrics is not None else []
    asked = list(dict.fromkeys(ASKED_AS.get(each, each) for each in names))
    for each in asked:
        check_choice(option("metrics"), each, STREAMS)
    check_root(root)
    for each in (samples, *([ref] if isinstance(ref, str) else [])):
        check_no_parent(each)
    source = Features(samples, verify=True) if is_features(samples) else open_source(samples, allow_lossy)
    vit = f"dinov2:{dinov2}" if dinov2 else "dinov2"
    if extractor is None and isinstance(source, Source):
        extractor = reference_spec(ref, overrides)
        if asked == ["fdd"] and (dinov2 or extractor == "inception"):
            extractor = vit
    elif isinstance(extractor, str):
        check_recorded(ref, extractor)
    wanted = [(_main_extractor(source, ref, extractor, weights, device), asked)]
    if "fdd" in asked and kind_of(wanted[0][0].protocol).name == "inception":
        if isinstance(source, Features):
            raise InputError(f"fdd: {samples!r} are features of Inception; score the images, or features of DINOv2")
        others = [each for each in asked if each != "fdd"]
        wanted = [*([(wanted[0][0], others)] if others else []), (load_extractor(vit, None, device), ["fdd"])]
    elif dinov2 and extractor != vit:
        remedy = f"add fdd to {option('metrics')}, or leave it out"
        raise InputError(f"{option('dinov2', dinov2)}: nothing asks for it; {remedy}")
    passes = [_prepare(samples, source, ref, *each, batch, allow_lossy, root, overrides) for each in wanted]
    notes = [f"left out: {reason.partition(';')[0]}" for one in passes for reason in one.left_out]
    main = passes[0]
    info, about = main.features.info, main.features.info["source"]
    design = design_of(main.features.n, info["class_histogram"], (about["manifest"] or {}).get("labels_rule"))
    groups = design.group_ids(main.features.labels, main.features.n)
    estimates: dict[str, Metric] = {}
    warnings = []
    for one in passes:
        for metric in one.metrics:
            if metric == "nearest" and (few := few_near(len(one.reference.features["pool"]))):
                warnings.append(f"copies: {few}")
            if metric in FRECHET:
                real = one.reference.moments[STREAMS[metric]]
                if few := too_few(len(real.mu), one.features.n, one.reference.n):
                    warnings.append(f"{metric}: {few}")
                sums = together(partial(stream_sums, one.features, STREAMS[metric], groups, shared=True)).all_reduce()
                if is_main():
                    estimates[metric] = frechet_metric(sums, real)
    leave()
    if not is_main():
        return None
    for one in passes:
        estimates |= other_metrics(one.metrics, one.features, one.reference, groups, one.extractor.device)
    accuracy = main.extractor.describe().get("heldout_accuracy")
    if "recognised" in estimates and accuracy is not None:
        estimates["classifier_heldout_accuracy"] = Estimate(accuracy, None, None)._asdict()
    for name, each in estimates.items():
        if not all(math.isfinite(value) for value in each.values() if isinstance(value, float)):
            raise InputError(f"{name} is not finite: the features are too large to compute with; check the extractor")
    for what, read in (("samples", about), ("reference", main.reference.source or {})):
        notes += [f"{what}: {note}" for note in read_as(read)]
    if main.reference.is_of(about["pixels_sha256"]):
        notes.append("warning: samples and reference are the same images; such scores say nothing of a model")
    return {
        "protocol": main.extractor.protocol,
        "n": main.features.n,
        "metrics": {name: estimates[name] for name in METRICS if name in estimates},
        "warnings": warnings,
        "class_histogram": info["class_histogram"],
        "reference": main.reference.describe(),
        "extractors": [one.extractor.describe() for one in passes],
        "samples": shown(Path(samples)),
        "samples_manifest": about["manifest"] or {},
        "samples_manifest_sha256": about["manifest_sha256"],
        "samples_lossy": about["lossy"],
        "pixels_sha256": about["pixels_sha256"],
        "labels_sha256": about["labels_sha256"],
        "image_shape": list(main.features.image_shape),
        "groups": design.groups,
        "error_bars": design.describe(),
        "device": info["device"],
        "batch": info["batch"],
        "versions": library_versions("timm", "torch-fidelity", "scipy"),
    }, notes


class _Stated(Extractor):
    """The extractor of a folder of features, as the folder states it: to compare with, without a network."""

    def __init__(self, features: Features, device: torch.device):
        about = dict(features.info["extractor"])
        super().__init__(about.pop("name"), about.pop("protocol"), nn.Identity(), features.streams, device, **about)
        self._path = features.path

    def launch(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        raise InputError(
            f"the reference has images whose features are not there, and {str(self._path)!r} is of features: state "
            f"their extractor again, with {option('extractor')} (for Inception also {option('weights')}), to extract "
            "the reference"
        )


def _main_extractor(
    source, ref: str | Reference, spec: str | Extractor | None, weights: str | None, device: str | None
) -> Extractor:  # fmt: skip
    """The extractor that was asked for, else the one that made the samples' features."""
    if spec is None and ref == "digits":
        spec = "digits"
    if isinstance(source, Features) and spec is None and weights is None:
        return _Stated(source, resolve_device(device or default_device("inception")))
    extractor = spec if isinstance(spec, Extractor) else load_extractor(spec or "inception", weights, device)
    if isinstance(source, Features):
        extractor.check_same(str(source.path), source.info["extractor"])
    else:
        extractor.check_source(source)
        if not extractor.streams:  # of a module of one's own: what it gives decides which metrics there are
            together(lambda: extractor(next(source.batches(0, 1))))
    return extractor


def _prepare(
    samples: str, source: Source | Features, ref: str | Reference, extractor: Extractor, asked: list[str], batch: int,
    allow_lossy: bool, root: str | None, overrides: Sequence[str],
) -> _Pass:  # fmt: skip
    """The reference is read first: it may not do."""
    offered = list(kind_of(extractor.protocol).offered)
    for metric in asked:
        if metric not in offered:
            same = next(each for each in offered if each in FRECHET)
            hint = f"; its Fréchet distance is {same}" * (metric in FRECHET)
            raise InputError(f"metric {metric!r} is none of extractor {extractor.name}{hint}; choose from {offered}")
    reference = ref
    if isinstance(ref, str):
        reference = read_reference(ref, extractor, batch, allow_lossy, source.image_shape, root, overrides)
    metrics, left_out = [], []
    for metric in asked or offered:
        try:
            check_metric(metric, source.n, source.labels is not None, extractor, reference)
            metrics.append(metric)
        except InputError as error:
            if asked:
                raise
            left_out.append(str(error))
    if not metrics:
        raise InputError(f"{samples!r} cannot be scored: {left_out[0]}")
    if "recognised" in metrics:
        check_labels(repr(samples), int(source.labels.max()), extractor)
    features = source if isinstance(source, Features) else features_of(source, extractor, batch=batch, root=root)
    return _Pass(extractor, features, reference, metrics, left_out)


def check_metric(metric: str, n: int, labelled: bool, extractor: Extractor, reference: Reference) -> None:
    """Raise InputError where a metric cannot be computed of n images; labelled: whether their classes are known."""
    stream = STREAMS[metric]
    if extractor.streams and stream not in extractor.streams:  # of a module of one's own they may not be known yet
        raise InputError(f"{metric}: extractor {extractor.name} gives no {stream!r}; leave {metric} out")
    if metric in FRECHET:
        reference.need(stream, metric)
    if metric == "recognised" and not labelled:
        raise InputError(f"{metric}: samples without labels; give them in manifest.json, or as arr_1 of the npz")
    if metric in ("pr", "kid", "nearest"):
        real = reference.need_features(stream, metric)
        found, fewest = min(n, len(real)), max(NEAREST.values()) + 1 if metric == "pr" else 2
        if found < fewest:
            raise InputError(f"{metric}: {found} images, and it takes {fewest}; leave {metric} out, or give more")
        if metric == "nearest" and (real == real[:1]).all():
            raise InputError(f"{metric}: all {len(real)} reference images have equal features; leave {metric} out")


def check_labels(name: str, last: int, extractor: Extractor) -> None:
    """Raise InputError where the largest label of images is beyond the classes that an extractor recognises. name: of
    the images."""
    if last >= (known := extractor.streams["logits"]):
        rule = f"has the label {last}, and extractor {extractor.name} knows {known} classes"
        raise InputError(f"recognised: {name} {rule}; give labels from 0 on")


def frechet_metric(sums: GroupSums, reference: Moments) -> Metric:
    """The Fréchet distance as a result has it; `corrected_needs`: images without which it has no corrected value."""
    value, *deleted = frechet_distances(sums.all_moments(), reference, len(sums.n) + (len(sums.n) > 1))
    metric = jackknife(value, deleted)._asdict()
    fewest = correction_needs(len(reference.mu))
    if sums.n.sum() < fewest:
        metric |= {"corrected": None, "corrected_needs": fewest}
    return metric


def other_metrics(
    metrics, features: Features | Held, reference: Reference, groups: np.ndarray, device, progress: bool = True
) -> dict[str, Metric]:
    """What is no Fréchet distance. Their biases are not 1/N, so none is corrected."""
    values = {}
    if "is" in metrics:
        values["is"] = inception_scores(features.batches("logits"), groups)
    if {"pr", "kid", "nearest"} & set(metrics):
        sets = reference.features["pool"], features.load("pool")
        where = "cpu" if device.type == "mps" else device  # which has no float64
        if "pr" in metrics:
            values |= manifold_scores(*sets, groups, where, progress)
        if "nearest" in metrics:
            copying, different = copying_scores(*sets, groups, where, progress)
            values |= copying
        if "kid" in metrics:
            kid = kernel_distance(*sets, groups, where, progress)
            values["kid"] = kid.full, kid.deleted
    if "recognised" in metrics:
        values["recognised"] = _recognised(features, groups)
    estimates = {name: jackknife(*each)._replace(corrected=None) for name, each in values.items()}
    if "nearest" in metrics and (se := estimates["copies"].se) is not None:
        # What counts as a copy is known from few reference images: their error comes on top.
        error = math.hypot(se, reference_error(estimates["copies"].value, different))
        estimates["copies"] = estimates["copies"]._replace(se=error)
    if "kid" in metrics:
        # The error of the estimate from all pairs, and on top of it that of drawing the subsets.
        se = estimates["kid"].se
        estimates["kid"] = Estimate(kid.value, None if se is None else math.hypot(se, kid.subset_se), None)
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def _recognised(features: Features | Held, groups: np.ndarray) -> tuple[float, list[float]]:
    """Share of samples that the classifier gives their class: of all, and without each group."""
    hits = np.empty(features.n, bool)
    for first, rows in features.batches("logits"):
        if not np.isfinite(rows).all():  # of which NaN would be the greatest
            raise InputError("logits are not finite; check the images and the extractor's weights")
        hits[first : first + len(rows)] = rows.argmax(1) == features.labels[first : first + len(rows)]
    number = int(groups.max()) + 1
    return hits.mean(), [hits[groups != group].mean() for group in range(number)] if number > 1 else []


def training_extractor(ref: str, weights: str | None = None, spec: str | None = None) -> Extractor:
    """The extractor of a `TrainingScorer` of these arguments. Raises InputError where there is none, or where the
    reference states another one."""
    stated = f"score.ref={ref} is of {reference_spec(ref)}" if spec is None else f"score.extractor is {spec}"
    if spec is not None:
        check_recorded(ref, spec, f"score.extractor={spec}")
    spec = spec or reference_spec(ref)
    if weights and not parsed(spec)[0].weights:
        raise InputError(f"score.weights belongs to Inception, and {stated}; leave it out")
    extractor = load_extractor(spec, weights, torch.device(default_device(spec)))
    if (found := recorded_extractor(ref)) is not None:
        extractor.check_same(f"reference {ref!r}", found[0])
    return extractor


class TrainingScorer:
    """What scores images while a model trains: called with uint8 images (N, C, H, W) and labels, gives numbers by name.

    These are the Fréchet distance and, where the extractor is a classifier of the images' classes, the share
    recognised, which alone looks at the labels. All of it is in memory, of one process, and asks nothing of the others.
    ref, weights, spec: as the command takes them, the latter as its extractor. about: name, protocol, digest of the
    weights and accuracy of the extractor; and as `warning`, what `check` found few. Raises InputError for what cannot
    be compared with.
    """

    def __init__(self, ref: str, weights: str | None = None, spec: str | None = None):
        self.extractor = training_extractor(ref, weights, spec)
        kind = kind_of(self.extractor.protocol)
        self.distance = next(each for each in kind.offered if each in FRECHET)
        self.recognises = "recognised" in kind.offered
        self.ref = ref
        if ref == "digits" or is_features(ref):
            reference = read_reference(ref, self.extractor)
            self.moments, self.n = reference.need("pool", self.distance), reference.n
            self.image_shape = reference.image_shape
        elif (found := read_moments(Path(ref), self.extractor)) is not None:
            self.moments, self.n, self.image_shape = found
        else:
            source = open_source(ref)
            self.extractor.check_source(source)
            self.moments = stream_sums(held(source, self.extractor, BATCH), "pool").moments()
            self.n, self.image_shape = source.n, source.image_shape
        described = self.extractor.describe()
        self.about = {
            key: described[key] for key in ("name", "protocol", "weights_sha256", *HELD_OUT) if key in described
        }

    def check(self, image_shape: tuple[int, int, int], class_names: Sequence[str], num: int) -> None:
        """Raise InputError where images (C, H, W) of these classes are not for the extractor or the reference; warn
        where `num` of them are few."""
        name = "the images of this run"
        self.extractor.check_images(name, image_shape)
        self.extractor.check_classes(name, class_names)
        self.recognises &= tuple(class_names) != ONE_CLASS
        if self.image_shape is not None:
            check_shape(self.ref, self.image_shape, image_shape)
        if few := too_few(len(self.moments.mu), num, self.n):
            self.about["warning"] = f"{self.distance}: {few}"
            say(f"warning: scores while training, {self.about['warning']}")

    def __call__(self, images: torch.Tensor, labels: Sequence[int]) -> dict[str, float]:
        """The scores of uint8 images (N, C, H, W) by name."""
        source = from_arrays(images, labels, "samples")
        self.extractor.check_source(source)
        features = held(source, self.extractor, BATCH)
        values = {self.distance: frechet_metric(stream_sums(features, "pool"), self.moments)["value"]}
        if self.recognises:
            values["recognised"] = float(_recognised(features, np.zeros(features.n, np.int64))[0])
        return values
