"""References to score against."""

from pathlib import Path

import numpy as np

from eval.frechet import Moments
from eval.sources import UNREADABLE
from sit_atconv.errors import InputError


def read_moments(path: Path) -> Moments | None:
    """`mu` and `sigma` of an npz file such as ADM's, or None when it holds images instead. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "mu" not in arrays:
                return None
            return Moments(arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64))
    except UNREADABLE as error:
        raise InputError(f"reference {str(path)!r} cannot be read: {error}") from None
