"""Distillation in the loop: what each step trains and by which loss, resumed to the bit, refused where it cannot be."""

import copy
import json
import shutil
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import assert_same_bits, log_rows, run_recipe, weights, write_recipe
from sampled import sampled

from experiments import distill_swap
from sit_atconv import SiTTransformer2DModel
from sit_atconv.config import Distill, load_recipe, make_recipe
from sit_atconv.data.digits import Digits
from sit_atconv.latents.encode import encode
from sit_atconv.layers.attention import Attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.checkpoint import load_trained
from sit_atconv.training.objectives.distill import (
    Distillation,
    load_teacher,
    relative_error,
    rising,
    student_of,
    swapped_names,
)
from sit_atconv.training.optimizer import make_optimizer

MODEL = {"token_mixer": "attention", "depth": 3}
DISTILL = {
    "blockwise_steps": 3, "share_steps": 2, "shares": [0.5, 1.0], "calib": 12,
    "output_weight": 0.7, "feature_weight": 0.2,
}  # fmt: skip
ATTENTIONS = [f"blocks.{index}.attn" for index in range(3)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return run_recipe(write_recipe(tmp_path_factory.mktemp("taught"), model=MODEL), "train.max_steps=20")


@pytest.fixture
def teacher(taught, tmp_path):
    """A copy of what was taught once."""
    return shutil.copytree(taught.parent, tmp_path / "teacher") / taught.name


@pytest.fixture
def recipe(recipe_file, teacher):
    path = recipe_file(distill={"teacher": str(teacher), **DISTILL}, flow={"time_stratified": True})
    stated = path.read_text()
    start = stated.index("model:")
    end = stated.index("\n", stated.index("token_mixer")) + 1
    path.write_text(stated[:start] + stated[end:])
    return path


def parts(recipe, **changes):
    settings = load_recipe(recipe)
    for key, value in changes.items():
        setattr(settings.distill, key, value)
    teacher = load_trained(settings.distill.teacher).model
    student = student_of(teacher, settings.distill, settings.run.seed)
    return settings, teacher, student, Distillation(student, teacher, settings.distill)


def batch_of(step: int, size: int = 8):
    samples = sampled(Digits("train"), (1, 8, 8), size, drop=0.1, flow={"time_stratified": True})
    batch, _ = samples.fetch(range(size * step, size * step + size))
    t = batch["t"][:, None, None, None]
    return batch, t * batch["image"] + (1 - t) * batch["noise"]


def test_times_are_stratified():
    for step in range(3):
        t = batch_of(step, 16)[0]["t"]
        assert (t * 16).floor().tolist() == list(range(16))
    assert batch_of(1, 16)[0]["t"][5] != batch_of(2, 16)[0]["t"][5]


def test_the_run_equals_a_loop_written_out(recipe):
    settings, teacher, student, distillation = parts(recipe)
    calibration = []
    samples = sampled(Digits("train"), (1, 8, 8), 8, drop=0.1, flow={"time_stratified": True})
    for positions in (range(8), range(8, 12)):
        batch, _ = samples.fetch(positions)
        t = batch["t"][:, None, None, None]
        calibration.append((t * batch["image"] + (1 - t) * batch["noise"], batch["t"], batch["label"]))
    distillation.start(calibration)
    optimizer = make_optimizer(student, settings.train)
    expected = []
    for step in range(7):
        batch, x = batch_of(step)
        captured, hidden = {}, {"teacher": [], "student": []}
        handles = [
            module.register_forward_hook(
                lambda _, args, output, name=name, to=captured: to.update({name: (args[0], output)})
            )
            for name, module in teacher.named_modules()
            if isinstance(module, Attention)
        ]
        for which, model in (("teacher", teacher), ("student", student)):
            for block in model.blocks:
                handles.append(block.register_forward_hook(lambda _, __, out, to=hidden[which]: to.append(out)))
        with torch.no_grad():
            wanted = teacher(x, batch["t"], batch["label"]).sample
        if step < 3:
            losses = []
            for name in ATTENTIONS:
                x, output = captured[name]
                own = student.get_submodule(name)(x)
                losses.append((own - output).square().sum((1, 2, 3)) / output.square().sum((1, 2, 3)))
            row = [None, None, None, torch.stack(losses).mean()]
            loss = row[3]
        else:
            mixed = student
            if step < 5:  # half of three layers
                mixed = copy.copy(student)
                for name in (ATTENTIONS[0], ATTENTIONS[2]):
                    student.get_submodule(name).forward = teacher.get_submodule(name).forward
            velocity = mixed(x, batch["t"], batch["label"]).sample
            for name in ATTENTIONS:
                student.get_submodule(name).__dict__.pop("forward", None)
            own = (velocity - (batch["image"] - batch["noise"])).square().mean()
            output = relative_error(velocity, wanted).mean()
            features = torch.stack(
                [relative_error(a, b).mean() for a, b in zip(hidden["student"], hidden["teacher"], strict=True)]
            ).mean()
            row, loss = [own, output, features, None], own + 0.7 * output + 0.2 * features
        for handle in handles:
            handle.remove()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append([value if value is None else value.item() for value in row])
    last = run_recipe(recipe, "train.max_steps=7")
    rows = log_rows(last.parent)
    names = ("loss", "output_loss", "feature_loss", "layer_loss")
    for row, wanted in zip(rows, expected, strict=True):
        assert [row[name] for name in names] == [value and pytest.approx(value, rel=1e-4) for value in wanted]
        assert (row["flops_per_second"], row["peak_share"]) == (None, None)
    stored = weights(last, "model")
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-3, atol=1e-5)


