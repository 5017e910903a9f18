"""The launch files of experiments/accelerate, as Accelerate's own launcher and plugin read them."""

import os
import re
import signal
import subprocess

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from torch.distributed.fsdp import StateDictType

from sit_atconv import create_model
from sit_atconv.runtime import sharding

FOLDER = ROOT / "experiments" / "accelerate"
CONFIGS = {
    "ddp_8gpu": (DistributedType.MULTI_GPU, 1, 8),
    "fsdp2_8gpu": (DistributedType.FSDP, 1, 8),
    "multinode_slurm": (DistributedType.MULTI_GPU, 2, 16),
}


def launched(name: str, *options: str):
    """The arguments that `accelerate launch` makes of a file and options, and the environment of its processes."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", *options]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "train_sit.py", "RECIPE"]))
    return args, prepare_multi_gpu_env(args)


def test_every_file_is_looked_at():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_launcher_takes_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == CONFIGS[name]
    args, environment = launched(name, "--main_process_ip", "node1", "--machine_rank", "0")
    assert (args.num_machines, args.num_processes) == CONFIGS[name][1:]
    assert args.nproc_per_node == "8"
    assert (args.multi_gpu, args.use_fsdp) == (name != "fsdp2_8gpu", name == "fsdp2_8gpu")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the recipe's train.precision decides


@pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
def test_fsdp2s_plugin(monkeypatch, mixer):
    _, environment = launched("fsdp2_8gpu")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for key in set(environment) - set(os.environ):
        monkeypatch.setenv(key, environment[key])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.transformer_cls_names_to_wrap == ["SiTBlock", "SiTATConvBlock"]
    model = create_model(
        None, 4, 2, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, token_mixer=mixer
    )
    sharding.fit_plugin(plugin, model, bf16=True)
    plugin.set_auto_wrap_policy(model)
    wraps = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {type(block) for block in model.blocks} == wraps
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


LAUNCHER = """#!/usr/bin/env python3
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.2)  # so that a script that does not wait for it is found out
    pathlib.Path("saved").touch()
    sys.exit(143)
pathlib.Path("launched").write_text(" ".join(sys.argv[1:]))
if pathlib.Path("status").exists():
    sys.exit(int(pathlib.Path("status").read_text()))
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").write_text("")  # a pipe: goes on when the test has opened it
signal.pause()
"""


SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" saved* > told; fi
"""


# As slurm's: told to end, it kills its task.
SRUN = """#!/bin/bash
shift
SLURM_NODEID=1 "$@" &
task=$!
echo $task > task
trap 'kill -KILL $task' TERM HUP
wait $task
status=$?
while kill -0 $task 2>/dev/null; do
    wait $task
    status=$?
done
exit $status
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sh in a folder with stand-ins for slurm's commands and Accelerate's."""
    tools = {
        "scontrol": SCONTROL,
        "srun": SRUN,
        "scancel": '#!/bin/sh\n[ "$*" = "--signal=TERM 120034.0" ] && kill -TERM "$(cat task)"\n',
        "accelerate": LAUNCHER,
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "120034", "SLURM_NNODES": "2"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(FOLDER / "slurm.sh"), "R.yaml", "run.out=a b"]
    return lambda: subprocess.Popen(command, cwd=tmp_path, env=environment)


@pytest.mark.parametrize("status", [0, 7])
def test_slurm_launches_one_launcher_per_machine_and_ends_as_it_does(slurm, tmp_path, status):
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    (tmp_path / "status").write_text(str(status))
    assert slurm().wait(timeout=60) == status
    assert (tmp_path / "launched").read_text() == (
        "launch --config_file experiments/accelerate/multinode_slurm.yaml --num_machines 2 --num_processes 16 "
        "--machine_rank 1 --main_process_ip node1 --main_process_port 20034 train_sit.py R.yaml run.out=a b"
    )
    assert not (tmp_path / "told").exists()


def test_slurms_signal_reaches_the_run_which_is_queued_again_once_it_has_saved(slurm, tmp_path):
    os.mkfifo(tmp_path / "started")
    script = slurm()
    (tmp_path / "started").read_text()
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 0
    assert (tmp_path / "told").read_text() == "requeue 120034 saved\n"  # and not saved*, which no file matched


def test_slurm_warns_earlier_than_torchrun_kills():
    text = (FOLDER / "slurm.sh").read_text()
    seconds = int(re.search(r"--signal=B:TERM@(\d+)", text)[1])
    assert 30 < int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1]) < seconds
