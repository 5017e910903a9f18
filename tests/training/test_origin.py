"""train.init: weights that fit are the source's to the bit, from each form of source; all others are named, allowed,
and drawn as a new run draws them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same_bits, log_rows, run_recipe, weights
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.config import load_recipe
from sit_atconv.convert import convert, export_public, load_public
from sit_atconv.data.digits import Digits
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.layers.embedders import sincos_position_embedding
from sit_atconv.models.fitting import PART, differences, is_named, part_of
from sit_atconv.models.sit import options_of
from sit_atconv.pipelines.exporting import export, open_source
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.markdown import plain
from sit_atconv.runtime.weights import digest_of
from sit_atconv.training import train
from sit_atconv.training.checkpoint import load_trained
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives.flow import FlowObjective, build_model
from sit_atconv.training.origin import opened
from sit_atconv.training.plan import dry_run
from sit_atconv.training.resolved import resolved

DIGITS = Facts((1, 8, 8), 10, 1437)
TINY = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": False}


def made(folder: Path, scale: float = 0.1, **options) -> Path:
    """A model folder, no tensor of which is zero or as a seed would draw it."""
    model = create_model(None, **{**TINY, "num_classes": 10, **options})
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.save_pretrained(folder)
    return folder


def begun(recipe_file, *overrides: str, facts: Facts = DIGITS, model: dict | None = None) -> FlowObjective:
    """The objective of a new run, as its first step finds it; of a recipe that leaves the model to its source."""
    path = recipe_file(model=model or {})
    if model is None:
        path.write_text("\n".join(line for line in path.read_text().split("\n") if line[2:].split(":")[0] not in TINY))
        path.write_text(path.read_text().replace("  patch_size: 2\n  token_mixer: hybrid\n", "  name: null\n"))
    recipe = load_recipe(path, overrides)
    origin = opened(recipe)
    objective = FlowObjective(origin.completed(recipe), facts, origin)
    objective.codec = IdentityCodec()
    objective.begin(None, None)
    return objective


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a if not is_named(name, but))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every form of a source, of one training: name -> (what train.init says, the model's tensors)."""
    folder = tmp_path_factory.mktemp("sources")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        json.dumps({
            "run": {"out": str(folder / "run")}, "data": {"kind": "digits"}, "preview": {"every": 0},
            "model": {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "token_mixer": "hybrid"},
            "train": {"max_steps": 5, "batch_size": 8, "lr": 0.01}, "ema": {"decay": 0.5},
        })
    )  # fmt: skip
    last = run_recipe(recipe)
    run = last.parent
    SiTPipeline.from_run(run).save_pretrained(folder / "pipeline")
    export(open_source(run), folder / "exported")
    export_public(run, folder / "ema.pt")
    export_public(run, folder / "ema.safetensors")
    convert(folder / "ema.pt", folder / "converted")
    shutil.copytree(last / "model", folder / "alone")
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(folder / "ema.safetensors", bare / "weights.safetensors")
    ema, model = weights(last), weights(last, "model")
    forms = {name: (folder / name, ema) for name in ("pipeline", "exported", "ema.pt", "ema.safetensors", "converted")}
    forms |= {
        "bare": (bare, ema),
        "alone": (folder / "alone", model),
        "transformer": (folder / "pipeline/transformer", ema),
    }
    forms |= {
        "run": (run, ema),
        "checkpoint": (last, ema),
        "ema": (last / "ema", ema),
        "model": (last / "model", model),
    }
    return forms


