"""The tests that need a GPU, where the library lies in a clone with its tests: each file in a process of its own."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import sit_atconv
from sit_atconv.bench.gpu.worker import ABSENT, TIME, Bench, status_within

ROOT = Path(sit_atconv.__file__).parents[1]
MARK = "mark.gpu"
FILE_SECONDS = 180.0  # that one file may take


def run(bench: Bench) -> None:
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text())
    if not files:
        bench.leave_out("the tests", ABSENT, f"there are none beside the library, in {str(ROOT)!r}")
    for path in files[:1] if bench.rehearsal else files:  # whatever they are, nothing of them runs in a rehearsal
        bench.attempt(path.name, lambda path=path: tested(bench, path))


def tested(bench: Bench, path: Path) -> None:
    """Run the tests of a file, and tell what its report says of each. Raises RuntimeError where pytest fails."""
    report = bench.folder / f"gpu-{path.stem}.xml"
    report.unlink(missing_ok=True)
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}")
    seconds = min(FILE_SECONDS, bench.seconds_left())
    status = status_within(seconds, [sys.executable, "-m", "pytest", *options, str(path)], cwd=ROOT)
    if status is None:
        bench.leave_out(path.name, TIME, f"it takes more than {seconds:.0f} s")
        return
    cases, bad = (
        list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else [],
        {"failure", "error"},
    )
    for case in cases:
        state = next((child.tag for child in case if child.tag in {"skipped", *bad}), "passed")
        if state == "skipped":
            bench.leave_out(_name(case), ABSENT, next(iter(case)).get("message", "")[:200])
        else:
            bench.check(_name(case), float(state in bad), 0)
    # 1: some failed, which the checks say; 5: none was collected.
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with status {status}; the log says more")
    bench.row("tests", file=path.relative_to(ROOT).as_posix(), cases=len(cases))


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"
