"""The tests that need a GPU, where the library lies in a clone with its tests."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import sit_atconv
from sit_atconv.bench.gpu.worker import ABSENT, Bench

ROOT = Path(sit_atconv.__file__).parents[1]
MARK = "mark.gpu"
JUNIT = "gpu-tests.xml"


def run(bench: Bench) -> None:
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text())
    if not files:
        bench.leave_out("the tests", ABSENT, f"there are none beside the library, in {str(ROOT)!r}")
        return
    report = bench.folder / JUNIT
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if bench.rehearsal:
        files = files[:1]  # whatever they are, nothing of them runs here
    done = subprocess.run([*words, *map(str, files)], cwd=ROOT)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {"failure", "error"}
    for case in cases:
        state = next((child.tag for child in case if child.tag in {"skipped", *bad}), "passed")
        if state == "skipped":
            bench.leave_out(_name(case), ABSENT, next(iter(case)).get("message", "")[:200])
        else:
            bench.check(_name(case), float(state in bad), 0)
    # 5: none was collected; 1: some failed, which the checks say.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {done.returncode}; the log says more")
    bench.row("tests", files=len(files), cases=len(cases))


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"
