"""The commands beside training in the drill: each is killed at any moment, meets a full disk and other people's files.

Each runs in a process forked off one that has loaded the libraries, and is told to kill itself before its Nth change of
a file, or is killed after a share of its time.
"""

import importlib
import math
import mmap
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from experiments.drill.forked import Ended, Forked
from experiments.drill.places import files_in, save_latent_data, small_disk
from experiments.drill.rows import Row, expect, expect_same, many, row_of
from sit_atconv.runtime.reading import parse_json

STEP = "run/step-0000004"
RECIPE = {
    "model": {"patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 2, "token_mixer": "hybrid"},
    "data": {"flip": True},
    "train": {"max_steps": 4, "batch_size": 16},
    "ema": {"kind": "power", "snapshot_every": 1},
    "checkpoint": {"every": 2},
    "preview": {"every": 0},
}
CLOCK = ("seconds", "seconds_per_image")  # keys of a record that differ
THEIRS = {"notes.txt": b"mine", "data.tmp": b"mine", ".other.unfinished/part": b"mine", "theirs/model.pt": b"mine"}
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Subcommand:
    """A command that writes to --out: {0} are its inputs, {1} what it writes, {2} that without its ending."""

    name: str
    module: str  # of its `main`
    words: str
    out: str  # the name of what it writes
    beside: tuple[str, ...] = ()  # other files that it writes
    goes_on: bool = False  # whether the same command goes on with what is there; else a whole one is refused
    anew: bool = False  # whether the same command writes its own result anew
    same: bool = True  # whether two runs write the same, but for the clock


SUBCOMMANDS = [
    Subcommand("sample.py", "sample", "--ckpt {0}/run --num 8 --steps 4 --out {1}", "grid.png", anew=True),
    Subcommand(
        "generate", "sampling.__main__", "generate --ckpt {0}/run --num 96 --batch 8 --steps 2 --out {1}", "samples",
        goes_on=True,
    ),
    Subcommand(
        "likelihood", "sampling.__main__",
        "likelihood --ckpt {0}/run --num 8 --sampler euler --steps 2 --out {1}", "likelihood.json",
    ),
    Subcommand(
        "speed", "sampling.__main__", "speed --models SiT-S/8 --sizes 64 --batch 1 --rounds 1 --dtype fp32 --out {2}",
        "speed.json", ("speed.md", "speed.png"), anew=True, same=False,
    ),
    Subcommand(
        "extract", "eval.__main__", "extract {0}/samples --extractor digits --shard 8 --batch 8 --out {1}", "features",
        goes_on=True,
    ),
    Subcommand("build-ref", "eval.__main__", "build-ref {0}/features --out {1}", "ref.npz"),
    Subcommand("score", "eval.__main__", "score {0}/features --ref digits --out {1}", "metrics.json", anew=True),
    Subcommand("table", "eval.__main__", "table {0}/metrics.json --out {1}", "table.md", ("table.json",), anew=True),
    Subcommand("report", "eval.__main__", "report {0}/run --out {1}", "page.html", anew=True),
    Subcommand(
        "encode", "sit_atconv.latents.__main__", "encode {0}/vae.yaml --shard-images 8 --out {1}", "latents",
        goes_on=True,
    ),
    Subcommand("convert to public", "sit_atconv.convert.__main__", "{0}/run --to public --out {1}", "sit.safetensors"),
    Subcommand(
        "convert to ours", "sit_atconv.convert.__main__", "{0}/public.safetensors --sample-size 8 --out {1}", "model",
    ),
    Subcommand("export", "sit_atconv.pipelines.export", "{0}/run --out {1}", "pipeline"),
    Subcommand("posthoc", "sit_atconv.posthoc", "{0}/run --std 0.1 --out {1}", "posthoc"),
]  # fmt: skip


def _run(
    descriptor: int, facts: dict, module: str, words: list[str], folder: str, die_at: int | None, limit: int | None
):
    """One command; killed before its `die_at`-th change of a file in a folder."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    facts["changes"] = 0

    def watch(event: str, args: tuple) -> None:
        if event not in CHANGES or isinstance(args[0], int):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not os.path.abspath(os.fspath(args[0])).startswith(folder):
            return
        facts["changes"] += 1
        if facts["changes"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    main = importlib.import_module(module).main
    sys.addaudithook(watch)
    os.write(descriptor, b"b")
    main(words)


@dataclass
class Place:
    """A command, its inputs, and a folder with other people's files that it writes into."""

    command: Subcommand
    inputs: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / self.command.out

    def fill(self) -> "Place":
        for name, content in THEIRS.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self

    def run(self, die_at: int | None = None, after: float | None = None, limit: int | None = None) -> Ended:
        """Run the command, killed before its change number `die_at`, or `after` seconds."""
        places = self.inputs, self.out, self.out.with_suffix("")
        words = [word.format(*places) for word in self.command.words.split()]
        forked = Forked(_run, self.command.module, words, str(self.folder.resolve()), die_at, limit)
        forked.read()
        if after is not None:
            forked.read(after)  # nothing comes, but its end
            forked.kill()
        return forked.end()

    def expect_theirs(self) -> None:
        """Raise Failed unless other people's files are as they were, and nothing of the command's is left beside."""
        there = files_in(self.folder)
        lost = [name for name in THEIRS if there.get(name) != THEIRS[name]]
        expect(not lost, f"other people's files are gone: {lost}")
        left = sorted(there.keys() - self.written().keys() - THEIRS.keys())
        expect(not left, f"left behind: {left[:3]}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that it writes."""
        return (self.command.out, *self.command.beside)

    @property
    def whole(self) -> bool:
        return all((self.folder / name).exists() for name in self.names)

    def written(self) -> dict[str, bytes]:
        """All that it wrote."""
        return {name: data for name, data in files_in(self.folder).items() if name.split("/")[0] in self.names}

    def contents(self) -> dict[str, object]:
        """The same but for the clock and the folder's name; the names alone where two runs do not write the same."""
        found = {}
        for name, data in self.written().items():
            data = data.replace(str(self.folder).encode(), b"FOLDER")
            content = _timeless(parse_json(data, name, object)) if name.endswith(".json") else data
            found[name] = content if self.command.same else None
        return found


def _timeless(record: object) -> object:
    if isinstance(record, dict):
        return {key: _timeless(value) for key, value in record.items() if key not in CLOCK}
    return [_timeless(each) for each in record] if isinstance(record, list) else record


def _kill_and_run_again(place: Place, whole: Place, changes: int, seconds: float, index: int) -> None:
    """One command killed at a moment that its index draws, and run again."""
    draw, killed = random.Random(index), None
    by_file = index % 2 == 1
    die_at, after = draw.randint(1, changes), draw.random() * seconds
    for _ in range(10):  # it may be over before: then earlier
        killed = place.fill().run(die_at) if by_file else place.fill().run(after=after)
        if killed.status == -signal.SIGKILL:
            break
        shutil.rmtree(place.folder)
        die_at, after = max(1, die_at // 2), after / 2
    expect(killed.status == -signal.SIGKILL, f"was not killed: exit status {killed.status}: {killed.said[-300:]}")
    complete = place.whole
    again = place.run()
    if complete and not (place.command.goes_on or place.command.anew):
        again.expect(2, "exists already")
    else:
        again.expect(0)
    place.expect_theirs()
    expect_same(place.contents(), whole.contents())
    shutil.rmtree(place.folder)


def killed(command: Subcommand, inputs: Path, out: Path, runs: int) -> str:
    """A command killed many times, each time run again to the same end."""
    Place(command, inputs, out / "first").fill().run()  # which may wait for what is loaded
    whole = Place(command, inputs, out / "whole").fill()
    start = time.perf_counter()
    alone = whole.run()
    seconds = time.perf_counter() - start
    alone.expect(0)

    def one(index: int) -> None:
        place = Place(command, inputs, out / f"killed-{index:02}")
        _kill_and_run_again(place, whole, alone.facts["changes"], seconds, index)

    done, failures = many(command.name, runs, one)
    seen = f"{len(done)} of {runs} end with the same content (of {alone.facts['changes']} changes of files)"
    expect(not failures, "; ".join([seen, *failures[:3]]))
    return seen


def full_disk(command: Subcommand, inputs: Path, out: Path) -> str:
    """A disk with room for half of what a command writes; where none can be mounted, a limit on the size of files."""
    whole = Place(command, inputs, out / "whole")
    sizes = [len(data) for data in whole.written().values()]
    pages = sum(math.ceil(size / mmap.PAGESIZE) for size in sizes) // 2 + len(THEIRS)  # of theirs each takes one
    with small_disk(out / "disk", pages * mmap.PAGESIZE) as filler:
        mounted = filler.exists()
        place = Place(command, inputs, out / "disk" / "here").fill()
        line = place.run(limit=None if mounted else max(sizes) // 2).expect(2)
        if not command.goes_on:
            expect(not place.whole, "half of it is there under its name")
            place.expect_theirs()
        filler.unlink(missing_ok=True)
        place.run().expect(0)
        place.expect_theirs()
        expect_same(place.contents(), whole.contents())
    how = "a tmpfs" if mounted else "a limit on files"
    return f"on {how}: '{line.partition('error: ')[2][-70:]}', then the same content"


def foreign(command: Subcommand, inputs: Path, out: Path) -> str:
    """A file, then a folder, of somebody else's under the name of what a command writes; then beside its files."""
    for kind in ("file", "folder"):
        place = Place(command, inputs, out / f"foreign-{kind}").fill()
        for name in place.names:
            mine = place.folder / name if kind == "file" else place.folder / name / "mine.txt"
            mine.parent.mkdir(exist_ok=True)
            mine.write_bytes(b"mine")
        place.run().expect(2)
        there = files_in(place.folder)
        expect(len(there) == len(THEIRS) + len(place.names), f"a {kind}: other files: {sorted(there)[:5]}")
        expect(set(there.values()) == {b"mine"}, f"a {kind} was changed")
    if command.goes_on:
        place, whole = Place(command, inputs, out / "foreign-inside").fill(), Place(command, inputs, out / "whole")
        place.run(die_at=2 * (Place(command, inputs, out / "counted").run().facts["changes"]) // 3)
        (place.out / "mine.tmp").write_bytes(b"mine")
        ended = place.run()
        ended.expect(2 if ended.status else 0)
        expect((place.out / "mine.tmp").read_bytes() == b"mine", "a file beside its own is gone")
        (place.out / "mine.tmp").unlink()
        place.run().expect(0)
        expect_same(place.contents(), whole.contents())
    return "refused in one line" + ("; a file beside its own stays" if command.goes_on else "")


def make_inputs(folder: Path) -> None:
    """What the commands read: a run, samples, features, scores, a converted file, images and an autoencoder."""
    folder.mkdir(parents=True)
    recipe = {**RECIPE, "run": {"out": str(folder / "run")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "vae.yaml").write_text(yaml.safe_dump({**recipe, **save_latent_data(folder)}))
    for module, words, out in (
        ("train_sit", "{0}/run.yaml", "run"),
        ("sampling.__main__", "generate --ckpt {0}/run --num 96 --steps 2 --out {1}", "samples"),
        ("eval.__main__", "extract {0}/samples --extractor digits --out {1}", "features"),
        ("eval.__main__", "score {0}/features --ref digits --out {1}", "metrics.json"),
        ("sit_atconv.convert.__main__", "{0}/run --to public --out {1}", "public.safetensors"),
    ):
        ended = Place(Subcommand(out, module, words, out), folder, folder).run()
        if ended.status:
            raise SystemExit(f"the drill's inputs could not be made: {out}: {ended.said[-500:]}")


def drilled(out: Path, runs: int) -> list[Row]:
    """All faults made on all commands, in a folder of their own; their inputs stay as they were."""
    inputs = out / "inputs"
    make_inputs(inputs)
    before = files_in(inputs)
    rows = []
    for command in SUBCOMMANDS:
        folder = out / command.name.replace(" ", "-")
        rows.append(row_of(command.name, "SIGKILL", partial(killed, command, inputs, folder, runs), runs))
        for fault, make in (("full disk", full_disk), ("other people's files", foreign)):
            rows.append(row_of(command.name, fault, partial(make, command, inputs, folder)))
    rows.append(Row("all of these", "their inputs", 1, "as they were", "nothing", before == files_in(inputs)))
    return rows