FORMS = (
    "run", "checkpoint", "ema", "model", "alone", "pipeline", "transformer", "exported", "converted", "ema.pt",
    "ema.safetensors", "bare",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_run_begins_from_every_form_of_source_to_the_bit(recipe_file, sources, form):
    stated, tensors = sources[form]
    objective = begun(recipe_file, f"train.init={stated}")
    assert same(objective.model.state_dict(), tensors)
    assert same(objective.averages.models["ema"].state_dict(), tensors)
    record = objective.describe()["init"]
    assert record["sha256"] == digest_of(tensors)
    assert record["anew"] == []
    assert record["from"]["step"] == (5 if form in ("run", "checkpoint", "ema", "model") else None)
    which = {"alone": None, "model": "model", "pipeline": None, "transformer": None, "exported": None, "bare": None}
    assert record["from"]["which"] == which.get(form, None if form == "ema.safetensors" else "ema")


def test_of_repa_the_time_is_folded_as_the_converter_folds_it(recipe_file, tmp_path):
    made(tmp_path / "mine", token_mixer="hybrid", activation="silu")
    export_public(tmp_path / "mine", tmp_path / "repa.pt", form="repa")
    objective = begun(recipe_file, f"train.init={tmp_path / 'repa.pt'}")
    assert same(objective.model.state_dict(), load_public(tmp_path / "repa.pt").state_dict())
    assert objective.model.config.activation == "silu"
    x, t, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 10])
    theirs = SiTTransformer2DModel.from_pretrained(tmp_path / "mine")
    torch.testing.assert_close(objective.model(x, t, labels).sample, theirs(x, t, labels).sample, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_drawn_as_a_new_run_draws_it(recipe_file, tmp_path):
    """Another number of classes, another mixer in a block, a block more; rows of classes are not kept."""
    source = made(tmp_path / "mine", token_mixer="attention")
    anew = ("y_embedder", "blocks.1.attn", "blocks.2")
    stated = ["model.depth=3", "model.token_mixer=[attention,atconv,attention]", f"train.init={source}", "run.seed=7"]
    with pytest.raises(InputError) as refusal:
        begun(recipe_file, *stated, facts=Facts((1, 8, 8), 5, 700))
    assert str(refusal.value).endswith(
        "what does not fit has to be drawn anew: y_embedder (num_classes 10 there, 5 here), blocks.1.attn (attention "
        "there, atconv here), blocks.2 (not there); state train.init_anew=[y_embedder,blocks.1.attn,blocks.2]"
    )
    named = f"train.init_anew=[{','.join(anew)}]"
    objective = begun(recipe_file, *stated, named, facts=Facts((1, 8, 8), 5, 700))
    new, own = build_model(objective.recipe, objective.facts).state_dict(), objective.model.state_dict()
    theirs = SiTTransformer2DModel.from_pretrained(source).state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, (new if is_named(name, anew) else theirs)[name]), name
    fitting = [name for name in new if not is_named(name, anew) and part_of(name) != "pos_embed"]
    assert not any(torch.equal(new[name], own[name]) for name in fitting)
    parts = [f"blocks.2.{part}" for part in ("attn", "mlp", "adaLN_modulation")]
    assert objective.describe()["init"]["anew"] == ["y_embedder", "blocks.1.attn", *parts]
    assert same(objective.averages.models["ema"].state_dict(), own)


