"""The bundler on a small package that has everything it must take apart, against that package itself."""

import importlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sit_atconv.pipelines.bundle import bundle, third_party

PACKAGE = {
    "__init__": '"""Never part of a bundle."""\nraise_if_run = 1\n',
    "base": '''"""Base."""
import math
import os.path
from functools import reduce as fold

LIMIT = 10  # stays beside its line
UNUSED = os.path.join("a", "b")


class Kept(ValueError):
    """Kept."""


def scale(x):
    return x * LIMIT


def root(x):
    return fold(lambda a, b: a + b, [math.sqrt(x)])
''',
    "left": '''"""Left.

Two paragraphs.
"""
import math

# Above the name.
LIMIT = 3
CASES: "dict[str, Kept]" = {}


def scale(x):
    """Up to LIMIT."""
    return min(x, LIMIT)


def _round(x):
    return math.floor(x)


def whole(x, *, LIMIT=5):
    return _round(x) + LIMIT
''',
    "right": '''"""Right."""


def scale(x):
    text = f"{LIMIT}: {x!r:>{LIMIT}} {{LIMIT}}" f" LIMIT {scale.__name__ and LIMIT + 1}"
    return text


def _round(x):
    return [LIMIT for LIMIT in range(x)]


def whole(x):
    return _round(x)


LIMIT = 7
''',
    "again": "from toy_package.left import scale as leftmost\nfrom toy_package.base import Kept\n",
    "optional": '''"""Needs what is not there."""
import json

import no_such_library as other

from toy_package.base import LIMIT

TEXT = """
not moved
"""


@other.jit
def scale(x):
    """Moved

    along.
    """
    return (
        f"{x} {LIMIT} "
        "more"
    ) + TEXT + json.dumps(x)
''',
    "main": '''"""The entry."""

import math

import toy_outside
from toy_outside import Thing

from toy_package import left, right
from toy_package.again import Kept, leftmost
from toy_package.base import root, scale

NAMESPACE = "toy"
TABLE = {"left": left, "right": right}


def run(x, whole=None):
    if whole is None:
        from toy_package import optional  # here

        return optional.scale(x)

    def inner(scale):
        return scale + left.scale(x)

    kinds = [left.LIMIT for left in [Thing()]] + [right.whole(whole)]
    return scale(x), inner(1), leftmost(x), right.scale(x), kinds, root(4.0), math.pi, TABLE["left"].whole(2)


class Holder:
    scale = staticmethod(right.scale)
    error: "Kept" = Kept

    def scaled(self, x):
        return scale(x), self.scale(x), self.values(x)

    def values(self, x, left=left.LIMIT):
        """`left` is a number here."""
        return left + x, toy_outside.VALUE
''',
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The package's folder; importable, with what it needs from outside."""
    folder = tmp_path / "toy_package"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / f"{name}.py").write_text(text)
    outside = SimpleNamespace(VALUE=11, Thing=type("Thing", (), {"LIMIT": 99}))
    monkeypatch.setitem(sys.modules, "toy_outside", outside)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_package"]:
        del sys.modules[name]


def load(path, text, name="toy_bundle"):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_does_what_the_package_does(toy, tmp_path):
    text = bundle("toy_package.main", package=toy)
    ours, theirs = load(tmp_path / "toy_bundle.py", text), importlib.import_module("toy_package.main")
    assert "toy_package" not in {name.partition(".")[0] for name in vars(ours)}
    assert ours.run(5, whole=2) == theirs.run(5, whole=2)
    assert ours.Holder().scaled(5) == theirs.Holder().scaled(5)
    assert ours.run(5, whole=2)[3].startswith("7:       5 {LIMIT} LIMIT 8")
    assert ours.Holder.error.__name__ == "Kept"
    assert ours.TABLE["right"].whole(3) == [0, 1, 2]
    with pytest.raises(NameError, match="optional"):  # it is not there, as its library is not
        ours.run(5)


def test_it_reads_like_the_package(toy):
    text = bundle("toy_package.main", "A note.", package=toy)
    assert text.startswith('"""The entry.\n\nA note.\n"""\n\nimport math\n')
    assert (
        "\n# ---- toy_package/left.py\n#\n# Left.\n#\n# Two paragraphs.\n\n# Above the name.\nLEFT_LIMIT = 3\n" in text
    )
    assert "LIMIT = 10  # stays beside its line\n" in text
    assert '"""Up to LIMIT."""\n    return min(x, LEFT_LIMIT)\n' in text
    assert "def left_whole(x, *, LIMIT=5):\n    return _left_round(x) + LIMIT\n" in text
    for gone in ("UNUSED", "raise_if_run", "os.path", "from toy_package", "import toy_package", "# here", "CASES"):
        assert gone not in text
    assert text.count("import math\n") == 1
    assert third_party(text) == ["toy_outside"]


def test_a_lazy_module_waits_for_its_library(toy, tmp_path, monkeypatch):
    text = bundle("toy_package.main", package=toy)
    guarded = text[text.index('if find_spec("no_such_library"):') :]
    assert "\n    import no_such_library as other" in guarded
    assert '\n    TEXT = """\nnot moved\n"""\n' in guarded
    assert '\n        """Moved\n\n        along.\n        """\n' in guarded
    (tmp_path / "no_such_library.py").write_text("def jit(function):\n    return function\n")
    importlib.invalidate_caches()
    ours, theirs = load(tmp_path / "toy_bundle.py", text), importlib.import_module("toy_package.main")
    assert ours.run(5) == theirs.run(5) == "5 10 more\nnot moved\n5"


def test_the_same_package_gives_the_same_bytes_and_another_one_another_namespace(toy):
    def namespace(text):
        return next(line for line in text.splitlines() if line.startswith("NAMESPACE"))

    text = bundle("toy_package.main", package=toy)
    assert bundle("toy_package.main", package=toy) == text
    assert namespace(text) != 'NAMESPACE = "toy"'
    (toy / "right.py").write_text(PACKAGE["right"].replace("range(x)", "range(x + 1)"))
    assert namespace(bundle("toy_package.main", package=toy)) != namespace(text)


def test_a_stand_in_takes_the_place_of_a_name(toy, tmp_path):
    text = bundle("toy_package.main", stand_ins={"toy_package.base.Kept": ("fractions", "Fraction")}, package=toy)
    assert "class Kept" not in text
    assert load(tmp_path / "toy_bundle.py", text).Holder.error.__module__ == "fractions"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import toy_package.base", "write from"),
        ("from toy_package.base import *", "import names"),
        ("from .base import LIMIT", "by absolute path"),
        ("from __future__ import annotations", "__future__"),
        ("if math.pi > 3:\n    from toy_package.base import LIMIT", "import in a function"),
        ("def f():\n    global TABLE\n    TABLE = 1", "global TABLE"),
        ("def f():\n    left.LIMIT = 1", "sets a name of another module"),
        ("from toy_package import nothing\nnothing", "has no nothing|nothing is not defined"),
    ],
)
def test_what_it_cannot_take_apart_is_refused(toy, line, says):
    (toy / "main.py").write_text(PACKAGE["main"].replace("import math\n", f"import math\n{line}\n"))
    with pytest.raises(ValueError, match=says):
        bundle("toy_package.main", package=toy)


@pytest.mark.parametrize("entry", ["models.sit", "pipelines.pipeline_sit", "layers.atconv", "pipelines.export"])
def test_what_comes_out_of_this_package_has_no_undefined_or_unused_name(tmp_path, entry):
    (tmp_path / "bundle.py").write_text(bundle(f"sit_atconv.{entry}"))
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "bundle.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert lint.returncode == 0, lint.stdout
