"""What is certain in a result of `eval score`, whatever version of this package wrote it."""

from types import NoneType
from typing import Any

from eval.digits import PROTOCOL as DIGITS
from eval.frechet import PER_FEATURE, correction_needs
from eval.jackknife import GROUPS, Design, design_of

# Features of what earlier versions corrected; of others they did not say how many there are.
FEATURES = {"fid": 2048, "sfid": 2023}


def sound(result: dict[str, Any]) -> dict[str, Any]:
    """A result with `error_bars`, see `Design`, and with none but the errors and corrected values that hold.

    Earlier versions counted the images of a class off into ten groups in their order, whatever the draw, and corrected
    the Fréchet distances of however few images: their errors stand where the groups would be as many and stratified
    today, and their corrected values where the images are known to be enough. What does not stand becomes None.
    Raises ValueError, KeyError, TypeError or AttributeError for what is no result.
    """
    stated = result.get("error_bars")
    if stated is not None:
        whole = isinstance(stated["upper_bound"], bool) and isinstance(stated["why"], str)
        counted = type(stated["groups"]) is (int if stated["design"] else NoneType)
        if not (whole and counted and stated["design"] in ("stratified", "random", None)):
            raise ValueError(f"error_bars is {stated!r}")
        for name, metric in result.get("metrics", {}).items():
            if ((metric or {}).get("se") or 0) < 0:
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


def needs(images: int) -> str:
    """What a corrected Fréchet distance that is not given would need."""
    return f"needs N >= {images:,} images for {images // PER_FEATURE:,} features"
