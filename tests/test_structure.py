"""The layout that DESIGN promises: imports go one way, and only the library is installed."""

import ast
import functools
import re
import tomllib
from collections.abc import Iterable, Iterator

import pytest
from conftest import ROOT

# What a part of the library may import from the rest of it; a part is a folder, or a module that is named here.
BASE = {"runtime", "version"}
CORE = BASE | {"config", "flow"}
SAVED = {"training.checkpoint", "training.ema"}
DRAWN = {"sampling", "sampling.caches", "sampling.settings", "sampling.trained"}
DOOR = {"commands", "runtime"}
ALLOWED = {
    "version": set(),
    "runtime": {"version"},
    "flow": set(),
    "sampling.settings": BASE | {"flow"},
    "sampling.caches": BASE | {"flow"},
    "config": BASE | {"flow", "sampling.settings"},
    "ops": BASE,
    "layers": BASE | {"ops"},
    "models": BASE | {"ops", "layers", "flow"},
    "data": CORE,
    "latents": CORE | {"data"},
    "scoring": CORE | {"data"},
    "training.ema": BASE | {"config"},
    "convert": CORE | {"models", "layers"},
    "training.checkpoint": CORE | {"models", "convert"},
    "training.posthoc": BASE | {"config", "models"} | SAVED,
    "sampling.trained": BASE | {"models", "latents", "sampling.settings", "training.checkpoint"},
    "sampling": CORE | DRAWN | {"models", "layers", "data", "latents", "training.checkpoint"},
    "sampling.generate": CORE | DRAWN | {"sampling.schedulers"},
    "bench.timing": BASE,
    "bench.results": BASE,
    "swap": CORE | {"bench.timing", "ops", "layers", "models"},
    "training": CORE | SAVED | DRAWN | {"models", "layers", "data", "latents", "swap"},
    "classification": CORE | {"models", "data", "training", "training.checkpoint"},
    "classification.extractor": CORE | {"classification.features", "scoring"},
    "classification.features": CORE | {"models", "classification", "scoring", "training", "training.checkpoint"},
    "convert.writing": CORE | {"models", "layers", "convert", "training.checkpoint"},
    "convert.__init__": {"runtime", "convert", "convert.writing"},
    "pipelines": CORE | SAVED | {"models", "latents", "sampling.caches", "sampling.settings", "sampling.trained"},
    "sampling.schedulers": BASE | DRAWN | {"flow", "models", "pipelines"},
    "app": CORE | DRAWN | {"models", "pipelines", "sampling.schedulers", "swap", "training.checkpoint"},
    "bench": CORE | DRAWN | {
        "models", "layers", "ops", "sampling.generate", "scoring", "bench.timing", "bench.results",
    },
    "bench.gpu": CORE | SAVED | DRAWN | {
        "models", "layers", "ops", "data", "latents", "training", "bench", "bench.timing", "bench.results",
    },
    "report": BASE | {"data", "scoring"},
    "hub": CORE | SAVED | {"data", "pipelines", "report", "scoring", "swap"},
    "principles": CORE | DRAWN | {
        "models", "layers", "ops", "data", "latents", "classification", "training.checkpoint",
    },
    "commands": CORE | SAVED | DRAWN | {
        "app", "bench", "bench.timing", "classification", "classification.extractor", "convert", "convert.writing",
        "data", "hub", "latents", "pipelines", "principles", "report", "sampling.generate", "sampling.schedulers",
        "scoring",
        "swap", "training", "training.posthoc",
    },
    "__main__": DOOR,
    "posthoc": DOOR,
    "convert.__main__": DOOR,
    "latents.__main__": DOOR,
    "pipelines.export": DOOR,
    "__init__": BASE | {"layers", "models", "pipelines", "swap"},
}  # fmt: skip
LIBRARY = sorted((ROOT / "sit_atconv").rglob("*.py"))
FOLDERS = ("sit_atconv", "sampling", "eval", "experiments")
PROGRAM = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])


SEES_MODELS = tuple(f"sit_atconv.{name}" for name in ("models", "layers", "sampling", "training"))


