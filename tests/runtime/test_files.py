"""Files that are there whole or not at all, and folders that are one process's."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sit_atconv.runtime import files
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import by_step, check_out, in_use, lock, step_in, step_name, write_atomic


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomic(tmp_path / "deep/a.json", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "deep/a.json", "new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.json"]
    assert (tmp_path / "deep/a.json").read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends while the first is between its content and the file's name."""
    original = os.fsync

    def between(descriptor):
        monkeypatch.setattr(files.os, "fsync", original)
        write_atomic(tmp_path / "a.json", "second")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", between)
    write_atomic(tmp_path / "a.json", "first")
    assert (tmp_path / "a.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


HOLDER = """
import sys
from pathlib import Path
from sit_atconv.runtime.files import lock
held = lock(Path(sys.argv[1]), "it")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert in_use(tmp_path / "f")
    with pytest.raises(InputError, match=r"^'f' is in use by another process; end that one"):
        lock(tmp_path / "f", "'f'")
    holder.communicate("")
    assert not in_use(tmp_path / "f")
    lock(tmp_path / "f", "'f'").close()


def test_to_ask_whether_a_folder_is_in_use_changes_nothing_there(tmp_path):
    assert not in_use(tmp_path / "none")
    assert not in_use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_fcntl_locks_by_its_own_means(tmp_path, monkeypatch):
    held = []

    def locking(descriptor, mode, length):
        if held:
            raise OSError(13, "Permission denied")
        held.append((os.fstat(descriptor).st_ino, mode, length))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with lock(tmp_path, "'f'"):
        assert held == [((tmp_path / files.LOCK).stat().st_ino, 2, 1)]
        with pytest.raises(InputError, match="'f' is in use by another process"):
            lock(tmp_path, "'f'")


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    check_out(tmp_path / "new/folder/a.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    places = (
        tmp_path / "file/a.json",
        "/proc/a.json",
        tmp_path / ("x" * 300) / "a.json",
        tmp_path / ("y" * 256),
        "a\0",
    )
    for out in (*places, "/dev/null", tmp_path, "."):
        with pytest.raises(InputError) as raised:
            check_out(out)
        assert str(raised.value).startswith(f"out {str(out)!r}") or out == "."


def test_what_a_command_left_that_was_killed_at_its_end_goes_with_the_next_one(tmp_path, monkeypatch):
    def anothers(file):
        raise OSError(errno.EACCES, "another process has it")

    out, claimed = tmp_path / "model", tmp_path / ".model.unfinished"
    out.mkdir()
    claimed.mkdir()
    (claimed / files.OWNER).touch()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_lock", anothers)
        with pytest.raises(InputError, match="exists already"):
            files.check_out(out)
    assert claimed.is_dir()
    with pytest.raises(InputError, match="exists already"):
        files.check_out(out)
    assert not claimed.exists()
    assert out.is_dir()
    claimed.mkdir()
    (claimed / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        files.check_out(out)
    assert (claimed / "mine").exists()


def test_names_of_steps_are_in_the_order_of_their_numbers():
    assert [step_name(step) for step in (7, 9_999_999, 10_000_000)] == ["step-0000007", "step-9999999", "step-10000000"]
    steps = (0, 7, 9_999_999, 10_000_000, 2**32 - 1)
    assert [step_in(step_name(step)) for step in steps] == [*steps]
    for name in ("step-", "step-\u00b2", "step-\u0663", "step-1 ", "step-1.damaged", ".step-1.unfinished", "x"):
        assert step_in(name) is None
    paths = [Path("a", f"{step_name(step)}.png") for step in steps]
    assert by_step([*reversed(paths), Path("a", "step-1"), Path("a", "other.png")], ".png") == paths
    assert by_step([Path("step-10"), Path("step-9"), *paths]) == [Path("step-9"), Path("step-10")]


def test_a_lease_ends_quietly_as_python_ends_and_names_of_modules_are_gone(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    held, faults = files.lease(tmp_path / "a"), []
    assert files.lease(tmp_path / "a", exclusive=True) is None
    monkeypatch.setattr(sys, "unraisablehook", faults.append)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", None)
        del held
    assert not faults
    assert files.lease(tmp_path / "a", exclusive=True) is not None
