"""Checkpoints are whole or not there, describe themselves, and give back every bit."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import slowly
from safetensors.torch import load_file, save_file

from sit_atconv import create_model
from sit_atconv.layers.projectors import Projectors, write_projectors
from sit_atconv.runtime import files, sharding
from sit_atconv.runtime.adapters import ADAPTERS
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.training import checkpoint
from sit_atconv.training.checkpoint import Part, write_pretrained


def small_model(seed=0):
    torch.manual_seed(seed)
    model = create_model(
        None, 4, 3, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, token_mixer="hybrid"
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_optimizer(model):
    """Two groups, so that the optimiser's order is not the model's."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


def trained_once(seed=0):
    model = small_model(seed)
    optimizer = make_optimizer(model)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.ones(2, 1, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def parts_of(models, projectors: Projectors | None = None) -> list[Part]:
    parts = [Part(name, model, write_pretrained) for name, model in models.items()]
    return parts + ([Part("model", projectors, write_projectors)] if projectors else [])


def save(run: Path, number: int, seed: int = 0, projectors: Projectors | None = None, **averages) -> Path:
    model, optimizer = trained_once(seed)
    models = {"model": model, "ema": small_model(5), **averages}
    facts = {"images_seen": number * 8, "recipe": {"a": 1}}
    return checkpoint.save(run, number, parts_of(models, projectors), model, optimizer, {"skipped": 0}, facts)


def test_layout_and_manifest(tmp_path):
    folder = save(tmp_path, 1000)
    assert folder.name == "step-0001000"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "ema/config.json", "ema/diffusion_pytorch_model.safetensors", "manifest.json", "model/config.json",
        "model/diffusion_pytorch_model.safetensors", "optimizer.safetensors", "trainer.json",
    ]  # fmt: skip
    manifest = checkpoint.read_manifest(folder)
    assert (manifest["step"], manifest["images_seen"], manifest["recipe"]) == (1000, 8000, {"a": 1})
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(manifest["files"]) == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_other_averages_and_projectors_lie_beside_the_model(tmp_path):
    torch.manual_seed(2)
    projectors, average = Projectors(8, 6, [5, 3], 1), small_model(6)
    folder = save(tmp_path, 1, projectors=projectors, **{"ema-0.100": average})
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"model", "ema", "ema-0.100"}
    loaded = Projectors.load(folder / "model")
    assert (loaded.encoder_depth, loaded.z_dims) == (1, [5, 3])
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in projectors.state_dict().items())
    for which, expected in (("model", trained_once()[0]), ("ema-0.100", average)):
        other = small_model(9)
        checkpoint.load_weights(folder / which, other)
        assert all(torch.equal(x, other.state_dict()[name]) for name, x in expected.state_dict().items())
    assert "model/projectors.safetensors" in checkpoint.read_manifest(folder)["files"]
    assert checkpoint.load_trained(folder / "model").which == "model"


