"""Names that load when they are used, and what happens as soon as a module is loaded."""

import importlib
import sys

import pytest

from sit_atconv.runtime.lazy import lazily, once_loaded


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that nobody has loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited_once.py").write_text("value = 5\n")
    yield "awaited_once"
    sys.modules.pop("awaited_once", None)


def test_a_function_is_called_once_when_its_module_is_there(module):
    seen, finders = [], list(sys.meta_path)
    once_loaded(module, lambda found: seen.append((found.__name__, found.value)))
    assert seen == []
    loaded = importlib.import_module(module)
    assert seen == [(module, 5)]
    assert sys.meta_path == finders
    importlib.reload(loaded)
    assert len(seen) == 1
    once_loaded(module, lambda found: seen.append(found))
    assert seen[1:] == [loaded]


def test_two_who_wait_are_both_called(module):
    seen = []
    once_loaded(module, lambda found: seen.append("first"))
    once_loaded(module, lambda found: seen.append("second"))
    importlib.import_module(module)
    assert sorted(seen) == ["first", "second"]


def test_a_name_loads_its_module_and_another_is_told(module):
    load, listed = lazily("sit_atconv", {"value": module})
    assert "value" in listed()
    assert module not in sys.modules
    assert load("value") == 5
    with pytest.raises(AttributeError, match="module 'sit_atconv' has no attribute 'other'"):
        load("other")


def test_a_module_that_fails_at_first_is_still_awaited(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited_twice.py").write_text(
        "import sys\nif not hasattr(sys, '_again'):\n    raise ImportError('no')\n"
    )
    seen = []
    once_loaded("awaited_twice", seen.append)
    with pytest.raises(ImportError, match="no"):
        importlib.import_module("awaited_twice")
    monkeypatch.setattr(sys, "_again", True, raising=False)
    assert seen == []
    module = importlib.import_module("awaited_twice")
    assert seen == [module]
    del sys.modules["awaited_twice"]


def test_a_library_that_is_not_there_is_not_found():
    once_loaded("awaited_never", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("awaited_never")
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "name", None) != "awaited_never"]
