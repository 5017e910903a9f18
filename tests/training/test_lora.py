"""LoRA: adapters alone are trained, on what train.init names, stored as diffusers stores them, and fused where used."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import log_rows, run_recipe
from safetensors.torch import load_file, save_file

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model, swap_attention
from sit_atconv.config import load_recipe, make_recipe
from sit_atconv.convert import export_public
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.models.lora import fuse, linears, read_lora, targets
from sit_atconv.pipelines.exporting import export, open_source
from sit_atconv.runtime.adapters import ADAPTERS
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.training.checkpoint import load_trained, load_with_lora
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.lora import LoraObjective
from sit_atconv.training.optimizer import make_optimizer
from sit_atconv.training.origin import opened
from sit_atconv.training.plan import dry_run
from sit_atconv.training.posthoc import write_model as fit_and_write

DIGITS = Facts((1, 8, 8), 10, 1437)
OF_MIXERS = {
    "attention": ("attn.qkv", "attn.proj"),
    "atconv": ("attn.kernel_proj", "attn.kernel_gen", "attn.x_proj", "attn.proj"),
}
X, T, LABELS = (
    torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5)),
    torch.tensor([0.1, 0.5, 0.9]),
    torch.tensor([0, 3, 9]),
)


def made(folder: Path, **options) -> Path:
    """A model folder, no tensor of which is zero."""
    shape = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = create_model(None, **{**shape, "learn_sigma": False, "num_classes": 10, "token_mixer": "hybrid", **options})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return made(tmp_path / "base")


@pytest.fixture
def recipe(recipe_file, base):
    return recipe_file(train={"init": str(base), "weight_decay": 0.1}, lora={"rank": 3, "alpha": 6})


def objective_of(path, *overrides: str, facts: Facts = DIGITS) -> LoraObjective:
    recipe = load_recipe(path, overrides)
    origin = opened(recipe)
    objective = LoraObjective(origin.completed(recipe), facts, origin)
    objective.open(IdentityCodec())
    objective.begin(None, None)
    return objective


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X, T, LABELS).sample


def test_adapters_begin_at_nothing_and_are_all_that_is_trained(recipe, base):
    objective = objective_of(recipe)
    plain = SiTTransformer2DModel.from_pretrained(base)
    assert torch.equal(output(objective.model), output(plain))
    trained = {name for name, each in objective.model.named_parameters() if each.requires_grad}
    layers = [f"blocks.{index}.{part}" for index, mixer in enumerate(("attention", "atconv"))
              for part in (*OF_MIXERS[mixer], "mlp.fc1", "mlp.fc2")]  # fmt: skip
    assert trained == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    optimizer = make_optimizer(objective.trained, objective.recipe.train)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained) == 20
    average = objective.averages.models["ema"]
    for name, each in objective.model.named_parameters():
        assert (average.get_parameter(name) is each) == (name not in trained), name


def test_a_step_is_that_of_the_sum_written_out(recipe, base):
    """W + alpha / r B A with plain torch: the gradients, AdamW's steps, the average; the base is neither trained nor
    decayed, and no gradient of it is computed."""
    last = run_recipe(recipe, "train.max_steps=3")
    objective = objective_of(recipe)
    pairs = {name: (objective.model.get_submodule(name).lora_A.default.weight.detach().clone().requires_grad_(),
                    objective.model.get_submodule(name).lora_B.default.weight.detach().clone().requires_grad_())
             for name in objective.layers}  # fmt: skip
    plain = SiTTransformer2DModel.from_pretrained(base)
    weights = {name: each.clone() for name, each in plain.state_dict().items()}
    optimizer = torch.optim.AdamW([each for pair in pairs.values() for each in pair], lr=1e-3, weight_decay=0.1)
    average = {name: [each.detach().clone() for each in pair] for name, pair in pairs.items()}
    from sampled import sampled

    from sit_atconv.data.digits import Digits

    samples, losses = sampled(Digits(), (1, 8, 8), 8, drop=0.1), []
    for step in range(3):
        batch, _ = samples.fetch(range(8 * step, 8 * step + 8))
        t = batch["t"][:, None, None, None]
        x = t * batch["image"] + (1 - t) * batch["noise"]
        summed = weights | {f"{name}.weight": weights[f"{name}.weight"] + 2 * b @ a for name, (a, b) in pairs.items()}
        velocity = torch.func.functional_call(plain, summed, (x, batch["t"], batch["label"])).sample
        loss = (velocity - (batch["image"] - batch["noise"])).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for name, pair in pairs.items():
            average[name] = [0.9 * old + 0.1 * new.detach() for old, new in zip(average[name], pair, strict=True)]
    assert [row["loss"] for row in log_rows(last.parent)] == pytest.approx(losses, rel=1e-5)
    for folder, wanted in (("model", pairs), ("ema", average)):
        found = read_lora(last / folder)
        assert found.scale == 2
        assert found.pairs.keys() == pairs.keys()
        for name, pair in found.pairs.items():
            for own, other in zip(pair, wanted[name], strict=True):
                torch.testing.assert_close(own, other.detach(), rtol=1e-3, atol=1e-5)
    assert sum(b.abs().sum() for _, b in found.pairs.values()) > 0


def test_the_base_has_no_gradient_and_stays(recipe, base):
    objective = objective_of(recipe)
    before = {name: each.clone() for name, each in objective.model.state_dict().items() if "lora_" not in name}
    optimizer = make_optimizer(objective.trained, objective.recipe.train)
    objective.model(X, T, LABELS).sample.square().mean().backward()
    assert all((each.grad is None) == ("lora_" not in name) for name, each in objective.model.named_parameters())
    optimizer.step()
    assert all(torch.equal(each, objective.model.state_dict()[name]) for name, each in before.items())


def test_a_checkpoint_is_small_and_opened_with_its_base(recipe, base):
    last = run_recipe(recipe, "train.max_steps=4")
    assert sorted(path.name for path in (last / "ema").iterdir()) == ["config.json", ADAPTERS]
    state = load_file(last / "optimizer.safetensors")
    assert {name.rpartition(".")[0].split(".lora_")[1] for name in state} == {"A.default.weight", "B.default.weight"}
    model = load_trained(last.parent).model
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    expected = SiTTransformer2DModel.from_pretrained(base)
    pairs = read_lora(last / "ema").pairs
    for name, (a, b) in pairs.items():
        expected.get_submodule(name).weight.data += 2 * b @ a
    torch.testing.assert_close(output(model), output(expected), rtol=1e-5, atol=1e-6)
    assert (output(model) - output(SiTTransformer2DModel.from_pretrained(base))).norm() > 1e-3


def test_diffusers_loads_what_is_stored(recipe, base, tmp_path):
    last = run_recipe(recipe, "train.max_steps=4")
    fused = output(load_trained(last).model)
    model = SiTTransformer2DModel.from_pretrained(base)
    plain = output(model)
    model.load_lora_adapter(last / "ema", use_safetensors=True)
    torch.testing.assert_close(output(model), fused, rtol=1e-5, atol=1e-6)
    pipe = SiTPipeline.from_run(base)
    pipe.load_lora_weights(last / "ema")
    torch.testing.assert_close(output(pipe.transformer), fused, rtol=1e-5, atol=1e-6)
    pipe.fuse_lora()
    torch.testing.assert_close(output(pipe.transformer), fused, rtol=1e-5, atol=1e-6)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(output(pipe.transformer), plain, rtol=1e-5, atol=1e-6)
    model.save_lora_adapter(tmp_path / "theirs", adapter_name="default_0")  # as diffusers writes it
    again = SiTTransformer2DModel.from_pretrained(base)
    fuse(again, read_lora(tmp_path / "theirs"))
    torch.testing.assert_close(output(again), fused, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_to_the_bit(recipe, tmp_path):
    whole = run_recipe(recipe, f"run.out={tmp_path / 'whole'}")
    run_recipe(recipe, "train.max_steps=3", "checkpoint.every=2")
    run_recipe(recipe, "train.max_steps=5")
    parts = run_recipe(recipe)
    names = ("ema/" + ADAPTERS, "model/" + ADAPTERS, "optimizer.safetensors")
    assert [sha256(parts / name) for name in names] == [sha256(whole / name) for name in names]
    kept = [[row[key] for key in ("step", "loss", "grad_norm")] for row in log_rows(parts.parent)]
    assert kept == [[row[key] for key in ("step", "loss", "grad_norm")] for row in log_rows(whole.parent)]


def test_a_base_that_moved_is_stated_anew_and_another_is_refused(recipe, base, tmp_path):
    last = run_recipe(recipe, "train.max_steps=2")
    wanted = output(load_trained(last).model)
    other = made(tmp_path / "other")
    model = SiTTransformer2DModel.from_pretrained(other)
    model.x_embedder.proj.bias.data += 1
    model.save_pretrained(other)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(
        InputError, match=r"its base is gone: .*put it back there, or draw from both: it as ckpt, this "
    ):
        load_trained(last)
    with pytest.raises(InputError, match="no such folder"):
        run_recipe(recipe)
    with pytest.raises(InputError, match="other weights"):
        run_recipe(recipe, f"train.init={other}")
    assert torch.equal(output(load_with_lora(tmp_path / "moved", last).model), wanted)
    last = run_recipe(recipe, f"train.init={tmp_path / 'moved'}", "train.max_steps=3")
    load_trained(last)
    shutil.copytree(other, tmp_path / "moved", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"is a LoRA of other weights than those of .*moved', which have changed"):
        load_trained(last)


def test_on_other_weights_it_is_put_with_a_word(recipe, base, tmp_path, capsys):
    last = run_recipe(recipe, "train.max_steps=2")
    other = SiTTransformer2DModel.from_pretrained(base)
    other.x_embedder.proj.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    model = load_with_lora(tmp_path / "other", last.parent).model
    assert "is a LoRA of other weights than those of" in capsys.readouterr().err
    fuse(other, read_lora(last / "ema"))
    assert torch.equal(output(model), output(other))


def test_parts_drawn_anew_are_trained_with_it_and_stored(recipe, base, tmp_path, recipe_file):
    """As of the classes of one's own data."""
    facts, anew = Facts((1, 8, 8), 4, 100), "train.init_anew=[y_embedder,blocks.1.attn]"
    with pytest.raises(InputError, match="y_embedder"):
        objective_of(recipe, facts=facts)
    objective = objective_of(recipe, anew, facts=facts)
    whole = [name for name in objective.names if "lora_" not in name]
    own = [name for name, _ in objective.model.named_parameters() if name.startswith("blocks.1.attn.")]
    assert sorted(whole) == sorted(["y_embedder.embedding_table.weight", *own])
    assert not any("lora_" in name for name in own)
    last = run_recipe(recipe, anew, "train.max_steps=3")
    assert load_file(last / "ema" / "anew.safetensors").keys() == set(whole)
    run_recipe(recipe, anew, f"run.out={tmp_path / 'parts'}", "train.max_steps=1")
    parts = run_recipe(recipe, anew, f"run.out={tmp_path / 'parts'}", "train.max_steps=3")
    for name in ("ema/anew.safetensors", f"ema/{ADAPTERS}", "model/anew.safetensors", "optimizer.safetensors"):
        assert sha256(parts / name) == sha256(last / name), name
    model = load_trained(last).model
    stored = load_file(last / "ema" / "anew.safetensors")
    assert all(torch.equal(model.state_dict()[name], each) for name, each in stored.items())
    theirs = SiTTransformer2DModel.from_pretrained(base).state_dict()
    assert torch.equal(model.state_dict()["t_embedder.mlp.0.weight"], theirs["t_embedder.mlp.0.weight"])
    assert not torch.equal(model.state_dict()["blocks.1.attn.proj.bias"], theirs["blocks.1.attn.proj.bias"])


