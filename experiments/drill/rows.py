"""The rows of the drill's table, and what fails one."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.markdown import markdown_table


@dataclass
class Row:
    """A line of the table: a command, a fault, how often it was made, what it should and did lead to."""

    script: str
    fault: str
    runs: int
    seen: str
    lost: str
    passed: bool


class Failed(Exception):
    """What should have happened did not."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


def expect_same(own: dict[str, object], other: dict[str, object]) -> None:
    """Raise Failed unless two folders, by `files_in`, have the same files."""
    expect(own.keys() == other.keys(), f"other files: {sorted(own.keys() ^ other.keys())[:4]}")
    changed = [name for name in own if own[name] != other[name]]
    expect(not changed, f"other content in {changed[:4]}")


def many(title: str, runs: int, make: Callable[[int], Any]) -> tuple[list[Any], list[str]]:
    """What `make` returned of so many indices, as many at once as there are cores, and how others failed."""
    done, failures = [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        tasks = [pool.submit(make, index) for index in range(runs)]
        for index, task in enumerate(Progress(tasks, desc=f"{title}: SIGKILL", unit="run")):
            try:
                done.append(task.result())
            except Failed as failure:
                failures.append(f"run {index}: {failure}")
    return done, failures


def row_of(script: str, fault: str, make: Callable[[], str], runs: int = 1) -> Row:
    """The row of a fault that is made in so many runs: `make` says what was seen, or raises Failed."""
    try:
        return Row(script, fault, runs, make(), "nothing", True)
    except Failed as failure:
        return Row(script, fault, runs, str(failure), "?", False)


def table(rows: list[Row]) -> str:
    text = ["command", "fault", "what was seen", "lost", ""]
    cells = []
    for row in rows:
        seen = " ".join(row.seen.replace("|", "/").split())  # of a run that failed, the end of what it said
        cells.append([row.script, row.fault, str(row.runs), seen, row.lost, "ok" if row.passed else "FAILED"])
    return markdown_table([*text[:2], "runs", *text[2:]], cells, text)
