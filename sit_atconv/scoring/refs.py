"""References to score against: statistics of others, our own, and images; `build-ref` makes our own of images."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sit_atconv.data.digits import Digits
from sit_atconv.data.npz import UNREADABLE, Array, arrays_of
from sit_atconv.runtime.errors import InputError, option, told
from sit_atconv.runtime.files import check_out, library_versions, new_path, sha256, shown
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.runtime.processes import is_main
from sit_atconv.runtime.reading import POSITIVE, SHAPE, Malformed, parse_json
from sit_atconv.scoring import BATCH, DIGITS_TRAIN
from sit_atconv.scoring.extract import (
    features_of,
)
from sit_atconv.scoring.extractor import KINDS, MODULE, OWN, Extractor, kind_of, parsed, pixels_told, recorded_spec
from sit_atconv.scoring.features import INDEX, Features, Held, check_no_parent, held, is_features
from sit_atconv.scoring.moments import Moments, stream_sums
from sit_atconv.scoring.sources import check_overrides, from_arrays, is_recipe, open_source, recipe_data

FORMAT_VERSION = 1
ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of a stream, as ADM's evaluator names them
KEPT = 10_000  # images whose features are kept for precision, recall and KID: as many as ADM's reference has
MOST_META = 1 << 24  # characters
SYMMETRY = 1e-5  # of the largest covariance: what fp32 statistics may be off by
NEGATIVE = 1e-3  # of the largest eigenvalue: likewise
META_FORM = {
    "n": POSITIVE, "image_shape": SHAPE, "extractor": {"name": str, "protocol": str},
    "source": {"pixels_sha256": str, "lossy": object},
}  # fmt: skip


@dataclass
class Reference:
    """What samples are compared with.

    n: images behind the moments, None where the file does not say. sha256: of the file; of images, that of their
    pixels; of a features folder, that of features.json. image_shape: (C, H, W), or None. moments: of pool and spatial,
    of all n images. features: pool (M, D) fp32 of up to 10,000 images evenly over the indices, or None. extractor: what
    the features came from, None where the file does not say. source: the images behind the moments, as
    `Source.describe` says it, None where the file does not say. extract: gives the features of the arr_0 of an ADM
    file, once a metric needs them; every process of a launch takes part.
    """

    name: str
    n: int | None
    sha256: str
    image_shape: tuple[int, int, int] | None
    moments: dict[str, Moments]
    features: dict[str, np.ndarray] | None
    extractor: dict[str, Any] | None
    source: dict[str, Any] | None
    extract: Callable[[], dict[str, np.ndarray]] | None = None

    def need(self, stream: str, metric: str) -> Moments:
        """Moments of a stream. Raises InputError where they are not there; metric: what wants them."""
        if stream not in self.moments:
            names = " and ".join(ARRAYS.get(stream, (stream,)))
            raise InputError(f"{metric}: reference {self.name!r} has no {names}; leave {metric} out, or give another")
        return self.moments[stream]

    def need_features(self, stream: str, metric: str) -> np.ndarray:
        """Features (M, D) of a stream. Raises InputError where they are not there; metric: what wants them."""
        if self.features is None and self.extract is not None:
            self.features = self.extract()
        if self.features is None or stream not in self.features:
            raise InputError(
                f"{metric}: reference {self.name!r} has neither images nor their features; leave {metric} out, or give "
                "another"
            )
        return self.features[stream]

    def describe(self) -> dict[str, Any]:
        """What a result records."""
        return {
            "name": self.name,
            "n": self.n,
            "sha256": self.sha256,
            "image_shape": self.image_shape and list(self.image_shape),
            "kept": len(next(iter(self.features.values()))) if self.features else None,
            "extractor": self.extractor,
            "lossy": self.source and self.source["lossy"],
            **{key: self.source[key] for key in ("background", "data") if key in (self.source or {})},
        }

    def is_of(self, pixels_sha256: str) -> bool:
        """Whether it is known to be of images with this digest of their pixels."""
        return self.source is not None and self.source["pixels_sha256"] == pixels_sha256


def read_reference(
    spec: str, extractor: Extractor, batch: int = BATCH, allow_lossy: bool = False,
    samples: Sequence[int] | None = None, root: str | None = None, overrides: Sequence[str] = (),
) -> Reference:  # fmt: skip
    """The reference that `spec` names, in an extractor's features.

    spec: "digits" (the train split); an npz with mu and sigma, perhaps mu_s and sigma_s, and perhaps images arr_0, as
    ADM's, or of `build-ref`; an npz or folder of images; a recipe, for what it trains on, with `overrides` laid over
    it; a folder of features. Images that are not in memory are extracted to the folder that `default_folder` names,
    below `root` where that is given. samples: (C, H, W) of what is to be compared, checked before that.
    Raises InputError for what is not there, is damaged, or does not go with the extractor or the samples.
    """
    path = Path(spec)
    check_overrides(path, overrides)
    if spec == "digits":
        return _digits(extractor, batch, samples)
    if not path.exists():
        raise InputError(f'reference {spec!r}: no such file or folder; give one, or "digits"')
    name = shown(path)
    if is_features(path):
        features, digest = Features(path, verify=True), sha256(path / INDEX)
    elif (statistics := _read_statistics(path)) is not None:
        return _of_statistics(path, statistics, extractor, batch, samples, root)
    else:
        source = open_source(path, allow_lossy, overrides)
        check_shape(name, source.image_shape, samples)
        features = features_of(source, extractor, batch=batch, root=root)
        digest = features.info["source"]["pixels_sha256"]
    extractor.check_same(f"reference {name!r}", features.info["extractor"])
    check_shape(name, features.image_shape, samples)
    return _of_features(name, features, features.info, digest)


def recorded_extractor(ref: str) -> tuple[dict[str, Any], str | None] | None:
    """What features, or statistics of ours, say of their extractor: `Extractor.describe`, and its spec where they state
    it; None for images and the statistics of others. Raises InputError for a record that is damaged."""
    path = Path(ref)
    if is_features(path):
        about = Features(path).info
    else:
        try:
            arrays = arrays_of(path, ("mu", "meta"))
        except UNREADABLE:  # no npz, or nothing there: who reads the reference says so
            return None
        if not {"mu", "meta"} <= arrays.keys():
            return None
        about = _read_meta(shown(path), arrays["meta"])
    return about["extractor"], about.get("extractor_spec")


def reference_spec(ref: str, overrides: Sequence[str] = ()) -> str:
    """The extractor that a reference implies: the digits' classifier for the digits, also of a recipe, the recorded
    one, else Inception.

    Raises InputError for a record that cannot be followed.
    """
    check_no_parent(ref)
    if ref == "digits" or (is_recipe(ref) and recipe_data(ref, overrides).kind == "digits"):
        return "digits"
    found = recorded_extractor(ref)
    return "inception" if found is None else recorded_spec(f"reference {ref!r}", *found)


def check_recorded(ref: str, spec: str, key: str | None = None) -> None:
    """Raise InputError where a reference says that its features are of another kind of extractor than `spec`; those of
    one kind are compared once they are loaded. key: what begins the error, by default the option."""
    found, (kind, _) = recorded_extractor(ref), parsed(spec)
    if found is None or (kind is KINDS[MODULE] and not OWN.fullmatch(spec)):  # which is no extractor
        return
    if kind_of(found[0]["protocol"]) is not kind:
        raise InputError(
            f"{key or option('extractor', spec)}: reference {ref!r} is of features with name {found[0]['name']!r}; "
            f"leave the option out, or build a reference of {spec}"
        )


def _digits(extractor: Extractor, batch: int, samples: Sequence[int] | None) -> Reference:
    digits = Digits("train")
    source = from_arrays(to_uint8(digits.images), digits.labels, "reference 'digits'")
    extractor.check_source(source)
    check_shape("digits", source.image_shape, samples)
    about = {"extractor": extractor.describe(), "source": source.describe()}
    return _of_features(DIGITS_TRAIN, held(source, extractor, batch), about, source.digest())


def _of_features(name: str, features: Features | Held, about: dict[str, Any], digest: str) -> Reference:
    """about: their extractor and the source of the images, as features.json says it."""
    rows = spread(features.n)
    return Reference(
        name, features.n, digest, features.image_shape,
        {stream: stream_sums(features, stream).moments() for stream in features.streams if stream in ARRAYS},
        {stream: features.load(stream, rows) for stream in features.streams if stream == "pool"},
        about["extractor"], about["source"],
    )  # fmt: skip


def spread(n: int, kept: int = KEPT) -> np.ndarray:
    """Indices of up to `kept` of n images, evenly over all: floor(i n / kept)."""
    kept = min(n, kept)
    return np.arange(kept) * n // kept


def _read_statistics(path: Path) -> dict[str, Array] | None:
    """The arrays of an npz with mu, of which none is read; None for an npz without mu, a folder and a recipe."""
    if is_recipe(path) or not path.is_file():
        return None
    with _readable(str(path)):
        found = arrays_of(path, ("mu", "sigma", "mu_s", "sigma_s", "pool", "meta", "arr_0"))
        for name in found.keys() - {"arr_0"} if "mu" in found else ():
            found[name].check()
    if "mu" not in found:
        return None
    for keys in ARRAYS.values():
        there = [key for key in keys if key in found]
        if len(there) == 1:
            raise InputError(f"reference {str(path)!r} has {there[0]} alone of {keys}; take the statistics again")
    return found


def _readable(name: str) -> AbstractContextManager[None]:
    """Tell what a broken npz raises as an InputError."""
    what = f"reference {name!r} cannot be read"
    return told(what, *UNREADABLE, InputError, remedy="give an npz that is whole")


def _of_statistics(
    path: Path, arrays: dict[str, Array], extractor: Extractor, batch: int, samples: Sequence[int] | None,
    root: str | None,
) -> Reference:  # fmt: skip
    """Of an npz with mu and sigma: ADM's, whose arr_0 are images, or ours, whose features are there."""
    name = shown(path)
    meta, moments = _statistics(name, arrays, extractor)
    shape, features, extract = (tuple(meta["image_shape"]) if meta else None), None, None
    if meta:
        check_shape(name, shape, samples)
        if "pool" in arrays:
            pool, dim = arrays["pool"], len(moments["pool"].mu)
            with _readable(name):
                kept = pool.read() if pool.dtype == np.float32 and pool.ndim == 2 and pool.shape[1] == dim else None
            if kept is None or not np.isfinite(kept).all():
                raise InputError(f"reference {name!r}: pool is no finite fp32 (M, {dim}); build it anew with build-ref")
            features = {"pool": kept}
    elif "arr_0" in arrays:
        source = open_source(path)
        shape = source.image_shape
        check_shape(name, shape, samples)

        def extract() -> dict[str, np.ndarray]:
            extracted = features_of(source, extractor, batch=batch, root=root)
            return {"pool": extracted.load("pool", spread(extracted.n))}

    return Reference(
        name, meta.get("n"), sha256(path), shape, moments, features, meta.get("extractor"), meta.get("source"), extract
    )  # fmt: skip


