"""Error bar and bias of a score, from the scores that result when a group of the images is left out at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from sit_atconv.runtime.draws import Stream, generator

GROUPS = 10  # where the classes leave the choice
FEWEST = 2 * GROUPS  # images that an error bar is told from
SEED = 0
LET_IN = 0.05  # share of the spread between classes that may be left in an error which is no mere bound


class Estimate(NamedTuple):
    """A score, its standard error, and the score without its 1/N bias; None where too few images tell."""

    value: float
    se: float | None
    corrected: float | None


def jackknife(full: float, deleted: Sequence[float]) -> Estimate:
    """Delete-a-group jackknife (Quenouille 1956, Tukey 1958) of a score `full` and those without each of G groups.

    se = sqrt((G - 1) / G sum (deleted - mean)^2); corrected = G full - (G - 1) mean, which takes away a bias that is
    proportional to 1/N. The groups are of one size (to one image).

    The error is that of drawing the samples anew from the same model, where the groups differ as such draws do, see
    `design_of`. The reference is taken as given: its own sampling error is not in it, and neither is that of training
    the model anew, which is larger.

    No groups, no error: without `deleted` there is the value alone. Raises ValueError for one group.
    """
    groups = len(deleted)
    if not groups:
        return Estimate(float(full), None, None)
    if groups == 1:
        raise ValueError("one group cannot be left out; give at least two")
    mean = float(np.mean(deleted))
    se = np.sqrt((groups - 1) / groups * np.sum((np.asarray(deleted) - mean) ** 2))
    return Estimate(float(full), float(se), float(groups * full - (groups - 1) * mean))


@dataclass(frozen=True)
class Design:
    """How images are shared out over the groups that the jackknife leaves out.

    design: "stratified", class by class; "random"; None without error bars. groups: their number, None without.
    upper_bound: the error may be larger than that of drawing anew, and the corrected value lower than the truth, for
    the groups may differ by more than such draws. why: one sentence. seed: of the order in which images are counted.
    """

    design: str | None
    groups: int | None
    upper_bound: bool
    why: str
    seed: int | None = SEED

    def group_ids(self, labels: np.ndarray | None, n: int) -> np.ndarray:
        """The group of each of n images, int64 (n,); all are in group 0 without error bars."""
        if self.design is None:
            return np.zeros(n, np.int64)
        return counted_off(labels if self.design == "stratified" else None, n, self.groups)

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def counted_off(labels: np.ndarray | None, n: int, groups: int = GROUPS) -> np.ndarray:
    """The group of each of n images, int64 (n,) in [0, groups): images in a random order, counted off class by class.

    So every group has its share of every class, and all have the same size (both to one image). Without labels all are
    one class, and the groups are random. The order is that of a seed: the file's own may hide what takes turns.

    Raises ValueError for labels of another length.
    """
    order = generator(SEED, Stream.GROUPS).permutation(n)
    if labels is not None:
        if np.shape(labels) != (n,):
            raise ValueError(f"labels of shape {np.shape(labels)} for {n} images")
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    result = np.empty(n, np.int64)
    result[order] = np.arange(n) % groups
    return result


def design_of(n: int, histogram: Mapping[str, int] | None, rule: str | None = None) -> Design:
    """The groups that differ as draws of n images do: with as much of the spread between classes as those have.

    histogram: images of each class that there is, None where the classes are unknown. rule: the sample manifest's
    `labels_rule`, None without one.

    Where every draw has as many images of a class, the spread between classes is in no draw and may be in no group:
    groups are stratified, and their number is one that the images of a class can be shared out over. Where the classes
    are drawn too, it is in both: groups are random. Counts that differ by at most one are taken for the former, others
    for the latter, unless the manifest says that labels were drawn. Random groups of balanced classes overstate.
    """
    if n < FEWEST:
        return Design(None, None, False, f"they take at least {FEWEST} images, and there are {n}", None)
    if rule == "random":
        return Design("random", GROUPS, False, "labels were drawn at random, and so are the groups")
    if histogram is None:
        return Design(
            "random", GROUPS, True,
            "classes are unknown, so groups are random; the errors are right if the class of each image was drawn at "
            "random, and too large if every class has as many images",
        )  # fmt: skip
    counts = np.array(list(histogram.values()))
    least, most = int(counts.min()), int(counts.max())
    if len(counts) == 1:
        return Design("random", GROUPS, False, "all images are of one class, so groups are random")
    if most - least > 1:
        return Design(
            "random", GROUPS, False,
            f"classes have {least:,} to {most:,} images, as labels drawn at random do, so groups are random too; an "
            "upper bound where these numbers were fixed",
        )  # fmt: skip
    each = f"{least:,}" if least == most else f"{least:,} or {most:,}"
    balanced = f"classes are balanced, {each} image{'s' * (most > 1)} each"
    if least == 1:
        return Design(
            "random", GROUPS, True,
            f"{balanced}, and one image does not tell the spread within its class from that between classes: random "
            "groups are an upper bound",
        )  # fmt: skip
    # Below 10 a class each group takes one of each; from there on their number is the first that divides them well.
    candidates = range(GROUPS, FEWEST) if least >= GROUPS else range(least, most + 1)
    groups = min(candidates, key=lambda number: (max(_between(counts, number), LET_IN / 5), number))
    if _between(counts, groups) > LET_IN:
        return Design(
            "stratified", groups, True,
            f"{balanced}, shared out unevenly over the groups: an upper bound, with some of the spread between classes",
        )  # fmt: skip
    return Design("stratified", groups, False, f"{balanced}, and every group has its share of each")


def _between(counts: np.ndarray, groups: int) -> float:
    """Share of the spread between classes of these counts that stratified groups have of that of random ones.

    Of c images of a class, r = c mod G come one by one to groups, whose numbers vary by r / G (1 - r / G) then; at
    random they vary by c / G (1 - 1 / G). 0 where G divides all counts, 1 for one image a class.
    """
    rest = counts % groups
    return float((rest * (groups - rest)).sum() / (counts.sum() * (groups - 1)))
