"""Execute the notebooks of notebooks/ in place: `python -m experiments.notebooks [NAME ...]`, all without a name.

Each runs from its beginning, in an empty folder of its own, runs/notebooks/NAME. What it gives is kept as a reader is
to see it: pictures and texts, no times of cells, no paths of this machine. One that fails, or warns, stays as it was.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sit_atconv.runtime.errors import ArgumentParser, InputError, command
from sit_atconv.runtime.files import scratch, write_atomic

ROOT = Path(__file__).parents[1]
FOLDER, RUNS = ROOT / "notebooks", Path("runs/notebooks")
SECONDS = 900  # of a cell at most
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what moves a terminal's cursor, or colours
PROGRESS = re.compile(r"[\w ]+: .+, .*\d (left|in all)")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def names() -> list[str]:
    """The notebooks, without .ipynb, in their order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def executed(name: str, folder: Path) -> Any:
    """A notebook of nbformat, with what its cells gave in `folder`.

    Raises InputError for a cell that fails or warns, and for a path of this machine in what they gave.
    """
    import matplotlib.font_manager  # noqa: F401 (makes its cache, of which it tells the one who waits)
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `sit-atconv` of this Python
    # tqdm, when a library loads it without ipywidgets; bars are texts then.
    environment = os.environ | {"PATH": beside, "PYTHONWARNINGS": "ignore:IProgress not found"}
    with tempfile.TemporaryDirectory() as sockets:  # by files, and no port that others may reach
        kernel = AsyncKernelManager(
            kernel_name="python3", transport="ipc", connection_file=str(Path(sockets, "kernel.json"))
        )
        client = NotebookClient(
            notebook, kernel, timeout=SECONDS, record_timing=False, coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )  # fmt: skip
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise InputError(f"notebook {name!r}: a cell failed: {ESCAPE.sub('', str(error))}") from None
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                _tidy(name, output, folder)
    return notebook


def _is_progress(output: Any) -> bool:
    """Whether an output is lines of progress alone, see `console.Progress`: they come where a machine is slow."""
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return all(PROGRESS.fullmatch(line) for line in output.text.splitlines())


def _tidy(name: str, output: Any, folder: Path) -> None:
    """Leave of an output what stands there in the end. Raises InputError for what is not to be published."""
    if output.output_type == "stream":
        if output.name == "stderr":
            raise InputError(f"notebook {name!r} warns: {output.text}")
        output.text = screen(output.text)
    texts = [output.text] if output.output_type == "stream" else [str(each) for each in output.data.values()]
    for place in (folder.resolve(), ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())):
        if any(f"{place}/" in text or text.rstrip().endswith(str(place)) for text in texts):
            raise InputError(f"notebook {name!r} tells of {str(place)!r}, a path of this machine: {texts}")


def screen(text: str) -> str:
    """What a terminal shows in the end: of lines that are written over, such as a bar's, the last writing."""
    lines = ESCAPE.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines)


def last_output(notebook: Any) -> str:
    """What the last cell of code gave, as text."""
    cell = [each for each in notebook.cells if each.cell_type == "code"][-1]
    return "\n".join(
        each.text if each.output_type == "stream" else each.data.get("text/plain", "") for each in cell.outputs
    ).strip()


@command
def main(argv: list[str] | None = None) -> None:
    import nbformat

    parser = ArgumentParser(prog="python -m experiments.notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*names(), []], help=f"{', '.join(names())}")
    for name in parser.parse_args(argv).names or names():
        began = time.monotonic()
        notebook = executed(name, scratch(RUNS / name))
        write_atomic(FOLDER / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
        print(f"{name}: {time.monotonic() - began:.0f} s\n{last_output(notebook)}\n", flush=True)


if __name__ == "__main__":
    main()