def _statistics(name: str, arrays: dict[str, Array], extractor: Extractor) -> tuple[dict[str, Any], dict[str, Moments]]:
    """What a file of ours says of itself, {} of another's; and the moments of the streams that the extractor gives too,
    of all there are where it is a module of one's own whose streams are not known yet."""
    meta = {}
    if "meta" in arrays:
        meta = _read_meta(name, arrays["meta"])
        extractor.check_same(f"reference {name!r}", meta["extractor"])
    known = extractor.streams or ARRAYS
    streams = [stream for stream, keys in ARRAYS.items() if keys[0] in arrays and stream in known]
    return meta, {stream: _check_moments(name, arrays, extractor, stream) for stream in streams}


def _check_moments(name: str, arrays: dict[str, Array], extractor: Extractor, stream: str) -> Moments:
    keys = ARRAYS[stream]
    mu, sigma = (arrays[key] for key in keys)
    dim = extractor.streams.get(stream, mu.size)
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise InputError(
            f"reference {name!r} has {keys[0]} {mu.shape} and {keys[1]} {sigma.shape}; {extractor.name}'s {stream} has "
            f"{dim} features"
        )
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise InputError(f"reference {name!r}: {keys[0]} is {mu.dtype}, {keys[1]} {sigma.dtype}; floats are needed")
    with _readable(name):
        mu, sigma = (array.read().astype(np.float64, copy=False) for array in (mu, sigma))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"reference {name!r}: {keys[0]} or {keys[1]} is not finite; take the statistics again")
    if np.abs(sigma - sigma.T).max() > SYMMETRY * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise InputError(
            f"reference {name!r}: {keys[1]} is not symmetric, or a variance in it is negative: no covariance"
        )
    values = np.linalg.eigvalsh(sigma)
    if values.min() < -NEGATIVE * values.max():
        raise InputError(
            f"reference {name!r}: {keys[1]} has the eigenvalues {values.min():.3g} to {values.max():.3g}, so it is no "
            "covariance; take the statistics again"
        )
    return Moments(mu, sigma)


