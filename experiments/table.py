"""python -m experiments.table FILE: train, sample, score and tabulate what a table lists, except what is there already.

FILE is a YAML file, see experiments/tables. Each of its runs lies in RUNS/ENTRY-seedS, its samples in
samples/SAMPLER within, with their metrics.json. OUT gets a table per sampler, as Markdown and JSON, and in OUT/raw
every metrics.json, with paths as seen from here. Run again after any interruption: every command goes on from what it
left.
"""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sit_atconv import config
from sit_atconv.commands import parser_of
from sit_atconv.commands.options import add_number, register_extractors, sampling_asked
from sit_atconv.data.digits import Digits
from sit_atconv.data.npz import UNREADABLE, arrays_of
from sit_atconv.runtime import limits
from sit_atconv.runtime.claims import SETTINGS
from sit_atconv.runtime.classes import Classes
from sit_atconv.runtime.comparison import differences
from sit_atconv.runtime.errors import ArgumentParser, InputError, check_choice, command, named
from sit_atconv.runtime.fields import chosen
from sit_atconv.runtime.files import sha256, write_out
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.runtime.precision import DTYPES
from sit_atconv.runtime.reading import as_stored, read_json, read_yaml
from sit_atconv.runtime.signals import ENDING, handled
from sit_atconv.sampling import FORMATS, generate
from sit_atconv.sampling.labels import RULES, sample_labels
from sit_atconv.sampling.samples import MANIFEST, PLACES
from sit_atconv.sampling.settings import SAMPLERS, SHORT, Sampling, flag
from sit_atconv.sampling.trained import describe_guide
from sit_atconv.scoring import DIGITS, GIVES
from sit_atconv.scoring.extractor import (
    INCEPTION_PROTOCOL,
    Extractor,
    Kind,
    inception_weights,
    kind_of,
    load_extractor,
    parsed,
)
from sit_atconv.scoring.features import INDEX, is_features
from sit_atconv.scoring.refs import check_recorded, recorded_extractor, reference_spec
from sit_atconv.scoring.result import RESULT, sound
from sit_atconv.scoring.sources import from_arrays, open_source
from sit_atconv.training import checkpoint
from sit_atconv.training.origin import opened
from sit_atconv.training.resolved import changes

NAME = re.compile(r"\w[\w.+-]*")  # of files
SETTLED = ("run.out", "run.seed")  # what a table decides of a recipe
SEED = "{seed}"  # in a text that each training seed has its own of
FULL = {short: name for name, short in SHORT.items()}
CURVES = ("curves.md", "curves.json", "curves.png")  # what experiments.curves writes beside the tables


