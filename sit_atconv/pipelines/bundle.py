"""One Python file out of a module of this package and all that it needs from the package, for people to read.

The text is edited at the positions that `ast` gives, so comments and layout stay. What changes: imports within the
package go, the others are merged on top, what is not needed is left out, and of equal names of several modules all but
one get their module's name in front. `module.name` becomes that name; a module that is used as a value becomes a
SimpleNamespace. A module that is only imported within functions and needs a library that nothing else needs, as
Triton's kernels do, is defined where that library is installed.
"""

import ast
import builtins
import hashlib
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Names that every module has.
IMPLICIT = {*dir(builtins), "__name__", "__file__", "__doc__", "__spec__"}


@dataclass(frozen=True)
class Definition:
    """A top-level name of a module of the package."""

    module: str
    name: str


@dataclass(frozen=True)
class Namespace:
    """A module of the package as a value."""

    module: str


@dataclass(frozen=True)
class External:
    """What an import from elsewhere binds: `import module`, or `from module import name`, under the name `alias`."""

    module: str
    name: str | None
    alias: str


Entity = Definition | Namespace | External

# What the file itself uses.
SIMPLE_NAMESPACE = External("types", "SimpleNamespace", "SimpleNamespace")
FIND_SPEC = External("importlib.util", "find_spec", "find_spec")
HELPERS = (SIMPLE_NAMESPACE, FIND_SPEC)


@dataclass
class Reference:
    """A place that means an entity: bytes [start, stop) of a module's text."""

    entity: Entity
    start: int
    stop: int
    hidden: frozenset[str]  # names that are something local at this place
    lazy: bool  # reached through an import within a function


@dataclass
class Statement:
    """A top-level statement with the comments above it: lines [first, last), counted from 0."""

    node: ast.stmt
    first: int
    last: int
    names: set[str]

    @property
    def acts(self) -> bool:
        """Whether it does more than bind names: then it belongs to its module, whoever uses it."""
        node = self.node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return bool(node.decorator_list)
        return not isinstance(node, ast.Assign | ast.AnnAssign) or not self.names


def bundle(
    entry: str, note: str = "", stand_ins: dict[str, tuple[str, str]] | None = None, package: Path = PACKAGE
) -> str:
    """The source of a file that is the module `entry` with all that it takes from the package.

    note: follows the module's docstring at the top of the file.
    stand_ins: what to import in the place of a name of the package: {"package.module.Name": ("library", "Other")}.
    A constant NAMESPACE, of torch operators, gets a hash of the file at its end: it belongs to this source alone.
    The same package gives the same bytes. Raises ValueError for code that it cannot take apart.
    """
    text = _Bundler(entry, note, stand_ins or {}, package).source()
    return re.sub(r'^(\w*NAMESPACE = )"(\w+)"$', rf'\1"\2_{digest(text)}"', text, flags=re.MULTILINE)


def digest(text: str) -> str:
    """Eight hexadecimal digits that tell one source from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def third_party(source: str) -> list[str]:
    """The libraries beside Python's own that a source imports at its top, those for some platforms left out."""
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return sorted({root for node in imports for root in _roots(node)} - sys.stdlib_module_names)


def _roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {module.partition(".")[0] for module in modules}


