"""What a command turns into one line, and what stays a traceback."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest
import torch

import sample
import train_sit
from sit_atconv import create_model
from sit_atconv.convert.reading import read_source
from sit_atconv.runtime.errors import InputError, command, option, told
from sit_atconv.training.checkpoint import load_trained

OF_TWO = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "x"}, "RANK='x' in the environment"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment: WORLD_SIZE=2"),
        ({"PMI_RANK": "one"}, "PMI_RANK='one'"),
        ({"MASTER_ADDR": "no-such-machine.invalid", **OF_TWO}, "MASTER_ADDR='no-such-machine.invalid'"),
        ({"MASTER_ADDR": "", **OF_TWO}, "MASTER_ADDR='' in the environment"),
        ({"MASTER_ADDR": "a" * 64 + ".b", **OF_TWO}, "give the name or address"),
        ({"MASTER_ADDR": "a..b", **OF_TWO}, "MASTER_ADDR='a..b'"),
        ({"MASTER_PORT": "70000", **OF_TWO}, "MASTER_PORT='70000' in the environment"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU='maybe'"),
    ],
)
def test_what_a_launcher_says_is_checked_before_the_work(fails, monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert says in fails(command(lambda argv: pytest.fail("it ran")))


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "::1"])
def test_a_machine_that_is_there_is_a_launchers(monkeypatch, address):
    for name, value in {"MASTER_ADDR": address, "MASTER_PORT": "29500", **OF_TWO}.items():
        monkeypatch.setenv(name, value)
    assert command(lambda argv: "it ran")([]) == "it ran"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), "File name too long; give a shorter name"),
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "take a smaller batch"),
    ],
)
def test_a_long_name_and_memory_that_ran_out_are_one_line(fails, error, says):
    @command
    def main(argv):
        raise error

    assert says in fails(main)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("?"), ValueError("?"), KeyError()]
)
def test_other_errors_stay_tracebacks(error):
    @command
    def main():
        raise error

    with pytest.raises(type(error)):
        main()


@pytest.fixture
def tiny(tmp_path):
    model = create_model(
        None, 8, 10, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, token_mixer="atconv"
    )
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_backend_that_cannot_run_here_is_one_line(fails, monkeypatch, tiny, recipe_file, tmp_path):
    monkeypatch.setenv("SIT_ATCONV_BACKEND", "triton")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = fails(sample.main, "--ckpt", tiny, "--num", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "x.png")
    assert "SIT_ATCONV_BACKEND=triton cannot run here" in said
    recipe = recipe_file()
    assert "SIT_ATCONV_BACKEND=triton cannot run here" in fails(train_sit.main, recipe)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_may_not_be_read_is_named(tiny):
    tiny.chmod(0)
    root = os.geteuid() == 0
    above = [path for path in tiny.parents if root and path.stat().st_uid == 0 and not path.stat().st_mode & 0o001]
    for path in above:
        path.chmod(path.stat().st_mode | 0o011)
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(InputError, match="cannot be read: Permission denied"):
            load_trained(tiny)
    finally:
        if root:
            os.seteuid(0)
        tiny.chmod(0o755)


def test_a_pt_file_that_was_compressed_says_so(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    for method, name in ((zipfile.ZIP_STORED, "stored.pt"), (zipfile.ZIP_DEFLATED, "deflated.pt")):
        with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / name, "w", method) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
    assert read_source(tmp_path / "stored.pt").tensors["a"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="was compressed after"):
        read_source(tmp_path / "deflated.pt")


@pytest.mark.parametrize("text", ["r\udcff", "run.out=\udce9", "\ud800"])
def test_arguments_that_cannot_be_recorded_are_refused(text, fails, tmp_path):
    for main, words in ((train_sit.main, ["recipe.yaml"]), (sample.main, ["--out"])):
        assert "is no UTF-8, and cannot be recorded" in fails(main, *words, text)


PRINTS = """
from sit_atconv.runtime.errors import command
@command
def main():
    for _ in range(20_000):
        print("\u00b1 caf\u00e9, a line that is long enough")
main()
print("after")
"""


def test_a_terminal_of_few_characters_costs_no_result():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", PRINTS], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\xb1 caf\\xe9, a line")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_who_reads_no_more_is_not_told_of_it():
    """As `head` does."""
    child = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline().startswith("\u00b1")
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 128 + 13


def test_an_argument_is_named_as_its_caller_wrote_it(capsys):
    @command
    def main():
        within.append((option("sample_size"), option("force", True), option("vae", "a b")))
        nested()
        raise InputError(option("out"))

    @command
    def nested():
        pass

    within = []
    assert (option("sample_size"), option("force", True), option("vae", "a b")) == (
        "sample_size", "force=True", "vae='a b'",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    assert within == [("--sample-size", "--force", "--vae a b")]
    assert capsys.readouterr().err == "error: --out\n"
    assert option("out") == "out"


def test_what_others_say_is_told_by_its_first_line_and_files_are_named(tmp_path):
    with pytest.raises(InputError) as raised, told("device", RuntimeError):
        raise RuntimeError("no such device\nSet CUDA_LAUNCH_BLOCKING=1")
    assert str(raised.value) == "device: no such device"
    file = tmp_path / "config.json"
    with pytest.raises(InputError) as raised, told("model 'm' cannot be read", OSError, remedy="mend it"):
        file.read_text()
    assert str(raised.value) == f"model 'm' cannot be read: No such file or directory: {str(file)!r}; mend it"
    with pytest.raises(InputError) as raised, told(f"{str(file)!r} cannot be read", OSError):
        file.read_text()
    assert str(raised.value) == f"{str(file)!r} cannot be read: No such file or directory"
    with pytest.raises(InputError, match=r"^mine$"), told("what", ValueError):
        raise InputError("mine")
    with pytest.raises(InputError, match=r"^what: mine$"), told("what", InputError):
        raise InputError("mine")
