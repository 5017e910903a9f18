"""Files that are there whole or not at all, and folders that are one process's."""

import json
import os
import re
import subprocess
import sys

import pytest

from sit_atconv import files
from sit_atconv.errors import InputError
from sit_atconv.files import FILE, INSIDE, SHAPE, Malformed, check_writable, fault_of, lock, parse_json, write_atomic


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
from sit_atconv.files import lock
held = lock(Path(sys.argv[1]), "it")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "f")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=r"^'f' is in use by another process; end that one"):
        lock(tmp_path / "f", "'f'")
    holder.communicate("")
    lock(tmp_path / "f", "'f'").close()


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new/folder/a.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/a.json", "/proc/a.json", tmp_path / ("x" * 300) / "a.json"):
        with pytest.raises(InputError, match="cannot be written"):
            check_writable(type(tmp_path)(out))


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        (2**63, int, "it is 9223372036854775808, and must be a whole number of 64 bits"),
        (True, int, "whole number"),
        (10**400, float, "a finite number"),
        (float("nan"), float, "a finite number"),
        ({"a": {"b": "x"}}, {"a": ({"b": int}, None)}, "a.b is 'x', and must be a whole number"),
        ({}, {"a": int, "b?": int}, "a is missing"),
        ({"b": 1.5}, {"b?": int}, "b is 1.5"),
        ({"x": 1}, {re.compile("[0-9]+"): int}, "'x' is a key that must be"),
        ([1, 2], SHAPE, "a list of 3"),
        ([1, "x"], [int], "1 is 'x'"),
        ("../x", FILE, "the name of a file"),
        ("a/../x", INSIDE, "the path of a file below the folder"),
        (0, range(1, 9), "a whole number, 1 to 8"),
        (1, (True, "x"), 'it is 1, and must be true or "x"'),
    ],
)
def test_a_form_names_the_place_and_the_rule(value, form, says):
    assert says in fault_of(value, form)


def test_a_form_takes_what_it_says():
    form = {"a": (None, [range(3)]), "b?": {str: float}, "c": "one", "file": INSIDE}
    whole = {"a": [0, 2], "b": {"x": 1, "": 1e300}, "c": "one", "file": "..x"}
    for value in ({"a": None, "c": "one", "file": "x/y.z"}, whole):
        assert fault_of(value, form) is None
        assert parse_json(json.dumps(value), "it", form) == value


@pytest.mark.parametrize("text", [r'{"a": "\u0000"}', r'"\ud800"', "[" * 100_000, "9" * 5000, "{", b"\xff"])
def test_a_text_that_cannot_be_used_is_refused(text):
    with pytest.raises(Malformed, match="is no JSON that can be read"):
        parse_json(text, "it", object)


def test_not_finite_numbers_are_refused_on_request():
    assert parse_json("[NaN]", "it", list)
    with pytest.raises(Malformed):
        parse_json("[1e999]", "it", list, finite=True)