def test_one_tensor_of_a_layer_drawn_anew_is_trained_and_stored(recipe):
    """Such a layer has no adapter: beside one the tensor would stay as it was drawn, and nobody would store it."""
    anew = "train.init_anew=[blocks.0.mlp.fc1.weight,blocks.1.attn.x_proj.bias]"
    objective = objective_of(recipe, anew)
    names = {name for name in objective.names if "lora_" not in name}
    assert names == {"blocks.0.mlp.fc1.weight", "blocks.1.attn.x_proj.bias"}
    assert {"blocks.0.mlp.fc1", "blocks.1.attn.x_proj"}.isdisjoint(objective.layers)
    last = run_recipe(recipe, anew, "train.max_steps=2")
    assert load_file(last / "model" / "anew.safetensors").keys() == names
    objective.begin(None, last)
    again = output(load_trained(last / "model").model)
    torch.testing.assert_close(output(objective.model), again, rtol=1e-5, atol=1e-6)


def test_adapters_alone_are_refused_where_more_was_trained(recipe, base, tmp_path):
    last = run_recipe(recipe, "train.init_anew=[y_embedder]", "train.max_steps=1")
    shutil.copytree(last / "ema", tmp_path / "copied")
    for each in (last / "ema" / ADAPTERS, tmp_path / "copied"):
        with pytest.raises(InputError, match=r"anew\.safetensors beside it holds parts that were drawn anew"):
            load_with_lora(base, each)
    pipe = SiTPipeline.from_run(base)
    for each in (last / "ema", last / "ema" / ADAPTERS):
        with pytest.raises(InputError, match=r"anew\.safetensors beside it holds parts"):
            pipe.load_lora_weights(each)
    assert torch.equal(output(load_with_lora(base, last / "ema").model), output(load_trained(last).model))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_heads": 4}, r"blocks\.0\.attn \(num_heads 4 there, 2 here\)"),
        ({"depth": 4}, "depth 4 there, 2 here"),
        ({"hidden_size": 32}, "hidden_size 32 there, 16 here"),
        ({"num_classes": 5}, r"y_embedder \(num_classes 5 there, 10 here\)"),
    ],
)
def test_a_lora_of_another_architecture_is_refused(recipe, tmp_path, options, says):
    """Whatever fits by its shapes, as with other heads or more blocks, would be another function."""
    last = run_recipe(recipe, "train.max_steps=1")
    with pytest.raises(InputError, match=rf"it is a LoRA of another architecture than that of '.*other': .*{says}"):
        load_with_lora(made(tmp_path / "other", **options), last)


