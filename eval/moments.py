"""Mean and covariance of features, from sums per group of images that add up over batches, shards, processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eval.jackknife import GROUPS


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


class GroupSums:
    """Number, sum and sum of outer products of each group's features, float64: n (G,), sum (G, D), outer (G, D, D).

    Sums of disjoint sets of images add to those of the union (`all_reduce`), in any split and order to rounding.
    """

    def __init__(self, dim: int, groups: int = GROUPS):
        self.n = torch.zeros(groups, dtype=torch.float64)
        self.sum = torch.zeros(groups, dim, dtype=torch.float64)
        self.outer = torch.zeros(groups, dim, dim, dtype=torch.float64)

    def update(self, features: np.ndarray | torch.Tensor, group_ids: np.ndarray) -> "GroupSums":
        """Add features (B, D) of images of these groups (B,). Raises ValueError for other shapes, or not finite."""
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.sum.shape[1] or len(features) != len(group_ids):
            raise ValueError(
                f"features of shape {tuple(features.shape)} for {len(group_ids)} images of {self.sum.shape[1]} features"
            )
        if not features.isfinite().all():
            raise ValueError("features are not finite; check the images and the extractor's weights")
        group_ids = torch.as_tensor(group_ids)
        for group in group_ids.unique().tolist():
            rows = features[group_ids == group].to("cpu", torch.float64)
            self.n[group] += len(rows)
            self.sum[group] += rows.sum(0)
            self.outer[group].addmm_(rows.T, rows)
        return self

    def all_reduce(self) -> "GroupSums":
        """Add up the sums of all processes, where there are several; every process must call it."""
        if dist.is_initialized():
            device = "cpu" if "cpu:" in str(dist.get_backend_config()) else "cuda"  # nccl alone has no CPU tensors
            for tensor in self._tensors():
                moved = tensor.to(device)
                dist.all_reduce(moved)
                tensor.copy_(moved)
        return self

    def moments(self, without: int | None = None) -> Moments:
        """Moments of all images, or of those of all groups but one. Raises ValueError for fewer than two images."""
        n, total, outer = (tensor.sum(0) for tensor in self._tensors())
        if without is not None:
            n, total, outer = n - self.n[without], total - self.sum[without], outer - self.outer[without]
        if n < 2:
            raise ValueError(f"{int(n)} images have no covariance; give at least two")
        mu = total / n
        return Moments(mu.numpy(), ((outer - n * mu.outer(mu)) / (n - 1)).numpy())

    def all_moments(self) -> Iterator[Moments]:
        """Moments of all images; then those without each of the groups, where there are several."""
        yield self.moments()
        yield from map(self.moments, range(len(self.n)) if len(self.n) > 1 else ())

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.n, self.sum, self.outer


def moments(features: np.ndarray | torch.Tensor) -> Moments:
    """Moments of features (N, D). Raises ValueError for fewer than two rows or non-finite numbers."""
    return GroupSums(features.shape[1], 1).update(features, np.zeros(len(features), np.int64)).moments()
