"""A file that holds a package in strings: a small package, against that package itself; and this one."""

import ast
import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
from diffusers.utils import dynamic_modules_utils

from sit_atconv.pipelines.bundle import PACKAGE, Bundle
from sit_atconv.pipelines.exporting import MODEL, PIPELINE

TOY = {
    "__init__.py": "import toy_for_users_alone\n",
    "base.py": '''"""Base."""
import math

LIMIT = 10


class Kept(ValueError):
    """Kept."""


def scale(x):
    return x * LIMIT


def fail(x):
    raise Kept(f"no {x}")  # said here
''',
    "inner/__init__.py": '''"""A package that runs something."""

from toy_package.inner import left

SEEN = [left.LIMIT]
''',
    "inner/left.py": '''"""Equal names as in base, and an import over lines."""

from toy_package.base import (
    Kept,
    scale as above,
)

LIMIT = 3
KINDS = {"\\\\d": Kept}


def scale(x):
    return above(min(x, LIMIT))
''',
    "inner/deep/__init__.py": "",
    "inner/deep/leaf.py": "from toy_package.inner.left import LIMIT as DEEP, KINDS\n",
    "inner/optional.py": '''"""Needs what is not there."""
import no_such_library as other

from toy_package.base import LIMIT


@other.jit
def scale(x):
    return x, LIMIT
''',
    "inner/unused.py": "import another_library\n",
    "main.py": '''"""The entry."""

import toy_outside

from toy_package.base import LIMIT, fail, scale
from toy_package.inner import SEEN, left
from toy_package.inner.deep.leaf import DEEP


def draw():
    import library_of_one_function as library

    return library.draw()


class Holder:
    error = left.Kept

    def __init__(self, x):
        self.x = x

    def run(self):
        if self.x is None:
            from toy_package.inner import optional  # here

            return optional.scale(5)
        spaces = {"left": left}
        return scale(self.x), left.scale(self.x), spaces["left"].KINDS, LIMIT, SEEN, DEEP, toy_outside.VALUE

    def fail(self):
        fail(self.x)
''',
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The bundle of a package that can be imported, with what it needs from outside."""
    for path, text in TOY.items():
        file = tmp_path / "toy_package" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("toy_outside", "toy_for_users_alone"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(VALUE=11))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = {*sys.modules}
    yield Bundle("toy_package.main", "Holder", package=tmp_path / "toy_package")
    for name in sys.modules.keys() - before:
        del sys.modules[name]


def load(path):
    """As diffusers does it: a file that is loaded again runs again in its module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(toy, tmp_path):
    path = tmp_path / "toy_file.py"
    path.write_text(toy.text("A note."))
    return path


def test_it_does_what_the_package_does_without_it(toy, written):
    before = {*sys.modules}
    ours = load(written).Holder
    assert not [name for name in sys.modules.keys() - before if name.partition(".")[0] != "toy_file"]
    found = ours(5).run()
    theirs = importlib.import_module("toy_package.main").Holder
    assert found[:2] == theirs(5).run()[:2] == (50, 30)
    assert found[3:] == theirs(5).run()[3:] == (10, [3], 3, 11)
    assert found[2]["\\d"] is ours.error is not theirs.error


def test_every_text_is_the_modules_but_for_imports_from_the_package(toy, written):
    module = load(written)
    assert module.__doc__ == "The entry.\n\nA note.\n"
    # the package's own imports and what nothing needs stay out; the packages around a module are run, as Python does it
    assert {*module.FILES} == {*TOY} - {"inner/unused.py"}
    changed = {
        "base.py": {},
        "inner/deep/__init__.py": {},
        "inner/__init__.py": {"from toy_package.inner import left": "from .. inner import left"},
        "inner/left.py": {"from toy_package.base import (": "from .. base import ("},
        "inner/deep/leaf.py": {"from toy_package.inner.left import": "from ... inner.left import"},
        "inner/optional.py": {"from toy_package.base import": "from .. base import"},
        "main.py": {"from toy_package.": "from . "},
    }
    for path, edits in changed.items():
        text = TOY[path]
        for old, new in edits.items():
            assert old in text
            text = text.replace(old, new)
        assert module.FILES[path] == f"\n{text}"


def test_what_a_function_imports_waits_for_its_library(toy, written, tmp_path):
    assert toy.libraries() == {"toy_outside"}
    holder = load(written).Holder(None)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        holder.run()
    (tmp_path / "no_such_library.py").write_text("def jit(function):\n    return function\n")
    importlib.invalidate_caches()
    assert holder.run() == (5, 10)


def test_the_same_package_gives_the_same_bytes_and_classes(toy, written):
    assert toy.text("A note.") == written.read_text()
    first, finders = load(written).Holder, len(sys.meta_path)
    assert load(written).Holder is first
    assert len(sys.meta_path) == finders


def test_two_versions_under_one_name_live_together(toy, written):
    (written.parent / "no_such_library.py").write_text("def jit(function):\n    return function\n")
    first = load(written).Holder
    for path, old, new in [("base.py", "x * LIMIT", "-x * LIMIT"), ("inner/optional.py", "x, LIMIT", "-x, LIMIT")]:
        file = toy.package / path
        file.write_text(TOY[path].replace(old, new))
    written.write_text(toy.text("A note."))
    second = load(written).Holder
    assert second(5).run()[0] == -first(5).run()[0]
    assert (first(None).run(), second(None).run()) == ((5, 10), (-5, 10))  # imported only now
    assert "return x * LIMIT" in inspect.getsource(sys.modules[first(5).error.__module__])
    assert "return -x * LIMIT" in inspect.getsource(sys.modules[second(5).error.__module__])


def test_a_stand_in_takes_the_place_of_a_module_and_of_what_that_one_needs(toy, tmp_path):
    text = "from fractions import Fraction as Kept\nLIMIT = 4\nKINDS = {}\nscale = abs\n"
    bundle = Bundle(toy.entry, toy.name, {"toy_package.inner.left": text}, toy.package)
    (tmp_path / "toy_file.py").write_text(bundle.text())
    module = load(tmp_path / "toy_file.py")
    assert module.FILES["inner/left.py"] == f"\n{text}"
    assert module.Holder.error.__module__ == "fractions"
    assert module.Holder(-5).run()[1:2] == (5,)


def test_tracebacks_and_inspect_find_the_lines(written):
    holder = load(written).Holder(5)
    entry = TOY["main.py"].replace("from toy_package.", "from . ")
    assert inspect.getsource(type(holder)) == entry[entry.index("class Holder") :]
    assert inspect.getsource(holder.error) == 'class Kept(ValueError):\n    """Kept."""\n'
    with pytest.raises(ValueError) as caught:
        holder.fail()
    told = "".join(traceback.format_exception(caught.value))
    line = 1 + TOY["base.py"].split("\n").index('    raise Kept(f"no {x}")  # said here')
    assert (
        f'{written}/{load(written).PACKAGE.partition(".")[2]}/base.py", line {line}, in fail\n    raise Kept(' in told
    )


def test_what_is_pickled_is_read_by_a_process_that_finds_the_file(written):
    (written.parent / "toy_outside.py").write_text("VALUE = 11\n")
    pickled = pickle.dumps(load(written).Holder(5))
    assert pickle.loads(pickled).x == 5
    code = "import pickle, sys; sys.path.append(sys.argv[1]); print(pickle.load(sys.stdin.buffer).run()[0])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(written.parent)], input=pickled, capture_output=True, check=True
    )
    assert done.stdout == b"50\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import toy_package.base", "base.py: 'import toy_package.base'; write from toy_package.module import name"),
        ("from toy_package import inner", "'from toy_package import inner'; write from toy_package.module import name"),
        ("TEXT = '''x'''", "base.py has three single quotes in a row; write three double quotes"),
    ],
)
def test_what_it_cannot_take_is_refused(toy, line, says):
    (toy.package / "base.py").write_text(TOY["base.py"].replace("import math", line))
    with pytest.raises(ValueError, match=says):
        toy.text()


