import json
import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RECORDED = "ccf83eb"  # the last commit whose operator took tokens beside their grid, and whose trainer knew kinds
# Half of what these hold is of Hugging Face datasets; the extra `dev` brings the library.
collect_ignore = [] if find_spec("datasets") else ["data/test_kinds.py", "data/test_hostile.py", "data/test_reader.py"]
sys.path.insert(0, str(Path(__file__).parent))
os.fsync = lambda descriptor: None  # what a test writes has to outlive no power cut, and the disk takes its time


def pytest_runtest_setup() -> None:
    if "datasets.config" in sys.modules:  # after each stream it sleeps for seconds, for a fault in threads that end
        sys.modules["datasets.config"].SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def reset_accelerate() -> None:
    """Accelerate keeps its state for the life of a process, and with it the first precision asked for."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def slowly(cases) -> list:
    """Parameters of a test that are `slow`: those that say little beyond the first, and take long."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def weights(checkpoint: Path, which: str = "ema") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / which / "diffusion_pytorch_model.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    for which in ("ema", "model"):
        first, second = weights(a, which), weights(b, which)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), which


def unmarked(file: Path) -> str:
    """A Markdown file of a command, without the mark that says whose it is."""
    from sit_atconv.runtime.files import MARKDOWN

    text = file.read_text()
    assert text.endswith(f"\n\n{MARKDOWN}\n")
    return text.removesuffix(f"\n{MARKDOWN}\n")


def log_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def run_recipe(path: Path, *overrides: str) -> Path:
    reset_accelerate()
    from sit_atconv.config import load_recipe
    from sit_atconv.training import train

    return train(load_recipe(path, overrides))


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def default_attention_backend(monkeypatch):
    """diffusers' set_attention_backend is the whole process's too, and reset_attention_backend leaves it there."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)


@pytest.fixture(autouse=True)
def project_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@contextmanager
def serving(*options: str):
    """Gives run(program, folder, arguments, *faults) -> (exit codes, what they said on stderr) of processes.

    program: a module with the `main` of a command, or text with a line break, which is run. faults: one for each rank,
    more of what tests/process_server.py is told; none, one process. What they print is in folder/printed-RANK.
    """
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "process_server.py"), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def run(program: str, folder: Path, arguments: list[str], *faults: dict) -> tuple[list[int], list[str]]:
        faults = faults or ({},)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        what = {"program": None, "code": program} if "\n" in program else {"program": program}
        jobs = []
        for rank, fault in enumerate(faults):
            world = {"WORLD_SIZE": len(faults), "LOCAL_WORLD_SIZE": len(faults), "RANK": rank, "LOCAL_RANK": rank}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            environment = {key: str(value) for key, value in world.items()} if len(faults) > 1 else {}
            said = {"stdout": str(folder / f"printed-{rank}"), "stderr": str(folder / f"said-{rank}")}
            job = {**what, "arguments": [str(each) for each in arguments], **said, **fault}
            jobs.append({**job, "environment": environment | fault.get("environment", {})})
        server.stdin.write(json.dumps(jobs) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, [Path(job["stderr"]).read_text() for job in jobs]

    try:
        yield run
    finally:
        server.communicate("null\n")


def _hold(take, arguments, line) -> None:
    held = take(*arguments)
    line.send("held")
    line.recv()  # until it is killed
    del held


@contextmanager
def another_process_has(take, *arguments):
    """Within it, a process that was forked from this one has what `take(*arguments)` gave it; then it is killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(take, arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "held"
        yield
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def process_server():
    with serving() as run:
        yield run


@pytest.fixture(scope="session")
def bare_server():
    with serving("--bare") as run:
        yield run


@pytest.fixture(scope="session")
def recorded_tree(tmp_path_factory):
    """The sources of the recorded commit, in a worktree beside this tree; the test is skipped without that commit."""
    known = subprocess.run(["git", "cat-file", "-e", f"{RECORDED}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"commit {RECORDED} is not in this clone; fetch the whole history")
    tree = tmp_path_factory.mktemp("recorded") / "before"
    subprocess.run(["git", "worktree", "add", "--detach", tree, RECORDED], cwd=ROOT, check=True, capture_output=True)
    yield tree
    subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True, capture_output=True)


def made_in(tree: Path, script: str, *words: Path, **environment: str | Path) -> dict:
    """What a script of this folder prints as JSON, run in the root of a tree and with that tree's packages."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), **environment}
    command = [sys.executable, ROOT / "tests" / script, *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_recipe(folder: Path, name: str = "recipe", **sections) -> Path:
    """Write a tiny digits recipe, with sections overridden, whose run lies in the same folder; its path."""
    recipe = {
        "run": {"out": str(folder / "run"), "log_every": 1},
        "data": {"kind": "digits"},
        "latents": {},
        "model": {
            "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": False,
            "token_mixer": "hybrid",
        },
        "train": {"max_steps": 8, "batch_size": 8, "lr": 1e-3},
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 4},
        "preview": {"every": 0},
    }  # fmt: skip
    for section, keys in sections.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe_file(tmp_path):
    """`write_recipe` in the test's own folder."""
    return partial(write_recipe, tmp_path)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The run of `write_recipe`'s recipe, trained once; a test that writes into it takes a copy."""
    return run_recipe(write_recipe(tmp_path_factory.mktemp("digits"))).parent


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with exit status 2 and one line on stderr; returns that line."""

    def run(main, *arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert exit_info.value.code == 2
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL with random weights, as a user would have it."""
    from tiny_vae import save_vae

    save_vae(folder := tmp_path_factory.mktemp("vae"))
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A small ViT for REPA, in timm's format."""
    from tiny_vit import save_vit

    save_vit(folder := tmp_path_factory.mktemp("encoder") / "vit")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Twelve random images of 8 x 8 pixels in three classes."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        folder = tmp_path / "images" / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return tmp_path / "images"
