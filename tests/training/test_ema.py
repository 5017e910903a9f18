"""Averages against closed forms and written-out sums, and their snapshots on the disk."""

import hashlib
import json
import math
import resource
import textwrap

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sit_atconv.config import Ema
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.ema import Averages, gamma_of, read_snapshots


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def profile(gamma: float, updates: int) -> np.ndarray:
    """The weight of every update in a power-function average, in float64."""
    steps = np.arange(updates + 1) / updates
    return np.diff(steps ** (gamma + 1))


def test_constant_closed_form_and_buffers():
    model = nn.BatchNorm1d(2)
    averages = Averages(model, Ema(decay=0.9))
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
        model.num_batches_tracked.fill_(4)
    for updates in range(1, 6):
        averages.update(model, updates)
    ema = averages.models["ema"]
    torch.testing.assert_close(ema.weight, torch.full((2,), 3 + (1 - 3) * 0.9**5))
    assert ema.running_mean.tolist() == [7.0, 7.0]
    assert (ema.num_batches_tracked.item(), ema.training, model.training) == (4, False, True)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert list(averages.models) == ["ema"]


def test_warmup_is_the_least_of_its_growth_and_the_decay():
    """ema_n = sum over i of (1 - b_i) theta_i times the product of the later b, with b_n = min(decay, (1+n)/(10+n))."""
    model = nn.Linear(1, 1, bias=False)
    fill(model, 5.0)
    averages = Averages(model, Ema(kind="warmup", decay=0.8))
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(1, 61)]
    assert decays[0] == 2 / 11
    assert decays[-1] == 0.8 > decays[33]
    expected = 5.0
    for n, decay in enumerate(decays, 1):
        fill(model, math.sin(n))
        averages.update(model, n)
        expected = decay * expected + (1 - decay) * math.sin(n)
        assert averages.models["ema"].weight.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_power_averages_are_the_sum_by_their_profiles():
    """Every width, after every update; the start leaves no trace, and of theta = n is n (gamma + 1) / (gamma + 2)."""
    model = nn.Linear(2, 1, bias=False)
    fill(model, 1e6)
    averages = Averages(model, Ema(kind="power", stds=[0.05, 0.1, 0.25, 0.1234]))
    assert list(averages.models) == ["ema", "ema-0.100", "ema-0.250", "ema-0.1234"]
    seen = []
    for n in range(1, 301):
        seen.append([float(n), math.cos(n / 20)])
        with torch.no_grad():
            model.weight.copy_(torch.tensor([seen[-1]]))
        averages.update(model, n)
        if n in (1, 2, 17, 300):
            for name, std in zip(averages.models, (0.05, 0.1, 0.25, 0.1234), strict=True):
                expected = profile(gamma_of(std), n) @ np.array(seen)
                np.testing.assert_allclose(averages.models[name].weight[0].numpy(), expected, rtol=1e-5, atol=2e-5)
    gamma = gamma_of(0.05)
    # The sum over steps is that of the integral, half a step later.
    assert averages.models["ema"].weight[0, 0].item() == pytest.approx(300 * (gamma + 1) / (gamma + 2) + 0.5, rel=1e-3)


@pytest.mark.parametrize("std", [0.001, 0.03, 0.05, 0.1, 0.2, 0.28, 12**-0.5])
def test_gamma_has_the_std(std):
    """Mean and standard deviation of the density t^gamma on [0, 1], by quadrature and by the formula."""
    gamma = gamma_of(std)
    assert gamma >= 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(std**2, rel=1e-9)
    weights, middles = profile(gamma, 200_000), (np.arange(200_000) + 0.5) / 200_000
    mean = weights @ middles
    assert math.sqrt(weights @ (middles - mean) ** 2) == pytest.approx(std, rel=1e-4)


def test_known_gammas_and_the_range():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-9)
    for std in (0.0, -0.1, 1e-300, 0.29, math.nan):
        with pytest.raises(InputError, match="std="):
            gamma_of(std)


def test_what_the_settings_leave_out():
    assert Ema().decay == Ema(kind="warmup").decay == 0.9999
    assert Ema(decay=0.0).decay == 0.0
    power = Ema(kind="power")
    assert (power.stds, power.decay) == ([0.05, 0.1], None)
    assert list(Averages(nn.Linear(1, 1), Ema(kind="power")).models) == ["ema", "ema-0.100"]


def test_averages_are_fp32_of_a_model_in_half_precision():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    fill(model, 1.0)
    averages = Averages(model, Ema(decay=0.999))
    fill(model, 2.0)
    for n in range(1, 11):
        averages.update(model, n)
    assert averages.models["ema"].weight.dtype == torch.float32
    assert averages.models["ema"].weight.item() == pytest.approx(2 - 0.999**10, rel=1e-6)  # lost in bf16


def test_a_wrapped_model_is_refused_rather_than_missed():
    model = nn.Linear(2, 2)
    averages = Averages(model, Ema(decay=0.9))
    with pytest.raises(KeyError, match="tensors differ"):
        averages.update(nn.Sequential(model), 1)
    with pytest.raises(ValueError, match=r"weight is \(1, 2\) here"):  # broadcast, if nobody looked
        averages.update(nn.Linear(2, 1), 1)


