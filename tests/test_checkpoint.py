"""Checkpoints are whole or not there, describe themselves, and give back every bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sit_atconv import checkpoint, create_model
from sit_atconv.config import Train
from sit_atconv.errors import InputError
from sit_atconv.files import sha256
from sit_atconv.training import make_optimizer


def small_model(seed=0):
    torch.manual_seed(seed)
    model = create_model(
        None, 4, 3, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, token_mixer="hybrid"
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trained_once(seed=0):
    model = small_model(seed)
    optimizer = make_optimizer(model, Train(lr=1e-2, weight_decay=0.1))
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.ones(2, 1, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run: Path, number: int, seed: int = 0) -> Path:
    model, optimizer = trained_once(seed)
    facts = {"images_seen": number * 8, "recipe": {"a": 1}}
    return checkpoint.save(run, number, model, small_model(5), optimizer, {"skipped": 0}, facts)


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


def test_optimizer_state_comes_back_bit_for_bit(tmp_path):
    model, optimizer = trained_once()
    folder = save(tmp_path, 1)
    other = small_model(9)
    other_optimizer = make_optimizer(other, Train(lr=1e-2, weight_decay=0.1))
    checkpoint.load_weights(folder / "model", other)
    tensors = checkpoint.load_tensors(folder / "optimizer.safetensors")
    checkpoint.load_optimizer_tensors(other, other_optimizer, tensors)
    step(model, optimizer)
    step(other, other_optimizer)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizer_state_of_another_model_is_refused():
    model, optimizer = trained_once()
    tensors = checkpoint.optimizer_tensors(model, optimizer)
    tensors.pop("x_embedder.proj.bias.step")
    renamed = {key.replace("x_embedder", "embed"): value for key, value in tensors.items()}
    with pytest.raises(KeyError, match="other parameters"):
        checkpoint.load_optimizer_tensors(model, optimizer, renamed)


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


@pytest.mark.parametrize("function", ["rename", "write_text"])
def test_a_fault_while_saving_leaves_the_old_checkpoint_and_no_half_one(tmp_path, monkeypatch, function):
    save(tmp_path, 10)

    def fault(*_args, **_kwargs):
        raise OSError("disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, function, fault)
        with pytest.raises(OSError, match="disk"):
            save(tmp_path, 20)
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-0000010"]
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 10
    save(tmp_path, 20)
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 20


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path):
    damage(save(tmp_path, 20), "truncated")
    save(tmp_path, 20)
    assert checkpoint.newest_valid(tmp_path)[1]["step"] == 20


def test_prune_keeps_the_newest_and_clears_unfinished_ones(tmp_path):
    for number in (5, 10, 15):
        save(tmp_path, number)
    shutil.copytree(tmp_path / "step-0000005", tmp_path / "step-0000020.tmp")
    checkpoint.prune(tmp_path, newest=15, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000010", "step-0000015"]


def test_prune_never_prefers_a_damaged_later_folder(tmp_path):
    for number in (5, 6, 9):
        save(tmp_path, number)
    damage(tmp_path / "step-0000009", "truncated")
    checkpoint.prune(tmp_path, newest=6, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000006"]


def test_a_non_finite_weight_is_never_written(tmp_path):
    model, optimizer = trained_once()
    ema = small_model()
    with torch.no_grad():
        ema.final_layer.linear.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"final_layer\.linear\.weight is not finite"):
        checkpoint.save(tmp_path, 1, model, ema, optimizer, {}, {})
    assert not list(tmp_path.iterdir())


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
        ({"class_dropout_prob": "a"}, "'<=' not supported"),
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
