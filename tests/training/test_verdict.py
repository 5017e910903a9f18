"""A decision that is read late makes the run that is made where each is read at once."""

import json
import os
import signal
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same_bits, log_rows, run_recipe, slowly
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sit_atconv.classification.loop import train as classify
from sit_atconv.classification.objective import ClassificationObjective
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.sharding import load_optimizer, optimizer_tensors, save_optimizer
from sit_atconv.training import checkpoint, trainer
from sit_atconv.training.log import Means
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.verdict import AtOnce, Late

NAN = float("nan")
KEYS = ("step", "loss", "loss_by_time", "grad_norm", "lr", "update_ratio", "skipped")


def as_on_cuda(monkeypatch, late: bool, kind=FlowObjective) -> None:
    """Train with the fused optimiser, which a CPU has too, and with its decisions read late, or at once."""
    make = kind.make_optimizer
    monkeypatch.setattr(kind, "make_optimizer", lambda self, fused: make(self, True))
    if not late:
        monkeypatch.setattr(trainer, "Late", AtOnce)


def poison(monkeypatch, steps, kind=FlowObjective) -> None:
    """NaN as a loss in these steps (0-based)."""
    losses = kind.losses

    def poisoned(self, batch, forward):
        return [loss * (NAN if forward.step in steps else 1.0) for loss in losses(self, batch, forward)]

    monkeypatch.setattr(kind, "losses", poisoned)


def left(run: Path) -> tuple:
    """Everything that a run leaves but what the clock says."""
    rows = [[row[key] for key in KEYS] for row in log_rows(run)]
    folders = checkpoint.step_folders(run)
    trainers = [json.loads((folder / "trainer.json").read_text()) for folder in folders]
    snapshots = sorted(run.glob("snapshots/*/*"))
    previews = [path.read_bytes() for path in sorted(run.glob("previews/*"))]
    return rows, [folder.name for folder in folders], trainers, [path.relative_to(run) for path in snapshots], previews


def assert_same_tensors(one: Path, other: Path, pattern: str) -> None:
    paths = sorted(one.rglob(pattern))
    assert paths
    assert [path.relative_to(one) for path in paths] == [
        path.relative_to(other) for path in sorted(other.rglob(pattern))
    ]
    for path in paths:
        found, wanted = load_file(other / path.relative_to(one)), load_file(path)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), path


SECTIONS = {
    "run": {"log_every": 5},
    "train": {"max_steps": 12, "max_skipped": 4},
    "ema": {"kind": "power", "snapshot_every": 4, "decay": None},
    "checkpoint": {"every": 3, "keep_last": 9},
    "preview": {"every": 4, "num": 2, "steps": 1},
}


@pytest.mark.parametrize(
    ("poisoned", "said"),
    [
        ({0, 3, 4, 5, 8}, None),  # the first, and those before the checkpoints of steps 6 and 9 and before a snapshot
        *slowly(
            [
                (set(), None),
                ({9, 10, 11}, "the last 3 of 12 steps were skipped"),
                ({5, 6, 7, 8, 9, 10, 11}, "no finite loss and gradient for 4 steps, up to step 9;"),
            ]
        ),
    ],
    ids=["some", "none", "the last", "too many"],
)
def test_a_run_whose_decisions_are_read_late_is_the_same_run(recipe_file, tmp_path, monkeypatch, poisoned, said):
    runs = [tmp_path / "late", tmp_path / "once"]
    for run in runs:
        with monkeypatch.context() as patched:
            as_on_cuda(patched, late=run.name == "late")
            poison(patched, poisoned)
            if said is None:
                run_recipe(recipe_file(**SECTIONS), f"run.out={run}")
                continue
            with pytest.raises(InputError, match=said):
                run_recipe(recipe_file(**SECTIONS), f"run.out={run}")
    assert left(runs[0]) == left(runs[1])
    assert_same_tensors(*runs, "*.safetensors")


def test_a_step_is_read_when_the_next_is_on_its_way(recipe_file, monkeypatch):
    as_on_cuda(monkeypatch, late=True)
    told, losses, step, outcome = [], FlowObjective.losses, Late.step, Late.outcome
    monkeypatch.setattr(
        FlowObjective, "losses", lambda self, *given: told.append(f"pass {given[1].step}") or losses(self, *given)
    )
    monkeypatch.setattr(Late, "step", lambda self, *given: told.append("step") or step(self, *given))
    monkeypatch.setattr(Late, "outcome", lambda self: told.append("read") or outcome(self))
    run_recipe(recipe_file(run={"log_every": 4}, train={"max_steps": 6}, checkpoint={"every": 9}))
    assert told == [
        "pass 0", "step", "pass 1", "read", "step", "pass 2", "read", "step", "pass 3", "read", "step", "read",
        "pass 4", "step", "pass 5", "read", "step", "read",
    ]  # fmt: skip