@dataclass
class Entry:
    """A method: a recipe and its training seeds, or checkpoints that were trained elsewhere."""

    name: str = MISSING
    recipe: str | None = None
    seeds: list[int] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # of the recipe, key=value; {seed} stands for the seed
    ckpts: list[str] = field(default_factory=list)  # as --ckpt takes them, each trained from a seed of its own
    method: str | None = None  # what its row is called; left out, what its training says

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise InputError(f"entry name {self.name!r}: letters, digits and . _ + - alone, no . first")
        if (self.recipe is None) == (not self.ckpts):
            raise InputError(f"entry {self.name!r}: give either recipe and seeds, or ckpts")
        if (self.recipe is None) != (not self.seeds) or (self.overrides and self.recipe is None):
            raise InputError(f"entry {self.name!r}: seeds and overrides go with a recipe, which needs seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"entry {self.name!r}: seeds={self.seeds}: the same one twice")
        for override in self.overrides:
            if (key := override.partition("=")[0]) in SETTLED:
                raise InputError(f"entry {self.name!r}: the table decides {key}; leave {override!r} out")
        if self.method is not None and not self.method:
            raise InputError(f"entry {self.name!r}: method='': give a name, or leave it out")


@dataclass
class Sampler(Sampling):
    """Options of `python -m sampling generate`: how images are drawn, and which; as SHORT calls them.

    guide: as `--guide` takes it; {seed} in it stands for the training seed of the model that it guides.
    """

    sampler: str = chosen(MISSING, SAMPLERS)
    guidance_scale: float = MISSING
    name: str = MISSING
    labels: str = "balanced"
    seed: int = 0
    batch: int | None = None
    dtype: str | None = None
    vae: str | None = None

    def __post_init__(self):
        if not NAME.fullmatch(self.name):
            raise InputError(f"sampler name {self.name!r}: letters, digits and . _ + - alone, no . first")
        with named(f"sampler {self.name!r}"):
            super().__post_init__()
            if self.dtype is not None:
                check_choice("dtype", self.dtype, DTYPES)
            limits.SEED.check("seed=", self.seed)
            limits.BATCH.check("batch=", self.batch)
            if self.labels not in RULES and not Path(self.labels).is_file():
                raise InputError(f"labels={self.labels!r}: no such file; choose from {list(RULES)} or give a file")

    def of(self, model: "Model") -> "Sampler":
        """The sampler of one model, with its training seed in the guide's place."""
        if self.guide is None or model.recipe is None:
            return self
        return dataclasses.replace(self, guide=self.guide.replace(SEED, str(model.recipe.run.seed)))

    def options(self) -> list[str]:
        words = []
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name != "name" and value is not None:
                words += [flag(entry.name), *map(str, value if isinstance(value, list) else [value])]
        return words


@dataclass
class Table:
    """What a table is made of."""

    out: str = MISSING  # folder of the results
    runs: str = MISSING  # folder of the runs
    num: int = MISSING  # samples of each
    ref: str = MISSING  # as `python -m eval score --ref` takes it
    metrics: list[str] = MISSING  # as `score --metrics` takes them
    ref_url: str | None = None  # where the reference can be had
    weights: str | None = None  # of Inception; left out, torch's hub cache
    extractor: str | None = None  # as `score --extractor` takes it; left out, what the reference implies
    format: str = "png"
    entries: list[Entry] = MISSING
    samplers: list[Sampler] = MISSING

    def __post_init__(self):
        if not 2 <= self.num <= limits.IMAGES.most:
            raise InputError(
                f"num={self.num}: one sample is no distribution; give at least 2 and at most {limits.IMAGES.most:,}"
            )
        check_choice("format", self.format, FORMATS)
        if not self.metrics:
            raise InputError("metrics=[]: give at least one")
        kind = kind_of_table(self)
        for metric in self.metrics:
            check_choice("metrics", metric, [*kind.offered, *["fdd"] * (kind.name == "inception")])
        for what in ("entries", "samplers"):
            names = [each.name for each in getattr(self, what)]
            if not names or len(set(names)) < len(names):
                raise InputError(f"{what} {names}: give at least one, and each a name of its own")
        seedless = next((entry.name for entry in self.entries if entry.recipe is None), None)
        for sampler in self.samplers:
            if seedless is not None and SEED in (sampler.guide or ""):
                raise InputError(
                    f"sampler {sampler.name!r}: guide={sampler.guide}: {SEED} stands for the seed of a recipe, and "
                    f"entry {seedless!r} has ckpts; name one guide for all"
                )


def load_table(path: Path) -> Table:
    """Read and check a table's file. Raises InputError in one line."""
    try:
        stated = read_yaml(path)
        _check_keys(stated, Table)
        samplers = stated.get("samplers") or []
        stated["samplers"] = [
            {FULL.get(key, key): value for key, value in sampler.items() if value is not None} for sampler in samplers
        ]
        table = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Table), stated))
    except OSError as error:
        raise InputError(f"table {str(path)!r}: {error.strerror}; see experiments/tables") from None
    except InputError:
        raise
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"table {str(path)!r}: {key}{str(error).splitlines()[0]}") from None
    return table