SHARDED = """
    import copy, sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from sit_atconv.config import Ema
    from sit_atconv.training.ema import Averages

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 7))
    settings = Ema(kind="power", stds=[0.05, 0.2])
    whole, reference = copy.deepcopy(model), Averages(model, settings)
    averages = Averages(model, settings)
    mesh = init_device_mesh("cpu", (2,))
    for module in (model, *averages.models.values()):
        fully_shard(module[2], mesh=mesh)
        fully_shard(module, mesh=mesh)
    for n in range(1, 6):
        with torch.no_grad():
            for sharded, parameter in zip(model.parameters(), whole.parameters(), strict=True):
                assert isinstance(sharded, DTensor)
                parameter.copy_(torch.randn_like(parameter))
                full = sharded.full_tensor().copy_(parameter)
                local = torch.distributed.tensor.distribute_tensor(full, mesh, sharded.placements).to_local()
                sharded.to_local().copy_(local)
            model[1].running_mean.fill_(n)
            whole[1].running_mean.fill_(n)
        averages.update(model, n)
        reference.update(whole, n)
    for name, average in averages.models.items():
        expected = reference.models[name].state_dict()
        for key, tensor in average.state_dict().items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(tensor, expected[key]), key
    unsharded = Averages(whole, settings)
    try:
        unsharded.update(model, 1)
    except ValueError as error:
        print("refused", error)
    dist.destroy_process_group()
    print("same")
"""


def test_sharded_averages_follow_a_sharded_model(process_server, tmp_path):
    """FSDP2 on two processes: to the bit what one process computes, and refused where one side alone is sharded."""
    codes, said = process_server(textwrap.dedent(SHARDED), tmp_path, [], {}, {})
    assert codes == [0, 0], said
    for rank in range(2):
        refused, same = (tmp_path / f"printed-{rank}").read_text().splitlines()
        assert refused.startswith("refused EMA: 0.weight is ")
        assert same == "same"


# Snapshots


def written(run, step=10, updates=9, **settings):
    torch.manual_seed(step)
    model = nn.BatchNorm1d(3)
    averages = Averages(model, Ema(kind="power", snapshot_every=10, **settings))
    tensors = {name: {"weight": torch.randn(3), "bias": torch.randn(3)} for name in averages.models}
    return averages, tensors, averages.write_snapshot(run, step, tensors, updates)


def test_a_snapshot_says_what_it_is(tmp_path):
    _, tensors, folder = written(tmp_path)
    written(tmp_path, 20, 19)
    assert folder == tmp_path / "snapshots" / "step-0000010"
    assert sorted(path.name for path in folder.iterdir()) == ["ema-0.100.safetensors", "ema.safetensors"]
    for name, std in (("ema", 0.05), ("ema-0.100", 0.1)):
        stored = load_file(folder / f"{name}.safetensors")
        assert stored.keys() == {"weight", "bias"}
        assert all(torch.equal(stored[key], tensors[name][key]) for key in stored)
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            facts = json.loads(file.metadata()["snapshot"])
        buffers = ["num_batches_tracked", "running_mean", "running_var"]
        assert facts == {
            "format": 1, "step": 10, "updates": 9, "std": std, "gamma": gamma_of(std), "buffers": buffers,
        }  # fmt: skip
    found = read_snapshots(tmp_path)
    assert [(one.step, one.updates, one.std) for one in found] == [
        (10, 9, 0.05), (10, 9, 0.1), (20, 19, 0.05), (20, 19, 0.1),
    ]  # fmt: skip
    assert read_snapshots(tmp_path / "nothing") == []


def test_a_snapshot_is_written_again_with_the_same_bytes(tmp_path):
    averages, tensors, folder = written(tmp_path)
    digests = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    left = folder.with_name(f".{folder.name}.unfinished")
    left.mkdir()
    (left / "ema-0.300.safetensors").touch()
    reordered = {name: dict(reversed(part.items())) for name, part in tensors.items()}
    averages.write_snapshot(tmp_path, 10, reordered, 9)
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == digests
    assert list(folder.parent.iterdir()) == [folder]
    # With a file that is damaged, or of the user's, what was there is set aside.
    (folder / "stray").write_text("mine")
    averages.write_snapshot(tmp_path, 10, reordered, 9)
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == digests
    assert (folder.with_name(f"{folder.name}.aside") / "stray").read_text() == "mine"
    assert len(read_snapshots(tmp_path)) == 2


def test_metadata_has_one_key_since_several_come_in_any_order(tmp_path):
    _, _, folder = written(tmp_path)
    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["snapshot"]


def test_what_an_interrupted_writing_left_is_no_snapshot(tmp_path):
    _, _, folder = written(tmp_path)
    folder.rename(folder.with_name(folder.name + ".tmp"))
    assert read_snapshots(tmp_path) == []


def test_damaged_snapshots_are_named(tmp_path):
    _, _, folder = written(tmp_path)
    path = folder / "ema.safetensors"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-4], "cut or damaged"),
        (b"", "cut or damaged"),
        (whole.replace(b'\\"step\\"', b'\\"stop\\"'), "cut or damaged"),
        (whole.replace(b'\\"format\\": 1', b'\\"format\\": 2'), "format 2; this reads 1"),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as raised:
            read_snapshots(tmp_path)
        assert str(path) in str(raised.value)


def test_a_disk_that_takes_no_snapshot_leaves_the_one_that_was_there(tmp_path):
    averages, tensors, folder = written(tmp_path)
    before = (folder / "ema.safetensors").read_bytes()
    larger = {name: {"weight": torch.zeros(100_000)} for name in tensors}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file that grows past it fails to
    try:
        with pytest.raises(InputError, match=r"step-0000010' cannot be written: .*make room"):
            averages.write_snapshot(tmp_path, 10, larger, 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "ema.safetensors").read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]