def test_a_cpu_settles_every_step_before_the_next(recipe_file, monkeypatch):
    told, optimize = [], Trainer._optimize

    def watched(self, *given):
        optimize(self, *given)
        told.append((self.pending, self.optimizer.optimizer.defaults["fused"], self.verdict_on.func))

    monkeypatch.setattr(Trainer, "_optimize", watched)
    run_recipe(recipe_file(run={"log_every": 8}))
    assert told == [(None, None, AtOnce)] * 8


@pytest.mark.parametrize("row", [3, *slowly([2])])
def test_a_signal_after_a_skipped_step_finds_it(recipe_file, tmp_path, monkeypatch, capsys, row):
    """A stop between a skipped step and its reading: nothing is saved of it, and one too many is told."""
    as_on_cuda(monkeypatch, late=True)
    poison(monkeypatch, {3, 4, 5})
    optimize = Trainer._optimize

    def acting(self, *given):
        optimize(self, *given)
        if self.step == 3 + row:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_optimize", acting)
    path = recipe_file(run={"log_every": 99}, train={"max_skipped": 3}, checkpoint={"every": 3})
    if row == 3:
        with pytest.raises(InputError, match="no finite loss and gradient for 3 steps, up to step 6"):
            run_recipe(path)
    else:
        assert run_recipe(path).name == "step-0000003"
        assert "warning: the last 2 steps, up to 5, were skipped and are not saved" in capsys.readouterr().err


