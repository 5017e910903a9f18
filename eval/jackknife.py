"""Error bar and bias of a score, from the scores that result when a tenth of the images is left out at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A score, its standard error, and the score without its 1/N bias; None where too few images tell."""

    value: float
    se: float | None
    corrected: float | None


def jackknife(full: float, deleted: Sequence[float]) -> Estimate:
    """Delete-a-group jackknife (Quenouille 1956, Tukey 1958) of a score `full` and those without each of G groups.

    se = sqrt((G - 1) / G sum (deleted - mean)^2); corrected = G full - (G - 1) mean, which takes away a bias that is
    proportional to 1/N. The groups are of one size (to one image).

    The error is that of drawing the samples anew from the same model. The reference is taken as given: its own
    sampling error is in no error bar, and neither is that of training the model anew, which is larger.

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