def test_export_is_the_sum_and_needs_no_peft(recipe, tmp_path):
    last = run_recipe(recipe, "train.max_steps=3")
    wanted = output(load_trained(last).model)
    export(open_source(last.parent), tmp_path / "out")
    exported = SiTTransformer2DModel.from_pretrained(tmp_path / "out/transformer", use_safetensors=True)
    assert torch.equal(output(exported), wanted)
    card = (tmp_path / "out/README.md").read_text()
    assert "began from: base" in card
    assert "LoRA: rank 3, alpha 6, added to the weights that it began from" in card
    export_public(last.parent, tmp_path / "public.safetensors")
    assert torch.equal(
        load_file(tmp_path / "public.safetensors")["blocks.0.mlp.fc1.weight"], exported.blocks[0].mlp.fc1.weight
    )


def test_averages_of_other_widths_are_made_of_snapshots(recipe, tmp_path):
    keys = [
        "ema.kind=power",
        "ema.decay=null",
        "ema.stds=[0.1]",
        "ema.snapshot_every=1",
        "train.init_anew=[y_embedder]",
    ]
    last = run_recipe(recipe, *keys, "train.max_steps=6")
    found = fit_and_write(last.parent, 0.1, None, tmp_path / "averaged")
    assert found.step == 6
    torch.testing.assert_close(
        output(load_trained(tmp_path / "averaged").model), output(load_trained(last).model), rtol=1e-4, atol=1e-5
    )