class _Module:
    """A module's text, its top-level statements, and what its names mean."""

    def __init__(self, name: str, path: Path, package: str):
        self.name, self.path, self.package = name, path, package
        self.text = path.read_bytes()
        self.tree = ast.parse(self.text)
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.docstring = ast.get_docstring(self.tree) or ""
        self.imported: dict[str, tuple[str, str]] = {}  # from the package: module and name
        self.externals: dict[str, list[External]] = {}
        self.statements: list[Statement] = []
        last = 0
        for node in self.tree.body:
            first, last = last, node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.statements.append(Statement(node, first, last, _bound([node])))
        self.names = set().union(*(statement.names for statement in self.statements))

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise ValueError(f"{self.name}: `from __future__` would reach all modules of a bundle")
        if self.from_package(node):
            for alias in node.names:
                self.imported[alias.asname or alias.name] = (node.module, alias.name)
            return
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                external = External(node.module, alias.name, alias.asname or alias.name)
            else:
                external = External(alias.name, None, alias.asname or alias.name)
            bound = external.alias if alias.asname else external.alias.partition(".")[0]
            self.externals.setdefault(bound, []).append(external)

    def from_package(self, node: ast.Import | ast.ImportFrom) -> bool:
        """Whether it imports from this package. Raises ValueError for a form that is not `from package import name`."""
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names)):
            raise ValueError(f"{self.name}: {ast.unparse(node)!r} cannot be bundled; import names, by absolute path")
        inside = self.package in _roots(node)
        if inside and isinstance(node, ast.Import):
            raise ValueError(f"{self.name}: {ast.unparse(node)!r} cannot be bundled; write from ... import ...")
        return inside

    def offset(self, line: int, column: int) -> int:
        """The byte at ast's line and column."""
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)


