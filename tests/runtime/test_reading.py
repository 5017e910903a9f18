"""Files of others: what is bounded, what is not worked out, and text that does nothing in a table."""

import json
import os
import re

import pytest

from sit_atconv.config import load_recipe, make_recipe
from sit_atconv.runtime.bounded import opened, read_bytes
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.markdown import plain
from sit_atconv.runtime.reading import (
    FILE,
    INSIDE,
    MOST_CONFIG,
    MOST_LINE,
    MOST_NESTED,
    MOST_SIZE,
    SHAPE,
    Malformed,
    as_stored,
    check_literal,
    fault_of,
    parse_json,
    read_config,
    read_json,
    read_rows,
    read_yaml,
    spelt,
)

RECIPE = "run: {out: here}\n"


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


def test_json_is_what_json_says_up_to_the_bounds():
    value = {"a": [1, 2.5, None, True, "[{"], "b": {"c": []}}
    assert parse_json(json.dumps(value), "it", object) == parse_json(json.dumps(value).encode(), "it", object) == value
    assert parse_json(nested(MOST_NESTED), "it", object) == json.loads(nested(MOST_NESTED))
    for text in (nested(MOST_NESTED + 1), nested(100_000), "[" * 100_000, '{"a":' * 100_000, f"[{'{},' * 1_000_001}0]"):
        with pytest.raises(ValueError, match=r"nested|lists and objects"):
            parse_json(text, "it", object)
    for text in (b"\xff", "", "[1", f"[{'9' * 5000}]"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_json(text, "it", object)


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"12345")
    for name, said in (("fifo", "a FIFO"), ("device", "a device"), ("nul\0", "no name"), (".", "directory")):
        with pytest.raises(OSError, match=said):
            opened(f"{tmp_path}/{name}")
        with pytest.raises(OSError, match=said):
            read_json(f"{tmp_path}/{name}")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "file", 4)


def test_rows_are_read_up_to_a_line_that_was_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    for text, rows in (("", 0), ('{"step": 1}\n{"step": 2}\n', 2), ('{"step": 1}\n{"st', 1), ('{"step": 1}', 1)):
        log.write_text(text)
        assert len(read_rows(log, {"step": int})) == rows
    for text, says in (
        ('{"step": 1}\n{"st\n', "line 2 is no JSON"), ("\n", "line 1 is no JSON"), ("[]\n", "line 1: it is"),
        ('{"step": "x"}\n{"step": 2}\n', "line 1: step is 'x'"),
        (nested(100_000) + "\n", "line 1 .* nested too deeply"),
        (f'{{"step": 1}}\n"{"x" * MOST_LINE}"', "line 2 is longer than 1,048,576 bytes"),
    ):  # fmt: skip
        log.write_text(text)
        with pytest.raises(Malformed, match=rf"log\.jsonl, {says}"):
            read_rows(log, {"step": int})


def test_the_sizes_of_a_configuration_are_bounded(tmp_path):
    file = tmp_path / "config.json"
    whole = {"a": MOST_SIZE, "b": [-MOST_SIZE, 1e300, {"c": True}], "d": None, "e": "9" * 30}
    file.write_text(json.dumps(whole))
    assert read_config(file) == whole
    for options, says in (
        ({"a": MOST_SIZE + 1}, "a is 1048577"), ({"b": [0, {"c": [-(1 << 70)]}]}, r"b\.1\.c\.0 is -11805"),
        ({"a": "x" * MOST_CONFIG}, "larger than 4,194,304 bytes"), ({"a": {"a": 1}}, "a is {'a': 1}, and must be"),
    ):  # fmt: skip
        file.write_text(json.dumps(options))
        with pytest.raises(Malformed, match=rf"config\.json.*{says}"):
            read_config(file, {"a?": (int, str)})


