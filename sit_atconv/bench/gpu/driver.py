"""Runs the stages of an acceptance, each in a process of its own, and keeps what they found after every one."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from sit_atconv.bench.gpu.stages import PACKAGE, Stage
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, option
from sit_atconv.runtime.files import check_out, lock, made_here, resolved, write_out
from sit_atconv.runtime.markdown import markdown_table, plain
from sit_atconv.runtime.reading import Malformed, fault_of, read_json, read_rows

NAME = "acceptance"
REHEARSAL, REAL = "rehearsal", "real"
MARKER = "SIT_ATCONV_STAGE"  # in the environment of a stage's process and of all that it starts
AT_ONCE = 2  # stages of a rehearsal, whose times mean nothing
LEAST_SECONDS = 10.0  # of what is left of the minutes: no stage is begun with less
NAMED = 8  # of what is left out for one reason
KEYS = ("rehearsal", "stages")
FORM = {"rehearsal": bool, "stages": {str: dict}}
OK, WRONG, FAILED, DIED, HUNG, PART = "ok", "wrong", "failed", "died", "out of time", "in part"
INTERRUPTED, LACKS, NOT_BEGUN = "interrupted", "not possible here", "not begun"
LATE, NEVER = (HUNG, PART), (LACKS, NOT_BEGUN)
TOLD = {"kind": str}  # a line of what a stage tells, the first of which is the driver's:
STAGE = {
    "kind": "stage", "name": str, "number": int, "about": str, "limit": float, "rehearsal": bool, "begun": float,
    "marker": re.compile("[0-9a-f]{32}"),
}  # fmt: skip


@dataclass
class Acceptance:
    """What is known of the stages, in a folder: NAME.json, NAME.md, and NAME.log with what the processes said.

    What the process of a stage tells is in NAME.STAGE.jsonl until it is in NAME.json: a driver that is killed loses
    nothing, the next one takes it up.
    rehearsal: on a CPU, at tiny sizes. Raises InputError where the folder holds a run of the other kind, or files that
    are not such a run's.
    """

    folder: Path
    rehearsal: bool

    def __post_init__(self):
        self.folder = resolved(self.folder)
        self._ours = made_here(*KEYS)
        self._files = {end: self.folder / f"{NAME}.{end}" for end in ("json", "md", "log")}
        for end in ("json", "md"):
            check_out(self._files[end], f"{end} file", ours=self._ours)
        self.stages: dict[str, dict[str, Any]] = {}
        self._markers: set[str] = set()  # of the stages that run
        self._stopped = threading.Event()
        left = self._left()
        if self._files["json"].exists():
            found = read_json(self._files["json"], FORM)
            self.stages = found["stages"]
            self._check_kind(found["rehearsal"])
        elif not left:
            check_out(self._files["log"], "log")
        for rows in left.values():
            self._check_kind(rows[0]["rehearsal"])

    def _check_kind(self, rehearsal: bool) -> None:
        if rehearsal != self.rehearsal:
            held = "a rehearsal" if rehearsal else "a run on a GPU"
            raise InputError(f"{option('out', str(self.folder))} holds {held}; choose another folder")

    def _channel(self, name: str) -> Path:
        return self.folder / f"{NAME}.{name}.jsonl"

    def _left(self) -> dict[Path, list[dict[str, Any]]]:
        """What stages told to drivers that were killed, by its file. Raises InputError for a file of another kind."""
        left = {}
        for path in sorted(self.folder.glob(f"{NAME}.*.jsonl")):
            try:
                left[path] = read_rows(path, TOLD)
            except (OSError, Malformed):
                left[path] = []
            if not left[path] or fault_of(left[path][0], STAGE) or path != self._channel(left[path][0]["name"]):
                check_out(path, "file of a stage")
        return left

    def run(self, stages: Sequence[Stage], minutes: float | None = None, again: bool = False) -> bool:
        """Run the stages, never stopping at one that fails; whether all of them are OK. Those that were never begun
        come first, and else their order holds. A rehearsal runs AT_ONCE of them at once.

        One that lacked time before gets twice the time that it had.
        minutes: after which none is begun, and the one that runs is ended. again: also those that are OK already.
        Raises InputError where another process works in the folder.
        """
        end = time.monotonic() + 60 * minutes if minutes else float("inf")
        with lock(self.folder, f"{option('out', str(self.folder))}"):
            self._take_up()
            states = {stage.name: self.stages.get(stage.name, {}).get("state", NOT_BEGUN) for stage in stages}
            left = [stage for stage in stages if again or states[stage.name] != OK]
            left.sort(key=lambda stage: states[stage.name] not in NEVER)
            with ThreadPoolExecutor(AT_ONCE if self.rehearsal else 1) as pool:
                running = {pool.submit(self._found, stage, end): stage for stage in left}
                try:
                    for done in as_completed(running):
                        states[running[done].name] = self._keep(running[done].name, done.result())
                except BaseException:
                    self._stopped.set()
                    for future in running:
                        future.cancel()
                    for marker in [*self._markers]:
                        end_all(marker)
                    for future, stage in running.items():
                        if not future.cancelled() and not future.exception() and self._channel(stage.name).exists():
                            self._keep(stage.name, future.result())
                    raise
            self._write()
        return all(state == OK for state in states.values())

    def _take_up(self) -> None:
        """Record what stages told to drivers that were killed."""
        for path, (stage, *_) in self._left().items():
            end_all(stage["marker"])  # its process may still be there
            told = read_rows(path, TOLD)[1:]
            say(f"{stage['name']}: what it told before its driver was killed is taken up")
            about = {key: stage[key] for key in ("number", "about", "limit")}
            about["seconds"] = round(max(0.0, path.stat().st_mtime - stage["begun"]), 1)
            found = summed(told, 0, 0)
            found |= {"state": INTERRUPTED, "why": "the command was killed; what it had found is here"}
            self._keep(stage["name"], about | found)

    def _keep(self, name: str, found: dict[str, Any]) -> str:
        """Record what was found of a stage, unless an earlier record tells more; the state that was found."""
        before, state = self.stages.get(name), found["state"]
        if before is None or state == OK or (state not in NEVER and _told(found) >= _told(before)):
            self.stages[name] = found
        elif state not in NEVER:
            before |= {"later": f"a later try told less, {state}{_because(found)}", "limit": found["limit"]}
        self._write()
        self._channel(name).unlink(missing_ok=True)
        return state

    def _found(self, stage: Stage, end: float) -> dict[str, Any]:
        """The record of a stage once it was run, or why it was not. end: of the time of all stages."""
        begun = time.monotonic()
        limit = min(self._limit(stage), end - begun)
        say(f"{stage.name}: {stage.about}")
        if lacking := [name for name in stage.needs if find_spec(name) is None]:
            found = {"state": LACKS, "why": f"needs the packages {', '.join(lacking)}"}
        elif self._stopped.is_set() or (limit < LEAST_SECONDS and end < float("inf")):
            found = {"state": NOT_BEGUN, "why": "no time was left; the same command goes on with it"}
        else:
            found = self._result(stage, limit)
        about = {"number": stage.number, "about": stage.about, "seconds": round(time.monotonic() - begun, 1)}
        say(f"{stage.name}: {found['state']}, {about['seconds']:.0f} s{_because(found)}")
        return about | {"limit": limit} | found

    def _limit(self, stage: Stage) -> float:
        """Seconds that a stage may take: twice what it had where it lacked time, and its own at least."""
        own, before = stage.rehearsal_seconds if self.rehearsal else stage.seconds, self.stages.get(stage.name, {})
        return max(own, 2 * before.get("limit", 0)) if before.get("state") in LATE else own

    def _result(self, stage: Stage, limit: float) -> dict[str, Any]:
        channel = self._channel(stage.name)
        with tempfile.TemporaryDirectory() as scratch:
            said = Path(scratch) / "said"
            facts = {"name": stage.name, "number": stage.number, "about": stage.about, "limit": limit}
            facts |= {"rehearsal": self.rehearsal, "begun": time.time(), "marker": uuid.uuid4().hex}
            channel.write_text(json.dumps({"kind": "stage", **facts}) + "\n")
            try:
                with open(said, "wb") as log:
                    status = self._process(stage, (channel, self.folder, Path(scratch)), limit, log, facts["marker"])
            finally:
                with open(self._files["log"], "ab") as log:
                    log.write(f"==== {stage.name} ====\n".encode() + said.read_bytes() + b"\n")
        found = summed(read_rows(channel, TOLD)[1:], status, limit)
        if self._stopped.is_set() and found["state"] == DIED:
            found |= {"state": INTERRUPTED, "why": "a signal ended the command; what it had found is here"}
        return found

    def _process(self, stage: Stage, places: Sequence[Path], limit: float, log: BinaryIO, marker: str) -> int | None:
        """Run the process of a stage; its exit status, None where it was ended for its time. places: its channel, the
        folder of the acceptance, and one for what goes with it."""
        mode = REHEARSAL if self.rehearsal else REAL
        environment = {**os.environ, MARKER: marker, "PYTHONUNBUFFERED": "1"}
        if self.rehearsal and stage.interpreted:
            environment["TRITON_INTERPRET"] = "1"
        places = (str(place.absolute()) for place in places)
        words = [sys.executable, "-m", f"{PACKAGE}.worker", stage.module, *places, str(limit), mode]
        self._markers.add(marker)
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            if self._stopped.is_set():  # before this process was there to be ended
                process.kill()
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()
            end_all(marker)
            self._markers.remove(marker)

    def _write(self) -> None:
        facts = {"rehearsal": self.rehearsal, "stages": self.stages}
        text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
        write_out(self._files["json"], text, "json file", ours=self._ours)
        write_out(self._files["md"], to_markdown(facts), "md file", ours=self._ours)


def end_all(marker: str) -> None:
    """End whatever has the marker in its environment: a stage's process and what it started, however that was."""
    for environment in Path("/proc").glob("[0-9]*/environ"):  # elsewhere than on Linux there are none
        with suppress(OSError):
            if f"{MARKER}={marker}".encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


