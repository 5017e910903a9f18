"""`sit-atconv watch`: what a terminal, a pipe and a browser get to see of a run, at work, stopped and ended."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_recipe
from html_page import Page
from PIL import Image

from sit_atconv.__main__ import main
from sit_atconv.commands import watch
from sit_atconv.report.terminal import GREYS, Colours, blocks, look, sparkline
from sit_atconv.runtime import files

TRUE, MANY, NONE = Colours(1 << 24), Colours(256), Colours(0)
# Takes a run's lock, as the trainer does, until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from sit_atconv.runtime.files import lock
held = lock(Path(sys.argv[1]), "run")
print("held", flush=True)
sys.stdin.read()
"""


def test_two_pixels_are_one_character():
    pixels = np.zeros((4, 2, 3), np.uint8)
    pixels[0], pixels[1, 0], pixels[3, 1] = 255, (255, 0, 0), (0, 0, 255)
    red = "\x1b[38;2;255;255;255m\x1b[48;2;255;0;0m▀"
    black = "\x1b[38;2;255;255;255m\x1b[48;2;0;0;0m▀"
    first, second = blocks(Image.fromarray(pixels), 80, 20, TRUE)
    assert first == f"{red}{black}\x1b[0m"
    assert second.endswith("\x1b[38;2;0;0;0m\x1b[48;2;0;0;255m▀\x1b[0m")
    # of 256 colours, the nearest of the cube; an odd row has black below it
    (line,) = blocks(Image.new("RGB", (1, 1), (250, 100, 0)), 80, 20, MANY)
    assert line == "\x1b[38;5;208m\x1b[48;5;16m▀\x1b[0m".replace("208", str(16 + 36 * 5 + 6 * 1))
    # and without colours a grey
    assert blocks(Image.new("L", (3, 2), 255), 80, 20, NONE) == [GREYS[-1] * 3]
    assert blocks(Image.new("L", (3, 2), 0), 80, 20, NONE) == [GREYS[0] * 3]


@pytest.mark.parametrize(("size", "columns", "rows"), [((100, 40), 20, 30), ((40, 100), 80, 10), ((8, 6), 80, 30)])
def test_a_picture_fits_and_keeps_its_shape(size, columns, rows):
    lines = blocks(Image.new("RGB", size), columns, rows, NONE)
    assert len(lines) <= rows
    assert {len(line) for line in lines} == {min(size[0], columns, int(size[0] * min(1, 2 * rows / size[1])))}
    assert len(lines[0]) / (2 * len(lines)) == pytest.approx(size[0] / size[1], rel=0.15)


def test_a_curve_goes_from_its_least_to_its_greatest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 8, 0, 0, None, None], 3) == "█▁ "
    assert sparkline([], 8) == sparkline([None], 8) == ""
    assert sparkline([3.0, 3.0], 8) == "▁▁"


def test_colours_are_those_of_the_environment():
    assert Colours.of({"COLORTERM": "truecolor", "TERM": "xterm"}) == TRUE
    assert Colours.of({"TERM": "xterm"}) == MANY
    assert Colours.of({"COLORTERM": "truecolor", "NO_COLOR": "1"}) == Colours.of({"TERM": "dumb"}) == NONE


@pytest.fixture
def begun(tmp_path):
    """A run's folder as the trainer writes it, two steps of eight into it."""
    run = tmp_path / "mine"
    (run / "previews").mkdir(parents=True)
    (run / "recipe.yaml").write_text("train: {max_steps: 8}\ndata: {kind: digits}\n")
    (run / ".lock").touch()
    for step in (1, 2):
        write(run, step)
    Image.new("RGB", (6, 4), (255, 255, 255)).save(run / "previews/step-0000002.png")
    return run


def write(run, step: int) -> None:
    row = {"step": step, "loss": 1 / step, "images_per_second": 1234.5, "eta_seconds": 75.0 * (8 - step), "skipped": 0}
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps(row) + "\n")


