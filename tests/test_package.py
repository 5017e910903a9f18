"""What is built and published: versions, what its papers name, its files, and that the wheel works alone."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import installed
import pytest
import yaml
from conftest import ROOT

from sit_atconv import __version__
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.commands import COMMANDS
from sit_atconv.config import Recipe, load_recipe
from sit_atconv.config.shipped import about, recipe_names
from sit_atconv.runtime.lazy import Renamed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PAPERS = ("CONTRIBUTING.md", "AGENTS.md")
# What a source distribution holds beside the package, for the tests.
BESIDE = ("tests", "docs", "eval", "sampling", "experiments", "notebooks", ".github")


def files(folder: Path) -> set[str]:
    """The paths of a folder's files, as seen from the project's root, but for what Python compiles."""
    found = {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if "__pycache__" not in path}


def data_files() -> set[str]:
    """The files of the library that are no modules."""
    return {path for path in files(ROOT / "sit_atconv") if not path.endswith(".py")}


def test_changelog_and_citation_are_of_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["title"]) == ("1.2.0", PROJECT["project"]["name"])
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["project"]["license"])
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["project"]["urls"]["Paper"]
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_the_changelog_names_every_module_that_moved():
    text = (ROOT / "CHANGELOG.md").read_text()
    moved = [name for finder in sys.meta_path if isinstance(finder, Renamed) and finder.told for name in finder.names]
    assert moved
    missing = [
        name for name in moved if f"`{name}`" not in text and f"`{name.removeprefix('sit_atconv.')}`" not in text
    ]
    assert missing == []


@pytest.mark.parametrize("paper", PAPERS)
def test_every_path_and_target_that_a_paper_names_is_there(paper):
    text = (ROOT / paper).read_text()
    paths = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|txt|yml|cff))`", text))
    assert len(paths) > 5
    assert [path for path in sorted(paths - {"runs/"}) if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^    make ((?:[a-z-]+ )*[a-z-]+)", text, re.MULTILINE))
    targets |= set(re.findall(r"`make ((?:[a-z-]+ ?)+)`", text))
    assert {target for words in targets for target in words.split()} <= TARGETS


def test_every_name_is_in_the_file_that_contributing_gives_for_it():
    """`IMAGES` of `sit_atconv/data/kinds.py`, and names that are said to be in a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"`([\w.]+)` (?:of|in) `([\w./-]+\.py)`", text)
    assert len(found) > 10
    for name, path in found:
        assert all(re.search(rf"\b{part}\b", (ROOT / path).read_text()) for part in name.split(".")), (name, path)


def test_workflows_call_targets_of_make_on_every_python_that_is_promised():
    classifiers = PROJECT["project"]["classifiers"]
    promised = {each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)}
    assert f">={min(promised)}" == PROJECT["project"]["requires-python"]
    rows, lines = [], []
    for path in WORKFLOWS:
        text = path.read_text()
        assert all(re.fullmatch(r"[\w./-]+@v\d+", used) for used in re.findall(r"uses: (\S+)", text)), path
        for job in yaml.safe_load(text)["jobs"].values():
            rows += job["strategy"]["matrix"]["include"]
            lines += [step["run"] for step in job["steps"] if "run" in step]
    assert lines == ["make ${{ matrix.target }}"] * len(WORKFLOWS)
    assert {row["target"] for row in rows} == {"lint", "test", "test-floor", "test-wheel"} <= TARGETS
    assert {row["python"] for row in rows if row["target"] == "test"} == promised


def test_package_data_is_what_lies_in_the_library_beside_its_modules():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sit_atconv"]
    matched = [{path.relative_to(ROOT).as_posix() for path in (ROOT / "sit_atconv").glob(each)} for each in patterns]
    assert all(matched)
    assert set.union(*matched) == data_files()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_the_package_is_whole_and_says_what_it_is(name):
    missing = ["distill.teacher=x"] if "distill" in name else []
    recipe = load_recipe(name, missing, ClassifierRecipe if "attnet" in name else Recipe)
    assert recipe.run.out.startswith(f"runs/{name}")
    assert about(name).endswith(".")


def test_every_command_is_among_those_that_the_installed_package_runs():
    assert {line.split()[0] for line in installed.COMMANDS} == COMMANDS.keys()


@pytest.mark.slow
def test_the_wheel_does_everything_from_an_empty_folder(tmp_path):
    """Wheel and source distribution are built; every command runs by the wheel in an environment of its own."""
    built = tmp_path / "dist"
    # By PYTHONPATH, pip would find the checkout, and hold it for what it is to install.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(python: Path | str, *words: Path | str) -> str:
        done = subprocess.run([python, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, ROOT)
    (wheel,), (sources,) = built.glob("*.whl"), built.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sources)

    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files(ROOT / "sit_atconv")
    with tarfile.open(sources) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert set.union(*(files(ROOT / each) for each in ("sit_atconv", *BESIDE))) <= held
    assert {*PAPERS, "CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt", "train_sit.py"} <= held

    venv.create(tmp_path / "new")
    python = tmp_path / "new" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The dependencies are those of the environment that tests; the .pth of an editable install there is not read.
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site,) = (tmp_path / "new" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(sorted(places)))

    said = run(python, ROOT / "tests" / "installed.py")
    print(f"\n{said}")
    version, place = said.splitlines()[0].split(maxsplit=1)
    assert (version, Path(place).parent.parent) == (__version__, site)