def summed(told: list[dict[str, Any]], status: int | None, limit: float) -> dict[str, Any]:
    """The record of a stage: its state, and why, and all that its process told.

    told: in order. status: of its process, see `subprocess`; None where it was ended after `limit` seconds.
    """
    kinds = {"row": "rows", "check": "checks", "left out": "left_out", "fault": "faults"}
    record: dict[str, Any] = {"where": {}, **{name: [] for name in kinds.values()}}
    for facts in told:
        kind = facts.pop("kind")
        if kind == "where":
            record["where"] = facts
        else:
            record[kinds[kind]].append(facts)
    return {**_state(record, status, limit), **record}


def _state(record: dict[str, Any], status: int | None, limit: float) -> dict[str, str]:
    wrong = [check["what"] for check in record["checks"] if not check["holds"]]
    late = [each["what"] for each in record["left_out"] if each["reason"] == "time"]
    if status is None:
        return {"state": HUNG, "why": f"it was ended after {limit:.0f} s; what it had found is here"}
    if status < 0:
        name = signal.Signals(-status).name if -status in {*signal.Signals} else f"signal {-status}"
        return {"state": DIED, "why": f"its process was ended by {name}; the log says more"}
    if record["faults"]:
        first = record["faults"][0]
        return {
            "state": FAILED,
            "why": f"{len(record['faults'])} errors, the first in {first['what']}: {first['error']}",
        }
    if status:
        return {"state": FAILED, "why": f"its process ended with status {status}; the log says more"}
    if wrong:
        return {"state": WRONG, "why": f"{len(wrong)} of {len(record['checks'])} checks do not hold: {wrong[0]}"}
    short = [each["what"] for each in record["left_out"] if each["reason"] == "memory"]
    if short and not _told(record):
        return {"state": PART, "why": f"no memory for any of its {len(short)} parts, the first {short[0]}"}
    if late:
        return {"state": PART, "why": f"no time for {len(late)} of its parts, the first {late[0]}"}
    return {"state": OK, "why": ""}