def test_progress_shows_the_loss_that_a_step_has(recipe, capsys, monkeypatch):
    monkeypatch.setattr("sit_atconv.runtime.console.EVERY", 0)
    last = run_recipe(recipe, "train.max_steps=6")
    said = capsys.readouterr().err
    assert "nan" not in said
    for row in log_rows(last.parent):
        name = "layer_loss" if row["step"] <= 3 else "loss"
        assert f"step {row['step']} of 6, {name} {row[name]:.4f}, " in said


def test_relative_error_is_of_every_sample():
    theirs = torch.tensor([[[3.0, 4.0]], [[6.0, 8.0]]])
    ours = theirs + torch.tensor([[[0.0, 5.0]], [[5.0, 0.0]]])
    torch.testing.assert_close(relative_error(ours, theirs), torch.tensor([1.0, 0.25]))


def test_layers_alone_are_trained_first_and_the_teacher_never(recipe, teacher):
    before = weights(teacher)
    first = run_recipe(recipe, "checkpoint.every=1", "checkpoint.keep_last=9", "train.max_steps=6")
    started, blockwise = (weights(first.parent / f"step-000000{step}", "model") for step in (1, 3))
    for name, tensor in weights(first, "model").items():
        if ".attn." not in name:
            assert torch.equal(blockwise[name], before[name]), name
            assert not torch.equal(tensor, blockwise[name]) or name == "pos_embed"
        else:
            assert not torch.equal(blockwise[name], started[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(teacher).items())


def test_blocks_that_are_checkpointed_give_the_same_gradients(recipe):
    gradients = []
    for checkpointed in (False, True):
        _, _, student, distillation = parts(recipe)
        if checkpointed:
            student.enable_gradient_checkpointing()
        batch, x = batch_of(0)
        output, *losses, _ = distillation(x, batch["t"], batch["label"], 3)
        (output.square().mean() + (losses[0] + losses[1]).sum()).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name}: DDP would wait for it"
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    idle = [name for name in gradients[0] if name.startswith((ATTENTIONS[0], ATTENTIONS[2]))]
    assert idle
    assert all(not gradients[0][name].any() for name in idle)
    assert gradients[0]["blocks.1.attn.x_proj.weight"].any()


def test_a_restart_goes_on_to_the_same_bits(recipe, teacher, tmp_path):
    whole = run_recipe(recipe, "checkpoint.every=1", "checkpoint.keep_last=9", f"run.out={tmp_path / 'whole'}")
    moved = tmp_path / "moved"
    moved.mkdir()
    teacher.rename(moved / teacher.name)  # wherever it lies, it is the same teacher
    for stop in (2, 4):  # of the layers alone, and of half of them in the model
        part = tmp_path / f"part-{stop}"
        later = [f"step-{step:07d}" for step in range(stop + 1, 9)]
        shutil.copytree(whole.parent, part, ignore=shutil.ignore_patterns(*later))
        last = run_recipe(recipe, f"distill.teacher={moved / teacher.name}", f"run.out={part}")
        assert_same_bits(whole, last)
        assert [row["step"] for row in log_rows(part)] == list(range(1, 9))


def test_the_student_is_a_sit_like_any_other(recipe):
    last = run_recipe(recipe, "distill.select=odd")
    model = load_trained(last).model
    assert type(model) is SiTTransformer2DModel
    assert model.config.token_mixer == ["attention", "atconv", "attention"]
    manifest = json.loads((last / "manifest.json").read_text())
    assert len(manifest["teacher"]["fingerprint"]) == 64


def test_the_first_stage_has_a_rate_of_its_own(recipe):
    last = run_recipe(recipe, "distill.blockwise_lr=0.003", "train.lr=0.001", "train.lr_schedule=constant")
    rates = [row["lr"] for row in log_rows(last.parent)]
    assert rates[:3] == [0.003] * 3
    assert set(rates[3:]) == {0.001}