def _check_keys(stated: Any, schema: type) -> None:
    if not isinstance(stated, dict):
        raise InputError(f"table: {stated!r} is to be a mapping")
    names = {SHORT.get(entry.name, entry.name) for entry in dataclasses.fields(schema)}
    for key, value in stated.items():
        check_choice("table key", key, names)
        part = {"entries": Entry, "samplers": Sampler}.get(key) if schema is Table else None
        if part is None and isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
            raise InputError(f"table: {key}={value!r} is to be a list of single values")
        if part:
            if not isinstance(value, list):
                raise InputError(f"table: {key}={value!r} is to be a list")
            for each in value:
                _check_keys(each, part)


@dataclass(frozen=True)
class Model:
    """One trained model of a table."""

    label: str  # of its files
    method: str | None  # of its row, None for what its training says
    ckpt: Path
    samples: Path  # a folder for each sampler: in its run, or for one that was trained elsewhere beside the runs
    train: list[str] | None  # the words that train it, or None where it was trained elsewhere
    recipe: config.Recipe | None


def models(table: Table) -> list[Model]:
    """The models of a table, in its order. Raises InputError for a recipe that is not valid."""
    found = []
    for entry in table.entries:
        for seed in entry.seeds:
            run = Path(table.runs) / f"{entry.name}-seed{seed}"
            overrides = [override.replace(SEED, str(seed)) for override in entry.overrides]
            words = [entry.recipe, *overrides, f"run.seed={seed}", f"run.out={run}"]
            recipe = config.load_recipe(words[0], words[1:])
            found.append(Model(run.name, entry.method, run, run / "samples", words, recipe))
        for number, ckpt in enumerate(entry.ckpts):
            label = f"{entry.name}-{number}"
            samples = Path(table.runs) / label / "samples"
            found.append(Model(label, entry.method, Path(ckpt), samples, None, None))
    return found


def is_trained(model: Model) -> bool:
    """Whether the last checkpoint of the model's recipe is there, whole."""
    if model.recipe is None:
        return True
    found = checkpoint.newest_valid(model.ckpt) if model.ckpt.is_dir() else None
    return (
        found is not None
        and found[1]["step"] == model.recipe.train.max_steps
        and not changes(found[1]["recipe"], model.recipe)
    )


