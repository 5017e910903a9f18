"""What the experiments that train many runs share."""

import os
import signal
from functools import partial

import pytest

from experiments.runs import parsed, parser_of, side_by_side
from sit_atconv.runtime.errors import InputError

ABOUT = "python -m experiments.some: about it.\n\nMore."


def arguments(*words):
    return parsed(parser_of("some", ABOUT), words)


def test_results_come_in_the_order_of_the_calls():
    args = arguments("--processes", "3")
    assert str(args.runs) == "runs/some"
    assert args.seeds == [0, 1, 2]
    assert side_by_side([partial(pow, 2, each) for each in range(9)], "some", args) == [2**each for each in range(9)]


def test_a_seed_twice_is_refused():
    with pytest.raises(InputError, match=r"--seeds \[3, 3\]: give different ones"):
        arguments("--seeds", "3", "3")


def test_an_error_of_a_run_is_the_error_of_all_and_begins_no_other():
    begun = []

    def fails():
        raise InputError("of the second")

    with pytest.raises(InputError, match="of the second"):
        side_by_side(
            [partial(begun.append, 0), fails, *[partial(begun.append, 1)] * 50], "some", arguments("--processes", "1")
        )
    assert begun.count(0) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_line(number, capsys):
    with pytest.raises(SystemExit) as ended:
        side_by_side(
            [partial(os.kill, os.getpid(), number), *[partial(pow, 2, 2)] * 50], "some", arguments("--processes", "1")
        )
    assert ended.value.code == 128 + number
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == f"{number.name}: whole runs are in 'runs/some'; the same command goes on"
