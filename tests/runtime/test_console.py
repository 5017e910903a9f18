"""How far something has come: a bar on a terminal, plain lines elsewhere, by a clock that the tests turn."""

import io
import re
from types import SimpleNamespace

import pytest

from sit_atconv.runtime.console import EVERY, REDRAWN, Progress, bars_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at():
    """A clock, which stands at `at.now`."""
    return SimpleNamespace(now=100.0)


def started(at, stream=None, **options) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO() if stream is None else stream
    return Progress(desc="train", unit="step", stream=stream, clock=lambda: at.now, **options), stream


def test_off_a_terminal_lines_come_by_the_clock(at):
    bar, stream = started(at, total=4000)
    with bar:
        for _ in range(1000):  # eight a second, for 125 seconds
            at.now += 0.125
            bar.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == pytest.approx(125 / EVERY, abs=1)
    assert "\r" not in stream.getvalue()
    assert lines[0] == "train: step 80 of 4,000, 8 step/s, 08:10 left"
    assert lines[-1] == "train: step 1,000 of 4,000, 8 step/s, 02:05 in all"


def test_the_last_line_of_what_is_done_has_no_time_left(at):
    bar, stream = started(at, total=2)
    with bar:
        for _ in range(2):
            at.now += EVERY
            bar.update()
    assert stream.getvalue().splitlines() == [
        "train: step 1 of 2, 10 s/step, 00:10 left", "train: step 2 of 2, 10 s/step, 00:20 in all"
    ]  # fmt: skip


def test_a_slow_step_is_told_in_seconds_and_a_resumed_run_counts_what_is_new(at):
    bar, stream = started(at, total=10, initial=4)
    bar.note("loss 0.5000")
    at.now += 20
    bar.update()
    assert stream.getvalue() == "train: step 5 of 10, loss 0.5000, 20 s/step, 01:40 left\n"


def test_work_within_a_unit_is_told_with_the_time_that_is_left(at):
    bar, stream = started(at, total=8)
    at.now += EVERY
    bar.note("evaluation 25", part=2.0)  # a quarter in ten seconds
    assert stream.getvalue() == "train: step 0 of 8, evaluation 25, 5 s/step, 00:30 left\n"
    bar.update(4)
    bar.close()
    assert stream.getvalue().splitlines()[1:] == ["train: step 4 of 8, 2.5 s/step, 00:10 in all"]


@pytest.mark.parametrize(
    ("options", "seconds", "count"),
    [({}, 0, 1), ({"leave": False}, 1, 0), ({"delay": 2}, 1, 0), ({"delay": 2}, 3, 1), ({"disable": True}, 99, 0)],
)
def test_a_short_work_leaves_one_line_or_none(at, options, seconds, count):
    bar, stream = started(at, total=1, **options)
    at.now += seconds
    bar.update()
    bar.close()
    assert len(stream.getvalue().splitlines()) == count


def test_nothing_is_said_of_work_that_fails_at_once(at):
    bar, stream = started(at, total=3)

    def work() -> None:
        with bar:
            at.now += 60
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert stream.getvalue() == ""


def test_it_goes_through_an_iterable_of_known_or_unknown_length(at):
    bar, stream = started(at, iterable=[1, 2, 3])
    assert [*bar] == [1, 2, 3]
    assert bar.total == 3
    assert stream.getvalue() == "train: step 3 of 3, 00:00 in all\n"
    bar, stream = started(at, iterable=iter("ab"))
    assert "".join(bar) == "ab"
    assert stream.getvalue() == "train: step 2, 00:00 in all\n"


def test_bytes_are_told_in_short(at):
    stream = io.StringIO()
    bar = Progress(desc="verify", total=4 * 10**9, unit="B", unit_scale=True, stream=stream, clock=lambda: at.now)
    at.now += 10
    bar.update(10**9)
    assert stream.getvalue() == "verify: 1.00GB of 4.00GB, 100MB/s, 00:30 left\n"


def test_a_terminal_has_one_bar_with_the_note_at_its_end(at):
    bar, stream = started(at, Terminal(), total=5)
    with bar:
        for number in range(1, 6):
            at.now += REDRAWN
            bar.update()
            bar.note(f"loss {number / 10:.4f}")
    assert "\r" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1
    assert re.search(r"5/5 .*, loss 0.5000\]", stream.getvalue())


def test_notes_on_a_terminal_do_not_draw_at_every_call(at):
    bar, stream = started(at, Terminal(), total=5)
    before = len(stream.getvalue())
    for number in range(1000):
        bar.note(f"evaluation {number}")
    assert len(stream.getvalue()) == before
    at.now += REDRAWN
    bar.note("evaluation 1000")
    assert "evaluation 1000" in stream.getvalue()


@pytest.mark.parametrize("on_terminal", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_bars_of_a_library_are_left_out_off_a_terminal_and_come_back(monkeypatch, on_terminal, wanted):
    library = SimpleNamespace(off=not wanted)
    library.are_progress_bars_disabled = lambda: library.off
    library.disable_progress_bars = lambda: setattr(library, "off", True)
    library.enable_progress_bars = lambda: setattr(library, "off", False)
    monkeypatch.setattr("sys.stderr", Terminal() if on_terminal else io.StringIO())
    with bars_of(library):
        assert library.off == (not wanted or not on_terminal)
    assert library.off != wanted


def test_a_stream_that_is_gone_stops_nothing(at):
    closed = io.StringIO()
    closed.close()
    bar, _ = started(at, closed, total=2)
    at.now += EVERY
    bar.update(2)
    bar.close()
