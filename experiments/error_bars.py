"""python -m experiments.error_bars: stated errors and corrected distances against those of repeated draws.

Features are drawn from a mixture of Gaussians whose moments are known, and scored by the functions that `eval score`
calls. Stated: root mean square of the stated errors of all repeats. Spread: standard deviation of their values.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_number, add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.scoring.frechet import correction_needs, frechet_distance, frechet_distances
from sit_atconv.scoring.jackknife import Design, design_of, jackknife
from sit_atconv.scoring.moments import Moments
from sit_atconv.scoring.refs import Reference
from sit_atconv.scoring.score import Held, Metric, frechet_metric, other_metrics, stream_sums
from sit_atconv.scoring.sources import class_histogram

FEATURES, IMAGES, REAL = 16, 400, 1000
METRICS = ("frechet_distance", "is", "precision", "recall", "density", "coverage", "kid", "recognised")
DISTANCE = ("true distance", "mean", "mean corrected")  # columns
RATIOS = (0.5, 1, 2, 5, 10, 15, 25)  # images a feature, of the corrected distance
WIDE = 64  # features of it


@dataclass(frozen=True)
class Draw:
    """How images get their classes: in turns, or at random; known: whether scoring sees them."""

    name: str
    classes: int
    balanced: bool = True
    known: bool = True

    def labels(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.arange(n) % self.classes if self.balanced else rng.integers(self.classes, size=n)


DRAWS = (
    Draw("balanced, 20 a class", IMAGES // 20),
    Draw("balanced, 5 a class", IMAGES // 5),
    Draw("balanced, 2 a class", IMAGES // 2),
    Draw("balanced, 1 a class", IMAGES),
    Draw("labels at random", IMAGES // 20, balanced=False),
    Draw("unlabelled, at random", IMAGES // 20, balanced=False, known=False),
    Draw("unlabelled, in turns", IMAGES // 20, known=False),
)


class Mixture:
    """Classes of unit Gaussians around centres that are as far apart as the classes are wide; what is real is narrower,
    and elsewhere."""

    def __init__(self, classes: int, features: int = FEATURES):
        rng = np.random.default_rng([0, classes, features])
        self.centres = rng.normal(size=(classes, features))
        mean, between = self.centres.mean(0), np.cov(self.centres, rowvar=False, ddof=0).reshape(features, features)
        self.moments = Moments(mean, between + np.eye(features))
        self.real = Moments(mean + 0.3, 0.8 * self.moments.sigma)
        self.truth = frechet_distance(*self.moments, *self.real)

    def draw(self, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
        return self.centres[labels] + rng.normal(size=(len(labels), self.centres.shape[1]))

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Up to a constant the log density of each class."""
        return x @ self.centres.T - np.square(self.centres).sum(1) / 2

    def reference(self) -> Reference:
        rng = np.random.default_rng([1, *self.centres.shape])
        rows = rng.multivariate_normal(*self.real, REAL, method="cholesky")
        return Reference("mixture", None, "", None, {"pool": self.real}, {"pool": rows}, None, None)


def scored(
    draw: Draw, mixture: Mixture, reference: Reference, rng: np.random.Generator, n: int
) -> tuple[Design, dict[str, Metric]]:
    """The groups and the metrics of one draw of n images, as `eval score` finds them."""
    labels = draw.labels(rng, n)
    x = mixture.draw(rng, labels)
    held = Held({"pool": x, "logits": mixture.logits(x)}, labels if draw.known else None)
    design = design_of(n, class_histogram(held.labels))
    groups = design.group_ids(held.labels, n)
    wanted = ["is", "pr", "kid", *["recognised"] * draw.known]
    found = {"frechet_distance": frechet_metric(stream_sums(held, "pool", groups), reference.moments["pool"])}
    return design, found | other_metrics(wanted, held, reference, groups, torch.device("cpu"), progress=False)


def error_bars(draw: Draw, repeats: int, n: int = IMAGES) -> dict[str, Any]:
    """Stated error and spread of every metric over `repeats` draws, and what scoring says of the error."""
    mixture = Mixture(draw.classes)
    reference = mixture.reference()
    drawn = []
    for repeat in Progress(range(repeats), draw.name, leave=False):
        rng = np.random.default_rng([2, draw.classes, draw.balanced, repeat])
        drawn.append(scored(draw, mixture, reference, rng, n))
    metrics = {}
    for name in drawn[0][1]:
        values, errors = (np.array([found[name][key] for _, found in drawn]) for key in ("value", "se"))
        stated, spread = float(np.sqrt(np.mean(errors**2))), float(values.std(ddof=1))
        metrics[name] = {"stated": stated, "spread": spread, "ratio": stated / spread}
    found = [each["frechet_distance"] for _, each in drawn]
    distance = {"truth": mixture.truth}
    distance |= {key: float(np.mean([each[key] for each in found])) for key in ("value", "corrected")}
    return {"draw": draw.name, "n": n, "error_bars": drawn[0][0].describe(), "metrics": metrics, "distance": distance}