@pytest.mark.slow
def test_statistics_of_a_classifier_follow_the_step_that_they_are_of(tmp_path, monkeypatch):
    for grey, name in enumerate(("dark", "light")):
        for part, number in (("train", 4), ("val", 1)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (16, 16), (40 + 120 * grey + index,) * 3).save(tmp_path / part / name / f"{index}.png")
    tiny = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [1, 1], "stem_strides": [2, 2]}
    sections = {
        "run": {"log_every": 99},
        "data": {"kind": "imagefolder", "root": str(tmp_path / "train"), "val_root": str(tmp_path / "val")},
        "model": {"name": "attnet_xxs", "input_size": 16, "options": tiny},
        "train": {"epochs": 7, "warmup_epochs": 0, "batch_size": 8, "lr": 1e-3},
        "ema": {"decay": 0.6},
        "eval": {"every_epochs": 3},
        "checkpoint": {"every": 5},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    runs = [tmp_path / "late", tmp_path / "once"]
    for run in runs:
        with monkeypatch.context() as patched:
            as_on_cuda(patched, run.name == "late", ClassificationObjective)
            poison(patched, {0, 3}, ClassificationObjective)
            classify(load_recipe(tmp_path / "recipe.yaml", (f"run.out={run}",), ClassifierRecipe))
    assert_same_tensors(*runs, "*.safetensors")
    late, once = ([json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()] for run in runs)
    assert [row["step"] for row in late] == [3, 6, 7]
    assert late == once


PARALLEL = """
    import sys
    import torch.distributed as dist
    import train_sit
    from sit_atconv.runtime import processes
    from sit_atconv.training import launch, trainer
    from sit_atconv.training.objectives.flow import FlowObjective
    from sit_atconv.training.verdict import AtOnce, Late

    how, sharded = sys.argv.pop(1), sys.argv.pop(1) == "sharded"
    if sharded:
        import fsdp_train_sit
    make, losses = FlowObjective.make_optimizer, FlowObjective.losses
    FlowObjective.make_optimizer = lambda self, fused: make(self, True)
    if how == "once":
        trainer.Late = AtOnce
    else:  # as where NCCL carries the tensors
        backend, dist.get_backend = dist.get_backend, lambda group=None: "nccl"

    def poisoned(self, batch, forward):
        bad = forward.step in (2, 5, 6) and dist.get_rank() == 1
        return [loss * (float("nan") if bad else 1) for loss in losses(self, batch, forward)]

    FlowObjective.losses = poisoned
    all_reduce, groups = dist.all_reduce, set()

    def watched(tensor, *args, group=None, **kwargs):
        if tensor.ndim == 1:  # neither the means of a report nor its count of images
            groups.add((tensor.dtype.is_floating_point, group is None))
        return all_reduce(tensor, *args, group=group, **kwargs)

    dist.all_reduce = watched
    train_sit.main()
    print(sorted(groups), trainer.Late is AtOnce)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_skip_what_one_of_them_finds(process_server, recipe_file, tmp_path, sharded):
    """Read late with counts exchanged apart from tensors, or at once: the same bits."""
    path = recipe_file(**SECTIONS | {"preview": {"every": 0}, "train": {"max_steps": 9}})
    runs = [tmp_path / "late", tmp_path / "once"]
    for run in runs:
        arguments = [
            run.name,
            "sharded" if sharded else "whole",
            path,
            f"run.out={run}",
            "train.gradient_accumulation_steps=2",
        ]
        codes, said = process_server(textwrap.dedent(PARALLEL), tmp_path, arguments, {}, {})
        assert codes == [0, 0], said
        apart = run.name == "late"
        printed = (tmp_path / "printed-0").read_text().splitlines()[-1]
        assert printed == f"{[(False, not apart), (True, True)]} {not apart}"
    assert left(runs[0]) == left(runs[1])
    assert [row[-1] for row in left(runs[0])[0]] == [1, 3]
    assert bool([*runs[0].glob("step-*/optimizer/shard-*")]) == sharded
    assert_same_tensors(*runs, "*.safetensors")


SHARDED = """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from sit_atconv.runtime.sharding import full_scalar, local
    from sit_atconv.training.verdict import Late

    class Prepared:  # as Accelerate's wrapper has it
        def __init__(self, optimizer):
            self.optimizer, self.step = optimizer, optimizer.step

    dist.init_process_group("gloo")
    mesh, results = init_device_mesh("cpu", (2,)), []
    for shards in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
        if shards:
            fully_shard(model[1], mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for step in range(4):
            loss = model(torch.randn(4, 5)).square().mean()  # the same of both processes
            loss.backward()
            norm = full_scalar(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            bad = step in (0, 2) and dist.get_rank() == 1
            verdict = Late(loss.detach() * (float("nan") if bad else 1), norm)
            before = [local(p.detach()).clone() for p in model.parameters()]
            verdict.step(Prepared(optimizer))
            same = all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters()))
            assert same == verdict.outcome().skipped == (step in (0, 2))
            assert {float(state["step"]) for state in optimizer.state.values()} == {(step + 1) // 2}
            optimizer.zero_grad()
        results.append([full_scalar(p.detach()) for p in model.parameters()])
    for sharded, whole in zip(*results, strict=True):
        torch.testing.assert_close(sharded, whole)
    dist.destroy_process_group()
    print("same")
"""


def test_a_sharded_optimiser_skips_by_the_same_tensor(process_server, tmp_path):
    codes, said = process_server(textwrap.dedent(SHARDED), tmp_path, [], {}, {})
    assert codes == [0, 0], said


@pytest.mark.parametrize("before", [True, False])
def test_the_optimisers_state_goes_on_fused_or_not(tmp_path, before):
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2), torch.randn(5, 8, 3)
    states = {}
    for fused in (before, not before):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        if fused == before:
            for x in inputs[:3]:
                model(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            save_optimizer(tmp_path, model, optimizer)
        else:
            load_optimizer(tmp_path, model, optimizer)
        assert optimizer.param_groups[0]["fused"] == fused
        states[fused] = optimizer_tensors(model, optimizer)
        assert {float(state["step"]) for state in optimizer.state.values()} == {3}
    assert all(torch.equal(states[True][name], states[False][name]) for name in states[True])
    model(inputs[3]).square().sum().backward()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {4}


def test_means_are_those_of_indexing_by_a_list():
    torch.manual_seed(0)
    means, sums = Means(["a", "b", "c"], torch.device("cpu"), 4), torch.zeros(2, 7)
    for there in ([0, 2], [1], [0, 1, 2], [2]):
        t, losses = torch.rand(33), [torch.randn(33) if index in there else None for index in range(3)]
        means.add(t, *losses)
        values = torch.stack([losses[index] for index in there])
        sums[0, there] += values.sum(1)
        sums[1, there] += 33
        if there[0] == 0:
            bins = 3 + (t * 4).long()
            sums[0].index_add_(0, bins, values[0])
            sums[1].index_add_(0, bins, torch.ones(33))
    assert torch.equal(means.sums, sums)


@pytest.mark.slow
def test_a_norm_without_clipping_leaves_gradients_alone(recipe_file, monkeypatch):
    """The steps are those of clipping to infinity, by which gradients are multiplied by one."""
    runs = []

    def clipping(self):
        runs.append(None)
        return self.accelerator.clip_grad_norm_(self.network.parameters(), float("inf"))

    plain = run_recipe(recipe_file())
    monkeypatch.setattr(Trainer, "_gradient_norm", clipping)
    clipped = run_recipe(recipe_file(), f"run.out={plain.parent.with_name('clipped')}")
    assert len(runs) == 8
    assert_same_bits(plain, clipped)
    assert [row["grad_norm"] for row in log_rows(plain.parent)] == [
        row["grad_norm"] for row in log_rows(clipped.parent)
    ]


@pytest.mark.parametrize("scale", [1.0, NAN])
@pytest.mark.parametrize("form", [Late, partial(AtOnce, scaler=None)], ids=["late", "at once"])
def test_both_forms_put_back_what_a_skipped_step_has_changed(form, scale):
    verdict = form(torch.tensor(scale), torch.tensor(2.0))
    now, before = [torch.full((3,), NAN), torch.tensor(5)], [torch.zeros(3), torch.tensor(4)]
    verdict.put_back(now, before)
    assert verdict.outcome().skipped == (scale != 1)
    assert verdict.outcome().grad_norm == 2
    assert now[0].isnan().all() if scale == 1 else (now[0] == 0).all()
    assert now[1] == (5 if scale == 1 else 4)
    verdict.put_back([], [])