def test_what_fits_and_is_named_is_drawn_anew_too(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention")
    theirs = SiTTransformer2DModel.from_pretrained(source).state_dict()
    for anew in (["blocks.*.attn"], ["blocks.1"], ["t_embedder.mlp.0.bias"]):
        objective = begun(recipe_file, f"train.init={source}", f"train.init_anew=[{anew[0]}]")
        new, own = build_model(objective.recipe, DIGITS).state_dict(), objective.model.state_dict()
        assert same(own, theirs, (*anew,))
        drawn = [name for name in own if is_named(name, anew)]
        assert len(drawn) == {"blocks.*.attn": 8, "blocks.1": 10, "t_embedder.mlp.0.bias": 1}[anew[0]]
        assert all(torch.equal(own[name], new[name]) for name in drawn)


def test_other_channels_and_another_size(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention")
    facts, stated = Facts((3, 12, 8), 10, 100), f"train.init={source}"
    with pytest.raises(InputError, match=r"x_embedder \(in_channels 1 there, 3 here\), final_layer\.linear \(in_cha"):
        begun(recipe_file, stated, facts=facts)
    model = begun(recipe_file, stated, "train.init_anew=[x_embedder,final_layer.linear]", facts=facts).model
    assert torch.equal(model.pos_embed, sincos_position_embedding((6, 4), 16))
    theirs = SiTTransformer2DModel.from_pretrained(source).state_dict()
    assert torch.equal(model.final_layer.adaLN_modulation[1].weight, theirs["final_layer.adaLN_modulation.1.weight"])


def test_a_stored_position_embedding_is_kept_where_it_fits(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention")
    model = SiTTransformer2DModel.from_pretrained(source)
    model.pos_embed.mul_(3)
    model.save_pretrained(source)
    assert torch.equal(begun(recipe_file, f"train.init={source}").model.pos_embed, model.pos_embed)


OTHERS = {
    "width": ({"model.hidden_size": 32}, r"hidden_size 16 there, 32 here.*state model\.hidden_size=16"),
    "patch": ({"model.patch_size": 4}, r"patch_size 2 there, 4 here"),
    "path": ({"flow.path": "gvp"}, r"path linear there, gvp here; state flow\.path=linear"),
    "prediction": ({"flow.prediction": "noise"}, r"state flow\.prediction=velocity"),
    "mlp": ({"model.mlp_ratio": 2}, r"state model\.mlp_ratio=4\.0"),
    "blocks": ({"model.depth": 1}, r"depth 2 there, 1 here; state model\.depth=2"),
    "positions": ({"model.pos_embed": "false"}, r"pos_embed True there, False here; state model\.pos_embed=true"),
    "heads": ({"model.num_heads": 4}, r"blocks\.0\.attn \(num_heads 2 there, 4 here\).*or model\.num_heads=2 as there"),
    "norms": ({"model.qk_norm": "true"}, r"qk_norm False there, True here.*model\.qk_norm=false"),
    "pool": ({"model.pool": "grid"}, r"blocks\.1\.attn \(pool raster there, grid here\).*model\.pool=raster"),
    "routing": ({"model.routing": "static"}, r"routing adaptive there, static here"),
    "inhibition": ({"model.inhibition": "none"}, r"inhibition learned there, none here"),
    "activation": ({"model.activation": "silu"}, r"activation gelu_tanh there, silu here"),
    "kernel": ({"model.kernel_size": 1}, r"kernel_size 3 there, 1 here"),
    "sigma": ({"model.learn_sigma": "true"}, r"final_layer\.linear \(learn_sigma False there, True here\)"),
    "null class": ({"model.class_dropout_prob": 0}, r"y_embedder \(a null class on one side alone\)"),
    "anew": ({"train.init_anew": "[y_embeder]"}, r"train\.init_anew='y_embeder': did you mean 'y_embedder'"),
    "anew, no block": ({"train.init_anew": "[blocks.7.attn]"}, r"did you mean 'blocks\..\.attn'"),
    "finer than a part": (
        {"model.num_heads": 4, "train.init_anew": "[blocks.0.attn.proj]"}, r"state train\.init_anew=\[blocks\.0\.attn"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_weights_that_would_mean_something_else_are_refused(recipe_file, tmp_path, case):
    keys, says = OTHERS[case]
    source = made(tmp_path / "mine", token_mixer="hybrid")
    with pytest.raises(InputError, match=says):
        begun(recipe_file, f"train.init={source}", *(f"{key}={value}" for key, value in keys.items()))


def test_options_of_a_mixer_that_is_not_there_any_more_differ_freely(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention", qk_norm=True)
    stated = ["model.token_mixer=atconv", "train.init_anew=[blocks.*.attn]", f"train.init={source}"]
    objective = begun(recipe_file, *stated)
    assert objective.model.pos_embed is not None  # as there: ATConv alone would have none by itself
    assert objective.model.config.qk_norm is False


def test_every_tensor_of_a_model_has_a_part_of_its_own_modules():
    model = create_model(None, **TINY, token_mixer="hybrid", num_classes=3)
    parts = {part_of(name) for name in model.state_dict()}
    assert parts == {
        "x_embedder", "y_embedder", "t_embedder", "pos_embed", "final_layer.linear", "final_layer.adaLN_modulation",
        *(f"blocks.{index}.{part}" for index in (0, 1) for part in ("attn", "mlp", "adaLN_modulation")),
    }  # fmt: skip
    assert PART.match("blocks.12.attn.qkv.weight")[0] == "blocks.12.attn"
    assert differences(model, model) == []
    assert is_named("blocks.12.attn.proj.bias", ["blocks.*.attn"])
    assert not is_named("blocks.12.attn.proj.bias", ["blocks.1", "blocks.1*.mlp", "attn", "blocks.12.attn.proj.bias.x"])


def foreign(folder: Path, kind: str) -> None:
    if kind == "DiT":
        shape = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8}
        model = DiTTransformer2DModel(**shape, num_embeds_ada_norm=5)
        first, second = (block.norm1.emb for block in model.transformer_blocks)
        second.load_state_dict(first.state_dict())
        model.save_pretrained(folder)
    elif kind == "U-Net":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    elif kind == "AttNet":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": "attnet_t2"}))
    elif kind == "nothing":
        folder.mkdir()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("DiT", "is a DiT, which predicts noise"),
        ("U-Net", "of diffusers' models DiTTransformer2DModel can be read"),
        ("AttNet", "it holds no SiTTransformer2DModel"),
        ("nothing", "is not a checkpoint: no valid manifest.json"),
        ("not there", "no such folder"),
    ],
)
def test_another_kind_of_model_is_refused(recipe_file, tmp_path, kind, says):
    if kind != "not there":
        foreign(tmp_path / "other", kind)
    with pytest.raises(InputError, match=rf"train\.init='.*other'.*{says}"):
        begun(recipe_file, f"train.init={tmp_path / 'other'}")


def test_what_a_public_file_leaves_open_is_left_to_convert(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention")
    state = SiTTransformer2DModel.from_pretrained(source).state_dict()
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"number of attention heads cannot be told.*`sit-atconv convert` takes"):
        begun(recipe_file, f"train.init={tmp_path / 'bare.pt'}")


def test_the_averages_begin_there_and_the_optimiser_anew(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="hybrid")
    theirs = SiTTransformer2DModel.from_pretrained(source).state_dict()
    last = run_recipe(recipe_file(), f"train.init={source}", "train.max_steps=1")
    model, ema = weights(last, "model"), weights(last)
    for name in model:
        torch.testing.assert_close(ema[name], 0.9 * theirs[name] + 0.1 * model[name], rtol=1e-5, atol=1e-7)
    # AdamW's first step moves every weight that has a gradient by lr.
    assert (model["final_layer.linear.bias"] - theirs["final_layer.linear.bias"]).abs().max() < 1.01e-3
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["init"] == {
        "sha256": digest_of(theirs), "anew": [],
        "from": {
            "source": str(source), "which": None, "step": None, "codec": {"codec": "open", "channels": 1},
            "model": {name: SiTTransformer2DModel.load_config(source)[name] for name in options_of(None)},
        },
    }  # fmt: skip


def test_a_run_goes_on_to_the_bit_without_its_source(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="attention")
    path = recipe_file()
    stated = [f"train.init={source}", "train.init_anew=[blocks.1.attn]"]
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}", *stated)
    run_recipe(path, *stated, "train.max_steps=3", "checkpoint.every=2")
    shutil.move(source, tmp_path / "moved")
    parts = run_recipe(path, *stated, "train.max_steps=5")
    assert json.loads((parts / "manifest.json").read_text())["init"]["from"]["source"] == str(source)
    parts = run_recipe(path, f"train.init={tmp_path / 'moved'}", stated[1])  # found again, where it lies now
    assert_same_bits(whole, parts)
    assert [row["loss"] for row in log_rows(parts.parent)] == [row["loss"] for row in log_rows(whole.parent)]


def test_what_the_source_decided_stays_when_it_is_gone(recipe_file, tmp_path):
    """Of a recipe that leaves the model to its source: plan and resumed run know it from the manifest, not by the
    defaults of a model; and what the recipe stated beside it stays stated."""
    source, path = made(tmp_path / "mine", token_mixer="attention", pos_embed=True), tmp_path / "open.yaml"
    recipe = yaml.safe_load(recipe_file().read_text())
    path.write_text(yaml.safe_dump({key: section for key, section in recipe.items() if key != "model"}))
    stated = [f"train.init={source}", "model.depth=3", "train.init_anew=[blocks.2,blocks.0.attn]"]
    whole = run_recipe(path, *stated, f"run.out={tmp_path / 'whole'}")
    run_recipe(path, *stated, "train.max_steps=3", "checkpoint.every=2")
    shutil.rmtree(source)
    plan = dry_run(load_recipe(path, stated))
    assert "goes on from step 3 of 8" in plan
    assert f"init               {source}; drawn anew: blocks.0.attn, blocks.2.attn" in plan
    assert_same_bits(whole, last := run_recipe(path, *stated))
    config = SiTTransformer2DModel.load_config(last / "ema")
    assert (config["hidden_size"], config["depth"], config["patch_size"], config["pos_embed"]) == (16, 3, 2, True)
    with pytest.raises(InputError, match=r"model\.depth: 3 -> 2"):
        run_recipe(path, stated[0], "train.init_anew=[blocks.0.attn]")
    with pytest.raises(InputError, match=r"mine'.*no such folder"):
        run_recipe(path, *stated, f"run.out={tmp_path / 'new'}")


def test_by_force_another_run_begins_from_the_source_and_is_held_against_it(recipe_file, tmp_path):
    source, path = made(tmp_path / "mine", token_mixer="attention"), recipe_file(model={"token_mixer": "attention"})
    stated = [f"train.init={source}", "train.max_steps=1"]
    run_recipe(path, *stated)
    with pytest.raises(InputError, match=r"blocks\.2 \(not there\); state train\.init_anew=\[blocks\.2\]"):
        train(load_recipe(path, [*stated, "model.depth=3"]), force=True)
    last = train(load_recipe(path, [*stated, "train.lr=1e-9"]), force=True)
    theirs = SiTTransformer2DModel.from_pretrained(source).state_dict()
    assert all((tensor - theirs[name]).abs().max() < 2e-9 for name, tensor in weights(last, "model").items())


def test_another_source_is_another_run(recipe_file, tmp_path):
    source, other = made(tmp_path / "mine"), made(tmp_path / "other", scale=0.2)
    path = recipe_file(model={"token_mixer": "attention"})
    run_recipe(path, f"train.init={source}", "train.max_steps=2")
    for now, said in (
        (other, f"train.init={str(other)!r} is not the one of run.out={str(tmp_path / 'run')!r}: other weights"),
        ("null", f"train.init is missing: run.out={str(tmp_path / 'run')!r} was begun with one; state train.init="
         f"{str(source)!r}, or choose another run.out"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(said)):
            run_recipe(path, f"train.init={now}", "train.max_steps=3")
        assert f"a start would be refused: {said}" in dry_run(load_recipe(path, [f"train.init={now}"]))
    with pytest.raises(InputError, match=r"train\.init_anew: \[\] -> \[\"y_embedder\"\]"):
        run_recipe(path, f"train.init={source}", "train.init_anew=[y_embedder]")


def test_a_run_that_was_drawn_does_not_begin_from_a_source_later(recipe_file, tmp_path):
    path = recipe_file(model={"token_mixer": "attention"})
    run_recipe(path, "train.max_steps=2")
    with pytest.raises(InputError, match=r"was begun without one; state train\.init=null, or"):
        run_recipe(path, f"train.init={made(tmp_path / 'mine')}")


def test_killed_before_its_first_checkpoint_it_begins_anew_from_its_source(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer="hybrid")
    path = recipe_file()
    whole = run_recipe(path, f"train.init={source}", f"run.out={tmp_path / 'whole'}")
    last = run_recipe(path, f"train.init={source}", "train.max_steps=2")
    shutil.rmtree(last)
    assert_same_bits(whole, run_recipe(path, f"train.init={source}"))


def test_the_recipe_takes_the_options_of_its_source_and_is_stored_with_them(recipe_file, tmp_path):
    source = made(tmp_path / "mine", token_mixer=["attention", "atconv"], class_dropout_prob=0.3, pool="grid")
    objective = begun(recipe_file, f"train.init={source}")
    config = SiTTransformer2DModel.from_pretrained(source).config
    stored = resolved(objective.recipe, DIGITS).model.options()
    assert stored == {name: config[name] for name in stored}
    assert len(stored) == 18
    with pytest.raises(InputError, match=r"hidden_size 16 there, 384 here, patch_size 2 there, 8 here; state model"):
        begun(recipe_file, f"train.init={source}", model={"name": "SiT-S/8"} | dict.fromkeys(
            ("patch_size", "hidden_size", "depth", "num_heads", "learn_sigma", "token_mixer")
        ))  # fmt: skip


@pytest.mark.slow
def test_two_processes_begin_as_one(process_server, recipe_file, tmp_path):
    source, path = made(tmp_path / "mine", token_mixer="attention"), recipe_file(train={"lr": 1e-4})
    stated = [f"train.init={source}", "train.init_anew=[blocks.1.attn]"]
    single = run_recipe(path, f"run.out={tmp_path / 'single'}", *stated)
    for steps in (5, 8):
        words = [path, *stated, f"run.out={tmp_path / 'two'}", f"train.max_steps={steps}"]
        codes, said = process_server("train_sit", tmp_path, words, {}, {})
        assert codes == [0, 0], said
        shutil.rmtree(source, ignore_errors=True)
    losses = [[row["loss"] for row in log_rows(run)] for run in (single.parent, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_plan_tells_where_the_weights_come_from(recipe_file, tmp_path):
    source = run_recipe(recipe_file("first"), f"run.out={tmp_path / 'first'}", "train.max_steps=1")
    recipe = load_recipe(recipe_file(), [f"train.init={source.parent}", "train.init_anew=[blocks.*.attn,y_embedder]"])
    (row,) = [line for line in dry_run(recipe).splitlines() if line.startswith("init ")]
    said = f"{source.parent} (ema, step 1); drawn anew: y_embedder, blocks.0.attn, blocks.1.attn"
    assert row.removeprefix("init").strip() == said


def test_other_latents_are_said(recipe_file, tmp_path, capsys, monkeypatch):
    source = run_recipe(recipe_file("first"), f"run.out={tmp_path / 'first'}", "train.max_steps=1")
    run_recipe(recipe_file(), f"train.init={source}", "train.max_steps=1", f"run.out={tmp_path / 'a'}")
    assert "other latents" not in capsys.readouterr().err
    vae = {"codec": "vae", "vae": "sd", "sha256": "0" * 64, "scale": 0.5, "shift": 0.0}
    monkeypatch.setattr(IdentityCodec, "describe", lambda self: vae)
    run_recipe(recipe_file(), f"train.init={source}", "train.max_steps=1", f"run.out={tmp_path / 'b'}")
    assert (
        'train.init was trained on other latents: {"codec": "identity", "scale": 1.0, "shift": 0.0} there, '
        '{"codec": "vae", "vae": "sd", "scale": 0.5, "shift": 0.0} here'
    ) in capsys.readouterr().err


def test_classes_of_other_names_are_said_where_their_embeddings_are_kept(recipe_file, tmp_path, capsys, monkeypatch):
    source = run_recipe(recipe_file("first"), f"run.out={tmp_path / 'first'}", "train.max_steps=1")
    monkeypatch.setattr(Digits, "class_names", (*"012", "drei", *"456789"))
    for number, (anew, said, share) in enumerate((("[]", True, "0.1"), ("[y_embedder]", False, "null"))):
        stated = (f"train.init={source}", f"train.init_anew={anew}", f"data.held_out={share}", "train.max_steps=1")
        run_recipe(recipe_file(), *stated, f"run.out={tmp_path / str(number)}")
        told = capsys.readouterr().err
        assert ("class 3 is '3' there, 'drei' here" in told) == said
        shares = f"train.init='{source}' was trained with data.held_out=null, and this run has data.held_out=0.1"
        assert (shares in told) == (share == "0.1")


def test_the_card_says_where_it_came_from(recipe_file, tmp_path):
    first = run_recipe(recipe_file("first"), f"run.out={tmp_path / 'first'}", "train.max_steps=1")
    second = run_recipe(
        recipe_file(), f"train.init={first.parent}", "train.init_anew=[y_embedder]", "train.max_steps=1"
    )
    export(open_source(second), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    digest = digest_of(load_trained(first).model.state_dict())
    assert f"- began from: first, step 1, ema, SHA-256 {digest}; drawn anew: {plain('y_embedder')}" in card
    assert str(tmp_path) not in card


def test_keys_that_do_nothing_are_refused(recipe_file):
    with pytest.raises(InputError, match=r"train\.init_anew=\['y_embedder'\] goes with train\.init; leave it out"):
        load_recipe(recipe_file(), ["train.init_anew=[y_embedder]"])