def test_optimizer_state_comes_back_bit_for_bit(tmp_path):
    model, optimizer = trained_once()
    folder = save(tmp_path, 1)
    other = small_model(9)
    other_optimizer = make_optimizer(other)
    checkpoint.load_weights(folder / "model", other)
    checkpoint.load_optimizer(folder, other, other_optimizer)
    step(model, optimizer)
    step(other, other_optimizer)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_optimizer_that_took_no_step_has_nothing_to_give_back(tmp_path):
    model = small_model()
    folder = checkpoint.save(tmp_path, 1, parts_of({"model": model}), model, make_optimizer(model), {}, {})
    optimizer = make_optimizer(model)
    checkpoint.load_optimizer(folder, model, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("change", ["one is missing", "another name", "another shape"])
def test_optimizer_state_of_another_model_is_refused(tmp_path, change):
    model, optimizer = trained_once()
    file = tmp_path / "optimizer.safetensors"
    sharding.save_optimizer(tmp_path, model, optimizer)
    tensors = load_file(file)
    names = [key for key in tensors if key.startswith("x_embedder.proj.bias.")]
    for name in names:
        tensor = tensors.pop(name)
        if change == "another name":
            tensors[name.replace("x_embedder", "embed")] = tensor
        elif change == "another shape":
            tensors[name] = tensor[:-1].clone() if tensor.ndim else tensor
    save_file(tensors, file)
    with pytest.raises(KeyError, match=r"other parameters.*(x_embedder|embed)\.proj\.bias"):
        sharding.load_optimizer(tmp_path, model, optimizer)


def damage(folder: Path, how: str) -> None:
    weights = folder / "ema" / "diffusion_pytorch_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "one bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "missing file":
        weights.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "torn manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])
    elif how == "manifest of a list":
        (folder / "manifest.json").write_text("[]")


DAMAGES = ["truncated", "one bit", "missing file", "no manifest", "torn manifest", "manifest of a list"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_noticed_passed_over_on_resume_and_refused_for_sampling(tmp_path, capsys, how):
    save(tmp_path, 10)
    damage(save(tmp_path, 20), how)
    folder, manifest = checkpoint.newest_valid(tmp_path)
    assert (folder.name, manifest["step"]) == ("step-0000010", 10)
    assert capsys.readouterr().err.count("warning: ") == 1
    for path in (tmp_path, tmp_path / "step-0000020", tmp_path / "step-0000020" / "ema"):
        with pytest.raises(InputError):
            checkpoint.load_trained(path)
    assert checkpoint.load_trained(tmp_path / "step-0000010").manifest["step"] == 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"step": 12}, "is of step 12"), ({"files": {}}, "lists no ema/config.json"), ({"recipe": None}, "has no recipe")],
)
def test_a_manifest_that_is_not_all_of_this_step_is_passed_over_on_resume(tmp_path, capsys, changes, says):
    save(tmp_path, 10)
    file = save(tmp_path, 20) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert checkpoint.newest_valid(tmp_path)[0].name == "step-0000010"
    assert says in capsys.readouterr().err


def test_another_format_version_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    save(tmp_path, 0)
    for read in (lambda: checkpoint.read_manifest(folder), lambda: checkpoint.newest_valid(tmp_path)):
        with pytest.raises(InputError, match="format 99"):
            read()