def test_the_commands_draw_from_it(recipe, base, tmp_path):
    last = run_recipe(recipe, "train.max_steps=2", "preview.every=2", "preview.num=2", "preview.steps=2")
    assert [path.name for path in (last.parent / "previews").iterdir()] == ["step-0000002.png"]
    public = tmp_path / "base.safetensors"
    export_public(base, public)
    pictures = []
    for number, words in enumerate((
        ["--ckpt", last.parent], ["--ckpt", base, "--lora", last.parent], ["--ckpt", public, "--lora", last / "ema"],
        ["--ckpt", base, "--lora", last / "ema" / ADAPTERS], ["--ckpt", base],
    )):  # fmt: skip
        out = tmp_path / f"{number}.png"
        sample.main([*map(str, words), "--steps", "2", "--classes", "3", "4", "--out", str(out)])
        pictures.append(out.read_bytes())
    assert len({*pictures[:3]}) == 1
    assert pictures[4] != pictures[0]
    words = ["--num", "2", "--steps", "2", "--out", str(tmp_path / "samples")]
    sampling(["generate", "--ckpt", str(base), "--lora", str(last.parent), *words])
    manifest = json.loads((tmp_path / "samples/manifest.json").read_text())
    assert manifest["lora"].endswith("run")
    sampling(["generate", "--ckpt", str(public), "--lora", str(last / "ema"), *words])  # the same, from elsewhere
    with pytest.raises(SystemExit):
        sampling(["generate", "--ckpt", str(base), *words])


