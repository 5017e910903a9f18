"""One Python file that holds a class of this package and every module that the class needs, each with its own text.

diffusers downloads one file for each component with code of its own, so all modules have to be in it. The file keeps
their texts in strings, from which `Importer` imports them as a package below the file's own module. The name of that
package ends with a digest of the texts, so two versions, or a version and the installed package, share nothing.

Only imports within the package are changed: `from sit_atconv.runtime.errors import InputError` becomes, in a module two
levels deep, `from .. runtime.errors import InputError`. The space is for diffusers, which searches the text of a file,
strings too, before it runs the file: it would copy a further file for `from ..runtime.errors import`, and ask for an
installation for `from sit_atconv.runtime.errors import`.
"""

import ast
import hashlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

PACKAGE = Path(__file__).parents[1]

ROOT = "# Left empty: what the package imports here is for those who install it.\n"
FILE = Template('''"""$docstring
"""

import importlib.abc
import importlib.util
import sys

__path__ = []  # so that other modules can be below this one
PACKAGE = f"{__name__}.$package"
FILES = {}


$importer

$files

if PACKAGE not in sys.modules:  # diffusers runs this file again at every load
    sys.meta_path.append(Importer(PACKAGE, FILES, __file__))
$name = importlib.import_module(f"{PACKAGE}.$entry").$name
''')


class Importer(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports `package` from the texts of its files, {"layers/atconv.py": text}, which lie in the file `home`."""

    def __init__(self, package: str, files: dict[str, str], home: str):
        self.texts, self.places = {}, {}
        for path, text in files.items():
            module = f"{package}/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            self.texts[module] = text.removeprefix("\n")
            self.places[module] = f"{home}/{package.rpartition('.')[2]}/{path}"

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.texts else None

    def is_package(self, name):
        return self.places[name].endswith("/__init__.py")

    def get_filename(self, name):
        return self.places[name]

    def get_source(self, name):  # tracebacks, inspect and Triton's compiler ask for it too
        return self.texts[name]


@dataclass(frozen=True)
class Bundle:
    """The class `name` of the module `entry`, and the modules of the package that it needs.

    stand_ins: {module: text} in the place of a module's own text.
    """

    entry: str
    name: str
    stand_ins: dict[str, str] = field(default_factory=dict)
    package: Path = PACKAGE

    def text(self, note: str = "") -> str:
        """The file; `note` follows the docstring of `entry` at its top. The same package gives the same bytes.

        Raises ValueError for a module that imports from the package in another way than `from package.module import`,
        or that has three single quotes in a row.
        """
        root, files = self.package.name, self._files()
        docstring = ast.get_docstring(ast.parse(files[self._path(self.entry)]))
        parts = [
            f"# ---- {root}/{path}\nFILES[\"{path}\"] = r'''\n{self._embedded(path, text)}'''\n"
            for path, text in files.items()
        ]
        return FILE.substitute(
            docstring=f"{docstring}\n\n{note}".rstrip(),
            package=f"{root}_{digest(''.join(parts))}",
            importer=inspect.getsource(Importer),
            files="\n".join(parts),
            entry=self.entry.removeprefix(f"{root}."),
            name=self.name,
        )

    def libraries(self) -> set[str]:
        """What has to be installed beside Python, imports within functions left out."""
        nodes = [node for text in self._files(lazy=False).values() for node in _imports(text, lazy=False)]
        roots = {name.partition(".")[0] for node in nodes for name in _named(node)}
        return roots - sys.stdlib_module_names - {self.package.name}

    def _files(self, lazy: bool = True) -> dict[str, str]:
        """{path in the package: text} of `entry` and of all that its import runs; lazy: what functions import, too."""
        stand_ins = {self.package.name: ROOT, **self.stand_ins}
        found, waiting = {}, [self.entry]
        while waiting:
            module = waiting.pop()
            path = self._path(module)
            if path is None or path in found:
                continue
            found[path] = stand_ins[module] if module in stand_ins else (self.package / path).read_text()
            waiting.append(module.rpartition(".")[0])  # the package around it is run first
            waiting += [name for node in _imports(found[path], lazy) for name in _named(node)]
        return dict(sorted(found.items()))

    def _path(self, module: str) -> str | None:
        """The file of a module, as a path in the package; None for what is no module of the package."""
        root, *below = module.split(".")
        paths = ("/".join([*below, "__init__.py"]), "/".join(below) + ".py")
        return next((path for path in paths if root == self.package.name and (self.package / path).is_file()), None)

    def _embedded(self, path: str, text: str) -> str:
        """A module's text with its imports from the package made relative."""
        root, lines = self.package.name, text.split("\n")
        if "'''" in text:
            raise ValueError(f"{root}/{path} has three single quotes in a row; write three double quotes")
        for node in _imports(text):
            if any(name.partition(".")[0] == root for name in _named(node)):
                line = lines[node.lineno - 1]
                if f"from {root}." not in line:
                    raise ValueError(f"{root}/{path}: {line.strip()!r}; write from {root}.module import name")
                dots = "." * (path.count("/") + 1)
                lines[node.lineno - 1] = line.replace(f"from {root}.", f"from {dots} ", 1)
        return "\n".join(lines)


def digest(text: str) -> str:
    """Eight hexadecimal digits that tell one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _imports(text: str, lazy: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in a module's text; lazy: those within functions, too."""
    waiting = [ast.parse(text)]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield node
            elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                waiting.append(node)


def _named(node: ast.Import | ast.ImportFrom) -> list[str]:
    """What an import names: modules, and what may be modules."""
    names = [alias.name for alias in node.names]
    return names if isinstance(node, ast.Import) else [node.module, *(f"{node.module}.{name}" for name in names)]
