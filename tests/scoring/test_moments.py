"""Moments from sums per group: any split, order and number of processes give what numpy gives from all features."""

import numpy as np
import pytest
import torch

from sit_atconv.scoring.jackknife import counted_off
from sit_atconv.scoring.moments import GroupSums, moments

N, DIM = 157, 12


def features(seed=0):
    # A mean far from zero, as that of features after a ReLU.
    return (np.random.default_rng(seed).normal(size=(N, DIM)) * 0.3 + 2).astype(np.float32)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * abs(b).max())


def by_numpy(rows):
    rows = rows.astype(np.float64)
    return rows.mean(0), np.cov(rows, rowvar=False)


def added(*parts):
    """As `all_reduce` adds up the sums of processes."""
    total = GroupSums(DIM)
    for own, *others in zip(total._tensors(), *(part._tensors() for part in parts), strict=True):
        own += sum(others)
    return total


def test_any_split_and_order_equal_numpy():
    x, ids = features(), counted_off(None, N)
    assert_equal(GroupSums(DIM).update(x, ids).moments(), by_numpy(x))
    for seed, size in enumerate((1, 7, 50)):
        order = np.random.default_rng(seed).permutation(N)
        parts = [
            GroupSums(DIM).update(x[rows], ids[rows]) for rows in np.array_split(order, range(size, N, size))
        ]  # fmt: skip
        total = parts[0]
        for part in parts[1:]:
            total = added(part, total)
        assert_equal(total.moments(), by_numpy(x))
        assert_equal(total.moments(without=3), by_numpy(x[ids != 3]))
    assert_equal(moments(x), by_numpy(x))


def test_without_a_group_are_the_others():
    x = features()
    ids = counted_off(np.arange(N) % 7, N)
    full, *deleted = GroupSums(DIM).update(x, ids).all_moments()
    assert_equal(full, by_numpy(x))
    assert len(deleted) == 10
    for group, found in enumerate(deleted):
        assert_equal(found, by_numpy(x[ids != group]))
    assert len(list(GroupSums(DIM, 1).update(x, np.zeros(N, np.int64)).all_moments())) == 1


PROCESS = """
import sys
import numpy as np
import torch.distributed as dist
from sit_atconv.scoring.jackknife import counted_off
from sit_atconv.scoring.moments import GroupSums

dist.init_process_group("gloo")
x = np.load(sys.argv[1], allow_pickle=False)
ids = counted_off(np.arange(len(x)) % 3, len(x))
mine = slice(0, 30) if dist.get_rank() == 0 else slice(30, None)
result = GroupSums(x.shape[1]).update(x[mine], ids[mine]).all_reduce()
np.savez(f"{sys.argv[2]}/{dist.get_rank()}.npz", *result.moments(), *result.moments(without=2))
dist.destroy_process_group()
"""


def test_two_processes_add_up_to_one(process_server, tmp_path):
    x = features()
    np.save(tmp_path / "x.npy", x)
    codes, said = process_server(PROCESS, tmp_path, [tmp_path / "x.npy", tmp_path], {}, {})
    assert codes == [0, 0], said
    ids = counted_off(np.arange(N) % 3, N)
    expected = (*by_numpy(x), *by_numpy(x[ids != 2]))
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz", allow_pickle=False) as arrays:
            assert_equal([arrays[f"arr_{number}"] for number in range(4)], expected)


def test_what_has_no_moments_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        moments(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        moments(np.array([[0.0, np.nan], [1.0, 2.0]]))
    sums = GroupSums(3, 2).update(torch.zeros(3, 3), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="1 images have no covariance"):
        sums.moments(without=1)
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        sums.update(torch.zeros(3, 4), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="for 2 images"):
        sums.update(torch.zeros(3, 3), np.zeros(2, np.int64))
