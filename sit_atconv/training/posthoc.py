"""sit-atconv posthoc RUN --std STD --out FOLDER: a power-function average of another width than was tracked.

A weighted sum of a run's snapshots (`ema.snapshot_every`), with the weights whose sum of stored profiles comes nearest
to the profile wanted: "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696,
section 3.2 and appendix C). FOLDER is a model that `sit-atconv sample` takes.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError, named, told
from sit_atconv.runtime.files import check_out, new_path
from sit_atconv.training import checkpoint
from sit_atconv.training.ema import SAMPLED, Snapshot, gamma_of, read_snapshots

# Relative, in L2. Up to it, averages of weights that drift, decay or swing come out within about 1e-3, and noise that
# is white over the steps differs by that share of what the average keeps of it.
MAX_PROFILE_ERROR = 0.01
LEAST_WEIGHT = 1e-9  # of a snapshot: under it, float32 does not show it
RIDGE = 1e-14  # relative: equal profiles, of snapshots with no update between them, share a weight


def inner_product(t1: np.ndarray, gamma1: np.ndarray, t2: np.ndarray, gamma2: np.ndarray) -> np.ndarray:
    """Integral over t > 0 of p1 p2, with the profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) for t <= T, 0 beyond.

    t1, t2: the ends T > 0. With m = min(t1, t2), a = gamma1 + 1 and b = gamma2 + 1, it is
    a b / (a + b - 1) (m / t1)^a (m / t2)^b / m, which no large power overflows.
    """
    a, b, m = gamma1 + 1, gamma2 + 1, np.minimum(t1, t2)
    return a * b / (a + b - 1) * (m / t1) ** a * (m / t2) ** b / m


@dataclass(frozen=True)
class Fit:
    """Snapshots whose sum by `weights`, which add up to 1, stands for the average of width `std` after `step`.

    error: of the summed profile, relative, in L2.
    """

    std: float
    step: int
    updates: int
    snapshots: tuple[Snapshot, ...]
    weights: tuple[float, ...]
    error: float


def fit(snapshots: list[Snapshot], std: float, step: int) -> Fit:
    """The weights of least squares, with sum 1, for the profile of width `std` that ends at `step`.

    Snapshots up to `step` are used, and there must be one of it. Raises InputError without any, for a step without one,
    a std out of range, and a profile that the snapshots miss by more than MAX_PROFILE_ERROR.
    """
    gamma = gamma_of(std)
    steps = sorted({snapshot.step for snapshot in snapshots})
    if not steps:
        raise InputError("no snapshots: train with ema.kind=power and ema.snapshot_every")
    if step not in steps:
        nearest = sorted(sorted(steps, key=lambda other: abs(other - step))[:2])
        raise InputError(f"step {step} has no snapshot; the nearest are of {' and '.join(map(str, nearest))}")
    # Before the first update an average is no average yet.
    used = [snapshot for snapshot in snapshots if snapshot.step <= step and snapshot.updates > 0]
    if not used:
        raise InputError(f"step {step}: no update had been made; choose a later step")
    updates = max(snapshot.updates for snapshot in used)
    ends = np.array([snapshot.updates for snapshot in used], dtype=np.float64)
    gammas = np.array([gamma_of(snapshot.std) for snapshot in used])
    between = inner_product(ends[:, None], gammas[:, None], ends, gammas)
    with_wanted = inner_product(ends, gammas, float(updates), gamma)
    wanted = inner_product(float(updates), gamma, float(updates), gamma)
    # With sum 1, sum w_i p_i - p = sum w_i (p_i - p), so the error is the square root of w' gaps w.
    gaps = (between - with_wanted[:, None] - with_wanted + wanted) / wanted
    weights = np.linalg.solve(gaps + RIDGE * np.eye(len(used)), np.ones(len(used)))
    weights /= weights.sum()
    weights[np.abs(weights) < LEAST_WEIGHT] = 0
    weights /= weights.sum()
    error = float(np.sqrt(max(weights @ gaps @ weights, 0)))
    if error > MAX_PROFILE_ERROR:
        tracked = sorted({snapshot.std for snapshot in used})
        raise InputError(
            f"std={std}: the {len(used)} snapshots up to step {step}, of std {tracked}, miss its profile by "
            f"{error:.1%}, more than {MAX_PROFILE_ERROR:.0%}; choose a std nearer to theirs, or a later step"
        )
    kept = [index for index in range(len(used)) if weights[index]]
    return Fit(std, step, updates, tuple(used[index] for index in kept), tuple(weights[kept].tolist()), error)


def combine(found: Fit) -> dict[str, torch.Tensor]:
    """The tensors of the average that a fit stands for, in the dtypes stored; buffers are those of its last snapshot.

    Sums are in float64, a tensor at a time, of files that are mapped and not read as a whole.
    Raises InputError where the snapshots do not hold the same tensors or a file is damaged.
    """
    last = max(found.snapshots, key=lambda snapshot: snapshot.updates)
    summed = {}
    with told("the snapshots cannot be summed", OSError, SafetensorError, RuntimeError), ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, framework="pt")) for snapshot in found.snapshots]
        newest = files[found.snapshots.index(last)]
        names = set(newest.keys())
        for snapshot, file in zip(found.snapshots, files, strict=True):
            if set(file.keys()) != names:
                raise InputError(f"snapshot {str(snapshot.path)!r} holds other tensors than the newest")
        for name in Progress(sorted(names), desc="sum", unit="tensor", delay=1):
            tensor = newest.get_tensor(name)
            if name in last.buffers:
                summed[name] = tensor.clone()
                continue
            total = torch.zeros(tensor.shape, dtype=torch.float64)
            for file, weight in zip(files, found.weights, strict=True):
                total.add_(file.get_tensor(name), alpha=weight)
            summed[name] = total.to(tensor.dtype)
    return summed


def write_model(run: Path, std: float, step: int | None, out: Path, force: bool = False) -> Fit:
    """Write the average of width `std` after `step` (None: of the newest snapshot) as a model folder, whole or not.

    `out` holds what `SiTTransformer2DModel.save_pretrained` writes, of the configuration in the run's newest
    checkpoint, and conversion.json: std, step, profile error, snapshots with their weights, SHA-256 of every file.
    force: what is at `out` is set aside.
    Raises InputError as `fit` and `combine`, for a run without a checkpoint, and for an `out` that exists or cannot be
    written.
    """
    check_out(out, force=force)
    if not run.is_dir():
        raise InputError(f"run {str(run)!r}: no such folder")
    snapshots = read_snapshots(run)
    if step is None:
        step = max((snapshot.step for snapshot in snapshots), default=0)
    found = fit(snapshots, std, step)
    newest = checkpoint.newest_leased(run)
    if newest is None:
        raise InputError(f"run {str(run)!r} has no checkpoint yet, which says what the model is; train on to one")
    folder, _lease = newest
    manifest, tensors = checkpoint.read_manifest(folder, under=f"{SAMPLED}/config.json"), combine(found)
    with named(f"the snapshots of {str(run)!r}"):
        model = checkpoint.model_of_average(folder / SAMPLED, manifest, tensors)
    record = {
        "made_by": "sit_atconv.posthoc",
        "weights": SAMPLED,
        "std": found.std,
        "gamma": gamma_of(found.std),
        "step": found.step,
        "updates": found.updates,
        "profile_error": found.error,
        "snapshots": [
            {"file": each.path.relative_to(run).as_posix(), "std": each.std, "updates": each.updates, "weight": weight}
            for each, weight in zip(found.snapshots, found.weights, strict=True)
        ],
    }
    with new_path(out, force=force) as unfinished:
        model.save_pretrained(unfinished)
        checkpoint.write_conversion(unfinished, record)
    return found
