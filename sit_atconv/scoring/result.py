"""What is certain in a result of `sit-atconv score`, whatever version of this package wrote it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import MOST, InputError
from sit_atconv.runtime.files import made_here
from sit_atconv.runtime.reading import fault_of
from sit_atconv.scoring import DIGITS, INCEPTION
from sit_atconv.scoring.frechet import PER_FEATURE, correction_needs
from sit_atconv.scoring.jackknife import GROUPS, Design, design_of

RESULT = made_here("protocol", "metrics")
BARS_FORM = {"design": ("stratified", "random", None), "groups": (int, None), "upper_bound": bool, "why": str}
FORM = {"metrics?": {str: dict}, "samples_manifest?": (dict, None), "error_bars?": (BARS_FORM, None)}
# Features of what earlier versions corrected; of others they did not say how many there are.
FEATURES = {"fid": 2048, "sfid": 2023}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell what a file that is no result raises when it is taken for one as an InputError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is no result of `sit-atconv score` ({type(error).__name__}: {error}); "
            "score the samples again"
        ) from None


def number(value: Any) -> float | None:
    """A number that fp32 holds, as all that is measured does, else None."""
    return value if fault_of(value, float) is None and abs(value) <= MOST else None


def sound(result: dict[str, Any]) -> dict[str, Any]:
    """A result with `error_bars`, see `Design`, and with none but the errors and corrected values that hold.

    Earlier versions counted the images of a class off into ten groups in their order, whatever the draw, and corrected
    the Fréchet distances of however few images: their errors stand where the groups would be as many and stratified
    today, and their corrected values where the images are known to be enough. What does not stand becomes None.
    Raises ValueError, KeyError, TypeError or AttributeError for what is no result.
    """
    if fault := fault_of(result, FORM):
        raise ValueError(fault)
    stated = result.get("error_bars")
    if stated is not None:
        if (stated["groups"] is None) != (stated["design"] is None):
            raise ValueError(f"error_bars is {stated!r}")
        for name, metric in result.get("metrics", {}).items():
            if (metric.get("se") or 0) < 0:
                raise ValueError(f"se of {name} is {metric['se']!r}, and no error is negative")
        return result
    n, manifest = result.get("n"), result.get("samples_manifest") or {}
    design = None if n is None else design_of(n, result.get("class_histogram"), manifest.get("labels_rule"))
    stands = design is not None and result.get("groups") == design.groups
    if stands and design.design is not None:
        stands = design.design == "stratified" and design.groups == GROUPS
    if not stands:
        why = "those of an earlier version do not fit how the images were drawn; score the samples again"
        design = Design(None, None, False, why, None)
    metrics = {}
    for name, metric in result.get("metrics", {}).items():
        metrics[name] = dict(metric) if stands else metric | {"se": None, "corrected": None}
        if metrics[name].get("corrected") is not None:
            features = 64 if result.get("protocol") == DIGITS else FEATURES.get(name)
            if features is None or n < correction_needs(features):
                metrics[name]["corrected"] = None
                if features is not None:
                    metrics[name]["corrected_needs"] = correction_needs(features)
    return result | {"metrics": metrics, "error_bars": design.describe()}


def bars_told(error_bars: dict[str, Any]) -> str:
    """The design of the error bars of a result in words."""
    if error_bars["design"] is None:
        return f"no error bars: {error_bars['why']}"
    return f"error bars: {error_bars['groups']} {error_bars['design']} groups; {error_bars['why']}"


def named(error_bars: dict[str, Any]) -> str:
    """What two results must share of their error bars to stand side by side."""
    return f"{error_bars['design'] or 'none'}{', an upper bound' * error_bars['upper_bound']}"


def features_told(metrics: Iterable[str], extractors: Iterable[Mapping[str, Any]]) -> str | None:
    """Whose features the Fréchet distances among metrics are in, and how good a classifier that is, where they are no
    FID; None where all are, or there are none. extractors: as a result lists them."""
    if not {"fdd", "frechet_distance"} & set(metrics):
        return None
    told = []
    for each in extractors:
        if not str(each.get("protocol")).startswith(INCEPTION):
            accuracy = number(each.get("heldout_accuracy"))
            told.append(
                f"{each.get('name')}" + ("" if accuracy is None else f" ({accuracy:.1%} right on held-out images)")
            )
    return f"the Fréchet distance in features of {' and '.join(dict.fromkeys(told))} is not a FID" if told else None


def needs(images: int) -> str:
    """What a corrected Fréchet distance that is not given would need."""
    return f"needs N >= {images:,} images for {images // PER_FEATURE:,} features"
