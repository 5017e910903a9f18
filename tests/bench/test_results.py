"""Rows of CSV: under one header, and a file that takes none is told before the work."""

import csv
import os

import pytest

from sit_atconv.bench import results
from sit_atconv.runtime.errors import InputError


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    results.append_csv(path, [{"a": 1, "b": "x, y"}])
    results.append_csv(path, [{"a": 2, "b": "z"}])
    with open(path, newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z"}]
    before = path.read_text()
    with pytest.raises(InputError, match="move it away"):
        results.append_csv(path, [{"a": 3, "c": "z"}])
    assert path.read_text() == before


def test_a_csv_that_takes_no_more_rows_is_told_before_the_work(tmp_path):
    path, columns = tmp_path / "rows.csv", ("a", "b")
    assert not results.check_csv(path, columns)
    assert not results.check_csv(tmp_path / "new" / "rows.csv", columns)
    assert list(tmp_path.iterdir()) == []
    path.write_text("a,b\n1,2\n")
    assert results.check_csv(path, columns)
    for content in (b"a,c\n", b"", b"\xff\xfe", b"x" * (1 << 20), b"a,b"[:2] + b"\0,b\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="move it away"):
            results.check_csv(path, columns)
        assert path.read_bytes() == content
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo", "file/x", "a\0b"):
        with pytest.raises(InputError, match=r"move it away|cannot be written"):
            results.check_csv(tmp_path / name, columns)