def test_a_swapped_model_is_trained_too_and_all_that_looks_at_a_run_sees_the_sum(recipe_file, tmp_path):
    """The adapters of both mixers, the held-out loss, a preview guided by the base, and the run as a guide."""
    swapped = SiTTransformer2DModel.from_pretrained(made(tmp_path / "attention", token_mixer="attention"))
    swap_attention(swapped, select="even", init="random")
    swapped.save_pretrained(tmp_path / "swapped")
    path = recipe_file(
        model={"token_mixer": ["atconv", "attention"]}, data={"held_out": 0.1}, lora={"rank": 2},
        train={"init": str(tmp_path / "swapped"), "max_steps": 2}, validation={"every": 1, "num": 8},
        preview={"every": 2, "num": 2, "steps": 2, "guide": str(tmp_path / "swapped")},
    )  # fmt: skip
    last = run_recipe(path)
    model = load_trained(last).model
    layers = load_file(last / "ema" / ADAPTERS).keys()
    for names in OF_MIXERS.values():
        assert any(names[0] in layer for layer in layers)
    losses = [json.loads(line)["loss"] for line in (last.parent / "validation.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert (last.parent / "previews/step-0000002.png").is_file()
    assert not torch.equal(output(model), output(swapped.eval()))
    words = ["--guide", str(last), "--cfg", "2", "--num", "2", "--steps", "2"]
    sampling(["generate", "--ckpt", str(tmp_path / "swapped"), *words, "--out", str(tmp_path / "samples")])
    guide = json.loads((tmp_path / "samples/manifest.json").read_text())["guide"]
    assert guide["checkpoint_sha256"] == load_trained(last).files


def test_targets_are_names_or_ends_of_names(base):
    model = SiTTransformer2DModel.from_pretrained(base)
    assert targets(model, ["mlp.fc1", "blocks.1.attn.x_proj"]) == [
        "blocks.0.mlp.fc1",
        "blocks.1.attn.x_proj",
        "blocks.1.mlp.fc1",
    ]
    assert targets(model, ["linear"]) == ["final_layer.linear"]
    assert set(linears(model)) >= {"t_embedder.mlp.0", "blocks.1.attn.kernel_gen", "final_layer.linear"}
    with pytest.raises(InputError, match=r"lora\.targets='to_q': choose from \['adaLN_modulation\.1', .*'mlp\.fc2', "):
        targets(model, ["to_q"])
    with pytest.raises(InputError, match=r"lora\.targets='mlp\.fc3': did you mean 'mlp\.fc[12]'"):
        targets(model, ["mlp.fc3"])
    with pytest.raises(InputError, match=r"did you mean 'blocks\.0\.mlp\.fc[12]'"):
        targets(model, ["blocks.0.mlp.fc3"])


def test_the_plan_counts_what_is_trained(recipe, recipe_file, base):
    recipe = load_recipe(recipe, ["lora.targets=[mlp.fc1]"])
    rows = {line[:18].strip(): line[18:].strip() for line in dry_run(recipe).splitlines()}
    model = SiTTransformer2DModel.from_pretrained(base)
    own, whole = 2 * 3 * (16 + 64), sum(each.numel() for each in model.parameters())
    said = f"rank 3, alpha 6, of 2 layers; trained {own / 1e6:.3f} M of {(own + whole) / 1e6:.3f} M parameters"
    assert rows["LoRA"] == said
    assert rows["init"].endswith("all of it fits")


WRONG = {
    "no base": ({"lora": {"rank": 2}}, "adapters are of a trained model, and train.init is missing"),
    "alpha alone": ({"train": {"init": "x"}, "lora": {"alpha": 2}}, "lora.alpha does nothing without lora.rank"),
    "targets alone": ({"train": {"init": "x"}, "lora": {"rank": None, "targets": ["x"]}}, "goes with lora.rank"),
    "no targets": ({"train": {"init": "x"}, "lora": {"rank": 2, "targets": []}}, "name a linear layer"),
    "rank 0": ({"train": {"init": "x"}, "lora": {"rank": 0}}, "lora.rank=0: must be at least 1"),
    "repa": ({"train": {"init": "x"}, "lora": {"rank": 2}, "repa": {"encoder": "x"}}, "lora.rank=2 with repa.encoder"),
    "distill": ({"train": {"init": "x"}, "lora": {"rank": 2}, "distill": {"teacher": "x"}}, "distill.teacher"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_do_not_go_together_are_refused(case):
    stated, says = WRONG[case]
    with pytest.raises(InputError) as refusal:
        make_recipe({"run": {"out": "x"}, **stated})
    assert says in str(refusal.value)


def test_without_peft_one_line_says_so(recipe, monkeypatch):
    monkeypatch.setattr("sit_atconv.training.objectives.lora.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lora\.rank needs peft, which is not installed: pip install"):
        dry_run(load_recipe(recipe))


@pytest.mark.parametrize("change", ["layer", "shape", "pattern", "odd", "ranks"])
def test_a_file_of_other_adapters_is_refused_in_one_line(recipe, base, tmp_path, change):
    pair = {"transformer.blocks.0.mlp.fc1.lora_A.weight": torch.ones(2, 16),
            "transformer.blocks.0.mlp.fc1.lora_B.weight": torch.ones(64, 2)}  # fmt: skip
    said = {"transformer.r": 2, "transformer.lora_alpha": 2}
    if change == "layer":
        pair = {name.replace("fc1", "fc3"): each for name, each in pair.items()}
    elif change == "shape":
        pair["transformer.blocks.0.mlp.fc1.lora_A.weight"] = torch.ones(2, 17)
    elif change == "pattern":
        said["transformer.alpha_pattern"] = {"x": 3}
    elif change == "odd":
        pair["transformer.blocks.0.mlp.fc1.lora_magnitude_vector"] = torch.ones(3)
    elif change == "ranks":
        said["transformer.r"] = 4
    save_file(pair, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    says = {"layer": "did you mean 'blocks.0.mlp.fc", "shape": "is of 64 x 17", "pattern": "alpha_pattern",
            "odd": "is no adapter of a linear layer", "ranks": "have the ranks"}[change]  # fmt: skip
    with pytest.raises(InputError) as refusal:
        load_with_lora(base, tmp_path / "x.safetensors")
    assert says in str(refusal.value)


def test_gradient_checkpointing_and_parts_of_a_batch_change_nothing(recipe, tmp_path):
    plain = run_recipe(recipe, f"run.out={tmp_path / 'plain'}", "train.max_steps=3")
    other = run_recipe(
        recipe, "train.max_steps=3", "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2"
    )
    losses = [[row["loss"] for row in log_rows(each.parent)] for each in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    own, others = read_lora(plain / "model"), read_lora(other / "model")
    for name, pair in own.pairs.items():
        for a, b in zip(pair, others.pairs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_fsdp_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"lora\.rank is not for FSDP.*use DDP"):
        LoraObjective.check_launch(SimpleNamespace(is_fsdp2=True))


@pytest.mark.slow
def test_two_processes_train_as_one(process_server, recipe, tmp_path):
    stated = ["train.init_anew=[y_embedder]", "train.max_steps=12", "train.lr=1e-4"]
    single = run_recipe(recipe, f"run.out={tmp_path / 'single'}", *stated)
    for steps in (7, 12):
        words = [recipe, *stated, f"run.out={tmp_path / 'two'}", f"train.max_steps={steps}"]
        codes, said = process_server("train_sit", tmp_path, words, {}, {})
        assert codes == [0, 0], said
    losses = [[row["loss"] for row in log_rows(run)] for run in (single.parent, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(
        output(load_trained(tmp_path / "two").model), output(load_trained(single).model), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_compiled_training_equals_eager(recipe, tmp_path):
    plain = run_recipe(recipe, f"run.out={tmp_path / 'plain'}", "train.max_steps=3")
    compiled = run_recipe(recipe, "train.max_steps=3", "train.compile=true")
    torch.testing.assert_close(
        output(load_trained(compiled).model), output(load_trained(plain).model), rtol=1e-3, atol=1e-4
    )
