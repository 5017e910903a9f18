"""Checkpoints: a folder that describes itself, is written atomically, and is proved whole before it is used.

    step-0001000/
        ema/, model/          config.json + safetensors, each loadable with from_pretrained; other averages beside them.
                              Of LoRA the adapters, as diffusers stores them, and anew.safetensors, what is drawn anew
        model/projectors.safetensors   where REPA's loss was used
        optimizer.safetensors "<parameter name>.<state name>"; of a sharded run optimizer/, a file per process
        trainer.json          skipped steps, gradient scaler
        manifest.json         step, images seen, processes, threads, recipe, data, codec, versions, SHA-256 of files

A sharded run needs a file system that all its machines share.

A folder without a valid manifest is not a checkpoint. A model alone, as `save_pretrained` or the converter writes it,
can be sampled too, and so can the transformer of a pipeline; the converter's conversion.json holds the SHA-256 of its
files.
"""

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sit_atconv.models import lora
from sit_atconv.models.fitting import differences, is_named, take_weights
from sit_atconv.models.sit import SiTTransformer2DModel
from sit_atconv.runtime import files, sharding
from sit_atconv.runtime.adapters import ADAPTERS, ANEW, check_whole
from sit_atconv.runtime.console import say
from sit_atconv.runtime.errors import InputError, check_choice, option, reason, said, told
from sit_atconv.runtime.files import DiskFull, Lease, check_checkpoint, check_space, lease, sha256
from sit_atconv.runtime.processes import is_main, raise_together
from sit_atconv.runtime.reading import COUNT, FILE, INSIDE, POSITIVE, SHA256, Malformed, read_json, read_tensors
from sit_atconv.runtime.weights import STEM, digest_of, load_pretrained, main_file, own_variant, variants, weight_files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONVERSION = "conversion.json"
PIPELINE_INDEX = "model_index.json"
DAMAGED = "damaged"  # the suffix of checkpoints that are set aside
UNFINISHED = re.compile(r"\.step-\d+\.unfinished")
ASIDE = re.compile(rf"step-(\d+)\.{DAMAGED}(-\d+)?")

# What the files hold that are read back, see `reading.parse_json`. That of a manifest is of its format version.
CODEC_FORM = (
    {"codec": "identity"},
    {"codec": "vae", "vae": str, "sha256": str, "scale": float, "shift": float},
)
OPEN_CODEC = {"codec": "open", "channels": POSITIVE}  # of a model that does not say
RECIPE_FORM = {
    "run?": {"seed?": range(2**64)},
    "train?": {
        "precision?": str, "batch_size?": POSITIVE, "lr?": float, "init?": (str, None), "init_anew?": [str],
    },
    "model?": {"name?": (str, None)},
    "data?": {"kind?": str},
    "ema?": dict,
    "repa?": {"encoder": (str, None), "depth": POSITIVE, "weight": float},
    "distill?": {"teacher": (str, None), "select": object, "control": bool},
    "lora?": {"rank": (POSITIVE, None), "alpha": (float, None)},
    "meanflow?": {"share": (float, None), "tangent": (str, None), "teacher": (str, None)},
}  # fmt: skip
# Where the first weights came from, see training.origin.
INIT_FORM = {
    "sha256": str, "anew": [str],
    "from": {
        "source": str, "which": (str, None), "step": (COUNT, None), "codec": (*CODEC_FORM, OPEN_CODEC), "model": dict,
    },
}  # fmt: skip
MANIFEST_FORM = {
    "step": COUNT,
    "files": {INSIDE: SHA256},
    "recipe?": (RECIPE_FORM, None),
    "codec?": CODEC_FORM,
    "data?": {"num_images": POSITIVE, "classes": [str]},
    "images_seen?": COUNT,
    "init?": (INIT_FORM, None),
    "seconds?": (float, None),
}
ID2LABEL_FORM = {"id2label?": ({re.compile("[0-9]{1,18}"): str}, None)}
CONVERSION_FORM = {"files": {FILE: SHA256}, "weights?": (str, None), "form?": object, "dtype?": object}


class Damaged(InputError):
    """A folder that claims to be a checkpoint and is not whole."""


