"""The notebooks: that each is whole as it is committed, that what it names is there, and (slow) that it runs."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
from test_docs import STARTS, check, slugs

from experiments import notebooks
from sit_atconv.runtime.errors import InputError

NAMES = notebooks.names()
MACHINE = re.compile(r"/(?:home|Users|root|tmp|work|usr|opt|var|mnt)/|\b[A-Z]:\\")
LARGEST = 300_000  # bytes of a notebook


def cells(name, kind):
    notebook = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def code(name):
    """The Python of a notebook, and its commands."""
    lines = "\n".join("".join(cell["source"]) for cell in cells(name, "code")).split("\n")
    return "\n".join(line for line in lines if line[:1] != "!"), [line[1:] for line in lines if line[:1] == "!"]


def test_there_are_notebooks():
    assert NAMES == ["digits", "score_folder", "swap_dit"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_a_reader_is_to_see_it(name):
    file = notebooks.FOLDER / f"{name}.ipynb"
    text = file.read_text()
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == notebooks.METADATA
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    run = cells(name, "code")
    assert [cell["execution_count"] for cell in run] == list(range(1, len(run) + 1))
    outputs = [output for cell in run for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert run[-1]["outputs"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    assert "\r" not in said
    assert "\x1b" not in said
    assert not re.search("(?i)warning|error:|not found", said)
    pictures = re.compile(r'"image/png": "[^"]*"')
    assert not MACHINE.search(pictures.sub("", text))
    assert file.stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_names_is_there(name, monkeypatch):
    python, commands = code(name)
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import):
            assert all(import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module != "IPython.display":  # of the notebook's own kernel
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)
    texts = ["".join(cell["source"]) for cell in cells(name, "markdown")]
    commands += [each for text in texts for each in re.findall("`([^`]+)`", text) if STARTS.match(each)]
    for line in commands:
        with monkeypatch.context() as patch:
            check(line, patch)
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts)):
        path, _, anchor = link.partition("#")
        file = (notebooks.FOLDER / path).resolve()
        assert file.exists(), link
        assert not anchor or anchor in slugs(file), link


def test_names_and_style_hold_in_the_notebooks():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", notebooks.FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_of_lines_that_are_written_over_the_last_writing_stays():
    bar = "train:   0%|  | 0/9\rtrain:  50%|# | 5/9\rtrain: 100%|##| 9/9 \r\n"
    assert notebooks.screen(f"first\r\n{bar}last\x1b[A\n") == "first\ntrain: 100%|##| 9/9\nlast\n"


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Executes a notebook of these cells."""
    nbformat = pytest.importorskip("nbformat", reason="the extra dev brings what executes notebooks")
    pytest.importorskip("nbclient", reason="the extra dev brings what executes notebooks")

    def execute(*sources):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        nbformat.write(notebook, tmp_path / "a.ipynb")
        (here := tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
        return notebooks.executed("a", here)

    return execute


@pytest.mark.slow
def test_a_notebook_is_executed_and_what_is_not_to_be_published_is_refused(other, tmp_path):
    notebook = other("import os\nprint(1)", "print(2)\nos.path.basename(os.getcwd())")
    assert notebooks.last_output(notebook) == "2\n\n'here'"
    assert notebook.metadata == notebooks.METADATA
    for sources, message in (
        (("1 / 0",), "a cell failed: .*ZeroDivisionError"),
        (("import warnings", "warnings.warn('old')"), "warns: .*old"),
        (("import os", "print(os.getcwd() + '/x')"), "a path of this machine"),
        (("import os", "os.getcwd()"), "a path of this machine"),
    ):
        with pytest.raises(InputError, match=f"(?s){message}"):
            other(*sources)


DISTANCE = r"\d+\.\d\d ± \d+\.\d\d"
GIVES = {
    "digits": r"frechet_distance: [1-3]\d\.\d+ ± \d\.\d+\nrecognised: 0\.[5-8]\d+ ± 0\.0\d+",
    "score_folder": rf"held_out: {DISTANCE}\nblurred: (?=[3-9]\.){DISTANCE}\nnoisy: {DISTANCE}",
    "swap_dit": "the same bits after the swap was taken back: True",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_its_beginning(name, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra dev brings what executes notebooks")
    pytest.importorskip("nbclient", reason="the extra dev brings what executes notebooks")
    notebook = notebooks.executed(name, tmp_path)
    nbformat.validate(notebook)
    assert re.fullmatch(GIVES[name], notebooks.last_output(notebook))
    committed = [cell["source"] for cell in cells(name, "code")]
    assert [cell.source.splitlines(keepends=True) for cell in notebook.cells if cell.cell_type == "code"] == committed


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outputs_are_of_the_committed_cells(name):
    """A result of the last cell as the test wants it: a notebook that was changed is executed anew."""
    last = cells(name, "code")[-1]["outputs"]
    assert re.fullmatch(GIVES[name], "".join("".join(each["text"]) for each in last).strip())
