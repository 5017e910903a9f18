"""Names of a package that load when they are used, and modules that are found under their earlier names."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping


def lazily(
    package: str, names: Mapping[str, str], beginnings: Mapping[str, str] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names lie in other modules, see PEP 562.

    names: {name: the module that defines it}. beginnings: {what other names begin with: the module that may have them}.
    """

    def load(name: str):
        module = names.get(name) or next((at for start, at in (beginnings or {}).items() if name.startswith(start)), "")
        if not module or not hasattr(importlib.import_module(module), name):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return load, listed


class Renamed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules, and what lies below them, under other names: what is imported is the module of the new name
    itself. It stands before the finders that would load what lies below a package a second time.

    names: {other name: name}. told: say once, on stderr, where a module lies now.
    """

    def __init__(self, names: Mapping[str, str], told: bool = True):
        self.names, self.told = dict(names), told

    def now(self, name: str) -> str | None:
        """The new name of a module; None for one that has kept its name."""
        above = name
        while above:
            if above in self.names:
                return self.names[above] + name[len(above) :]
            above = above.rpartition(".")[0]
        return None

    def find_spec(self, name, path=None, target=None):
        now = self.now(name)
        return importlib.util.spec_from_loader(name, self) if now and importlib.util.find_spec(now) else None

    def create_module(self, spec):
        now = self.now(spec.name)
        if self.told and spec.name in self.names:
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
        self.name, self.act, self.looking = name, act, False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.looking:
            return None
        self.looking = True  # `find_spec` asks all finders, this one too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module) -> None:
            load(module)
            sys.meta_path.remove(self)
            self.act(module)

        spec.loader.exec_module = load_and_act
        return spec