def correction(ratio: float, repeats: int) -> dict[str, Any]:
    """The jackknife's corrected distance of `ratio` images a feature, over `repeats` draws, whether score gives it or
    not."""
    mixture, n = Mixture(20, WIDE), round(ratio * WIDE)
    rows = []
    for repeat in Progress(range(repeats), f"{ratio:g} images a feature", leave=False):
        rng = np.random.default_rng([3, n, repeat])
        labels = rng.integers(20, size=n)
        held = Held({"pool": mixture.draw(rng, labels)}, labels)
        groups = design_of(n, class_histogram(labels), "random").group_ids(labels, n)
        sums = stream_sums(held, "pool", groups)
        value, *deleted = frechet_distances(sums.all_moments(), mixture.real)
        rows.append(jackknife(value, deleted))
        given = frechet_metric(sums, mixture.real)["corrected"]
        assert given == (rows[-1].corrected if n >= correction_needs(WIDE) else None)
    value, se, corrected = np.array(rows).T
    return {
        "images_per_feature": ratio, "n": n, "truth": mixture.truth, "value": value.mean(),
        "corrected": corrected.mean(), "corrected_spread": corrected.std(ddof=1),
        "stated": float(np.sqrt(np.mean(se**2))), "given": given is not None,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"Stated error over the spread of {result['repeats']} repeated draws of {IMAGES} images, {FEATURES} features. "
        "Stated: root mean square over the repeats. Right is 1. ≤: scoring says that the error is an upper bound, and "
        "≥ that the corrected distance is a lower one. Recall and coverage ask whether any image is near, which the "
        "images left out change by more than their share: their errors are rough, the more so the fewer the groups.",
        "",
    ]
    head, rows = ["draw", "groups", *(name.replace("_", " ") for name in METRICS), *DISTANCE], []
    for row in result["error_bars"]:
        bars, distance = row["error_bars"], row["distance"]
        most, least = ("≤ ", "≥ ") if bars["upper_bound"] else ("", "")
        ratios = [row["metrics"].get(name, {}).get("ratio") for name in METRICS]
        cells = ["" if ratio is None else f"{most}{ratio:.2f}" for ratio in ratios]
        cells += [f"{distance['truth']:.2f}", f"{distance['value']:.2f}", f"{least}{distance['corrected']:.2f}"]
        rows.append([row["draw"], f"{bars['groups']} {bars['design']}", *cells])
    lines += [
        markdown_table(head, rows, text=("draw", "groups")),
        "",
        *(f"- {row['draw']}: {row['error_bars']['why']}." for row in result["error_bars"]),
        "",
        f"The corrected Fréchet distance against the truth, {WIDE} features, labels at random. Mean ± standard "
        "deviation of one draw; off: mean less truth, over the stated error.",
        "",
    ]
    head = ["N / features", "N", "truth", "value", "corrected", "stated error", "off", "`eval score`"]
    rows = []
    for row in result["corrected"]:
        off = (row["corrected"] - row["truth"]) / row["stated"]
        corrected = f"{row['corrected']:.2f} ± {row['corrected_spread']:.2f}"
        figures = f"{row['images_per_feature']:g}", f"{row['n']:,}", f"{row['truth']:.2f}", f"{row['value']:.2f}"
        given = "gives it" if row["given"] else "gives null"
        rows.append([*figures, corrected, f"{row['stated']:.2f}", f"{off:+.1f}", given])
    return "\n".join([*lines, markdown_table(head, rows, text=("`eval score`",))]) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.error_bars", description=__doc__.split("\n")[0])
    repeats = limits.Range(2, 100_000, "a spread needs two draws, and each takes seconds")
    add_number(parser, "--repeats", repeats, 100, "draws of each kind")
    add_out(parser, "of its table and JSON", default="experiments/results/error_bars", metavar="DIR")
    args = parser.parse_args(argv)
    places = named(Path(args.out) / "error_bars", ".json", ".md")
    files = Results(places, args.force, "command", "repeats", "error_bars", "corrected")
    result = {
        "command": "python -m experiments.error_bars",
        "repeats": args.repeats,
        "error_bars": [error_bars(draw, args.repeats) for draw in DRAWS],
        "corrected": [correction(ratio, args.repeats) for ratio in RATIOS],
    }
    text = markdown(result)
    files.write(result, text)
    print(text, end="")


if __name__ == "__main__":
    main()