def _bound(nodes: list[ast.AST]) -> set[str]:
    """Names that statements bind in their own scope."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            # Its targets are its own, what := binds is not.
            names |= {walrus.target.id for walrus in ast.walk(node) if isinstance(walrus, ast.NamedExpr)}
            continue
        if isinstance(node, ast.Global):
            raise ValueError(f"line {node.lineno}: {ast.unparse(node)!r} cannot be bundled")
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
        names |= _bound(list(ast.iter_child_nodes(node)))
    return names


@dataclass
class _Scope:
    """A function, class or comprehension: its local names, and those of them that an import from the package binds."""

    parent: "_Scope | None"
    names: set[str]
    is_class: bool = False
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)

    def chain(self) -> Iterator["_Scope"]:
        """The scopes that a name is looked up in, from the inside; a class is invisible to what is within."""
        yield self
        scope = self.parent
        while scope is not None:
            if not scope.is_class:
                yield scope
            scope = scope.parent


class _Scanner(ast.NodeVisitor):
    """Finds the references of one statement and the imports to cut from it."""

    def __init__(self, bundler: "_Bundler", module: _Module):
        self.bundler, self.module = bundler, module
        self.scope: _Scope | None = None
        self.within_text = False
        self.references: list[Reference] = []
        self.cuts: list[ast.ImportFrom] = []

    def within(self, scope: _Scope, nodes: list[ast.AST]) -> None:
        outer, self.scope = self.scope, scope
        for node in nodes:
            self.visit(node)
        self.scope = outer

    def meaning(self, name: str) -> tuple[Entity | None, bool]:
        """What a name means here, None for something local or implicit, and whether a local import says so."""
        for scope in self.scope.chain() if self.scope else ():
            if name in scope.imported:
                return self.bundler.resolve(*scope.imported[name]), True
            if name in scope.names:
                return None, False
        return self.bundler.top_level(self.module, name), False

    def add(self, entity: Entity, span: tuple[int, int], lazy: bool = False) -> None:
        hidden = [scope.names - scope.imported.keys() for scope in self.scope.chain()] if self.scope else []
        self.references.append(Reference(entity, *span, frozenset().union(*hidden), lazy))

    def entity(self, node: ast.AST) -> tuple[Entity | None, bool]:
        """The same for `name` and `module.name`."""
        if isinstance(node, ast.Name):
            return self.meaning(node.id)
        if isinstance(node, ast.Attribute):
            space, lazy = self.entity(node.value)
            if isinstance(space, Namespace):
                if not isinstance(node.ctx, ast.Load):
                    raise ValueError(f"{self.module.name}, line {node.lineno}: sets a name of another module")
                return self.bundler.resolve(space.module, node.attr), lazy
        return None, False

    def visit_Name(self, node: ast.Name | ast.Attribute) -> None:
        entity, lazy = self.entity(node)
        if entity is not None:
            self.add(entity, self.module.span(node), lazy)
        else:
            self.generic_visit(node)

    visit_Attribute = visit_Name

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        # Within an f-string ast's positions are right from Python 3.12 on, so the names are looked for in its text.
        if self.within_text:
            self.generic_visit(node)
            return
        start, stop = self.module.span(node)
        first = len(self.references)
        self.within_text = True
        self.generic_visit(node)
        self.within_text = False
        found, self.references[first:] = self.references[first:], []
        text = self.module.text[start:stop].decode()
        for reference in dict.fromkeys((r.entity, r.hidden, r.lazy) for r in found):
            entity, hidden, lazy = reference
            count = sum((r.entity, r.hidden, r.lazy) == reference for r in found)
            spelt = self.spellings(node, entity)
            places = [
                (begin + match.start(), begin + match.end())
                for begin, end in _fields(text)
                for match in re.finditer(rf"(?<![\w.])(?:{'|'.join(spelt)})(?!\w)", text[begin:end])
            ]
            if len(places) != count:
                raise ValueError(f"{self.module.name}, line {node.lineno}: cannot tell the names in {text}")
            for begin, end in places:
                before = start + len(text[:begin].encode())
                self.references.append(Reference(entity, before, before + len(text[begin:end].encode()), hidden, lazy))

    def spellings(self, node: ast.JoinedStr, entity: Entity) -> set[str]:
        """How an f-string writes an entity."""
        return {re.escape(ast.unparse(part)) for part in ast.walk(node) if self.entity(part)[0] == entity}

    def annotation(self, node: ast.expr | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            start, stop = self.module.span(node)
            text = self.module.text[start:stop].decode()
            for match in re.finditer(r"(?<![\w.])[A-Za-z_]\w*", text):
                entity, lazy = self.meaning(match[0])
                if entity is not None:
                    self.add(entity, (start + match.start(), start + match.end()), lazy)
        elif isinstance(node, ast.expr):
            self.visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotation(node.annotation)
        for child in (node.target, node.value):
            if child is not None:
                self.visit(child)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if self.module.from_package(node):
            if self.scope is None:
                raise ValueError(
                    f"{self.module.name}, line {node.lineno}: an import under a condition; import in a function"
                )
            self.cuts.append(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.named(node)
        arguments = node.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given += [one for one in (arguments.vararg, arguments.kwarg) if one]
        for outside in [*node.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]:
            self.visit(outside)
        for annotation in [*(argument.annotation for argument in given), node.returns]:
            self.annotation(annotation)
        scope = _Scope(self.scope, {argument.arg for argument in given} | _bound(node.body))
        for inner in _own_nodes(node.body):
            if isinstance(inner, ast.ImportFrom) and self.module.from_package(inner):
                scope.imported |= {alias.asname or alias.name: (inner.module, alias.name) for alias in inner.names}
            elif isinstance(inner, ast.Nonlocal):
                scope.names -= set(inner.names)
        self.within(scope, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.named(node)
        for outside in [*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)]:
            self.visit(outside)
        self.within(_Scope(self.scope, _bound(node.body), is_class=True), node.body)

    def named(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """The name in a definition, which has no node of its own."""
        entity, _ = self.meaning(node.name)
        if self.scope is None and entity is not None:
            start = self.module.offset(node.lineno, node.col_offset)
            match = re.compile(rb"(?:async\s+def|def|class)\s+(\w+)").match(self.module.text, start)
            self.add(entity, match.span(1))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        arguments = node.args
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            self.visit(default)
        names = {argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)}
        self.within(_Scope(self.scope, names), [node.body])

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        first = node.generators[0]
        self.visit(first.iter)  # in the scope outside
        names = set().union(*(_bound([generator.target]) for generator in node.generators))
        inside = [first.target, *first.ifs, *node.generators[1:]]
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.within(_Scope(self.scope, names), [*inside, *results])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension


def _own_nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions and classes in it."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own_nodes(list(ast.iter_child_nodes(node)))


def _fields(text: str) -> Iterator[tuple[int, int]]:
    """The replacement fields of an f-string's source, format specifications included."""
    depth, begin, position = 0, 0, 0
    while position < len(text):
        if depth == 0 and text[position : position + 2] in ("{{", "}}"):
            position += 2
            continue
        if text[position] == "{":
            begin, depth = begin if depth else position, depth + 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                yield begin, position
        position += 1


