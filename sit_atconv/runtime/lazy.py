"""Names of a package that load when they are used, and modules that are found under their earlier names."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names lie in other modules, see PEP 562.

    names: {name: the module that defines it}.
    """

    def load(name: str):
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return load, listed


class Renamed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under other names: what is imported is the module of the new name itself.

    names: {other name: name}. told: say once, on stderr, where a module lies now.
    """

    def __init__(self, names: Mapping[str, str], told: bool = True):
        self.names, self.told = dict(names), told

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.names else None

    def create_module(self, spec):
        now = self.names[spec.name]
        if self.told:
            warnings.warn(f"{spec.name} is now {now}; the old name ends with version 0.3", FutureWarning, stacklevel=2)
        module = importlib.import_module(now)
        spec.loader_state = module.__spec__, module.__loader__, module.__package__
        return module

    def exec_module(self, module):
        """Give the module back its own names, which the import system has just replaced."""
        module.__spec__, module.__loader__, module.__package__ = module.__spec__.loader_state


def once_loaded(name: str, act: Callable[[object], None]) -> None:
    """Call `act` with the module of that name: now where it is loaded, else as soon as somebody loads it."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Awaited(name, act))


class _Awaited(importlib.abc.MetaPathFinder):
    """Has the other finders load a module, and acts on it."""

    def __init__(self, name: str, act: Callable[[object], None]):
        self.name, self.act = name, act

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_act(module) -> None:
            load(module)
            self.act(module)

        spec.loader.exec_module = load_and_act
        return spec
