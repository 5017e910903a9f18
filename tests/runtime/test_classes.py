"""Classes by id or by name; see tests/pipelines/test_sit_pipeline.py for the pipeline's."""

import pytest

from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.errors import InputError

NAMED = Classes(4, {0: "tench, Tinca tinca", "1": "goldfish", 2: "crane", 3: "crane"})


@pytest.mark.parametrize(("word", "label"), [("goldfish", 1), (" Tench ", 0), ("tinca tinca", 0), ("3", 3), ("+2", 2)])
def test_a_word_is_an_id_or_a_name(word, label):
    assert NAMED.read(word) == label


def test_ids_and_names_may_be_mixed_and_a_text_of_digits_is_a_name_there():
    assert NAMED.ids(["goldfish", 3, "tench"]) == [1, 3, 0]
    assert Classes(2, {0: "1", 1: "0"}).ids(["1", 1]) == [0, 1]
    assert Classes(2, {0: "1", 1: "0"}).read("1") == 1  # a number that is written is an id


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("goldfsh", "class='goldfsh': did you mean 'goldfish'"),
        ("crane", r"class 'crane' is the name of \[2, 3\]; give an id"),
        ("4", "class id 4 is out of range; this model has classes 0 to 3"),
        ("-1", "class id -1 is out of range"),
    ],
)
def test_what_is_no_class_is_refused_with_the_nearest(word, says):
    with pytest.raises(InputError, match=says):
        NAMED.read(word)


def test_without_names_ids_are_asked_for():
    with pytest.raises(InputError, match="class 'tench': the checkpoint names no classes; give ids, 0 to 9"):
        Classes(10).read("tench")
