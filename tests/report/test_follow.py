"""A report that follows its runs: it is written anew while a process trains one of them, and no longer."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from html_page import Page

from sit_atconv.commands import parser_of, report
from sit_atconv.runtime import files
from sit_atconv.runtime.errors import InputError


def trained(run, *steps):
    """A run with reports of these steps."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text("train: {max_steps: 40}\n")
    rows = ({"step": step, "loss": 1 / step, "eta_seconds": 7.0 * (40 - step)} for step in steps)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def refreshed(page):
    return [each["content"] for each in page.all("meta") if each.get("http-equiv") == "refresh"]


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Follows runs. events: what happens in each wait; after the last one the training has ended. The pages."""

    def follow(*runs, events):
        out, pages, left = tmp_path / "page.html", [], list(events)

        def look():
            pages.append(Page(out.read_text()))

        def sleep(seconds):
            look()
            left.pop(0)()

        clock = iter(range(0, 10_000, 3))  # a page takes three seconds
        monkeypatch.setattr(report, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: next(clock)))
        for module in (report, sys.modules["sit_atconv.report.runs"]):
            monkeypatch.setattr(module, "in_use", lambda folder: bool(left))
        args = parser_of("report", "report").parse_args([*map(str, runs), "--follow", "--out", str(out)])
        args.run(args)
        look()
        return pages

    import sit_atconv.report.runs  # noqa: F401

    return follow


def test_a_page_is_written_anew_until_the_training_ends(tmp_path, follow, capsys):
    run = trained(tmp_path / "run", 10)
    events = [lambda: trained(run, 10, 20), lambda: trained(run, 10, 20, 30), lambda: trained(run, 10, 20, 30, 40)]
    pages = follow(run, events=events)
    assert [page.text.count("Being trained") for page in pages] == [1, 1, 1, 0]
    for page, step, left in zip(pages, (10, 20, 30), ("03:30", "02:20", "01:10"), strict=False):
        assert f"Being trained, step {step} of 40, about {left} left as this page was written." in page.text
        ((name, bar),) = [each for each in page.elements if each[0] == "progress"]
        assert (name, bar["value"], bar["max"]) == ("progress", str(step), "40")
    assert [refreshed(page) for page in pages] == [["10"], ["10"], ["60"], []]  # twenty times what a page takes
    assert "Latest: 0.025 at step 40" in pages[-1].text
    assert not pages[-1].all("progress")
    told = capsys.readouterr()
    assert "is written anew every 10 seconds while a RUN is trained" in told.err
    assert told.out.startswith(f"written to {tmp_path / 'page.html'}")


def test_a_damaged_file_costs_one_warning_and_the_page_stays(tmp_path, follow, capsys):
    run = trained(tmp_path / "run", 10)

    def damaged():
        (run / "log.jsonl").write_text("{\n")

    pages = follow(run, events=[damaged, lambda: None, lambda: trained(run, 10, 20)])
    assert pages[0].source == pages[1].source == pages[2].source
    assert "Latest: 0.05 at step 20" in pages[-1].text
    assert capsys.readouterr().err.count("the page stays as it was") == 1
    damaged()
    with pytest.raises(InputError, match="line 1 is no JSON"):
        follow(run, events=[lambda: None])


def test_runs_that_nobody_trains_are_written_once(tmp_path, follow, capsys):
    (page,) = follow(trained(tmp_path / "a", 10), trained(tmp_path / "b", 20), events=[])
    assert not refreshed(page)
    assert "no RUN is being trained: the page is written once" in capsys.readouterr().err


def test_of_several_runs_each_that_goes_on_is_told(tmp_path, follow, monkeypatch):
    first, second = trained(tmp_path / "a", 10), trained(tmp_path / "b", 20)
    page, last = follow(first, second, events=[lambda: None])
    assert "a: being trained, step 10 of 40, about 03:30 left" in page.text
    assert "b: being trained, step 20 of 40, about 02:20 left" in page.text
    assert "being trained" not in last.text


def test_a_signal_ends_it_and_the_page_is_loaded_no_more(tmp_path):
    run, out = trained(tmp_path / "run", 10), tmp_path / "page.html"
    command = [sys.executable, "-m", "sit_atconv", "report", run, "--follow", "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with files.lock(run, "it"), subprocess.Popen(command, **pipes) as follower:
        assert "Ctrl-C ends this" in follower.stderr.readline()
        assert refreshed(Page(out.read_text())) == ["10"]
        follower.send_signal(signal.SIGINT)
        told = follower.communicate()[1]
    assert follower.returncode == 128 + signal.SIGINT
    assert told == f"SIGINT: the page {str(out)!r} is as the runs were now; the same command follows them again\n"
    page = Page(out.read_text())
    assert "Being trained, step 10 of 40" in page.text
    assert not refreshed(page)