def _because(found: dict[str, Any]) -> str:
    return f": {found['why']}" if found["why"] else ""


def _told(record: dict[str, Any]) -> int:
    """How much a stage told."""
    return len(record.get("checks", ())) + len(record.get("rows", ()))


def to_markdown(facts: dict[str, Any]) -> str:
    """All tables: the stages, then what each found."""
    stages = sorted(facts["stages"].items(), key=lambda item: item[1]["number"])
    lines = ["A rehearsal on a CPU: its times mean nothing.\n"] if facts["rehearsal"] else []
    places = {}
    for name, record in stages:
        if record.get("where"):
            said = ", ".join(f"{key} {value}" for key, value in record["where"].items() if value and key != "at")
            places.setdefault(said, []).append(name)
    lines += [f"{plain(place)} ({', '.join(names)}).\n" for place, names in places.items()]
    rows = (
        [str(record["number"]), name, record["state"], f"{record['seconds']:.0f}", plain(_reasons(record))]
        for name, record in stages
    )
    lines.append(markdown_table(["", "stage", "state", "s", "why"], rows, text=("stage", "state", "why")))
    for name, record in stages:
        lines += _of_stage(name, record)
    return "\n".join(lines) + "\n"


def _reasons(record: dict[str, Any]) -> str:
    return "; ".join(filter(None, (record["why"], record.get("later"))))


def _of_stage(name: str, record: dict[str, Any]) -> Iterator[str]:
    parts = [record.get(each, []) for each in ("checks", "rows", "left_out", "faults")]
    if not any(parts):
        return
    checks, rows, left_out, faults = parts
    yield f"\n## {name}: {record['about']}\n"
    if checks:
        wrong = [check for check in checks if not check["holds"]]
        yield f"{len(checks) - len(wrong)} of {len(checks)} checks hold."
        yield from (f"- WRONG: {plain(each['what'])}: {each['error']}, bound {each['bound']}" for each in wrong)
    for table in dict.fromkeys(row["table"] for row in rows):
        own = [{key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == table]
        head = [key for key in dict.fromkeys(key for row in own for key in row) if any(row.get(key) for row in own)]
        if not head:
            continue
        text = {key for key in head if any(isinstance(row.get(key), str) for row in own)}
        yield f"\n{table}\n"
        yield markdown_table(head, ([_cell(row.get(key)) for key in head] for row in own), text)
    for why in dict.fromkeys(each["why"] for each in left_out):
        what = [each["what"] for each in left_out if each["why"] == why]
        more = f" and {len(what) - NAMED} more" if len(what) > NAMED else ""
        yield f"- left out: {plain(', '.join(what[:NAMED]))}{more}: {plain(why)}"
    yield from (f"- ERROR: {plain(each['what'])}: {plain(each['error'])}" for each in faults)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return plain(value)