@pytest.mark.parametrize(
    ("bundle", "libraries"),
    [(MODEL, {"diffusers", "einops", "torch"}), (PIPELINE, {"PIL", "diffusers", "numpy", "torch"})],
)
def test_diffusers_asks_for_no_file_and_no_library_beyond_those_needed(tmp_path, monkeypatch, bundle, libraries):
    """It searches the strings, too."""
    assert bundle.libraries() == libraries
    file = tmp_path / "file.py"
    file.write_text(bundle.text())
    asked = set()
    monkeypatch.setattr(dynamic_modules_utils, "importlib", SimpleNamespace(import_module=asked.add))
    assert dynamic_modules_utils.check_imports(file) == []
    assert {"torch", "diffusers"} <= asked <= libraries | sys.stdlib_module_names


@pytest.mark.parametrize("bundle", [MODEL, PIPELINE])
def test_an_exported_file_has_this_packages_lines(bundle):
    for node in ast.parse(bundle.text()).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)):
            continue
        path, text = ast.literal_eval(node.targets[0].slice), ast.literal_eval(node.value)
        others = {f"{name.partition('.')[2].replace('.', '/')}.py" for name in bundle.stand_ins}
        if path not in {"__init__.py", *others}:
            ours, theirs = text[1:].split("\n"), (PACKAGE / path).read_text().split("\n")
            assert len(ours) == len(theirs)
            for our, their in zip(ours, theirs, strict=True):
                assert our == their or (our.split("import")[1:] == their.split("import")[1:] and "from ." in our), path
