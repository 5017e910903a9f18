"""Moving averages of a model's weights, and the snapshots of them that `posthoc` makes other widths of.

After update n an average is ema <- beta_n ema + (1 - beta_n) model, with beta_n by kind of average:

    constant   decay
    warmup     min(decay, (1 + n) / (10 + n))
    power      (1 - 1/n)^(gamma + 1): update i weighs what t^gamma has over (i - 1, i], the start nothing. Its width
               relative to n is std = sigma_rel, sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

The last is the power-function average of "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv 2312.02696, section 3.1 and appendix C).
"""

import copy
import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sit_atconv import config
from sit_atconv.runtime import files, limits
from sit_atconv.runtime.compat.torch import copy_each, lerp_each
from sit_atconv.runtime.errors import InputError, reason, told
from sit_atconv.runtime.reading import COUNT, Malformed, parse_json
from sit_atconv.runtime.sharding import local

Pairs = list[tuple[torch.Tensor, torch.Tensor]]

SAMPLED = "ema"  # the name of the average that gets sampled
SNAPSHOTS, SNAPSHOT_FORMAT, METADATA = "snapshots", 1, "snapshot"


def describe(settings: config.Ema) -> str:
    """What is averaged how, in words: "constant, decay 0.9999", "power, std 0.05 and 0.1"."""
    if settings.kind == "power":
        return f"power, std {' and '.join(map(str, settings.stds))}"
    return f"{settings.kind}, decay {settings.decay}"


