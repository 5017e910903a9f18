"""FSDP2 as it runs on GPUs: `accelerate` shards a model on one GPU, which trains, saves, and goes on.

A CPU shows all of the state handling (runtime/test_sharding.py). A GPU alone shows that Accelerate itself enables FSDP2
from the launch file, that NCCL carries DTensors, collectives of objects and the checkpoint's plans, that shards are
copied from the device while they are written, and that autocast, compiled blocks and FSDP's hooks get along. Several
GPUs, and with them real communication, are shown by neither.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log_rows, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def launch(path, *overrides: str) -> None:
    config = ROOT / "experiments" / "accelerate" / "fsdp2_8gpu.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1",
        "--main_process_port", "0", "train_sit.py", str(path), *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp2_trains_saves_and_goes_on(recipe_file, tmp_path, precision):
    """Five steps in one go, and stopped after three: the same losses; and those of a run that is not sharded."""
    path = recipe_file(train={"max_steps": 5, "precision": precision, "lr": 1e-4}, checkpoint={"every": 3})
    whole, parts, plain = (tmp_path / name for name in ("whole", "parts", "plain"))
    launch(path, f"run.out={whole}")
    launch(path, f"run.out={parts}", "train.max_steps=3")
    step = parts / "step-0000003"
    assert [file.name for file in (step / "optimizer").iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    assert json.loads((step / "ema" / "config.json").read_text())["_class_name"] == "SiTTransformer2DModel"
    launch(path, f"run.out={parts}")
    unsharded = [sys.executable, "train_sit.py", str(path), f"run.out={plain}"]
    subprocess.run(unsharded, cwd=ROOT, check=True, timeout=600)
    losses = {run.name: torch.tensor([row["loss"] for row in log_rows(run)]) for run in (whole, parts, plain)}
    tolerance = {"fp32": 1e-5, "bf16": 1e-2}[precision]
    torch.testing.assert_close(losses["whole"], losses["parts"], rtol=tolerance, atol=0)
    torch.testing.assert_close(losses["whole"], losses["plain"], rtol=tolerance, atol=0)
    for name, tensor in weights(whole / "step-0000005").items():
        torch.testing.assert_close(tensor, weights(parts / "step-0000005")[name], rtol=tolerance, atol=1e-5)


def test_compiled_blocks_under_fsdp2(recipe_file, tmp_path):
    path = recipe_file(train={"max_steps": 3, "precision": "bf16", "compile": True})
    launch(path)
    assert len(log_rows(tmp_path / "run")) == 3