def write_pretrained(model: SiTTransformer2DModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a SiT, whose own tensors may be sharded, as `from_pretrained` reads it."""
    with torch.device("meta"):
        whole = SiTTransformer2DModel.from_config(model.config)
    whole.load_state_dict(tensors, strict=True, assign=True)
    whole.save_pretrained(folder)


def write_adapted(
    options: dict[str, Any],
    rank: int,
    alpha: float,
    module: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Write what LoRA trains of a SiT of these options, by peft's names: adapters, and what was drawn anew."""
    with torch.device("meta"):
        SiTTransformer2DModel.from_config(options).save_config(folder)
    adapters = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    lora.write_lora(folder, adapters, rank, alpha)
    if anew := {name: tensor for name, tensor in tensors.items() if name not in adapters}:
        save_file(anew, folder / ANEW)


def load_adapted_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What `write_adapted` has written there, by peft's names."""
    adapters = load_file(folder / ADAPTERS)
    named = {name.removeprefix(lora.PREFIX).replace(".weight", ".default.weight"): adapters[name] for name in adapters}
    return named | load_anew(folder)


@dataclass(frozen=True)
class Part:
    """A module of a checkpoint: its folder there, and how it is written into it, given with its full tensors."""

    folder: str
    module: torch.nn.Module
    write: Callable[[torch.nn.Module, dict[str, torch.Tensor], Path], None]


def save(
    run: Path,
    step: int,
    parts: Sequence[Part],
    trained: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    """Write `run`/step-XXXXXXX, whole or not at all. Collective: every process calls it, and the main one writes, but
    for the optimiser's shards.

    trained: whose parameters the optimiser has. trainer: what the loop needs to go on. facts: what the manifest says of
    the run (recipe, data, codec, ...).
    Raises in every process, with nothing left behind: InputError when a weight is not finite or a file cannot be
    written, DiskFull when the disk lacks room.
    """
    check_finite(step, [part.module for part in parts])
    final = folder_of(run, step)
    temporary = files.being_written(final)
    stored = [part.module.state_dict() for part in parts] + [sharding.optimizer_tensors(trained, optimizer)]
    needed = sum(tensor.numel() * tensor.element_size() for tensors in stored for tensor in tensors.values())

    @contextmanager
    def writing() -> Iterator[bool]:
        """Whether this is the process that writes; what goes wrong in one process is raised in all."""
        error = None
        try:
            yield is_main()
        except (InputError, OSError, SafetensorError) as fault:
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            error = fault if isinstance(fault, InputError) else _unwritten(fault, run, step, needed)
        raise_together(error)

    with writing() as main:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            check_space(run, needed)
            temporary.mkdir(parents=True)
    for part in parts:
        tensors = sharding.full_tensors(part.module)
        with writing() as main:
            if main:
                part.write(part.module, tensors, temporary / part.folder)
    with writing():
        sharding.save_optimizer(temporary, trained, optimizer)
    with writing() as main:
        if main:
            (temporary / "trainer.json").write_text(json.dumps(trainer, indent=1, allow_nan=False))
            paths = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                **facts,
                "versions": files.library_versions(),
                "files": {path.relative_to(temporary).as_posix(): sha256(path) for path in paths},
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            files.settle(temporary)
            if final.exists():  # left invalid by a fault: a valid one would have been resumed from
                files.set_aside(final, DAMAGED)
            temporary.rename(final)
            files.sync(run)
    return final


def check_finite(step: int, modules: Iterable[torch.nn.Module]) -> None:
    """Raise InputError in every process where one holds a tensor of the modules that is not finite. Collective."""
    here = ((name, sharding.local(each)) for module in modules for name, each in module.state_dict().items())
    wrong = next((name for name, tensor in here if not tensor.isfinite().all()), None)
    text = f"step {step}: {wrong} is not finite, no checkpoint written; begin a new run with a lower train.lr"
    raise_together(InputError(text) if wrong else None)


def _unwritten(error: OSError | SafetensorError, run: Path, step: int, needed: int) -> InputError:
    """What to say when a file of a checkpoint cannot be written; needed: bytes of its tensors."""
    if not files.disk_full(error):
        return InputError(f"step {step}: no checkpoint could be written in {str(run)!r}: {error}")
    free = files.free_space(run)
    return DiskFull(
        f"step {step}: no room for a checkpoint in {str(run)!r}: it needs {needed / 1e6:,.1f} MB and "
        f"{free / 1e6:,.1f} MB are free ({error}); make room or lower checkpoint.keep_last, and give the same command "
        "to go on from the checkpoint before"
    )


def load_optimizer(
    folder: Path,
    trained: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    untrained: Collection[torch.nn.Parameter] = (),
) -> None:
    """Give the optimiser of `trained`, sharded or not, its state in the checkpoint `folder`. Collective.

    untrained: parameters of which there may be no state, since no step has changed them yet.
    Nothing happens if no step had been taken. Raises InputError for a damaged state, or that of other parameters.
    """
    try:
        sharding.load_optimizer(folder, trained, optimizer, untrained)
    except InputError:
        raise
    except Exception as error:  # metadata of any kind: torch refuses them in every way there is
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):  # of a process that is lost
            raise
        raise InputError(
            f"checkpoint {str(folder)!r}: its optimiser's state cannot be read: {said(error)}; remove the folder, and "
            "the same command goes on from the checkpoint before"
        ) from None


def clear_unfinished(folder: Path) -> None:
    """Remove what an interrupted save or removal left in a run's folder. Call it on the main process alone."""
    for path in folder.glob(".step-*.unfinished"):
        if UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def prune(run: Path, newest: int, keep_last: int, keep_every: int | None = None) -> None:
    """Keep the last `keep_last` checkpoints up to step `newest`, which is whole, and the multiples of `keep_every`.

    Where a multiple is not there, as its step was skipped or the disk full, the first one before the next multiple is.
    Older ones go, but for one that a reader has a lease of, which goes later. Folders of later steps, which a run that
    is at `newest` found damaged, become step-XXXXXXX.damaged, and go once a checkpoint of their step or a later one is
    whole. What holds a file that no manifest lists stays under another name. What an interrupted save left goes.
    Call it on the main process alone, after `save`, or before a run goes on.
    """
    clear_unfinished(run)
    folders = step_folders(run)
    known = [folder for folder in folders if step_of(folder) <= newest]
    kept = set(known[-keep_last:])
    if keep_every:
        firsts = {step_of(folder) // keep_every: folder for folder in reversed(known)}
        kept |= {folder for number, folder in firsts.items() if number}
    for folder in folders:
        if step_of(folder) > newest:
            say(f"warning: {str(folder)!r} is damaged, and set aside as {str(files.set_aside(folder, DAMAGED))!r}")
        elif folder not in kept and not _remove(folder):
            say(f"warning: {str(folder)!r} holds more than a checkpoint, and is now {str(files.set_aside(folder))!r}")
    for aside in run.glob(f"step-*.{DAMAGED}*"):
        found = ASIDE.fullmatch(aside.name)
        if found and int(found[1]) <= newest:
            _remove(aside)


def _remove(folder: Path) -> bool:
    """Remove a checkpoint, at one blow, unless a reader has a lease of it; False for a folder that holds anything else,
    which stays."""
    try:
        listed = {MANIFEST, *read_json(folder / MANIFEST)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not listed.issuperset(path.relative_to(folder).as_posix() for path in paths):
        return False
    if unread := lease(folder / MANIFEST, exclusive=True):
        doomed = files.being_written(folder.with_name(folder.name.partition(".")[0]))
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)  # killed in the middle, it is no damaged checkpoint but a leftover
        shutil.rmtree(doomed, ignore_errors=True)
        del unread
    return True


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / files.step_name(step)


def newest_leased(run: Path) -> tuple[Path, Lease | None] | None:
    """The newest checkpoint of a run, None where there is none, and its lease: as long as that is there, a training run
    that goes on does not remove the folder."""
    while folders := step_folders(run):
        held = lease(folders[-1] / MANIFEST)
        if held is not None or folders[-1].exists():
            return folders[-1], held
    return None


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return files.step_in(folder.name)


def step_folders(run: Path) -> list[Path]:
    """The folders that claim to be checkpoints of a run, oldest first."""
    return files.by_step(path for path in run.glob("step-*") if path.is_dir())


def read_manifest(folder: Path, under: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing the SHA-256 of its files (those under `under`) with it.

    Raises Damaged naming the first thing that is missing or changed, InputError for another format.
    """
    try:
        version = read_json(folder / MANIFEST, {"format_version": object})["format_version"]
        manifest = read_json(folder / MANIFEST, MANIFEST_FORM if version == FORMAT_VERSION else dict)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{str(folder)!r} is not a checkpoint: no valid {MANIFEST}") from None
    except Malformed as error:
        raise Damaged(f"{str(folder)!r} is not a checkpoint: no valid {MANIFEST} ({error})") from None
    except OSError as error:
        raise _unreadable(folder, MANIFEST, error) from None
    if version != FORMAT_VERSION:
        raise InputError(f"{str(folder)!r} has checkpoint format {version!r}; this library reads {FORMAT_VERSION}")
    named = MANIFEST
    try:
        for named in filter(lambda name: name.startswith(under), manifest["files"]):
            if not (folder / named).is_file():
                raise _damaged(folder, f"{named} is missing")
            if sha256(folder / named) != manifest["files"][named]:
                raise _damaged(folder, f"{named} was changed or cut")
    except OSError as error:
        raise _unreadable(folder, named, error) from None
    return manifest


def _unreadable(folder: Path, name: str, error: OSError) -> InputError:
    """Of a checkpoint that may be whole, so that nothing takes its place."""
    return InputError(f"checkpoint {str(folder)!r}: {name} cannot be read: {reason(error)}; mend the disk")


def _damaged(folder: Path, what: str) -> Damaged:
    return Damaged(f"checkpoint {str(folder)!r} is damaged: {what}")


def _check_complete(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise Damaged where a manifest is not of this step, or lacks what a run goes on from."""
    if manifest.get("step") != step_of(folder):
        raise _damaged(folder, f"its {MANIFEST} is of step {manifest.get('step')}")
    for name in ("ema/config.json", "model/config.json", "trainer.json"):
        if name not in manifest["files"]:
            raise _damaged(folder, f"its {MANIFEST} lists no {name}")
    if not manifest.get("recipe"):
        raise _damaged(folder, f"its {MANIFEST} has no recipe")


def newest_valid(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole, with its manifest; a damaged one is passed over with a warning.

    Raises InputError for a checkpoint of another format: going on from before it would overwrite it.
    """
    for folder in reversed(step_folders(run)):
        try:
            manifest = read_manifest(folder)
            _check_complete(folder, manifest)
            return folder, manifest
        except Damaged as error:
            say(f"warning: {error}; trying the one before")
    return None


@dataclass
class Trained:
    """A trained model for sampling: the checkpoint, which of its models ("ema" or "model"), and its files' SHA-256.

    Of a model folder outside a checkpoint, `which` is None where nobody says, and the manifest has no step and leaves
    the codec open.
    """

    folder: Path
    which: str | None
    manifest: dict[str, Any]
    model: SiTTransformer2DModel
    files: dict[str, str]
    lease: Lease | None = field(default=None, repr=False, compare=False)  # of the checkpoint, while this is there

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes by id, of what was trained with names, or of a pipeline that has some; else None."""
        names = self.manifest.get("data", {}).get("classes")
        if names:
            return dict(enumerate(names))
        stated = self.manifest.get("id2label")
        return stated and {int(label): name for label, name in stated.items()}

    def stated(self, name: str) -> Any:
        """What the manifest says under a name. Raises Damaged where it says nothing."""
        if not self.manifest.get(name):
            raise _damaged(self.folder, f"its {MANIFEST} has no {name}")
        return self.manifest[name]


@dataclass
class Stored:
    """A model in a checkpoint: the checkpoint's folder, which of its models ("ema" or "model"), its manifest, the
    SHA-256 of the model's files, and a lease of the checkpoint while this is there."""

    folder: Path
    which: str
    manifest: dict[str, Any]
    files: dict[str, str]
    lease: Lease | None = field(repr=False, compare=False)


def stored_model(path: Path) -> Stored:
    """The model that a path means, whatever its class: the ema/ of a run's newest checkpoint or of a checkpoint, or an
    ema/ or model/ folder of one.

    Raises Damaged where there is none, or where it is not as its manifest says, by the SHA-256 of its files.
    """
    has_model = (path / "config.json").is_file()
    which = path.name if has_model else "ema"
    newest = None if has_model else newest_leased(path)
    folder, held = newest or ((own := path.parent if has_model else path), lease(own / MANIFEST))
    manifest = read_manifest(folder, under=f"{which}/")
    files = {name: digest for name, digest in manifest["files"].items() if name.startswith(f"{which}/")}
    present = {path.relative_to(folder).as_posix() for path in (folder / which).rglob("*") if path.is_file()}
    if present != set(files):
        raise _damaged(folder, f"{MANIFEST} does not list {sorted(present ^ set(files))}")
    return Stored(folder, which, manifest, files, held)


def is_in_checkpoint(path: Path) -> bool:
    """Whether a folder of a model is one of a checkpoint's."""
    return path.name in ("ema", "model") and path.parent.name.startswith("step-")


def load_trained(path: str | Path, dtype: torch.dtype | None = torch.float32, variant: str | None = None) -> Trained:
    """The EMA model of a run folder (its newest checkpoint) or a checkpoint, or the one in an ema/ or model/ folder.

    Also a model folder on its own, such as a converted one, or the transformer in a pipeline's folder, whose
    autoencoder is the codec's unless another is named. dtype: of the weights in memory; None: the narrowest that holds
    all of those on disk; of a LoRA fp32, as its sum is. variant: of those on disk, such as "fp16", as diffusers takes
    it: of a pipeline's parts, those that have it.
    Raises InputError when there is none or it is damaged, and for a variant of a LoRA. Nothing in it is executed: JSON
    and safetensors alone.
    """
    try:
        return _load_trained(Path(path).absolute(), dtype, variant)
    except OSError as error:
        what = f"{error.filename or path!r} cannot be read: {reason(error)}"
        raise InputError(f"checkpoint {str(path)!r}: {what}; make it readable") from None


def _load_trained(path: Path, dtype: torch.dtype | None, variant: str | None) -> Trained:
    check_checkpoint(path)
    if (path / PIPELINE_INDEX).is_file():
        # A variant that other parts of the pipeline have may be one that the transformer has not.
        elsewhere = any(variant in variants(part) for part in path.iterdir() if part.is_dir())
        own = own_variant(path / "transformer", variant) if elsewhere else variant
        trained = _load_trained(path / "transformer", dtype, own)
        with told(f"pipeline {str(path)!r} cannot be read", Malformed):
            trained.manifest["id2label"] = read_json(path / PIPELINE_INDEX, ID2LABEL_FORM).get("id2label")
        if (path / "vae").is_dir():
            trained.manifest["codec"]["vae"] = str(path / "vae")
        return trained
    has_model = (path / "config.json").is_file()
    if has_model and not is_in_checkpoint(path):
        return _load_model_folder(path, dtype, variant)
    stored = stored_model(path)
    if f"{stored.which}/{ADAPTERS}" in stored.files:
        if variant is not None:
            raise InputError(
                f"{option('variant', variant)}: checkpoint {str(path)!r} is a LoRA, whose weights are added up in "
                "fp32 and are no variant; leave it out"
            )
        return _load_adapted(stored, dtype)
    model = _load_model(stored.folder / stored.which, dtype, variant)
    return Trained(stored.folder, stored.which, stored.manifest, model, stored.files, stored.lease)


def _load_adapted(stored: Stored, dtype: torch.dtype | None, base: Trained | None = None) -> Trained:
    """The model of a LoRA in a checkpoint, its adapters added to the weights.

    base: what the adapters are put on; None is what they were trained on, which is to be there and as it was.
    """
    folder = stored.folder / stored.which
    model, digest = _adapted(folder, stored.manifest, lora.read_lora(folder), load_anew(folder), base)
    files = {**stored.files, "base": digest}
    model = torch.nn.Module.to(model, dtype or torch.float32)
    return Trained(stored.folder, stored.which, stored.manifest, model, files, stored.lease)


def _adapted(
    folder: Path,
    manifest: dict[str, Any],
    adapters: lora.Lora,
    anew: dict[str, torch.Tensor],
    base: Trained | None = None,
) -> tuple[SiTTransformer2DModel, str]:
    """The model that a LoRA's ema/ or model/ tells of, in fp32: the base's weights, what was drawn anew, and the
    adapters added; and the SHA-256 of the base. base: as `_load_adapted` takes it."""
    init, run = manifest.get("init"), str(folder.parent)
    if not init:
        raise _damaged(folder.parent, f"its {MANIFEST} does not say what its LoRA is of")
    given = base
    if given is None:
        remedy = f"put it back there, or draw from both: it as {option('ckpt')}, this run as {option('lora')}"
        with told(f"checkpoint {run!r} is a LoRA, and its base is gone", InputError, remedy=remedy):
            given = load_any(init["from"]["source"])
    digest = digest_of(given.model.float().state_dict())
    if digest != init["sha256"]:
        said = f"{run!r} is a LoRA of other weights than those of {str(given.folder)!r}"
        if base is None:
            raise InputError(f"checkpoint {said}, which have changed; put it on others by {option('lora')}")
        say(f"warning: {said}")
    with told(f"checkpoint {run!r} cannot be read", InputError, RuntimeError, KeyError):
        model = SiTTransformer2DModel.from_config(read_options(folder)).eval()
        own, drawn = model.state_dict(), (manifest.get("recipe") or {}).get("train", {}).get("init_anew", [])
        if wrong := [each for each in differences(given.model, model) if not is_named(each.part, drawn)]:
            told_of = ", ".join(f"{each.part} ({each.said})" if each.part else each.said for each in wrong)
            raise InputError(
                f"it is a LoRA of another architecture than that of {str(given.folder)!r}: {told_of}; give the model "
                "that it was trained on"
            )
        take_weights(given.model.state_dict(), own, drawn)
        model.load_state_dict({**own, **anew})
        lora.fuse(model, adapters)
    return model, digest


def model_of_average(folder: Path, manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SiTTransformer2DModel:
    """The model of a checkpoint's ema/ with other tensors in the place of those that an average there has.

    Raises InputError for tensors that do not fit.
    """
    if (folder / ADAPTERS).is_file():
        adapters, ends = lora.read_lora(folder), [end.replace(".weight", ".default.weight") for end in (lora.A, lora.B)]
        with told("they do not fit its LoRA", KeyError):
            pairs = {layer: tuple(tensors[f"{layer}{end}"] for end in ends) for layer in adapters.pairs}
            anew = {name: tensors[name] for name in load_anew(folder)}
        return _adapted(folder, manifest, dataclasses.replace(adapters, pairs=pairs), anew)[0]
    with torch.device("meta"), told(f"checkpoint {str(folder.parent)!r} cannot be read", InputError):
        model = SiTTransformer2DModel.from_config(read_options(folder))
    with told("they do not fit its model", RuntimeError, in_full=True):
        model.load_state_dict(tensors, strict=True, assign=True)
    return model


def load_anew(folder: Path) -> dict[str, torch.Tensor]:
    """What lies beside adapters: the tensors of the parts that were drawn anew."""
    return load_file(folder / ANEW) if (folder / ANEW).is_file() else {}


def load_with_lora(base: str | Path, adapters: str | Path, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of `base`, as `load_any` takes it, with adapters added to its weights.

    adapters: a run of LoRA, its checkpoint, the ema/ or model/ in it, whose classes and codec then are the model's; or
    a folder or file of adapters in diffusers' form. Raises InputError for either that is not there or damaged, and
    for adapters of another architecture.
    """
    given, path = load_any(base), Path(adapters).absolute()
    if (path / MANIFEST).is_file() or is_in_checkpoint(path) or step_folders(path):
        stored = stored_model(path)
        if f"{stored.which}/{ADAPTERS}" not in stored.files:
            raise InputError(f"LoRA {str(path)!r}: the run trained no LoRA; name it as {option('ckpt')}")
        return _load_adapted(stored, dtype, given)
    file = path / ADAPTERS if path.is_dir() else path
    check_whole(file)
    lora.fuse(given.model, lora.read_lora(file))
    given.files["lora"] = sha256(file)
    return dataclasses.replace(given, model=torch.nn.Module.to(given.model, dtype))


def load_any(path: str | Path) -> Trained:
    """`load_trained`, in fp32, also of what `sit-atconv convert` reads: a public file, or a folder with one.

    Such a file's model has its EMA where there is one, REPA's time folded into it, and none of its projectors.
    Raises InputError as both do.
    """
    path = Path(path).absolute()
    if not (path.exists() and _is_public(path)):
        return load_trained(path)
    from sit_atconv.convert.public import read_public  # diffusers' DiT, and with it a second

    with told(
        "", InputError, remedy="what a file leaves open, `sit-atconv convert` takes: name the folder that it writes"
    ):
        found = read_public(path, keep_projectors=False)
    manifest = {"step": None, "codec": _open_codec(found.model)}
    files = {file.name: sha256(file) for file in found.files}
    return Trained(path, found.record["weights"], manifest, found.model.float(), files)


def _is_public(path: Path) -> bool:
    """Whether what lies there is for `sit-atconv convert` to read: a file, or a folder of another library's."""
    if path.is_file():
        return True
    folder = path / "transformer" if (path / PIPELINE_INDEX).is_file() else path
    if (folder / "config.json").is_file():
        with told(f"checkpoint {str(path)!r} cannot be read", Malformed, OSError):
            return "_class_name" in (config := read_json(folder / "config.json")) and (
                config["_class_name"] != SiTTransformer2DModel.__name__
            )
    return not (folder / MANIFEST).is_file() and not step_folders(folder) and bool(_weights_in(folder))


def _weights_in(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.suffix in (".safetensors", ".pt", ".pth", ".bin")]


def _open_codec(model: SiTTransformer2DModel) -> dict[str, Any]:
    return {"codec": "open", "channels": model.config.in_channels}


def read_conversion(folder: Path) -> dict[str, Any]:
    """conversion.json of a converted folder, after comparing the SHA-256 of the folder's files with it.

    Raises Damaged naming the first thing that is missing or changed, or files that it does not list.
    """
    try:
        record = read_json(folder / CONVERSION, CONVERSION_FORM)
    except Malformed as error:
        raise Damaged(f"{str(folder)!r} holds no valid {CONVERSION} ({error}); convert again") from None
    files = record["files"]
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise Damaged(f"model {str(folder)!r} is damaged: {name} is missing, was changed or cut; convert again")
    if strays := {path.name for path in _model_files(folder)} - {CONVERSION, *files}:
        raise Damaged(f"model {str(folder)!r} is damaged: {CONVERSION} does not list {sorted(strays)}; convert again")
    return record


def write_conversion(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write conversion.json into the folder of a model, with the record and the SHA-256 of all files; what it says."""
    record = {**record, "files": {path.name: sha256(path) for path in sorted(folder.iterdir())}}
    (folder / CONVERSION).write_text(json.dumps(record, indent=1))
    return record


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def _load_model_folder(folder: Path, dtype: torch.dtype | None, variant: str | None) -> Trained:
    if (folder / CONVERSION).is_file():
        record = read_conversion(folder)
        model, which, files = _load_model(folder, dtype, variant), record.get("weights"), record["files"]
    else:
        model, which = _load_model(folder, dtype, variant), None
        loaded = {main_file(folder, variant), *weight_files(folder, variant)}
        mine = [path for path in _model_files(folder) if path in loaded or not path.name.startswith(STEM)]
        files = {path.name: sha256(path) for path in mine}
    return Trained(folder, which, {"step": None, "codec": _open_codec(model)}, model, files)


def read_options(folder: Path) -> dict[str, Any]:
    """config.json of a SiT. Raises InputError for that of another class, or with options that a SiT does not have."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != SiTTransformer2DModel.__name__:
        raise InputError(f"it holds no {SiTTransformer2DModel.__name__}; see `sit-atconv convert`")
    options = list(inspect.signature(SiTTransformer2DModel.__init__).parameters)[1:]
    for name in config:
        # diffusers' own begin with "_", but for the one with which an export names its code. It ignores any other.
        if not name.startswith("_") and name != "auto_map":
            check_choice("option in config.json", name, options)
    return config


def _load_model(folder: Path, dtype: torch.dtype | None, variant: str | None) -> SiTTransformer2DModel:
    with told(f"checkpoint {str(folder)!r} cannot be read", InputError, OSError):
        read_options(folder)
        weights = weight_files(folder, variant)  # which says what is there instead
        if dtype is None:
            tensors = (each for file in weights for each in read_tensors(file, "model")[0].values())
            dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
        return load_pretrained(SiTTransformer2DModel, folder, variant, dtype=dtype).eval()


def load_weights(folder: Path, into: torch.nn.Module) -> None:
    """Load the model in `folder` (ema/ or model/) into one, sharded or not, strictly."""
    tensors = {}
    for file in weight_files(folder):
        tensors.update(load_file(file))
    sharding.load_full(into, tensors)