def is_scored(samples: Path, table: Table) -> bool:
    """Whether metrics.json is of these samples, this reference, these weights and these metrics, and whatever version
    wrote it, its errors and corrected values hold."""
    try:
        result = read_json(samples / "metrics.json")
        return (
            result["samples_manifest_sha256"] == sha256(samples / "manifest.json")
            and _extractors(result, table) == wanted_extractors(table)
            and set(result["metrics"]) - {"classifier_heldout_accuracy"} == wanted_metrics(table)
            and result["reference"]["sha256"] == reference_digest(table.ref)
            and sound(result)["metrics"] == result["metrics"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def kind_of_table(table: Table) -> Kind:
    """The kind of extractor that a table is scored by: the stated one, else what its reference implies, see
    `sit_atconv.scoring.refs.reference_spec`. Raises InputError where the reference is of another kind's features."""
    register_extractors()
    if table.extractor is not None:
        check_recorded(table.ref, table.extractor, f"extractor={table.extractor}")
        return parsed(table.extractor)[0]
    found = recorded_extractor(table.ref)
    return kind_of(found[0]["protocol"]) if found else parsed(reference_spec(table.ref))[0]


def wanted_metrics(table: Table) -> set[str]:
    """The numbers that a result of a table holds, but for the accuracy of the extractor, which may not be known."""
    found = {name for metric in table.metrics for name in GIVES.get(metric, [metric])}
    return found - {"classifier_heldout_accuracy"}


def wanted_extractors(table: Table) -> list[tuple[str, str | None]]:
    """Protocol and SHA-256 of the weights of the extractors that the metrics take, in their order in a result; the
    digits' classifier is trained on the spot."""
    kind = kind_of_table(table).name
    if kind == "digits":
        return [(DIGITS, None)]
    if kind != "inception":
        about = _described(table.extractor) if table.extractor is not None else recorded_extractor(table.ref)[0]
        return [(about["protocol"], about.get("weights_sha256"))]
    found = []
    if table.metrics != ["fdd"]:
        found.append((INCEPTION_PROTOCOL, sha256(inception_weights(table.weights))))
    if "fdd" in table.metrics:
        stated = _described("dinov2")
        found.append((stated["protocol"], stated["weights_sha256"]))
    return found


def _extractors(result: dict[str, Any], table: Table) -> list[tuple[str, str | None]]:
    if kind_of_table(table).name == "digits":
        return [(result["protocol"], None)]
    return [(each["protocol"], each["weights_sha256"]) for each in result["extractors"]]


@cache
def _extractor(spec: str) -> Extractor:
    return load_extractor(spec, device="cpu")


def _described(spec: str) -> dict[str, Any]:
    return _extractor(spec).describe()


@cache
def reference_digest(ref: str) -> str:
    """The SHA-256 that a result states of a reference, see `scoring.refs.Reference`; one file is read once."""
    path = Path(ref)
    if ref == "digits":
        digits = Digits("train")
        return from_arrays(to_uint8(digits.images), digits.labels, ref).digest()
    if is_features(path):
        return sha256(path / INDEX)
    if path.suffix == ".npz" and _has_statistics(path):
        return sha256(path)
    return open_source(path).digest()


def _has_statistics(path: Path) -> bool:
    try:
        return bool(arrays_of(path, ("mu",)))
    except UNREADABLE:  # which opening it as images tells
        return False


def missing(table: Table, wanted: list[Model]) -> list[str]:
    """What the table needs and is not there, a sentence each; training makes what is missing of a recipe.

    Raises InputError for weights that nothing takes.
    """
    found = []
    kind = kind_of_table(table)
    if table.weights and not kind.weights:
        said = f"ref={table.ref}" if table.extractor is None else f"extractor={table.extractor}"
        raise InputError(f"weights belong to Inception, and {said} is of {kind.name} features; leave them out")
    if table.ref != "digits" and not Path(table.ref).exists():
        source = f"download {table.ref_url} to that place" if table.ref_url else "put it there"
        found.append(f"reference {table.ref!r} is not there; {source}, or name another as ref")
    if kind.weights:
        try:
            inception_weights(table.weights)
        except InputError as error:
            found.append(str(error).replace("--weights", "weights"))
    elif table.ref != "digits":
        try:
            check_extractor(table)
        except InputError as error:
            found.append(str(error).replace("--extractor", "extractor"))
    found += [
        f"checkpoint {str(model.ckpt)!r} is not there; train or convert it to that place, or name another in ckpts"
        for model in wanted
        if model.recipe is None and not model.ckpt.is_dir()
    ]
    for sampler in table.samplers:
        for place in dict.fromkeys(sampler.of(model).guide for model in wanted):
            try:
                with named(f"sampler {sampler.name!r}: guide"):
                    find_guide(place, wanted)
            except InputError as error:
                found.append(str(error))
    for number, model in enumerate(wanted):
        init = model.recipe and model.recipe.train.init
        if init is not None and not is_trained(model) and not is_coming(init, wanted[:number]):
            try:
                opened(model.recipe)
            except InputError as error:
                found.append(f"{model.label}: {error}")
    return found


def is_coming(place: str, wanted: list[Model]) -> bool:
    """Whether a place lies in a run that the table has yet to train."""
    return any(
        Path(place).resolve().is_relative_to(model.ckpt.resolve()) and not is_trained(model)
        for model in wanted
        if model.recipe is not None
    )


def find_guide(place: str | None, wanted: list[Model]) -> dict[str, Any] | None:
    """What samples record of a guide; None without one, and of one in a run that the table has yet to train.

    Raises InputError where there is none.
    """
    return None if place is None or is_coming(place, wanted) else describe_guide(checkpoint.load_trained(place))


def check_extractor(table: Table) -> None:
    """Raise InputError where the extractor of a table is not there, or is another one than the reference states."""
    stated = recorded_extractor(table.ref)
    extractor = _extractor(table.extractor or reference_spec(table.ref))
    if stated is not None:
        extractor.check_same(f"reference {table.ref!r}", stated[0])


class Runner:
    """Runs Python command lines one after the other, each shown; a dry one only shows them.

    processes: of each command that can share its work.
    """

    def __init__(self, processes: int, dry: bool):
        self.processes, self.dry = processes, dry

    def __call__(self, words: list[str], shared: bool = False) -> None:
        """Raises InputError where the command fails."""
        launcher = [sys.executable]
        if shared and self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            words = ["-m", "--", *words[1:]] if words[0] == "-m" else words  # or it would take options for its own
        print(f"$ {shlex.join(['python', *launcher[1:], *words])}", flush=True)
        if self.dry:
            return
        status, received = call([*launcher, *words])
        if received:
            print(f"{received.name}: stopped; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + received)
        if status:
            raise InputError(f"`python {shlex.join(words)}` ended with exit status {status}; mend it, and run again")


def call(words: list[str]) -> tuple[int, signal.Signals | None]:
    """Run a command; its exit status, and the first signal that came meanwhile, or None.

    SIGINT and SIGTERM are passed on, and the command is waited for: training saves a checkpoint then. It has a session
    of its own, so that a terminal's Ctrl-C does not reach it twice, which would end it at once. One that comes before
    the command is there is passed on as soon as it is.
    """
    received, pending, process = [], [], None

    def send() -> None:
        with suppress(IndexError):  # no more of them; a signal that comes meanwhile may have sent them, each once
            while process is not None:
                process.send_signal(pending.pop())

    def pass_on(number: int, frame) -> None:
        received.append(signal.Signals(number))
        pending.append(number)
        send()

    with handled(ENDING, pass_on):
        process = subprocess.Popen(words, start_new_session=True)
        send()
        return process.wait(), next(iter(received), None)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.table", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="YAML file of a table, see experiments/tables")
    add_number(parser, "--processes", limits.PROCESSES, 1, "processes per command", metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="show the commands that are left, and run none")
    args = parser.parse_args(argv)
    table = load_table(Path(args.file))
    wanted = models(table)
    lacking = missing(table, wanted)
    if lacking and not args.dry_run:
        raise InputError(lacking[0])
    for sampler in table.samplers:
        for model in wanted:
            check_samples(table, model, sampler, wanted)
    make(table, wanted, Runner(args.processes, args.dry_run))
    for sentence in lacking:
        print(f"# {sentence}")


def make(table: Table, wanted: list[Model], run: Runner) -> None:
    """Make what is missing of a table. Raises InputError where a command fails; what was made stays."""
    if run.processes > 1 and "ACCELERATE_USE_CPU" not in os.environ and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for model in wanted:
        if not is_trained(model):
            run(["train_sit.py", *model.train], shared=True)
            if not run.dry and not is_trained(model):
                raise InputError(f"{str(model.ckpt)!r} is not trained to its end; run again, which goes on with it")
    raw = Path(table.out) / "raw"
    results: dict[str, list[str]] = {}
    for sampler in table.samplers:
        for model in wanted:
            samples = model.samples / sampler.name
            if not is_sampled(model, sampler):
                run(["-m", "sampling", "generate", *generate_words(table, model, sampler)], shared=True)
            if not is_scored(samples, table):
                score = ["-m", "eval", "score", str(samples), "--ref", table.ref, "--metrics", ",".join(table.metrics)]
                score += ["--weights", table.weights] if table.weights else []
                run([*score, *(["--extractor", table.extractor] if table.extractor else [])], shared=True)
            target = raw / f"{model.label}-{sampler.name}.json"
            print(f"# {samples / 'metrics.json'} is copied to {target}", flush=True)
            if not run.dry:
                copy_result(samples / "metrics.json", target)
            results.setdefault(sampler.name, []).append(f"{model.method}={target}" if model.method else str(target))
    for name, files in results.items():
        run(["-m", "eval", "table", *files, "--out", str(Path(table.out) / f"{name}.md")])
    for path in leftovers(table, wanted):
        print(f"# {str(path)!r} is of nothing in this table; remove it unless another needs it")


def leftovers(table: Table, wanted: list[Model]) -> list[Path]:
    """Files among the results that this table does not write, as of an entry or a sampler that it had before."""
    out, samplers = Path(table.out), [sampler.name for sampler in table.samplers]
    written = {out / f"{name}{suffix}" for name in samplers for suffix in (".md", ".json")}
    written |= {out / name for name in CURVES}
    written |= {out / "raw" / f"{model.label}-{name}.json" for name in samplers for model in wanted}
    there = [*out.glob("*.md"), *out.glob("*.json"), *(out / "raw").glob("*.json")]
    return sorted(path for path in there if path not in written)


def copy_result(source: Path, target: Path) -> None:
    """Copy a metrics.json, with the paths in it as seen from the current folder where they lie in it."""
    here = f"{Path.cwd()}/"

    def seen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: seen(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [seen(inner) for inner in value]
        return value.removeprefix(here) if isinstance(value, str) else value

    write_out(target, json.dumps(seen(read_json(source)), indent=1) + "\n", "result", ours=RESULT)


def generate_words(table: Table, model: Model, sampler: Sampler) -> list[str]:
    """Options of `python -m sampling generate`."""
    words = ["--ckpt", str(model.ckpt), "--num", str(table.num), "--format", table.format]
    return [*words, *sampler.of(model).options(), "--out", str(model.samples / sampler.name)]


def stored_settings(samples: Path) -> tuple[dict[str, Any], bool] | None:
    """What a folder of samples says of its settings, and whether it is complete; None where nothing is begun.

    Raises InputError for a damaged file.
    """
    for name in (MANIFEST, SETTINGS):
        try:
            if (samples / name).is_file():
                return dict(read_json(samples / name)), name == MANIFEST
        except (OSError, ValueError, TypeError):
            raise InputError(f"{str(samples / name)!r} is damaged; remove {str(samples)!r}") from None
    return None


def check_samples(table: Table, model: Model, sampler: Sampler, wanted: list[Model]) -> None:
    """Raise InputError where samples are there that were begun with settings other than the table's, or another guide.

    wanted: all models of the table, of which some may be guides that are yet to be trained.
    """
    samples = model.samples / sampler.name
    if (stored := stored_settings(samples)) is None:
        return
    args = parser_of("generate", "generate").parse_args(generate_words(table, model, sampler))
    args.sampling = sampling_asked(args)
    known = generate.stated(args)
    if known["labels_rule"] == "file":
        known["labels"] = sample_labels(args.labels, args.num, args.num, args.seed, Classes(sys.maxsize))
    for key in ("steps", "epsilon"):  # the model decides them
        if known[key] is None:
            del known[key]
    if model.recipe is not None:
        known["step"] = model.recipe.train.max_steps
    guide = sampler.of(model).guide
    with suppress(InputError):  # one that is not there is told by `missing`
        found = find_guide(guide, wanted)
        if found is not None or guide is None or stored[0].get("guide") is None:
            known["guide"] = found or guide
    if changed := differences({key: stored[0].get(key) for key in known}, as_stored(known), PLACES):
        raise InputError(
            f"{str(samples)!r} has samples with other settings than the table's, {changed[0]}; give sampler "
            f"{sampler.name!r} another name, or remove {str(samples)!r}"
        )


def is_sampled(model: Model, sampler: Sampler) -> bool:
    """Whether the samples, which have passed `check_samples`, are complete and of the checkpoint that is there now."""
    stored = stored_settings(model.samples / sampler.name)
    if stored is None or not stored[1]:
        return False
    manifest = stored[0]
    if sampler.vae is not None and (manifest.get("codec") or {}).get("vae") != sampler.vae:
        return False
    try:
        guide = sampler.of(model).guide
        guided = guide and checkpoint.load_trained(guide).files
        if (manifest.get("guide") or {}).get("checkpoint_sha256") != guided:
            return False
        return manifest.get("checkpoint_sha256") == checkpoint.load_trained(model.ckpt).files
    except InputError:  # which sampling tells
        return False


if __name__ == "__main__":
    main()
