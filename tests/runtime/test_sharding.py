"""Sharded training is the training of one process: saved and loaded on 1, 2 and 4 processes and unsharded, to the bit.

The processes are those of tests/sharded_training.py, over gloo, through Accelerate's own FSDP2 code. What a GPU alone
shows is in tests/test_gpu_sharding.py.
"""

import json
from pathlib import Path

import pytest
import sharded_training as sharded
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from sit_atconv import create_model
from sit_atconv.layers.projectors import Projectors
from sit_atconv.runtime import sharding
from sit_atconv.runtime.errors import InputError
from sit_atconv.training import checkpoint

SOURCES = ("run-1", "run-2-sharded")
WORLDS = (1, 2, 4)


def go_on(aligned, average, optimizer, steps: range) -> list[list[float]]:
    """[loss, gradient norm] of steps on one process, without any of the machinery under test."""
    figures = []
    for step in steps:
        loss = next(sharded.losses(aligned, step, 0, 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(aligned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sharded.follow(average, aligned.model)
        figures.append([float(loss.detach()), float(norm)])
    return figures


@pytest.fixture(scope="module")
def runs(process_server, tmp_path_factory) -> Path:
    """The folder in which everything has run; its expected.json is the unsharded run."""
    folder = tmp_path_factory.mktemp("sharded")
    aligned, average = sharded.make()
    optimizer = sharded.make_optimizer(aligned)
    figures = go_on(aligned, average, optimizer, range(sharded.STEP))
    sharded.save(folder / "run-1", aligned, average, optimizer)
    figures += go_on(aligned, average, optimizer, range(sharded.STEP, sharded.STEP + sharded.MORE))
    (folder / "expected.json").write_text(json.dumps(figures))
    program = (ROOT / "tests" / "sharded_training.py").read_text()
    codes, said = process_server(program, folder, [folder], {"environment": {"OWN": str(ROOT / "tests")}})
    assert codes == [0], said[0][-4000:]
    return folder


def expected(runs: Path, start: int = 0) -> torch.Tensor:
    return torch.tensor(json.loads((runs / "expected.json").read_text())[start:])


def results(runs: Path, world: int, rank: int = 0) -> dict:
    return json.loads((runs / f"results-{world}-{rank}.json").read_text())


def folder_of(runs: Path, source: str) -> Path:
    return runs / source / f"step-{sharded.STEP:07d}"


def assert_close(figures: list, others: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(figures), others, rtol=1e-5, atol=0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its files alone."""
    tensors = {f"ema.{name}": x for name, x in load_file(folder / "ema/diffusion_pytorch_model.safetensors").items()}
    for file, prefix in (("diffusion_pytorch_model", "trained.model"), ("projectors", "trained.projectors")):
        tensors |= {f"{prefix}.{name}": x for name, x in load_file(folder / f"model/{file}.safetensors").items()}
    if (folder / "optimizer.safetensors").exists():
        whole = load_file(folder / "optimizer.safetensors")
    else:
        parts: dict[str, list] = {}
        for path in (folder / "optimizer").iterdir():
            with safe_open(path, "pt") as file:
                offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    parts.setdefault(name, []).append((offsets[name]["saved_offsets"], file.get_tensor(name)))
        ordered = {name: [part for _, part in sorted(found, key=lambda it: it[0])] for name, found in parts.items()}
        whole = {name: found[0] if found[0].ndim == 0 else torch.cat(found) for name, found in ordered.items()}
    return tensors | {f"optimizer.{name}": x for name, x in whole.items()}


@pytest.mark.slow
def test_sharded_steps_are_those_of_one_process(runs):
    for rank in (0, 1):
        two = results(runs, 2, rank)
        assert_close(two["from the start"] + two["goes on"], expected(runs))
        assert_close(two["accumulated"], expected(runs)[: sharded.STEP])


@pytest.mark.slow
def test_the_average_is_sharded_as_the_model_is(runs):
    two = results(runs, 2)
    assert two["groups"] == ["", *(f"model.blocks.{index}" for index in range(3))]
    assert two["ema groups"] == ["", *(f"blocks.{index}" for index in range(3))]
    assert two["ema"]
    assert two["whole after a forward"] == 0


@pytest.mark.slow
def test_a_forward_pass_before_saving_hides_no_state(runs):
    two = results(runs, 2)
    assert two["states"] == 3 * two["parameters"] > 0


@pytest.mark.slow
def test_what_is_written_is_what_was_trained(runs):
    """The files of both runs, against what the processes held, and against each other."""
    folder = folder_of(runs, "run-2-sharded")
    assert sorted(path.name for path in (folder / "optimizer").iterdir()) == [
        f"shard-0000{index}-model-00001-of-00001.safetensors" for index in (1, 2)
    ]
    of_two, held, of_one = stored(folder), load_file(runs / "saved.safetensors"), stored(folder_of(runs, "run-1"))
    assert of_two.keys() == held.keys() == of_one.keys()
    for name, tensor in of_two.items():
        assert torch.equal(tensor, held[name]), name
        two, one = (each[name] for each in (of_two, of_one))
        if name.endswith("attn.qkv.bias"):  # a bias of the keys has no gradient but rounding, and AdamW takes its sign
            two, one = (torch.cat([q, v]) for q, _, v in (two.chunk(3), one.chunk(3)))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=name)
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) < 1.5 * sum(tensor.nbytes for tensor in held.values())
    assert set(checkpoint.read_manifest(folder)["files"]) >= {path.relative_to(folder).as_posix() for path in files}
    for which in ("model", "ema"):  # as a model that was never sharded writes it
        config = [(folder_of(runs, source) / which / "config.json").read_bytes() for source in SOURCES]
        assert config[0] == config[1]
        trained = checkpoint.load_trained(folder / which).model
        prefix = {"model": "trained.model", "ema": "ema"}[which]
        assert all(torch.equal(x, held[f"{prefix}.{name}"]) for name, x in trained.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("world", WORLDS)
def test_loaded_to_the_bit_on_any_number_of_processes_and_gone_on(runs, source, world):
    files, loaded = stored(folder_of(runs, source)), load_file(runs / f"{source}-on-{world}.safetensors")
    assert files.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in files.items())
    for rank in range(world):
        assert_close(results(runs, world, rank)[source], expected(runs, sharded.STEP))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_loaded_to_the_bit_without_sharding(runs, source):
    aligned, average = sharded.make(seed=7)
    optimizer = sharded.make_optimizer(aligned)
    folder = folder_of(runs, source)
    sharded.load(folder, aligned, average, optimizer)
    parts = {"trained": aligned.state_dict(), "ema": average.state_dict()}
    parts["optimizer"] = sharding.optimizer_tensors(aligned, optimizer)
    loaded = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    files = stored(folder)
    assert files.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in files.items())
    steps = range(sharded.STEP, sharded.STEP + sharded.MORE)
    assert_close(go_on(aligned, average, optimizer, steps), expected(runs, sharded.STEP))


@pytest.mark.slow
def test_a_fault_of_one_process_is_told_by_all_and_leaves_nothing(runs):
    two = [results(runs, 2, rank) for rank in (0, 1)]
    says = two[0]["faults"]
    assert says == two[1]["faults"]
    needed = sum(tensor.nbytes for tensor in load_file(runs / "saved.safetensors").values())
    for fault in ("full", "main"):
        assert says[fault].startswith("DiskFull: step 3: no room for a checkpoint in"), fault
        assert f"it needs {needed / 1e6:.1f} MB" in says[fault]
    assert says["apart"].startswith("InputError: ")
    assert "share the file system" in says["apart"]
    assert says["nan"].startswith("InputError: step 3: blocks.1.mlp.fc1.bias is not finite")
    assert "size mismatch for blocks.0.mlp.fc1.bias" in says["shape"]
    assert 'Missing key(s) in state_dict: "final_layer.linear.bias"' in says["missing"]
    assert two[0]["left"] == []


@pytest.mark.slow
def test_bf16_under_fsdp_errs_no_more_than_autocast(runs):
    """A policy that casts the inputs, as Accelerate's own does, rounds the time, and errs ten times as much."""
    bf16 = results(runs, 2)["bf16"]
    exact, autocast, fsdp = (torch.tensor(bf16[name]) for name in ("no", "bf16", "sharded"))
    assert ((fsdp - exact).abs() <= 2 * (autocast - exact).abs() + 1e-6).all(), bf16
    assert not torch.equal(fsdp, exact)
    assert bf16["dtypes"] == ["torch.float32"]


def plugin(*names: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(names)
    )


@pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
def test_a_plugin_fits_models_of_every_mixer(mixer):
    model = create_model(
        None, 4, 2, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, token_mixer=mixer
    )
    fitted = plugin("SiTBlock", "SiTATConvBlock")
    sharding.fit_plugin(fitted, model, bf16=False)
    wraps = fsdp2_prepare_auto_wrap_policy(fitted, model)
    assert [name for name, module in model.named_modules() if wraps(module)] == ["blocks.0", "blocks.1"]
    with pytest.raises(InputError, match=r"none of \['LlamaLayer'\]"):
        sharding.fit_plugin(plugin("LlamaLayer"), model, bf16=False)


@pytest.mark.parametrize("option", ["cpu_ram_efficient_loading", "cpu_offload", "activation_checkpointing"])
def test_plugin_options_that_do_not_go_with_it_are_refused(monkeypatch, option):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "False")  # which the plugin sets and never takes back
    refused = FullyShardedDataParallelPlugin(fsdp_version=2, **{option: True})
    with pytest.raises(InputError, match=f"fsdp_{option.replace('cpu_offload', 'offload_params')}: true"):
        sharding.fit_plugin(refused, torch.nn.Linear(1, 1), bf16=False)


def test_plain_modules_are_left_as_they_are():
    aligned, average = sharded.make()
    assert sharding.shard_like(average, aligned.model) is average
    assert not sharding.is_sharded(average)
    tensors = sharding.full_tensors(average)
    assert all(torch.equal(x, tensors[name]) for name, x in average.state_dict().items())
    assert tensors["final_layer.linear.weight"].data_ptr() == average.final_layer.linear.weight.data_ptr()
    assert sharding.full_scalar(torch.tensor(2.0)) == 2
    with pytest.raises(RuntimeError, match="Unexpected key"):
        sharding.load_full(average, {**tensors, "more": torch.zeros(1)})


@pytest.mark.slow
def test_projectors_are_no_weights_of_the_model(runs):
    folder = folder_of(runs, "run-1") / "model"
    projectors = Projectors.load(folder)
    assert projectors.encoder_depth == 1
    trained = checkpoint.load_trained(folder)
    assert "model/projectors.safetensors" in trained.files
    checkpoint.load_weights(folder, sharded.make(5)[0].model)