def test_pickled_weights_are_never_taken(tmp_path):
    folder = save(tmp_path, 1)
    model = folder / "ema"
    torch.save(small_model().state_dict(), model / "diffusion_pytorch_model.bin")
    (model / "diffusion_pytorch_model.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: digest for name, digest in manifest["files"].items() if not name.startswith("ema/")}
    for listed in (files, {**files, "ema/diffusion_pytorch_model.bin": sha256(model / "diffusion_pytorch_model.bin")}):
        listed["ema/config.json"] = manifest["files"]["ema/config.json"]
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": listed}))
        with pytest.raises(InputError):
            checkpoint.load_trained(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    with pytest.raises(InputError, match="does not list"):
        checkpoint.load_trained(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Every file in the order in which it is written, and the renaming at the end.
WRITES = [
    "model/config.json", "model/diffusion_pytorch_model.safetensors", "ema/config.json",
    "ema/diffusion_pytorch_model.safetensors", "model/projectors.safetensors", "optimizer.safetensors",
    "trainer.json", "manifest.json", "rename",
]  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fail_at(patch, target: str, error: OSError) -> None:
    """Let writing the file `target` of a checkpoint cut it and raise `error`, in its library's own way."""

    def patched(place, function: str, raised: Exception, position: int = 0):
        """position: of the path among the arguments."""
        whole = getattr(place, function)

        def replaced(*args, **kwargs):
            if not str(args[position]).endswith(target):
                return whole(*args, **kwargs)
            Path(args[position]).write_bytes(b"cut")
            raise raised

        patch.setattr(place, function, replaced)

    if target == "rename":
        patch.setattr(Path, "rename", lambda _path, _target: (_ for _ in ()).throw(error))
    elif target.endswith(".safetensors"):
        text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        patched(safetensors.torch, "serialize_file", safetensors.SafetensorError(text), position=1)
    elif target.endswith("config.json"):
        patched(checkpoint.SiTTransformer2DModel, "to_json_file", error, position=1)
    else:
        patched(Path, "write_text", error)


FEW = ["model/config.json", "optimizer.safetensors", "manifest.json", "rename"]


@pytest.mark.parametrize("target", [*FEW, *slowly(each for each in WRITES if each not in FEW)])
def test_a_disk_that_fills_up_at_any_file_leaves_the_old_checkpoints(tmp_path, monkeypatch, target):
    save(tmp_path, 10)
    projectors = Projectors(8, 6, [5], 1)
    for number in FULL:
        with monkeypatch.context() as patch:
            fail_at(patch, target, OSError(number, errno.errorcode[number]))
            with pytest.raises(checkpoint.DiskFull, match=r"step 20: .* it needs 0\.\d MB and [\d,.]+ MB are free"):
                save(tmp_path, 20, projectors=projectors)
        assert names(tmp_path) == ["step-0000010"]
        assert checkpoint.newest_valid(tmp_path)[1]["step"] == 10
    with monkeypatch.context() as patch:
        fail_at(patch, target, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(InputError, match="step 20: no checkpoint could be written") as raised:
            save(tmp_path, 20, projectors=projectors)
    assert not isinstance(raised.value, checkpoint.DiskFull)
    assert names(tmp_path) == ["step-0000010"]
    save(tmp_path, 20, projectors=projectors)
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 20


@pytest.mark.parametrize(
    ("name", "code"), [("manifest.json", errno.EIO), ("ema/config.json", errno.EIO), ("ema/config.json", errno.ENOENT)]
)
def test_what_the_disk_does_not_give_counts_as_damaged_by_nobody(tmp_path, monkeypatch, name, code):
    for step in (10, 20):
        save(tmp_path, step)
    lost = str(tmp_path / "step-0000020" / name)

    def failing(function):
        def call(path, *arguments, **options):
            if str(path) == lost:
                raise OSError(code, os.strerror(code))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(checkpoint, "read_json", failing(checkpoint.read_json))
    monkeypatch.setattr(checkpoint, "sha256", failing(checkpoint.sha256))
    with pytest.raises(InputError, match=rf"step-0000020': {name} cannot be read: {os.strerror(code)}; mend the disk"):
        checkpoint.newest_valid(tmp_path)


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 10, projectors=Projectors(8, 6, [5], 1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}


def bytes_needed() -> int:
    model, optimizer = trained_once()
    state = sharding.optimizer_tensors(model, optimizer).values()
    return sum(x.nbytes for x in [*model.state_dict().values(), *small_model(5).state_dict().values(), *state])


def test_a_disk_known_to_be_too_small_is_not_written_to(tmp_path, monkeypatch):
    usage, needed = namedtuple("usage", ["total", "used", "free"]), bytes_needed()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _path: usage(10**9, 0, needed - 1))
    monkeypatch.setattr(Path, "mkdir", lambda *_args, **_kwargs: pytest.fail("written to"))
    with pytest.raises(checkpoint.DiskFull, match=rf"needs {needed / 1e6:.1f} MB and {needed / 1e6:.1f} MB are free"):
        save(tmp_path / "run", 20)
    assert not names(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _path: usage(10**9, 0, needed))
    save(tmp_path / "run", 20)


def test_a_real_disk_that_is_full(tmp_path, monkeypatch):
    """A small tmpfs, with room for less and less of the second checkpoint, until even its first file has none."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 4096 * 64
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        save(disk, 10)
        monkeypatch.setattr(checkpoint, "check_space", lambda _path, _needed: None)  # as under a quota
        free = files.free_space(disk)
        assert 3 * bytes_needed() // 2 < size
        faults = []
        for room in range(0, bytes_needed(), 8192):
            (disk / "filler").write_bytes(b"x" * (free - room))
            with pytest.raises(checkpoint.DiskFull, match="No space left on device") as raised:
                save(disk, 20)
            faults.append("safetensors" in str(raised.value) or "os error" in str(raised.value))
            assert names(disk) == ["filler", "step-0000010"]
            (disk / "filler").unlink()
        assert {True, False} == set(faults)  # both libraries' errors were met
        assert checkpoint.newest_valid(disk)[1]["step"] == 10
        save(disk, 20)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_the_size_of_a_file(tmp_path):
    save(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(checkpoint.DiskFull, match="File too large"):
            save(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-0000010"]


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    damage(save(tmp_path, 20), "truncated")
    save(tmp_path, 20)
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 20


def test_prune_keeps_the_newest_and_clears_unfinished_ones(tmp_path):
    for number in (5, 10, 15):
        save(tmp_path, number)
    shutil.copytree(tmp_path / "step-0000005", tmp_path / ".step-0000020.unfinished")
    shutil.copytree(tmp_path / "step-0000005", tmp_path / "step-0000005.tmp")  # a copy of the user's
    checkpoint.prune(tmp_path, newest=15, keep_last=2)
    left = ["step-0000005.tmp", "step-0000010", "step-0000015"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_prune_never_removes_what_is_kept_for_good(tmp_path):
    for number in (5, 10, 15, 20, 25, 30):
        (folder := checkpoint.folder_of(tmp_path, number)).mkdir()
        (folder / "manifest.json").write_text('{"files": {}}')
    checkpoint.prune(tmp_path, newest=25, keep_last=2, keep_every=10)
    damaged = "step-0000030.damaged"  # later than the newest
    assert names(tmp_path) == ["step-0000010", "step-0000020", "step-0000025", damaged]
    checkpoint.prune(tmp_path, newest=25, keep_last=1)
    assert names(tmp_path) == ["step-0000025", damaged]


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_pruning_leaves_leftovers_and_no_damaged_checkpoint(tmp_path, monkeypatch, moment):
    for number in (5, 10, 15):
        save(tmp_path, number)
    calls, rename, remove = [], Path.rename, shutil.rmtree

    def counted(function):
        def called(path, *args, **kwargs):
            if "step-" in str(path) and path.exists():
                calls.append(path)
                if len(calls) > moment:
                    if function is remove:  # half of the folder is gone
                        next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
                    raise KeyboardInterrupt
            return function(path, *args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(rename))
        patch.setattr(checkpoint.shutil, "rmtree", counted(remove))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, newest=15, keep_last=1)
    for folder in checkpoint.step_folders(tmp_path):
        checkpoint.read_manifest(folder)
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 15
    checkpoint.prune(tmp_path, newest=15, keep_last=1)
    assert names(tmp_path) == ["step-0000015"]


def test_steps_of_more_than_seven_digits_are_in_order(tmp_path):
    for number in (9_999_998, 9_999_999, 10_000_000, 10_000_001):
        save(tmp_path, number)
    for name in ("step-", "step-x", "step-\u00b2", "step-\u0663", "step-1.5", "step-+1"):  # of no checkpoint
        (tmp_path / name).mkdir()
    assert [checkpoint.step_of(folder) for folder in checkpoint.step_folders(tmp_path)] == [
        9_999_998, 9_999_999, 10_000_000, 10_000_001,
    ]  # fmt: skip
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 10_000_001
    assert checkpoint.newest_leased(tmp_path)[0].name == "step-10000001"
    assert checkpoint.load_trained(tmp_path).manifest["step"] == 10_000_001
    checkpoint.prune(tmp_path, newest=10_000_001, keep_last=2)
    assert [folder.name for folder in checkpoint.step_folders(tmp_path)] == ["step-10000000", "step-10000001"]


def test_prune_never_prefers_a_damaged_later_folder(tmp_path):
    for number in (5, 6, 9):
        save(tmp_path, number)
    damage(tmp_path / "step-0000009", "truncated")
    checkpoint.prune(tmp_path, newest=6, keep_last=1)
    assert names(tmp_path) == ["step-0000006", "step-0000009.damaged"]


def test_a_damaged_checkpoint_stays_until_a_whole_one_of_its_step_has_followed(tmp_path):
    for number in (5, 9):
        save(tmp_path, number)
    (tmp_path / "step-0000009" / "optimizer.safetensors").unlink()
    weights = (tmp_path / "step-0000009/ema/diffusion_pytorch_model.safetensors").read_bytes()
    aside = tmp_path / "step-0000009.damaged"
    checkpoint.prune(tmp_path, newest=5, keep_last=1)
    assert (aside / "ema/diffusion_pytorch_model.safetensors").read_bytes() == weights
    save(tmp_path, 7)
    checkpoint.prune(tmp_path, newest=7, keep_last=1)
    assert names(tmp_path) == ["step-0000007", "step-0000009.damaged"]
    (tmp_path / "step-0000009").mkdir()  # and another one, whose manifest is gone: nothing says what it is
    checkpoint.prune(tmp_path, newest=7, keep_last=1)
    assert names(tmp_path) == ["step-0000007", "step-0000009.damaged", "step-0000009.damaged-2"]
    save(tmp_path, 9)
    checkpoint.prune(tmp_path, newest=9, keep_last=1)
    assert names(tmp_path) == ["step-0000009", "step-0000009.damaged-2"]


def test_what_a_user_put_into_a_checkpoint_does_not_go_with_it(tmp_path):
    for number in (5, 10, 15):
        save(tmp_path, number)
    (tmp_path / "step-0000005/ema/thesis.txt").write_text("mine")
    (tmp_path / "step-0000002").mkdir()
    (tmp_path / "step-0000002/notes.txt").write_text("mine")
    (tmp_path / ".step-notes.unfinished").mkdir()
    checkpoint.prune(tmp_path, newest=15, keep_last=1)
    asides = ["step-0000002.aside", "step-0000005.aside"]
    assert names(tmp_path) == [".step-notes.unfinished", *sorted(["step-0000015", *asides])]
    assert (tmp_path / "step-0000005.aside/ema/thesis.txt").read_text() == "mine"


def test_a_checkpoint_that_is_read_is_removed_only_after_that(tmp_path):
    for number in (5, 10):
        save(tmp_path, number)
    other = checkpoint.load_trained(tmp_path / "step-0000005/ema")  # by name
    trained = checkpoint.load_trained(tmp_path)
    for number in (15, 20):
        save(tmp_path, number)
        checkpoint.prune(tmp_path, newest=number, keep_last=1)
    assert names(tmp_path) == ["step-0000005", "step-0000010", "step-0000020"]
    assert (trained.folder / "ema/config.json").is_file()
    del trained, other
    checkpoint.prune(tmp_path, newest=20, keep_last=1)
    assert names(tmp_path) == ["step-0000020"]


def test_a_reader_goes_on_to_the_next_where_the_newest_went_between(tmp_path, monkeypatch):
    save(tmp_path, 5)
    lease = checkpoint.lease

    def meanwhile(file, exclusive=False):
        if not exclusive and "step-0000005" in str(file) and file.exists():
            save(tmp_path, 10)
            checkpoint.prune(tmp_path, newest=10, keep_last=1)
        return lease(file, exclusive)

    monkeypatch.setattr(checkpoint, "lease", meanwhile)
    assert checkpoint.load_trained(tmp_path).folder.name == "step-0000010"


def test_a_non_finite_weight_is_never_written(tmp_path):
    model, optimizer = trained_once()
    ema = small_model()
    with torch.no_grad():
        ema.final_layer.linear.weight[0, 0] = float("nan")
    broken = Projectors(8, 6, [5], 1)
    torch.nn.init.constant_(broken.projectors[0][4].bias, float("inf"))
    for models, projectors, name in (
        ({"model": model, "ema": ema}, None, "final_layer.linear.weight"),
        ({"model": model}, broken, "projectors.0.4.bias"),
    ):
        with pytest.raises(InputError, match=f"step 1: {re.escape(name)} is not finite"):
            checkpoint.save(tmp_path, 1, parts_of(models, projectors), model, optimizer, {}, {})
    assert not names(tmp_path)


def test_load_trained_takes_the_ema_unless_the_model_folder_is_named(tmp_path):
    folder = save(tmp_path, 10)
    ema, raw = small_model(5).state_dict(), trained_once()[0].state_dict()
    for path, expected, which in (
        (tmp_path, ema, "ema"), (folder, ema, "ema"), (folder / "ema", ema, "ema"), (folder / "model", raw, "model"),
    ):  # fmt: skip
        trained = checkpoint.load_trained(path)
        assert trained.which == which
        assert not trained.model.training
        assert all(torch.equal(value, expected[name]) for name, value in trained.model.state_dict().items())
        assert set(trained.files) == {f"{which}/config.json", f"{which}/diffusion_pytorch_model.safetensors"}
    with pytest.raises(InputError, match=r"no diffusion_pytorch_model\.fp16\.safetensors, and there are no variants"):
        checkpoint.load_trained(tmp_path, variant="fp16")
    adapters, manifest = folder / "ema" / ADAPTERS, folder / "manifest.json"
    (folder / "ema/diffusion_pytorch_model.safetensors").rename(adapters)
    manifest.write_text(manifest.read_text().replace("ema/diffusion_pytorch_model.safetensors", f"ema/{ADAPTERS}"))
    with pytest.raises(InputError, match=r"^variant='fp16': checkpoint '.*' is a LoRA, .* no variant; leave it out"):
        checkpoint.load_trained(tmp_path, variant="fp16")


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.load_trained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.load_trained(tmp_path)


def test_load_trained_takes_a_model_folder_on_its_own(tmp_path):
    model = small_model(3)
    model.save_pretrained(tmp_path / "sit")
    trained = checkpoint.load_trained(tmp_path / "sit")
    assert (trained.which, trained.manifest["step"]) == (None, None)
    assert trained.manifest["codec"] == {"codec": "open", "channels": 1}
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    assert trained.files == {name: sha256(tmp_path / "sit" / name) for name in files}
    for name, tensor in model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], tensor), name
    (tmp_path / "sit").rename(tmp_path / "ema")
    assert checkpoint.load_trained(tmp_path / "ema").which is None
    (tmp_path / "step-0000001").mkdir()  # in a checkpoint it is a part, and the manifest must be there
    (tmp_path / "ema").rename(tmp_path / "step-0000001" / "ema")
    with pytest.raises(InputError, match="no valid manifest"):
        checkpoint.load_trained(tmp_path / "step-0000001" / "ema")


@pytest.mark.parametrize("config", ['{"_class_name": "AutoencoderKL"}', "[]", "{"])
def test_a_folder_of_another_model_is_refused(tmp_path, config):
    small_model().save_pretrained(tmp_path / "sit")
    (tmp_path / "sit" / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"holds no SiTTransformer2DModel|cannot be read"):
        checkpoint.load_trained(tmp_path / "sit")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_model_whose_tensors_are_not_all_there_is_refused(tmp_path, change):
    small_model().save_pretrained(tmp_path / "mine")
    path = tmp_path / "mine" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["final_layer.linear.weight"]
    else:
        tensors["final_layer.extra"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{change}_keys.*final_layer"):
        checkpoint.load_trained(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 12}, "expected shape torch.Size([72]), but got torch.Size([48])"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"depth": 1}, "unexpected_keys"),
        ({"class_dropout_prob": "a"}, "class_dropout_prob='a': choose a share in [0, 1)"),
        ({"path": "edm"}, "path='edm'"),
        ({"hiden_size": 8}, "option in config.json='hiden_size': did you mean 'hidden_size'"),
    ],
)
def test_a_config_that_the_model_refuses_is_one_line(fails, tmp_path, change, says):
    import sample

    small_model().save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**config, **change}))
    assert says in fails(sample.main, "--ckpt", tmp_path / "mine", "--out", tmp_path / "grid.png")


def test_load_trained_takes_the_transformer_of_a_pipeline(tmp_path, vae_folder):
    model = small_model(3)
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    trained = checkpoint.load_trained(tmp_path)
    assert trained.folder == tmp_path / "transformer"
    assert torch.equal(trained.model.x_embedder.proj.weight, model.x_embedder.proj.weight)
    assert trained.manifest["codec"] == {"codec": "open", "channels": 1}
    (tmp_path / "vae").symlink_to(vae_folder)
    assert checkpoint.load_trained(tmp_path).manifest["codec"]["vae"] == str(tmp_path / "vae")