class _Bundler:
    def __init__(self, entry: str, note: str, stand_ins: dict[str, tuple[str, str]], package: Path):
        self.entry, self.note, self.package = entry, note, package
        self.stand_ins = {
            Definition(*name.rsplit(".", 1)): External(library, other, other)
            for name, (library, other) in stand_ins.items()
        }
        self.modules: dict[str, _Module] = {}
        self.scanned: dict[int, _Scanner] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module of the package, or None."""
        place = self.package.parent.joinpath(*module.split("."))
        return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            path = self.path(name)
            if path is None:
                raise ValueError(f"there is no module {name} in {self.package.name}")
            self.modules[name] = _Module(name, path, self.package.name)
        return self.modules[name]

    def resolve(self, module: str, name: str) -> Entity:
        """What `from module import name` gives, through re-exports."""
        if (definition := Definition(module, name)) in self.stand_ins:
            return self.stand_ins[definition]
        if name not in self.module(module).names and self.path(f"{module}.{name}"):
            return Namespace(f"{module}.{name}")
        entity = self.top_level(self.module(module), name)
        if entity is None:
            raise ValueError(f"{module} has no {name}")
        return entity

    def top_level(self, module: _Module, name: str) -> Entity | None:
        """What a name means at the top level of a module; None for one that every module has."""
        if name in module.names:
            return Definition(module.name, name)
        if name in module.imported:
            return self.resolve(*module.imported[name])
        if name in module.externals:
            first = module.externals[name][0]
            # `import a.b` and `import a.c` both bind a, which is one thing.
            return first if first.name or first.alias == name else External(name, None, name)
        if name not in IMPLICIT:
            raise ValueError(f"{module.name}: the name {name} is not defined")
        return None

    def scan(self, module: _Module, statement: Statement) -> _Scanner:
        if id(statement) not in self.scanned:
            scanner = self.scanned[id(statement)] = _Scanner(self, module)
            scanner.visit(statement.node)
        return self.scanned[id(statement)]

    @cached_property
    def needed(self) -> dict[str, list[Statement]]:
        """The statements that go in, by module and in their order: the whole entry, and of the rest what is reached."""
        chosen: dict[str, set[int]] = {}
        entry = self.module(self.entry)
        queue = [(entry, statement) for statement in entry.statements]
        while queue:
            module, statement = queue.pop()
            if module.name not in chosen:
                chosen[module.name] = set()
                queue += [(module, other) for other in module.statements if other.acts]
            if id(statement) in chosen[module.name]:
                continue
            chosen[module.name].add(id(statement))
            for reference in self.scan(module, statement).references:
                match reference.entity:
                    case Definition(home, name):
                        wanted = {name}
                    case Namespace(home):
                        wanted = self.public(home)
                    case _:
                        continue
                other = self.module(home)
                queue += [(other, definer) for definer in other.statements if definer.names & wanted]
        return {
            name: [statement for statement in self.module(name).statements if id(statement) in ids]
            for name, ids in chosen.items()
        }

    def public(self, module: str) -> set[str]:
        """What a namespace has: the functions and classes of a module, but those with an underscore."""
        nodes = [statement.node for statement in self.module(module).statements]
        return {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }

    def references(self, module: str) -> list[Reference]:
        """All references of what is needed of a module."""
        return [
            reference
            for statement in self.needed[module]
            for reference in self.scan(self.module(module), statement).references
        ]

    def uses(self, module: str, lazy: bool) -> list[str]:
        """The modules that a module takes something from, in order; `lazy`: through imports within functions."""
        homes = [
            r.entity.module for r in self.references(module) if r.lazy is lazy and not isinstance(r.entity, External)
        ]
        return [home for home in dict.fromkeys(homes) if home != module]

    @cached_property
    def order(self) -> list[str]:
        """The modules, each after those it needs at import time, and if it can after those its functions import."""
        done: list[str] = []

        def reachable(module: str, seen: set[str]) -> set[str]:
            for other in [*self.uses(module, False), *self.uses(module, True)]:
                if other not in seen:
                    seen.add(other)
                    reachable(other, seen)
            return seen

        def visit(module: str) -> None:
            if module in done:
                return
            for other in self.uses(module, False):
                visit(other)
            for other in self.uses(module, True):
                if module not in reachable(other, set()):
                    visit(other)
            done.append(module)

        visit(self.entry)
        for module in sorted(self.needed):  # what functions import and what imports them in turn
            visit(module)
        return done

    def externals(self, module: str) -> set[External]:
        """The imports from elsewhere that a module needs."""
        found = set()
        for reference in self.references(module):
            if isinstance(reference.entity, External):
                entity = reference.entity
                same = self.module(module).externals.get(entity.alias, [])
                found |= set(same) if entity.name is None and same else {entity}
        return found

    @cached_property
    def guards(self) -> dict[str, list[str]]:
        """The libraries that a module waits for, those of modules that nothing needs at import time."""
        eager, queue = set(), [self.entry]
        while queue:
            module = queue.pop()
            if module not in eager:
                eager.add(module)
                queue += self.uses(module, False)

        def libraries(modules: list[str] | set[str]) -> set[str]:
            roots = {e.module.partition(".")[0] for module in modules for e in self.externals(module)}
            return roots - sys.stdlib_module_names

        return {module: sorted(libraries([module]) - libraries(eager)) for module in self.order if module not in eager}

    @cached_property
    def names(self) -> dict[Entity, str]:
        """The name of every entity in the file: its own, or its module's in front where that is taken or hidden."""
        places = [reference for module in self.order for reference in self.references(module)]
        hidden: dict[Entity, set[str]] = {}
        for place in places:
            hidden.setdefault(place.entity, set()).update(place.hidden)
        spaces = [entity for entity in hidden if isinstance(entity, Namespace)]
        defined = [
            Definition(module, name)
            for module in sorted(reversed(self.order), key=lambda module: bool(self.guards.get(module)))
            for statement in self.needed[module]
            for name in sorted(statement.names)
        ]
        outside = sorted(
            (e for e in hidden if isinstance(e, External)), key=lambda e: (e.alias, e.module, e.name or "")
        )
        members = [definition for definition in defined if definition.module == self.entry]
        # Modules that are used as values have the same functions: none of them goes by the bare name.
        alike = Counter(definition.name for definition in dict.fromkeys(defined))
        chosen: dict[Entity, str] = {}
        taken = set(IMPLICIT)
        for entity in dict.fromkeys([*HELPERS, *members, *outside, *defined, *sorted(spaces, key=lambda s: s.module)]):
            spread = isinstance(entity, Definition) and alike[entity.name] > 1 and Namespace(entity.module) in hidden
            for name in _candidates(entity):
                if name not in taken and name not in hidden.get(entity, ()) and not (spread and name == entity.name):
                    break
            else:
                raise ValueError(f"no name is free for {entity}")
            chosen[entity] = name
            taken.add(name)
        return chosen

    def section(self, name: str) -> str:
        """What is needed of a module, edited."""
        module, parts = self.module(name), []
        for statement in self.needed[name]:
            scanner = self.scan(module, statement)
            start, stop = module.starts[statement.first], module.starts[statement.last]
            edits = [(r.start, r.stop, self.names[r.entity].encode()) for r in scanner.references]
            for cut in scanner.cuts:
                last = cut.end_lineno
                while not module.lines[last].strip():  # the blank lines after an import
                    last += 1
                edits.append((module.starts[cut.lineno - 1], module.starts[last], b""))
            text = module.text[start:stop]
            for begin, end, new in sorted(edits, reverse=True):
                text = text[: begin - start] + new + text[end - start :]
            parts.append(text.decode())
        parts += [self.namespace(name)] if Namespace(name) in self.names else []
        return "".join(parts).strip("\n") + "\n"

    def namespace(self, module: str) -> str:
        space = self.names[Namespace(module)]
        members = "".join(
            f"    {name}={self.names[Definition(module, name)]},\n" for name in sorted(self.public(module))
        )
        return f"\n\n{space} = SimpleNamespace(\n{members})\n"

    def heading(self, name: str) -> str:
        module = self.module(name)
        path = module.path.relative_to(self.package.parent).as_posix()
        described = ["", *module.docstring.splitlines()] if module.docstring and name != self.entry else []
        lines = [f"---- {path}", *described]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines)

    def source(self) -> str:
        """The whole file."""
        guarded = {name: libraries for name, libraries in self.guards.items() if libraries}
        imports = set().union(*(self.externals(name) for name in self.order if name not in guarded))
        if any(isinstance(entity, Namespace) for entity in self.names):
            imports.add(SIMPLE_NAMESPACE)
        if guarded:
            imports.add(FIND_SPEC)
        parts = []
        for name in self.order:
            text = self.section(name)
            if name in guarded:
                condition = " and ".join(f'find_spec("{library}")' for library in guarded[name])
                own = self.render(self.externals(name) - imports, remark="  # where it is installed")
                text = f"if {condition}:\n" + _indent(f"{own}\n{text}")
            parts.append(f"{self.heading(name)}\n{text}")
        head = "\n\n".join(text for text in (self.module(self.entry).docstring, self.note) if text)
        text = f'"""{head}\n"""\n\n{self.render(imports)}\n' + "\n\n".join(parts)
        return text

    def render(self, imports: set[External], remark: str = "") -> str:
        """Import statements, Python's own before the others, plain ones before `from`."""
        plain = sorted({(e.module, e.alias) for e in imports if e.name is None})
        lines: dict[bool, list[str]] = {True: [], False: []}

        def own(module: str) -> bool:
            return module.partition(".")[0] in sys.stdlib_module_names

        for module, alias in plain:
            external = External(module, None, alias)
            name = self.names.get(external, alias)
            lines[own(module)].append(
                f"import {module}{remark}" if name == module else f"import {module} as {name}{remark}"
            )
        for module in sorted({e.module for e in imports if e.name is not None}, key=str.lower):
            members = sorted((e for e in imports if e.module == module and e.name), key=lambda e: (e.name, e.alias))
            names = [(e.name, self.names.get(e, e.alias)) for e in members]
            spelt = [name if name == bound else f"{name} as {bound}" for name, bound in names]
            line = f"from {module} import {', '.join(spelt)}"
            if len(line) > 120:
                line = f"from {module} import (\n" + "".join(f"    {one},\n" for one in spelt) + ")"
            lines[own(module)].append(line + remark)
        return "\n".join("".join(f"{line}\n" for line in block) for block in lines.values() if block)


def _candidates(entity: Entity) -> Iterator[str]:
    """Names for an entity, from the plainest on."""
    path = entity.module.split(".")
    match entity:
        case External(alias=alias):
            plain = alias.partition(".")[0]
        case Definition(name=name):
            plain = name
        case Namespace():
            yield path[-1]
            plain = "module"
    if not isinstance(entity, Namespace):
        yield plain
    bare = plain.lstrip("_")
    for parts in range(1, len(path) + 1):
        front = "_".join(path[-parts:])
        if bare.isupper():
            front = f"{front.upper()}_"
        elif bare[:1].isupper():
            front = front.title().replace("_", "")
        else:
            front = f"{front}_"
        yield "_" * (len(plain) - len(bare)) + front + bare


def _indent(text: str) -> str:
    """The text one level deeper; within strings of several lines only docstrings move along."""
    docstrings, inside = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docstrings.add(node.body[0].lineno)
    strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in strings and token.start[0] not in docstrings:
            inside |= set(range(token.start[0] + 1, token.end[0] + 1))
    lines = text.splitlines(keepends=True)
    return "".join(
        line if number in inside or not line.strip() else f"    {line}" for number, line in enumerate(lines, 1)
    )