def gamma_of(std: float) -> float:
    """The exponent gamma >= 0 of the power profile of width std, 1e-8 <= std <= 12^-1/2.

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - std^-2) gamma + 12 - std^-2.
    Raises InputError for another std.
    """
    least = limits.EMA_STD.least
    if not least <= std <= 12**-0.5:
        raise InputError(f"std={std}: the width of a power-function average is {least:g} to {12**-0.5:.4f}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return max(0.0, float(max(roots.real)))  # all three are real; 0 may come out as a rounding error below it


# The share beta_n of an average that update n leaves, by its kind and by decay or gamma.
DECAYS = {
    "constant": lambda decay, updates: decay,
    "warmup": lambda decay, updates: min(decay, (1 + updates) / (10 + updates)),
    "power": lambda gamma, updates: (1 - 1 / updates) ** (gamma + 1),
}


class Averages:
    """Averages of `model`, all moved by one `update` per optimisation step.

    models: name of a checkpoint's folder -> averaged fp32 copy, in eval mode and without gradients. "ema" is the first
    and what gets sampled; with kind "power" it has the first of the stds, and those that follow are named like
    "ema-0.100". Buffers are copied; parameters that are frozen in the model are the model's own.
    """

    def __init__(self, model: nn.Module, settings: config.Ema):
        self.stds: dict[str, float] = {}  # of the power-function averages, by their names
        if settings.kind == "power":
            first, *others = settings.stds
            self.stds = {SAMPLED: first, **{_width_name(std): std for std in others}}
        parameters = {name: gamma_of(std) for name, std in self.stds.items()} or {SAMPLED: settings.decay}
        self.decays = {name: partial(DECAYS[settings.kind], each) for name, each in parameters.items()}
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        self.models = {
            name: copy.deepcopy(model, {id(each): each for each in frozen}).float().eval().requires_grad_(False)
            for name in self.decays
        }
        self._followed: nn.Module | None = None  # what `_pairs` are of: to find them takes longer than to move them
        self._pairs: dict[str, tuple[Pairs, Pairs]] = {}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """One step towards the weights of `model`.

        updates: optimisation steps applied so far, this one included (1 after the first).
        A sharded model (DTensors) needs averages sharded alike; each process moves its own shards.
        Raises KeyError when the model's tensors are not exactly those of the averages, as with a wrapped or compiled
        model (pass the bare one), ValueError when they are sharded otherwise.
        """
        if self._followed is not model:
            self._pairs = {
                name: (
                    _paired(dict(average.named_parameters()), dict(model.named_parameters())),
                    _paired(dict(average.named_buffers()), dict(model.named_buffers())),
                )
                for name, average in self.models.items()
            }
            self._followed = model
        for name, (parameters, buffers) in self._pairs.items():
            lerp_each(*_tensors(parameters), 1 - self.decays[name](updates))
            if buffers:
                copy_each(*_tensors(buffers))

    def write_snapshot(self, run: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], updates: int) -> Path:
        """Write `run`/snapshots/step-XXXXXXX with a safetensors file per power-function average, whole or not at all.

        One that is there already is written again. Call on the main process alone.
        tensors: full CPU tensors of every average, by its name. updates: as `update` was last told.
        Raises DiskFull where the disk has no room, InputError where it does not take it; then nothing is left.
        """
        final = run / SNAPSHOTS / files.step_name(step)
        temporary = files.being_written(final)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for name, std in self.stds.items():
                buffers = sorted(dict(self.models[name].named_buffers()))
                facts = {"format": SNAPSHOT_FORMAT, "step": step, "updates": updates, "std": std}
                facts |= {"gamma": gamma_of(std), "buffers": buffers}
                # A single key: safetensors writes several in an order that changes from process to process.
                save_file(tensors[name], temporary / f"{name}.safetensors", {METADATA: json.dumps(facts)})
            files.settle(temporary)
            if final.exists():
                if not all(map(files.tensors_made_here(METADATA), final.iterdir())):
                    files.set_aside(final)
                else:
                    shutil.rmtree(final)
            temporary.rename(final)
            files.sync(final.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kind = files.DiskFull if files.disk_full(error) else InputError
            remedy = "make room, then go on from the last checkpoint"
            raise kind(f"snapshot {str(final)!r} cannot be written: {reason(error)}; {remedy}") from None
        return final


def _width_name(std: float) -> str:
    return f"{SAMPLED}-{std:.3f}" if math.isclose(std, round(std, 3), rel_tol=1e-9) else f"{SAMPLED}-{std!r}"


def _paired(own: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> Pairs:
    """The tensors of an average, each with the one that it follows."""
    if own.keys() != new.keys():
        raise KeyError(f"EMA: tensors differ from the model's: {sorted(own.keys() ^ new.keys())[:3]}")
    for name, tensor in own.items():
        target, source = local(tensor.detach()), local(new[name].detach())
        if target.shape != source.shape:  # which foreach would broadcast where it can
            raise ValueError(f"EMA: {name} is {tuple(source.shape)} here, the average's {tuple(target.shape)}")
    return [(tensor, new[name]) for name, tensor in own.items() if tensor is not new[name]]


def _tensors(pairs: Pairs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both sides, as they are now: this process's shards, in the average's dtype."""
    targets = [local(own.detach()) for own, _ in pairs]
    sources = [local(new.detach()).to(own.dtype) for own, new in pairs]
    return targets, sources


FACTS_FORM = {"step": COUNT, "updates": COUNT, "std": float, "buffers": [str]}


@dataclass(frozen=True)
class Snapshot:
    """A stored power-function average: its file, after which step and how many updates, its width, and its buffers."""

    path: Path
    step: int
    updates: int
    std: float
    buffers: tuple[str, ...]


def read_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots in a run's folder, oldest first, by width within a step.

    Raises InputError for a file that is damaged or of another format.
    """
    found = []
    for path in run.glob(f"{SNAPSHOTS}/step-*/*.safetensors"):
        if files.step_in(path.parent.name) is None:  # what an interrupted writing left
            continue
        damaged = f"snapshot {str(path)!r} is cut or damaged"
        with told(damaged, OSError, SafetensorError, Malformed, remedy="remove its folder"):
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA, "null")
            version = parse_json(text, METADATA, {"format": object})["format"]
            if version != SNAPSHOT_FORMAT:
                raise InputError(f"{str(path)!r} has snapshot format {version!r}; this reads {SNAPSHOT_FORMAT}")
            facts = parse_json(text, METADATA, FACTS_FORM)
        found.append(Snapshot(path, facts["step"], facts["updates"], facts["std"], tuple(facts["buffers"])))
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.std))
