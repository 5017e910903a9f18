"""Samples are the same to the bit from one process or two, killed and gone on with; a fault ends all at once."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, slowly

from sampling.__main__ import main as sampling
from sit_atconv import SiTTransformer2DModel, create_model
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling.setup import own_device

NUM, BLOCK = 23, 4  # six blocks, the last of them padded


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A pixel model of three classes with random weights."""
    torch.manual_seed(0)
    options = {"in_channels": 1, "token_mixer": "hybrid", "patch_size": 2, "hidden_size": 16, "depth": 2}
    model = create_model(None, 4, 3, num_heads=2, learn_sigma=False, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(folder)
    return folder


def command(model, out, *more) -> list[str]:
    options = ["--ckpt", model, "--num", NUM, "--batch", BLOCK, "--sampler", "heun", "--steps", 2, "--out", out]
    return ["generate", *map(str, options), *map(str, more)]


@pytest.fixture(scope="module")
def processes(process_server):
    return partial(process_server, "sampling.__main__")


MEASURED = ("processes", "seconds_per_image")


def content(folder) -> dict:
    """All files of complete samples, the manifest without what differs from run to run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    manifest = json.loads(files.pop("manifest.json").read_text())
    stated = {key: value for key, value in manifest.items() if key not in MEASURED}
    assert manifest["seconds_per_image"] > 0
    return {name: path.read_bytes() for name, path in files.items()} | {"manifest.json": stated}


@pytest.fixture(scope="module")
def whole(model_folder, processes, tmp_path_factory):
    """What one process makes without a break, by format."""
    made = {}
    for kind in ("png", "npz"):
        folder = tmp_path_factory.mktemp("whole")
        codes, said = processes(folder, command(model_folder, folder / "out", "--format", kind))
        assert codes == [0], said
        made[kind] = content(folder / "out")
    assert sorted(made["png"]) == [*(f"{index:06d}.png" for index in range(NUM)), "manifest.json"]
    assert sorted(made["npz"]) == ["manifest.json", "samples.npz"]
    assert len({data for name, data in made["png"].items() if name != "manifest.json"}) == NUM
    return made


def kill(call, number) -> dict:
    return {"at": [call, number, "KILL"]}


# Who dies of SIGKILL, in place of giving which file its name. Data are images and what says of a block what it is, of
# format npz two a block, and samples.npz. A record is settings.json, and in a later process manifest.json.
DEATHS = {
    "one": [[kill("record", 1)], [kill("data", 1)], [kill("data", 4)], [kill("data", 4)], [kill("data", 2)]],
    "two": [[{}, kill("data", 2)], [kill("data", 4), {}], [{}, kill("evaluate", 2)]],
    "mixed": [[kill("data", 5)], [kill("evaluate", 6), {}], [kill("data", 2)]],
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("two", "npz"), *slowly([("one", "png"), ("one", "npz"), ("two", "png"), ("mixed", "png"), ("mixed", "npz")])],
)
def test_killed_samples_end_as_uninterrupted_ones(model_folder, processes, whole, tmp_path, name, kind):
    out, arguments = tmp_path / "out", command(model_folder, tmp_path / "out", "--format", kind)
    for ranks in DEATHS[name]:
        codes, said = processes(tmp_path, arguments, *ranks)
        assert -9 in codes, said
        assert not (out / "manifest.json").exists()
    last = [kill("record", 1), {}]  # the images are there, and the manifest is about to get its name
    assert -9 in processes(tmp_path, arguments, *last)[0]
    assert list(out.glob(".manifest.json.*.unfinished"))
    codes, said = processes(tmp_path, arguments, {}, {})
    assert codes == [0, 0], said
    assert content(out) == whole[kind]
    assert not list(tmp_path.glob(".*"))


def test_two_processes_share_the_work_and_one_shows_it(model_folder, processes, whole, tmp_path):
    codes, (first, second) = processes(tmp_path, command(model_folder, tmp_path / "out"), {}, {})
    assert codes == [0, 0]
    assert content(tmp_path / "out") == whole["png"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == 2
    assert f"generate: image {NUM} of {NUM}, " in first  # of all processes' images
    assert second == ""


def test_the_evaluations_of_an_adaptive_sampler_do_not_depend_on_processes(model_folder, processes, tmp_path):
    for name, ranks in (("one", [{}]), ("two", [{}, {}])):
        arguments = command(model_folder, tmp_path / name, "--sampler", "dopri5", "--cfg", 4)
        codes, said = processes(tmp_path, arguments, *ranks)
        assert codes == [0] * len(ranks), said
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one == two
    assert one["manifest.json"]["nfe"] % 1  # a mean over blocks that differ


@pytest.mark.parametrize(
    ("faults", "status", "name"),
    [
        ([{"at": ["evaluate", 10, "INT"]}], 130, "SIGINT"),
        ([{}, {"at": ["evaluate", 9, "TERM"]}], 143, "SIGTERM"),
        ([{"at": ["data", 8, "TERM"]}, {}], 143, "SIGTERM"),
        *slowly(
            [
                ([{"at": ["evaluate", 10, "TERM"]}, {"at": ["evaluate", 9, "TERM"]}], 143, "SIGTERM"),
                ([{"at": ["record", 1, "INT"]}, {}], 130, "SIGINT"),
            ]
        ),
    ],
)
def test_a_signal_leaves_what_the_same_command_goes_on_with(
    model_folder, processes, whole, tmp_path, faults, status, name
):
    arguments = command(model_folder, tmp_path / "out")
    codes, said = processes(tmp_path, arguments, *faults)
    assert codes == [status] * len(faults), said
    lines = [line for text in said for line in text.splitlines() if not line.lstrip("\r").startswith("generate:")]
    assert len([line for line in lines if line]) == 1, said
    assert f"{name}: stopped; " in said[0]
    assert "the same command goes on" in said[0]
    codes, said = processes(tmp_path, arguments)
    assert codes == [0], said
    assert content(tmp_path / "out") == whole["png"]


def test_a_signal_costs_the_blocks_in_work_alone(model_folder, processes, tmp_path):
    # Eight evaluations a block, guided: four calls of the network.
    faults = ({"at": ["evaluate", 4 * 2 + 1, "TERM"]}, {"at": ["evaluate", 4 * 2 + 1, "TERM"]})
    _, (said, _) = processes(tmp_path, command(model_folder, tmp_path / "out"), *faults)
    assert f"{4 * BLOCK} of {NUM} images are there" in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 4 * BLOCK
    _, (said,) = processes(tmp_path, command(model_folder, tmp_path / "out"))
    assert f"generate: image {NUM} of {NUM}, " in said


def errors(said: list[str]) -> list[str]:
    assert not any("Traceback" in text for text in said), said
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")]


def test_a_disk_that_is_full_for_one_process_ends_both_with_one_line(model_folder, processes, whole, tmp_path):
    arguments = command(model_folder, tmp_path / "out")
    codes, said = processes(tmp_path, arguments, {}, {"largest_file": 40})
    assert codes == [2, 2], said
    (line,) = errors(said)
    assert "cannot be written: File too large" in line
    assert "the same command goes on" in line
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*"))
    images = [f"{index:06d}.png" for index in range(BLOCK)]  # the first process has made its first block
    assert files == [".lock", *images, "blocks", "blocks/000000.json", "settings.json"]
    assert processes(tmp_path, arguments, {}, {})[0] == [0, 0]
    assert content(tmp_path / "out") == whole["png"]


def test_a_process_that_is_killed_does_not_leave_the_other_waiting(model_folder, processes, tmp_path):
    arguments = command(model_folder, tmp_path / "out")
    codes, said = processes(tmp_path, arguments, {"spared": True}, kill("evaluate", 6))
    assert codes == [2, -9], said
    assert errors(said) == [
        "error: another process of the launch was killed or has failed, or cannot be reached; the same command goes on "
        "from what is there"
    ]


def test_an_image_that_is_not_finite_in_one_process_is_named_once(model_folder, processes, tmp_path):
    model = SiTTransformer2DModel.from_pretrained(model_folder, use_safetensors=True)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[1] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n" * 6 + "1\n" + "0\n" * (NUM - 7))  # image 6 is in the second process's block
    arguments = command(tmp_path / "broken", tmp_path / "out", "--labels", labels)
    codes, said = processes(tmp_path, arguments, {}, {})
    assert codes == [2, 2], said
    (line,) = errors(said)
    assert "image 6 is not finite as it comes from the sampler" in line
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"{i:06d}.png" for i in range(BLOCK)]


def test_processes_that_would_sample_different_models_are_stopped(model_folder, processes, tmp_path):
    model = SiTTransformer2DModel.from_pretrained(model_folder, use_safetensors=True)
    with torch.no_grad():
        model.final_layer.linear.bias += 1
    model.save_pretrained(tmp_path / "trained-on")
    shutil.copy(model_folder / "config.json", tmp_path / "trained-on")
    mine, other = command(model_folder, tmp_path / "out"), command(tmp_path / "trained-on", tmp_path / "out")
    codes, said = processes(tmp_path, mine, {}, {"arguments": other})
    assert codes == [2, 2], said
    (line,) = errors(said)
    assert "the processes do not sample the same: checkpoint_sha256.diffusion_pytorch_model.safetensors: " in line
    codes, said = processes(tmp_path, mine, {}, {"arguments": command(tmp_path / "nowhere", tmp_path / "out")})
    assert codes == [2, 2], said
    assert "no such folder" in errors(said)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_starts_it(model_folder, whole, tmp_path):
    command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command_line += ["-m", "--", "sampling", *command(model_folder, tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{NUM} images in {tmp_path / 'out'}, NFE 8\n"
    assert content(tmp_path / "out") == whole["png"]


@pytest.mark.parametrize("sampler", ["euler", "sde-heun"])
def test_block_sizes_agree_within_a_level(model_folder, tmp_path, sampler):
    for block in (3, 8):
        options = ("--sampler", sampler, "--steps", 6, "--batch", block, "--format", "npz")
        sampling(command(model_folder, tmp_path / str(block), *options))
    three, eight = (np.load(tmp_path / name / "samples.npz", allow_pickle=False)["arr_0"] for name in ("3", "8"))
    assert three.std() > 20
    assert np.abs(three.astype(int) - eight.astype(int)).max() <= 1


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    monkeypatch.setattr("sit_atconv.runtime.processes.count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("cuda", "cpu")] == ["cuda:3", "cpu"]
    with pytest.raises(InputError, match="device='cuda:1': 4 processes take a GPU each; say cuda"):
        own_device("cuda:1")


def test_a_number_in_the_environment_makes_no_process_of_a_launch(model_folder, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as a scheduler may leave it
    sampling(command(model_folder, tmp_path / "out"))
    assert content(tmp_path / "out") == whole["png"]