@functools.cache
def parsed(path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes(path) -> list[ast.AST]:
    return list(ast.walk(parsed(path)))


@pytest.fixture(scope="module", autouse=True)
def _files_are_parsed_once():
    yield
    parsed.cache_clear()
    nodes.cache_clear()


@functools.cache
def imports(path) -> frozenset[str]:
    modules = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return frozenset(modules)


def part(name: str) -> str:
    """The part of the library that a module, or what is imported from one, belongs to."""
    parts = name.split(".")[1:3]
    return ".".join(parts) if ".".join(parts) in ALLOWED else parts[0]


def module(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


NAMED = {module(path).removesuffix(".__init__"): path for path in PROGRAM}


def modules_imported(path, named: dict) -> set[str]:
    """The modules among the named ones that a file imports, within functions, too: `from package import module` is of
    the module alone."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            wholes = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {whole if whole in named else node.module for whole in wholes}
    return found & named.keys()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_imports_go_one_way(path):
    own = {name: other for name, other in NAMED.items() if name.partition(".")[0] == "sit_atconv"}
    names = {part(name) for name in modules_imported(path, own) if name != "sit_atconv"}
    assert names <= ALLOWED[part(module(path))] | {part(module(path))}
    top = {name.partition(".")[0] for name in imports(path)}
    assert not top & {"experiments", "sampling", "eval", "sample", "train_sit", "tests"}


def in_a_circle(graph: dict[str, set[str]]) -> set[str]:
    """The names that lead to a circle, as each leads to those in its set."""
    graph = dict(graph)
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    return graph.keys()


def test_no_modules_import_each_other_in_a_circle(tmp_path):
    assert not in_a_circle({name: modules_imported(path, NAMED) - {name} for name, path in NAMED.items()})
    (tmp_path / "x.py").write_text("def lazy():\n    from a import b, c\n    import d.e\n")
    assert modules_imported(tmp_path / "x.py", {"a": 0, "a.b": 0, "d.e": 0, "f": 0}) == {"a", "a.b", "d.e"}
    assert in_a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


@pytest.mark.parametrize("path", sorted((ROOT / "sit_atconv/flow").glob("*.py")), ids=lambda path: path.name)
def test_flow_needs_torch_and_torchdiffeq_alone(path):
    outside = {name.partition(".")[0] for name in imports(path)} - {"sit_atconv", "__future__"}
    assert outside <= {"torch", "torchdiffeq", "collections", "functools", "itertools", "math", "dataclasses", "typing"}


@pytest.mark.parametrize("path", sorted((ROOT / "sit_atconv/scoring").glob("*.py")), ids=lambda path: path.name)
def test_scoring_never_sees_a_model(path):
    assert not {name for name in imports(path) if name.startswith(SEES_MODELS)}


def test_every_part_of_the_library_has_its_place():
    assert {part(module(path)) for path in LIBRARY} == ALLOWED.keys()


def test_only_the_library_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"] == {"include": ["sit_atconv*"]}


# Private too, without the underscore: experimental, or not in its library's documentation.
PRIVATE = {"torch.fx.experimental", "numpy.random.bit_generator", "torch.utils.flop_counter.flop_registry"}
# Python's own, which it documents; and what this package puts on models of others.
NOT_PRIVATE = {"_asdict", "_replace", "_exit", "_swap_record"}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.endswith("__") and name not in NOT_PRIVATE


def defined(path) -> Iterator[str]:
    """The names of a module's functions, classes, variables, and attributes of `self`."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


@functools.cache
def own_names() -> set[str]:
    return {name for path in PROGRAM for name in defined(path)}


def reached(path) -> Iterator[str]:
    """The names that a module imports from other libraries, part by part, and those that it asks objects for."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in FOLDERS:
            yield from (*node.module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) != "super()":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from (each.value for each in node.args[1:2] if isinstance(each, ast.Constant))


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_other_libraries_are_in_compat_alone(path):
    """A name that is private, and that nothing here defines, is another library's. What a base class calls stays."""
    if path.parent == ROOT / "sit_atconv/runtime/compat":
        return
    assert not {name for name in reached(path) if is_private(name)} - own_names()
    assert not {name for name in imports(path) if name.startswith(tuple(PRIVATE))}


# Python's own modules that one system has alone, and what Windows lacks in those that all have.
OF_ONE_SYSTEM = {
    "fcntl",
    "msvcrt",
    "resource",
    "pwd",
    "grp",
    "termios",
    "tty",
    "pty",
    "syslog",
    "posix",
    "winreg",
    "nt",
}
NOT_ON_WINDOWS = {
    "signal": {"SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGPIPE", "alarm", "pthread_sigmask"},
    "os": {"fork", "mkfifo", "getuid", "killpg", "setsid", "sched_getaffinity", "sysconf", "statvfs", "uname", "umask"},
}


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What is run when a module is imported: not the inside of functions."""
    waiting = [tree]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if not isinstance(node, ast.FunctionDef | ast.Lambda):
                yield node
                waiting.append(node)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_is_imported_on_every_system(path):
    for node in at_import(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & OF_ONE_SYSTEM, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in NOT_ON_WINDOWS.get(node.value.id, ()), node.lineno


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_progress_has_one_owner(path):
    """tqdm writes one endless line off a terminal; `console.Progress` does not. forked.py sets tqdm's lock."""
    owners = {"sit_atconv/runtime/console.py", "experiments/drill/forked.py"}
    assert str(path.relative_to(ROOT)) in owners or "tqdm" not in imports(path)


# Loops that go once more through what was measured, which takes seconds, by module and function.
SILENT = {
    "sit_atconv.scoring.features": {"load"},
    "sit_atconv.scoring.inception_score": {"inception_scores"},
    "sit_atconv.scoring.score": {"_recognised"},
}


def silent_loops(nodes: Iterable[ast.AST]) -> set[str]:
    """The functions with a loop over batches that say nothing of how far they are: by no Progress, and no bar of
    their caller's."""
    found = set()
    for function in nodes:
        if not isinstance(function, ast.FunctionDef):
            continue
        loops = [node.iter for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension)]
        over = [ast.unparse(each) for each in loops]
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if any(re.search(r"\b(batches|TrainingBatches)\b", each) for each in over) and not names & {"Progress", "bar"}:
            found.add(function.name)
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_loops_over_batches_tell_how_far_they_are(path):
    # A step of the trainer goes through its parts, under the bar of all steps.
    told = SILENT.get(module(path), set()) | ({"_optimize"} if module(path) == "sit_atconv.training.trainer" else set())
    assert silent_loops(nodes(path)) == told


def test_a_silent_loop_is_found():
    def silent(text: str) -> set[str]:
        return silent_loops(ast.walk(ast.parse(text)))

    assert silent("def f(source):\n    for each in source.batches(8):\n        use(each)\n") == {"f"}
    assert silent("def f(x):\n    return [use(each) for each in TrainingBatches(x)]\n") == {"f"}
    assert not silent("def f(x):\n    for each in Progress(x.batches(8)):\n        use(each)\n")
    assert not silent("def f(x, bar):\n    for each in x.batches(8):\n        bar.update(use(each))\n")


READERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load", "OmegaConf.load"}
# Who may parse a text himself: the drill reads what its own children have just written, and wants to fail loudly.
PARSERS = {"sit_atconv/runtime/reading.py", "experiments/drill/__main__.py", "experiments/drill/child.py"}


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_parsed_by_the_bounded_reader(path):
    if str(path.relative_to(ROOT)) not in PARSERS:
        called = {ast.unparse(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
        assert not called & READERS
        assert not imports(path) & READERS


def test_nothing_is_unpickled():
    wanted = {"load": ("weights_only", "True"), "from_pretrained": ("use_safetensors", "True")}
    for path in PROGRAM:
        for node in nodes(path):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if function == "np.load":
                assert keywords.get("allow_pickle") == "False", path
            elif function == "torch.load" or function.endswith(".from_pretrained"):
                key, value = wanted[function.rpartition(".")[2]]
                assert keywords.get(key) == value, path
        assert not imports(path) & {"pickle", "cloudpickle", "joblib", "torch.load", "numpy.load"}, path


def spoken(tree: ast.AST) -> Iterator[ast.Constant]:
    """The texts in a file but for docstrings and what is told to a parser of options."""
    silent = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            silent |= {id(each) for each in ast.walk(node)}
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            silent.add(id(node.body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node


OLD_NAMES = re.compile(r"python -m (eval|sampling|sit_atconv)|(train_sit|train_attnet|sample)\.py")
# The doors' own names.
DOORS = {
    "latents/__main__.py", "posthoc.py", "convert/__main__.py", "pipelines/export.py", "bench/gpu/__main__.py",
}  # fmt: skip


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_calls_commands_by_their_installed_name(path):
    if path.relative_to(ROOT / "sit_atconv").as_posix() not in DOORS:
        assert not [each.value for each in spoken(parsed(path)) if OLD_NAMES.search(each.value)]


def flags_in(tree: ast.Module) -> list[str]:
    return [node.value for node in spoken(tree) if re.search(r"(^|[\s(`'])--[a-z]", node.value)]


def test_the_library_speaks_of_arguments_and_not_of_flags():
    """Its errors name an argument by `errors.option`, which gives the flag within a command."""
    others = {
        "sit_atconv/runtime/errors.py": [" --help`"],
        "sit_atconv/bench/timing.py": [
            "--query-gpu=",
            "--format=",
            "--error-unmatch",
            "--id=",
            "--short",
            "--porcelain",
        ],  # nvidia-smi's and git's
        "sit_atconv/bench/gpu/correct.py": ["--tool", "--error-exitcode"],  # compute-sanitizer's
        "sit_atconv/bench/gpu/digits.py": [
            "--ckpt",
            "--steps",
            "--dtype",
            "--force",
            "--out",
            "--classes",
        ],  # of `sample`
        "sit_atconv/bench/gpu/tests.py": ["--continue-on-collection-errors", "--junitxml="],  # pytest's
    }
    found = {path.relative_to(ROOT).as_posix(): flags_in(parsed(path)) for path in LIBRARY}
    found = {path: flags for path, flags in found.items() if flags and not path.startswith("sit_atconv/commands/")}
    assert {path: sorted(flags) for path, flags in found.items()} == {
        path: sorted(each) for path, each in others.items()
    }
    text = """def f(x):\n    "Writes `--out`."\n    raise ValueError(f"give --out {x}")"""
    assert flags_in(ast.parse(text)) == ["give --out "]