def test_a_value_comes_back_as_a_file_would_give_it():
    assert as_stored({1: (2, [3.0, None]), "a": True}) == {"1": [2, [3.0, None]], "a": True}


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}", "a${oc.env:SECRET}b", "\\${oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}",
        "${oc.create:[1]}", "${${run.out}:SECRET}", "${run.out}", "${oc.env:NOWHERE,SECRET}",
    ],
)  # fmt: skip
def test_nothing_in_a_recipe_is_worked_out(text, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    file, quoted = tmp_path / "recipe.yaml", json.dumps(text)
    for content, overrides in (
        (f"{RECIPE}data: {{root: {quoted}}}", ()),
        (f"{RECIPE}train: {{betas: [0.9, {quoted}]}}", ()),
        (f"{RECIPE}{quoted}: 1", ()),
        (RECIPE, [f"run.out={text}"]),
        (RECIPE, [f"train.betas=[0.9,{quoted}]"]),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=r"is not worked out") as error:
            load_recipe(file, overrides)
        assert "s3cr3t" not in str(error.value)
    with pytest.raises(InputError, match=r"is not worked out"):  # as stored in a manifest
        make_recipe({"run": {"out": text}})


@pytest.mark.parametrize("text", ["a\\0b", "\\ud800", "\\udce9x"])
def test_a_recipe_holds_what_a_manifest_can(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f'{RECIPE}data: {{split: "{text}"}}')
    with pytest.raises(InputError, match=r"it holds a text with a NUL, or with half|it is no YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    value = json.loads(f'"{text}"' if "\\u" in text else '"a\\u0000b"')
    with pytest.raises(InputError, match="it holds a text with a NUL"):
        make_recipe({"run": {"out": "x"}, "data": {"split": value}})
    assert parse_json(json.dumps(spelt(value)), "it", str) == spelt(value)
    assert spelt("é 日本 \U0001f600 \\x00 \n") == "é 日本 \U0001f600 \\x00 \n"


def test_a_base_is_a_recipe_and_its_content_is_not_told(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for name, content in (
        ("base.txt", "root:x:0:0"), ("key.yaml", "hunter2: 5"), ("value.yaml", "train: {lr: hunter2}"),
        ("text.yaml", "data: {root: 2, split: hunter2}"), ("list.yaml", "- hunter2"), ("word.yaml", "hunter2"),
        ("broken.yaml", "hunter2: [\n"), ("tag.yaml", "run: !hunter2 {}"), ("env.yaml", "run: {out: '${hunter2}'}"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        recipe.write_text(f"base: {name}\n{RECIPE}")
        with pytest.raises(InputError, match=name) as error:
            load_recipe(recipe)
        assert "hunter2" not in str(error.value)
        assert "root:x" not in str(error.value)
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, said in (("fifo.yaml", "it is a FIFO"), ("a\0.yaml", "it holds a text with a NUL")):
        recipe.write_text(f"base: {json.dumps(name)}\n{RECIPE}")
        with pytest.raises(InputError, match=said):
            load_recipe(recipe)


@pytest.mark.parametrize(
    "text",
    ["5", "- 1", "hunter", "[" * 100_000, nested(60), "a: &a [*a]", "a: &a {<<: *a}", "a: 1\n---\nb: 2", "? [1]\n: 2",
     "a: !!python/object:os.system x", "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]"
                                                                   for n in range(1, 9)),
     "\0", "a: " + "9" * 5000],
)  # fmt: skip
def test_a_yaml_that_is_no_recipe_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError):
        load_recipe(tmp_path / "recipe.yaml")


def test_yaml_keeps_aliases_numbers_and_pipes(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &x {b: 1e-4}\nc: *x\nd: {<<: *x, e: [1, two]}")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": {"b": 1e-4}, "c": {"b": 1e-4}, "d": {"b": 1e-4, "e": [1, "two"]},
    }  # fmt: skip
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") == {}
    check_literal({"a": ["$5", "{x}", "$ {x}"]})
    reading, writing = os.pipe()
    os.write(writing, RECIPE.encode())
    os.close(writing)
    assert read_yaml(f"/dev/fd/{reading}") == {"run": {"out": "here"}}
    os.close(reading)


def test_text_of_others_does_nothing_in_a_table():
    markdown_it = pytest.importorskip("markdown_it")
    for text in (
        "<script>alert(1)</script>", "<b>bold</b>", "a\n| new | row |\n# head", "a | b", "[x](http://y)", "![x](http://y)",
        "`code`", "&lt;b&gt;", "\\", "a\\|b", "**b**", "~~x~~", "<http://y>", "a\r\nb", "a\u2028b", "\x1b[31mred",
    ):  # fmt: skip
        page = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
        tokens = page.parse(f"| h | i |\n|---|---|\n| {plain(text)} | z |\n")
        assert [token.type for token in tokens].count("td_open") == 2
        (cell, _) = [token for token in tokens if token.type == "inline"][2:]
        assert {child.type for child in cell.children} <= {"text", "text_special"}, text
        shown = "".join(each if each.isprintable() else " " for each in " ".join(text.split()))
        assert "".join(child.content for child in cell.children) == shown.strip()
    assert plain("SiT-B/2 guidance_scale 1.5, 3 x 256") == "SiT-B/2 guidance_scale 1.5, 3 x 256"


@pytest.mark.parametrize(
    ("value", "form", "says"),
    [
        (2**63, int, "it is 9223372036854775808, and must be a whole number of 64 bits"),
        (True, int, "whole number"),
        (10**400, float, "a finite number"),
        (float("nan"), float, "a finite number"),
        ({"a": {"b": "x"}}, {"a": ({"b": int}, None)}, "a.b is 'x', and must be a whole number"),
        ({}, {"a": int, "b?": int}, "a is missing"),
        ({"b": 1.5}, {"b?": int}, "b is 1.5"),
        ({"x": 1}, {re.compile("[0-9]+"): int}, "'x' is a key that must be"),
        ([1, 2], SHAPE, "a list of 3"),
        ([1, "x"], [int], "1 is 'x'"),
        ("../x", FILE, "the name of a file"),
        ("a/../x", INSIDE, "the path of a file below the folder"),
        (0, range(1, 9), "a whole number, 1 to 8"),
        (1, (True, "x"), 'it is 1, and must be true or "x"'),
    ],
)
def test_a_form_names_the_place_and_the_rule(value, form, says):
    assert says in fault_of(value, form)


def test_a_form_takes_what_it_says():
    form = {"a": (None, [range(3)]), "b?": {str: float}, "c": "one", "file": INSIDE}
    whole = {"a": [0, 2], "b": {"x": 1, "": 1e300}, "c": "one", "file": "..x"}
    for value in ({"a": None, "c": "one", "file": "x/y.z"}, whole):
        assert fault_of(value, form) is None
        assert parse_json(json.dumps(value), "it", form) == value


@pytest.mark.parametrize("text", [r'{"a": "\u0000"}', r'"\ud800"', "[" * 100_000, "9" * 5000, "{", b"\xff"])
def test_a_text_that_cannot_be_used_is_refused(text):
    with pytest.raises(Malformed, match="is no JSON that can be read"):
        parse_json(text, "it", object)


def test_not_finite_numbers_are_refused_on_request():
    assert parse_json("[NaN]", "it", list)
    with pytest.raises(Malformed):
        parse_json("[1e999]", "it", list, finite=True)