@pytest.fixture
def holder(begun):
    """A process that has the run's folder, as the trainer has it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, begun], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_whether_a_process_is_at_work_is_seen_without_taking_its_place(begun, holder):
    assert files.in_use(begun) is True
    assert files.in_use(begun) is True  # which it still has
    holder.kill()
    holder.wait()
    assert files.in_use(begun) is False
    (begun / ".lock").unlink()
    assert files.in_use(begun) is False


def test_off_a_terminal_a_run_at_work_is_told_line_by_line_until_it_ends(begun, holder, monkeypatch, capsys):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            write(begun, 4)
        if len(waits) == 3:
            write(begun, 8)
            holder.communicate()

    monkeypatch.setattr(time, "sleep", sleep)
    main(["watch", str(begun), "--every", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "step 2 of 8, loss 0.5000, 1,234 images/s, 07:30 left", f"preview {begun.resolve()}/previews/step-0000002.png",
        "step 4 of 8, loss 0.2500, 1,234 images/s, 05:00 left", "step 8 of 8, loss 0.1250, 1,234 images/s",
        f"{begun}: ended at step 8",
    ]  # fmt: skip
    assert waits == [3, 3, 3]


def test_a_run_that_was_killed_half_way_is_told_once_with_how_it_goes_on(begun, monkeypatch, capsys):
    (begun / "log.jsonl").open("a").write('{"step": 3, "lo')
    monkeypatch.setattr(time, "sleep", None)
    main(["watch", str(begun)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 2 of 8, loss 0.5000, 1,234 images/s"
    assert lines[-1] == f"{begun}: stopped at step 2 of 8; the command that began it goes on"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_screen_that_is_drawn_again(begun, holder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("NO_COLOR", "1")

    def sleep(seconds: float) -> None:
        write(begun, 8)
        holder.communicate()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["watch", str(begun)])
    first, second = sys.stdout.getvalue().split("\x1b[8F\x1b[J")  # as many lines back as were drawn
    assert first.removeprefix("\x1b[J").splitlines() == [
        "mine: training, step 2", "step 2 of 8, loss 0.5000, 1,234 images/s"[:40],
        "████████░░░░░░░░░░░░░░░░░░░░░░░░░░  25%",
        "loss  █▁", "      1 at first, 0.5 at least", "preview of step 2", GREYS[-1] * 6, GREYS[-1] * 6,
    ]  # fmt: skip
    assert "mine: ended at step 8" in second
    assert second.splitlines()[-1] == f"{begun}: ended at step 8"


def test_a_small_terminal_is_not_overrun(begun, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["watch", str(begun)])
    drawn = sys.stdout.getvalue().splitlines()[:-1]
    assert len(drawn) == 4
    assert all(len(re.sub(r"\x1b\[\w+", "", line)) <= 20 for line in drawn)


def refreshed(page: Page) -> list[str]:
    return [each["content"] for each in page.all("meta") if each.get("http-equiv") == "refresh"]


@pytest.fixture
def pages(begun, holder, monkeypatch):
    """Watches the run with its page. events: what happens in each wait, which takes 70 seconds, as a page takes three;
    after the last one the training has ended. Gives the page as it was before each event, and at last."""

    def pages(*events):
        found, left, clock = [], list(events), [0.0]

        def look():
            found.append(Page((begun / "report.html").read_text()))

        def sleep(seconds):
            look()
            clock[0] += 70
            left.pop(0)()
            if not left:
                holder.communicate()

        def monotonic():
            clock[0] += 3
            return clock[0]

        monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, monotonic=monotonic))
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
        opened = []
        main(["watch", str(begun), "--open", "--every", "7"])
        assert opened == [(begun.resolve() / "report.html").as_uri()]
        look()
        return found

    return pages


def test_the_page_is_written_anew_and_loads_itself_until_the_run_ends(begun, pages):
    found = pages(lambda: write(begun, 3), lambda: None, lambda: write(begun, 6), lambda: write(begun, 8))
    assert found[1].source == found[2].source  # there was no news
    assert [refreshed(page) for page in found] == [["7"], ["60"], ["60"], ["60"], []]  # twenty times what a page takes
    assert [page.text.count("Being trained") for page in found] == [1, 1, 1, 1, 0]
    for page, step, left in zip(found, (2, 3, 3, 6), ("07:30", "06:15", "06:15", "02:30"), strict=False):
        assert f"Being trained, step {step} of 8, about {left} left as this page was written." in page.text
        ((_, bar),) = [each for each in page.elements if each[0] == "progress"]
        assert (bar["value"], bar["max"]) == (str(step), "8")
    assert "Latest: 0.125 at step 8" in found[-1].text
    assert not found[-1].all("progress")


def test_a_page_that_takes_long_is_written_less_often(begun, pages, monkeypatch):
    monkeypatch.setattr(watch, "SHARE", 40)  # so that 120 seconds lie between two pages, and 70 between two looks
    found = pages(*[lambda step=step: write(begun, step) for step in (3, 4, 5, 6, 8)])
    latest = [re.search(r"Being trained, step (\d)", page.text) for page in found]
    assert [match and match[1] for match in latest] == ["2", "2", "4", "4", "6", None]


def test_without_a_browser_the_place_of_the_page_is_told(begun, monkeypatch, capsys):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    main(["watch", str(begun), "--open"])
    assert f"there is no browser here; open {begun}/report.html" in capsys.readouterr().err


def test_of_several_runs_each_that_goes_on_is_told(begun, tmp_path, holder):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/recipe.yaml").write_text("train: {max_steps: 8}\n")
    out = tmp_path / "page.html"
    main(["report", str(begun), str(tmp_path / "other"), "--out", str(out)])
    page = Page(out.read_text())
    assert "mine: being trained, step 2 of 8, about 07:30 left" in page.text
    assert "other: being trained" not in page.text
    assert not refreshed(page)


def test_what_is_no_run_costs_one_line(begun, tmp_path, fails):
    assert "is no folder" in fails(main, "watch", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "nothing to report" in fails(main, "watch", tmp_path / "empty")
    Image.new("L", (4, 4)).save(tmp_path / "empty/0.png")
    assert "is a folder of samples" in fails(main, "watch", tmp_path / "empty")
    (begun / "report.html").write_text("mine")
    assert "report.html" in fails(main, "watch", begun, "--open")
    assert (begun / "report.html").read_text() == "mine"
    (begun / "log.jsonl").write_text("[]\n")
    assert "is damaged" in fails(main, "watch", begun)
    assert "--every 0: must be at least 1" in fails(main, "watch", begun, "--every", "0")


def test_a_fault_that_passes_is_waited_for(begun, holder, monkeypatch, capsys):
    log, waits = (begun / "log.jsonl").read_text(), []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (begun / "log.jsonl").write_text("[]\n" if len(waits) in (1, 2) else log)
        if len(waits) == 4:
            holder.communicate()

    monkeypatch.setattr(time, "sleep", sleep)
    main(["watch", str(begun)])
    assert "stopped at step 2" in capsys.readouterr().out


def test_a_fault_that_stays_is_told_and_the_page_is_loaded_no_more(begun, holder, monkeypatch, capsys):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (begun / "log.jsonl").write_text("[]\n")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(begun), "--open"])
    assert stop.value.code == 2
    assert "is damaged" in capsys.readouterr().err
    assert len(waits) == watch.TRIES
    assert not refreshed(Page((begun / "report.html").read_text()))


def test_a_picture_that_is_half_written_costs_one_warning(begun, pages, capsys):
    preview = begun / "previews/step-0000002.png"
    whole = preview.read_bytes()

    def damaged():
        write(begun, 3)
        preview.write_bytes(whole[:40])

    def mended():
        preview.write_bytes(whole)

    found = pages(damaged, lambda: write(begun, 4), mended, lambda: write(begun, 8))
    assert found[0].source == found[1].source == found[2].source
    assert "step 4 of 8" in found[3].text
    assert not refreshed(found[-1])
    assert capsys.readouterr().err.count("the page stays as it was") == 1


def test_a_signal_ends_the_watching_alone_and_the_page_is_loaded_no_more(begun, holder, monkeypatch, capsys):
    monkeypatch.setattr("webbrowser.open", lambda address: True)

    def sleep(seconds: float) -> None:
        assert refreshed(Page((begun / "report.html").read_text())) == ["5"]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(SystemExit) as stop:
        main(["watch", str(begun), "--open"])
    assert stop.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "SIGINT: no longer watched; the run goes on\n"
    page = Page((begun / "report.html").read_text())
    assert "Being trained, step 2 of 8" in page.text
    assert not refreshed(page)


def test_a_run_of_the_trainer_is_seen_as_it_is(recipe_file, tmp_path, capsys):
    run_recipe(recipe_file(preview={"every": 4, "num": 10, "steps": 1}))
    capsys.readouterr()
    main(["watch", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 8 of 8, loss ")
    assert lines[-1] == f"{tmp_path / 'run'}: ended at step 8"
    at = look(tmp_path / "run")
    assert (at.step, at.steps, at.ended) == (8, 8, True)