def test_the_control_has_fresh_attention(recipe):
    _, teacher, student, _ = parts(recipe, control=True, init="random", select="odd")
    fresh, old = student.blocks[1].attn, teacher.blocks[1].attn
    assert isinstance(fresh, Attention)
    assert not torch.equal(fresh.qkv.weight, old.qkv.weight)
    assert torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)
    last = run_recipe(recipe, "distill.control=true", "distill.init=random")
    assert load_trained(last).model.config.token_mixer == "attention"


def test_the_closed_form_starts_nearer_than_a_random_one(recipe):
    first = {}
    for init in ("closed_form", "copy_vo", "random"):
        last = run_recipe(recipe, f"distill.init={init}", "train.max_steps=6", f"run.out={recipe.parent / init}")
        first[init] = log_rows(last.parent)[0]["layer_loss"]
    assert first["closed_form"] < first["copy_vo"] < first["random"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distill.teacher=/nowhere", "no such folder"),
        ("distill.select=blocks.7", "leave nothing to swap"),
        ("distill.select=auto", "does not depend on a clock"),
        ("distill.shares=[1.0,0.5]", "rising shares"),
        ("distill.shares=[0.5]", "the last must be 1"),
        ("distill.init=warm", "distill.init='warm'"),
        ("distill.control=true", "starts at random"),
        (("distill.control=true", "distill.init=random", "distill.pool=grid"), "do nothing with distill.control"),
        (("distill.control=true", "distill.init=random", "distill.kernel_size=5"), "do nothing with distill.control"),
        ("distill.blockwise_steps=8", "must be less than train.max_steps"),
        ("distill.share_steps=5", "all layers would take part from step 8 on"),
        ("distill.select=null", "distill.select=None"),
        ("data.image_size=16", "data.image_size"),
        ("model.depth=3", "the model is the teacher's copy"),
        ("train.compile=true", "its layers change places"),
        ("flow.path=gvp", "has path 'linear'"),
        ("data.root=.", "data."),
    ],
)
def test_what_cannot_be_distilled_is_one_line(recipe, fails, override, said):
    overrides = (override,) if isinstance(override, str) else override
    assert said in fails(distill_swap.main, recipe, *overrides)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("number", range(1, 13))
def test_shares_rise_layer_by_layer(number):
    names, shares = [f"layer{index}" for index in range(number)], [0.1, 0.34, 0.5, 0.75, 1.0]
    sets = rising(names, shares)
    assert all(first <= second for first, second in pairwise(sets))
    assert [len(each) for each in sets] == [max(1, int(share * number + 1e-9)) for share in shares]
    assert sets[-1] == set(names)
    if number % 4 == 0:
        assert sets[2] == set(names[1::2])
        assert sets[3] == set(names) - set(names[::4])


def test_layers_can_be_left_out(recipe):
    last = run_recipe(recipe, "distill.exclude=[blocks.0]", "train.max_steps=6")
    assert load_trained(last).model.config.token_mixer == ["attention", "atconv", "atconv"]


def test_a_teacher_of_other_data_or_without_attention_is_refused(recipe, recipe_file, tmp_path, image_folder):
    distilled = run_recipe(recipe, "train.max_steps=6", f"run.out={tmp_path / 'distilled'}")
    with pytest.raises(InputError, match="has no attention to distil"):
        run_recipe(recipe, f"distill.teacher={distilled}")
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8}
    other = run_recipe(recipe_file("folder", model=MODEL, data=data), f"run.out={tmp_path / 'o'}", "train.max_steps=1")
    with pytest.raises(InputError, match="has in_channels 3"):
        run_recipe(recipe, f"distill.teacher={other}")
    for key, said in (("class_names", "has num_classes 10"), ("size", r"has sample_size \(8, 8\)")):
        settings = load_recipe(recipe)
        shape, classes = ((1, 8, 8), 7) if key == "class_names" else ((1, 16, 8), 10)
        with pytest.raises(InputError, match=said):
            load_teacher(settings, shape, classes)


@pytest.mark.parametrize(("option", "value"), [("path", "gvp"), ("prediction", "noise")])
def test_a_teacher_of_another_flow_is_refused(tmp_path, option, value):
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 1, "num_heads": 2}
    SiTTransformer2DModel(**sizes, **{option: value}).save_pretrained(tmp_path)
    recipe = make_recipe({"run": {"out": "unused"}, "distill": {"teacher": str(tmp_path)}})
    with pytest.raises(InputError, match=f"has {option} {value!r}, data, codec and flow say"):
        load_teacher(recipe, (1, 8, 8), 10)