def _read_meta(name: str, array: Array) -> dict[str, Any]:
    with _readable(name):
        if array.nbytes > 4 * MOST_META:  # a character takes four
            raise ValueError(f"meta is longer than {MOST_META:,} characters")
        meta = str(array.read())
    try:
        version = parse_json(meta, "meta", {"format_version": object})["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"reference {name!r} is of format {version!r}, this version reads {FORMAT_VERSION}; build it anew"
            )
        return parse_json(meta, "meta", META_FORM, finite=True)
    except Malformed as error:
        raise InputError(f"reference {name!r}: its meta is damaged ({error}); build it anew with build-ref") from None


def check_shape(name: str, image_shape: tuple[int, int, int], samples: Sequence[int] | None) -> None:
    if samples is not None and image_shape[1:] != tuple(samples[1:]):
        raise InputError(
            f"reference {name!r} is of {pixels_told(image_shape[1:])} px images, the samples "
            f"{pixels_told(samples[1:])}; compare what has one resolution"
        )


def build_reference(
    images: str, out: Path, extractor: Extractor, batch: int = BATCH, allow_lossy: bool = False,
    root: str | None = None, force: bool = False, overrides: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write the statistics of all images, and the pool of up to 10,000, as an npz; returns its meta.

    Arrays: mu, sigma (and mu_s, sigma_s) float64, unbiased, under the names that ADM's evaluator reads; pool (M, D)
    fp32 of images floor(i n / M); meta, a JSON string. images: a folder or npz of images, a recipe for what it trains
    on, with `overrides` laid over it, or a folder of features. root: the folder that features go below, see
    `default_folder`.
    force: what is at `out` is set aside.
    Every process of a distributed launch calls this; the first writes. Raises InputError.
    """
    check_out(out, force=force)
    path = Path(images)
    check_overrides(path, overrides)
    if is_features(path):
        features = Features(path, verify=True)
        extractor.check_same(str(path), features.info["extractor"])
    else:
        source = open_source(path, allow_lossy, overrides)
        features = features_of(source, extractor, batch=batch, root=root)
    if "pool" not in features.streams:
        raise InputError(f"extractor {extractor.name} gives {sorted(features.streams)}; a reference needs 'pool'")
    rows = spread(features.n)
    meta = {
        "format_version": FORMAT_VERSION,
        "n": features.n,
        "kept": len(rows),
        **{key: features.info[key] for key in ("image_shape", "class_histogram", "extractor", "source")},
        "extractor_spec": features.info.get("extractor_spec"),
        "versions": library_versions("timm", "torch-fidelity"),
    }
    if is_main():
        arrays = {"pool": features.load("pool", rows), "meta": np.array(json.dumps(meta))}
        for stream, names in ARRAYS.items():
            if stream in features.streams:
                arrays |= zip(names, stream_sums(features, stream).moments(), strict=True)
        with new_path(out, force=force) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **arrays)
    return meta


def read_moments(path: Path, extractor: Extractor) -> tuple[Moments, int | None, tuple[int, int, int] | None] | None:
    """The pool's moments of an npz, checked as `read_reference` does, without a look at images; the number of images
    behind them and their shape (C, H, W), where it says so. None of all else.

    It works in one process alone, as a trainer needs it. Raises InputError.
    """
    arrays = _read_statistics(path)
    if arrays is None:
        return None
    meta, moments = _statistics(shown(path), arrays, extractor)
    return moments["pool"], meta.get("n"), (tuple(meta["image_shape"]) if meta else None)