def test_another_teacher_is_refused(recipe, recipe_file, tmp_path, fails):
    run_recipe(recipe, "train.max_steps=6")
    other = run_recipe(
        recipe_file("other", model=MODEL), f"run.out={tmp_path / 'other'}", "train.max_steps=1", "run.seed=5"
    )
    with pytest.raises(InputError, match=r"distill\.teacher=.*other weights"):
        run_recipe(recipe, f"distill.teacher={other}")


def test_the_command_wants_a_teacher_and_the_section_needs_one(recipe_file, recipe, fails):
    assert "distill.teacher is missing" in fails(distill_swap.main, recipe_file("plain", run={"out": "/tmp/none"}))
    with pytest.raises(InputError, match=r"distill\.calib does nothing without distill\.teacher"):
        load_recipe(recipe_file("idle", distill={"calib": 3}))


def test_the_plan_of_a_distillation(recipe, teacher, capsys):
    def planned(*overrides):
        distill_swap.main([str(recipe), *overrides, "--dry-run"])
        rows = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        return {name: text for name, text in rows if name in ("model", "teacher")}

    assert planned() == {
        "model": "['atconv', 'atconv', 'atconv'], depth 3, hidden_size 16, patch_size 2",
        "teacher": f"{teacher}; 3 of 3 layers to ATConv, started by closed_form: " + ", ".join(ATTENTIONS),
    }
    one = planned("distill.select=odd", "distill.init=copy_vo")["teacher"]
    assert one == f"{teacher}; 1 of 3 layers to ATConv, started by copy_vo: {ATTENTIONS[1]}"
    control = planned("distill.control=true", "distill.init=random", "distill.exclude=[blocks.0]")["teacher"]
    assert control == f"{teacher}; 2 of 3 layers to fresh attention (a control): {', '.join(ATTENTIONS[1:])}"
    distill_swap.main([str(recipe), "data.held_out=0.1", "--dry-run"])
    assert "was trained with data.held_out=null, and this run has data.held_out=0.1" in capsys.readouterr().err


def test_from_cached_latents_as_from_their_images(recipe_file, image_folder, vae_folder, tmp_path):
    images = {
        "data": {"kind": "imagefolder", "root": str(image_folder), "image_size": 8},
        "latents": {"codec": "vae", "vae": str(vae_folder)},
    }
    plain = recipe_file("images", model={**MODEL, "patch_size": 1}, **images)
    encode(load_recipe(plain), tmp_path / "cache", "fp32", 4)
    teacher = run_recipe(plain, f"run.out={tmp_path / 'teacher'}")
    distilled = {}
    for name in ("images", "latents"):
        path = recipe_file(name, distill={"teacher": str(teacher), **DISTILL}, **images)
        stated = yaml.safe_load(path.read_text())
        del stated["model"]
        if name == "latents":
            stated["data"] = {"kind": "latents", "root": str(tmp_path / "cache")}
            stated["latents"]["vae"] = None
        path.write_text(yaml.safe_dump(stated))
        last = run_recipe(path, f"run.out={tmp_path / f'from-{name}'}")
        distilled[name] = [row["loss"] or row["layer_loss"] for row in log_rows(last.parent)]
    assert len(distilled["latents"]) == 8
    assert distilled["latents"] == pytest.approx(distilled["images"], rel=1e-4)


def test_in_half_precision_the_losses_differ_by_rounding(recipe, tmp_path):
    rows = {}
    for each in ("fp32", "bf16"):
        last = run_recipe(recipe, f"train.precision={each}", f"run.out={tmp_path / each}")
        rows[each] = log_rows(last.parent)
        assert all(tensor.dtype == torch.float32 for tensor in weights(last, "model").values())
    for name, count in (("layer_loss", 3), ("feature_loss", 5), ("output_loss", 5), ("loss", 5)):
        whole, half = ([row[name] for row in rows[each] if row[name] is not None] for each in ("fp32", "bf16"))
        assert len(whole) == len(half) == count
        assert half == pytest.approx(whole, rel=0.05, abs=2e-5), name
        assert half != whole


@pytest.mark.parametrize(("select", "layers"), [("even", [0, 2]), ("all", [0, 2]), (0.5, [2])])
def test_even_counts_the_blocks_of_a_hybrid_teacher(select, layers):
    teacher = SiTTransformer2DModel(
        sample_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=10, token_mixer="hybrid"
    )
    settings = Distill(select=select)
    assert swapped_names(teacher, settings) == [f"blocks.{index}.attn" for index in layers]
    with pytest.raises(InputError, match="leave nothing to swap"):
        swapped_names(teacher, Distill(select="odd"))
