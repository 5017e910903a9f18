"""The MeanFlow objective: its losses against ones written out sample by sample, its start, and a run."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, log_rows, run_recipe
from torch.autograd import forward_ad
from torch.func import jvp

from sit_atconv import SiTTransformer2DModel, create_model
from sit_atconv.config import load_recipe
from sit_atconv.data.digits import Digits
from sit_atconv.data.images import in_range
from sit_atconv.flow.meanflow import change
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.models.cost import count_macs
from sit_atconv.runtime.errors import InputError
from sit_atconv.training.facts import Facts
from sit_atconv.training.objectives import objective_of
from sit_atconv.training.objectives.flow import build_model
from sit_atconv.training.objectives.objective import Forward
from sit_atconv.training.origin import opened
from sit_atconv.training.plan import dry_run

DIGITS = Facts((1, 8, 8), 10, 1437)
TINY = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": False}


def noisy(model):
    """No tensor of it is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.fixture
def teacher(tmp_path):
    noisy(create_model(None, num_classes=10, patch_size=2, **TINY)).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def objective(path, *overrides):
    recipe = load_recipe(path, overrides)
    origin = opened(recipe)
    recipe = origin.completed(recipe) if origin else recipe
    made = objective_of(recipe)(recipe, DIGITS, origin)
    made.open(IdentityCodec())
    return made


def losses(objective, batch, autocast=nullcontext):
    return objective.losses(batch, Forward(objective.model, autocast, 0, 0))


def batch_of(objective, count=8):
    return objective.make_samples(Digits()).fetch(range(count))[0]


def by_hand(objective, batch, teacher=None):
    """The squared error of each sample, its target from a product along (v, 1, -1) in (x, t, s - t)."""
    settings, model, found = objective.recipe.meanflow, objective.model, []
    for index in range(len(batch["t"])):
        image, noise = in_range(batch["image"][index]), batch["noise"][index]
        t, s, label = batch["t"][index], batch["s"][index], batch["label"][index : index + 1]
        x = t * image + (1 - t) * noise

        def at(x, t, length, label=label, model=model):
            after = {} if length is None else {"timestep_r": (t + length)[None]}
            return model(x[None], t[None], label, return_dict=False, **after)[0][0]

        with torch.no_grad():
            v = image - noise if teacher is None else at(x, t, None, model=teacher)
            velocity, none = v, torch.tensor([10])
            if label != 10:
                of = model if teacher is None else teacher
                v = settings.omega * v + settings.kappa * at(x, t, None, model=of)
                v = v + (1 - settings.omega - settings.kappa) * at(x, t, None, none, of)
            assert label == 10 or settings.guidance.scale != 1 or torch.allclose(v, velocity)
            along = v if settings.tangent == "sample" else at(x, t, None)
            rate = jvp(at, (x, t, s - t), (along, torch.ones(()), -torch.ones(())))[1]
            target = v + (s - t) * rate
            found.append((at(x, t, s - t) - target).square().sum().item())
    return torch.tensor(found)


SETTINGS = {
    "plain": [],
    "guided": ["meanflow.omega=1.2", "meanflow.kappa=0.4"],
    "sharp": ["meanflow.omega=2"],
    "along the network": ["meanflow.tangent=network"],
    "taught": ["meanflow.omega=1.5", "meanflow.teacher=TEACHER"],
}


@pytest.mark.parametrize("mixer", ["atconv", "attention"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_losses_are_those_written_out(recipe_file, teacher, kind, mixer):
    path = recipe_file(meanflow={"share": 0.6}, model={"token_mixer": mixer, "class_dropout_prob": 0.4})
    made = objective(path, *(each.replace("TEACHER", str(teacher)) for each in SETTINGS[kind]))
    noisy(made.model)
    batch = batch_of(made)
    assert {10}.issubset(batch["label"].tolist())
    assert batch["apart"].tolist() == [1, 3, 4, 6]
    squared, loss = losses(made, batch)
    expected = by_hand(made, batch, SiTTransformer2DModel.from_pretrained(teacher) if kind == "taught" else None)
    torch.testing.assert_close(squared * 64, expected, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected / (expected + 1e-3), rtol=2e-4, atol=1e-6)
    loss.sum().backward()  # through the average velocity alone: the gradient of the last layer is that of the error
    assert not squared.requires_grad


@pytest.mark.parametrize("backend", ["reference", "conv", "native"])
def test_every_backend_gives_the_same_gradients(recipe_file, monkeypatch, backend):
    path = recipe_file(meanflow={"share": 1.0}, model={"token_mixer": "atconv"})
    gradients = []
    for chosen in ("auto", backend):
        monkeypatch.setenv("SIT_ATCONV_BACKEND", chosen)
        made = objective(path)
        noisy(made.model)
        losses(made, batch_of(made))[1].sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in made.model.parameters() if each.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())


def test_at_equal_times_and_its_zero_start_it_is_the_flow_to_the_bit(recipe_file):
    path = recipe_file(meanflow={"share": 1e-9, "power": 0}, model={"token_mixer": "hybrid"})
    average, flow = objective(path), objective(path, "meanflow.share=null", "meanflow.power=null")
    own, plain = average.model.state_dict(), flow.model.state_dict()
    assert own.keys() - plain.keys() == {f"r_embedder.mlp.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(own[name], plain[name]) for name in plain)  # of the same seed
    noisy(flow.model)
    average.model.load_state_dict(flow.model.state_dict(), strict=False)
    assert not average.model.r_embedder.mlp[2].weight.any()
    batch = batch_of(average)
    assert not len(batch["apart"])
    assert torch.equal(batch["s"], batch["t"])
    x, t, labels = batch["noise"], batch["t"], batch["label"]
    with torch.no_grad():
        expected = flow.model(x, t, labels).sample
        for s in (None, t, torch.ones(8)):
            assert torch.equal(average.model(x, t, labels, timestep_r=s).sample, expected)
    squared, loss = losses(average, batch)
    (wanted,) = losses(flow, batch)
    assert torch.equal(squared, wanted)
    assert torch.equal(loss, 64 * wanted)  # the sum over the numbers of a sample, not their mean


def test_the_two_times_are_two_draws_in_order_and_belong_to_the_sample(recipe_file):
    made = objective(recipe_file(meanflow={"share": 0.25}, train={"batch_size": 400}))
    samples = made.make_samples(Digits())
    whole = samples.fetch(range(400, 2000))[0]
    t, s, apart = whole["t"], whole["s"], whole["apart"]
    assert len(apart) == 400
    assert (s[apart] > t[apart]).all()
    others = torch.ones(1600, dtype=torch.bool).index_fill(0, apart, False)
    assert torch.equal(s[others], t[others])
    # The smaller and the larger of two uniform numbers: 1 - (1 - x)^2 and x^2 below x.
    for values, below in ((t, lambda x: 1 - (1 - x) ** 2), (s[apart], lambda x: x**2)):
        gap = np.abs(below(np.sort(values.numpy())) - (np.arange(len(values)) + 0.5) / len(values)).max()
        assert gap < 1.63 / len(values) ** 0.5  # Kolmogorov and Smirnov, of 1%
    part = samples.fetch(range(700, 900))[0]
    assert torch.equal(part["s"], s[300:500])
    assert torch.equal(part["t"], t[300:500])
    assert torch.equal(part["apart"] + 300, apart[(apart >= 300) & (apart < 500)])


def test_a_checkpoint_of_a_flow_is_a_start_and_gives_the_same_velocities(recipe_file, teacher, tmp_path):
    path = recipe_file(meanflow={"share": 0.5}, model={"token_mixer": "attention"}, train={"init": str(teacher)})
    made = objective(path)
    made.begin(None, None)
    source = SiTTransformer2DModel.from_pretrained(teacher)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 9])
    with torch.no_grad():
        assert torch.equal(made.model(x, t, labels, timestep_r=torch.ones(3)).sample, source(x, t, labels).sample)
    assert made.origin.record["anew"] == []
    run_recipe(path, "train.max_steps=1")
    back = recipe_file("back", model={"token_mixer": "attention"}, train={"init": str(tmp_path / "run")})
    with pytest.raises(
        InputError, match=r"average velocities \(MeanFlow\) there, velocities here.*meanflow\.share=0\.25"
    ):
        objective(back)
    for key, value in (("lora.rank", 2), ("repa.encoder", "x")):  # which a MeanFlow model does not go with
        with pytest.raises(InputError, match=rf"\(MeanFlow\), and {key}={value} goes with a flow alone; begin with a "):
            objective(back, f"{key}={value}")


RUN = {
    "meanflow": {"share": 0.5, "omega": 1.2, "kappa": 0.3}, "data": {"flip": True},
    "train": {"max_steps": 12, "lr": 1e-3}, "checkpoint": {"every": 5},
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one(process_server, recipe_file, tmp_path):
    path = recipe_file(**RUN)
    single = run_recipe(path, f"run.out={tmp_path / 'single'}")
    codes, said = process_server("train_sit", tmp_path, [path, f"run.out={tmp_path / 'two'}"], {}, {})
    assert codes == [0, 0], said
    for a, b in zip(log_rows(single.parent), log_rows(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["weighted_loss"] == pytest.approx(a["weighted_loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_run_goes_on_to_the_same_bits(recipe_file, tmp_path):
    path = recipe_file(**RUN)
    single = run_recipe(path, f"run.out={tmp_path / 'single'}")
    for steps in (7, 12):
        run_recipe(path, f"run.out={tmp_path / 'parts'}", f"train.max_steps={steps}")
    assert_same_bits(single, tmp_path / "parts/step-0000012")
    config = json.loads((single / "ema/config.json").read_text())
    assert (config["use_meanflow"], config["trained_guidance"]) == (True, pytest.approx(1.2 / 0.7))


def test_its_plan_tells_of_attention_and_of_what_a_step_costs(recipe_file, teacher):
    path = recipe_file(meanflow={"share": 0.25, "omega": 1.0, "kappa": 0.5}, model={"token_mixer": "atconv"})
    told = dry_run(load_recipe(path))
    # Forward and backward 3, a quarter of 2 for the change, one more for each of the class and none.
    assert "25% of the samples with two times; guidance 2 is learned; a step computes 1.83 of the flow's" in told
    assert "attention" not in told.replace(str(path), "")
    told = dry_run(load_recipe(path, ["model.token_mixer=hybrid", "train.batch_size=512"]))
    # 128 samples of 2 heads and 16 x 16 scores of 4 bytes.
    assert "the scores of a layer (16 x 16) are 0.25 MiB" in told


@pytest.mark.parametrize("kind", [*SETTINGS, "along the network, guided"])
def test_the_cost_is_that_of_the_evaluations_there_are(recipe_file, teacher, kind):
    """Forward passes, by the samples in them: that of the gradient counts three times, that of a tangent twice."""
    settings = {**SETTINGS, "along the network, guided": [*SETTINGS["guided"], *SETTINGS["along the network"]]}[kind]
    path = recipe_file(meanflow={"share": 0.5}, model={"token_mixer": "attention"})
    made = objective(path, *(each.replace("TEACHER", str(teacher)) for each in settings))
    seen = []

    def note(module, given):
        seen.append(len(given[0]) * (3 if torch.is_grad_enabled() else 2 if forward_ad._current_level >= 0 else 1))

    for model in filter(None, (made.model, made.teacher)):
        model.register_forward_pre_hook(note)
    losses(made, batch_of(made))
    assert made.flops_per_image == pytest.approx(2 * count_macs(made.model) * sum(seen) / 8, rel=0.02)
    told = f"{made.flops_per_image / (6 * count_macs(made.model)):.2f}"
    assert f"a step computes {told} of the flow's" in made.rows()["MeanFlow"]
    assert (made.describe().get("meanflow_teacher") is None) == (kind != "taught")


@pytest.mark.parametrize("backend", ["reference", "conv", "native"])
@pytest.mark.parametrize("mixer", ["atconv", "attention"])
def test_the_change_of_a_model_is_that_of_differences(monkeypatch, backend, mixer):
    """Along (v, 1) at fixed s. t is fp32 in a model: it takes steps that fp32 knows exactly."""
    monkeypatch.setenv("SIT_ATCONV_BACKEND", backend)
    model = noisy(create_model(None, num_classes=10, patch_size=2, token_mixer=mixer, use_meanflow=True, **TINY))
    model = model.double()
    generator = torch.Generator().manual_seed(4)
    x, v = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64, generator=generator)
    t, s, labels = torch.tensor([8, 24, 40]) / 64, torch.tensor([16, 60, 64]) / 64, torch.tensor([1, 10, 3])

    def average(x, t, s):
        return model(x, t, labels, return_dict=False, timestep_r=s)[0]

    with torch.no_grad():
        ends = [average(x + step * v, t + step, s) for step in (1 / 256, -1 / 256)]
    expected = (ends[0] - ends[1]) * 128
    found = change(average, x, t, s, v)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_plain_blocks(recipe_file, how):
    keys = {"checkpointed": "gradient_checkpointing", "compiled": "compile"}
    path, found = recipe_file(meanflow={"share": 0.5, "tangent": "network"}), []
    for overrides in ([], [f"train.{keys[how]}=true"]):
        made = objective(path, *overrides)
        noisy(made.model)
        made.prepare()
        _, loss = losses(made, batch_of(made))
        loss.sum().backward()
        found.append([loss, *(each.grad for each in made.model.parameters() if each.grad is not None)])
    assert len(found[0]) == len(found[1])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_a_teacher_of_another_codec_or_of_other_classes_is_refused(recipe_file, tmp_path, teacher):
    last = run_recipe(recipe_file("flow", model={"token_mixer": "attention"}, train={"max_steps": 1}))
    path = recipe_file(meanflow={"share": 0.5, "teacher": str(last)}, run={"out": str(tmp_path / "other")})
    made = objective(path)
    digits = Digits()
    made.make_samples(digits)
    made.taught.manifest["data"]["classes"] = ["nought", *digits.class_names[1:]]
    digits.class_names = ["zero", *digits.class_names[1:]]
    with pytest.raises(InputError, match=r"meanflow\.teacher=.*its class 0 is 'nought', the model's 'zero'"):
        made.make_samples(digits)

    class Scaled(IdentityCodec):
        def describe(self):
            return {"name": "vae", "scale": 2.0}

    with pytest.raises(InputError, match=r"meanflow\.teacher=.*its latents are of a codec with"):
        made.open(Scaled())


def test_a_small_share_comes_to_its_turn(recipe_file):
    made = objective(recipe_file(meanflow={"share": 0.03}))
    samples = made.make_samples(Digits())
    places = [samples.fetch(range(first, first + 8))[0]["apart"].tolist() for first in range(0, 400, 8)]
    assert sum(map(len, places)) == 12
    assert len({each for some in places for each in some}) > 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["meanflow.power=1"], r"meanflow\.power does nothing without meanflow\.share"),
        (["meanflow.share=0"], r"meanflow\.share=0\.0: must be over 0"),
        (
            ["meanflow.share=0.5", "lora.rank=2", "train.init=x"],
            r"with lora\.rank: .*; state lora\.rank=null or meanflow\.share=null$",
        ),
        (["meanflow.share=0.5", "repa.encoder=x"], r"meanflow\.share=0\.5 with repa\.encoder"),
        (["meanflow.share=0.5", "flow.prediction=noise"], r"with flow\.prediction=noise"),
        (["meanflow.share=0.5", "meanflow.kappa=1"], r"meanflow\.kappa=1\.0: must be at least 0 and under 1"),
        (["meanflow.share=0.5", "meanflow.teacher=x", "meanflow.kappa=0.1"], r"meanflow\.kappa=0\.1 with meanflow\.te"),
        (["meanflow.share=0.5", "meanflow.teacher=x", "meanflow.tangent=network"], r"meanflow\.tangent=network with"),
        (["meanflow.share=0.5", "meanflow.teacher=NOISE"], r"predicts noise; give a flow that predicts the velocity"),
        (["meanflow.share=0.5", "meanflow.teacher=OTHER"], r"sample_size=\[16, 16\]"),
        (["meanflow.share=0.5", "meanflow.teacher=NONE"], r"has no null class, and labels are dropped here"),
        (["meanflow.share=0.5", "meanflow.omega=2", "model.class_dropout_prob=0"], r"the rest to 1 is of no class"),
    ],
)
def test_what_does_nothing_or_does_not_fit_is_refused(recipe_file, tmp_path, overrides, said):
    for name, options in (
        ("NOISE", {"prediction": "noise"}),
        ("OTHER", {"sample_size": 16}),
        ("NONE", {"class_dropout_prob": 0.0}),
    ):
        create_model(None, num_classes=10, patch_size=2, **(TINY | options)).save_pretrained(tmp_path / name)
        overrides = [each.replace(f"={name}", f"={tmp_path / name}") for each in overrides]
    with pytest.raises(InputError, match=said):
        objective(recipe_file(), *overrides)


@pytest.mark.parametrize("omega", [0.7, 0.9, 0.93])
def test_shares_that_sum_to_one_need_no_null_class_whatever_their_rounding(recipe_file, omega):
    stated = {"share": 0.5, "omega": omega, "kappa": round(1 - omega, 2)}
    made = objective(recipe_file(meanflow=stated, model={"class_dropout_prob": 0.0}))
    assert made.model.config.trained_guidance == 1
    assert torch.isfinite(losses(made, batch_of(made))[1]).all()


def test_the_model_refuses_what_is_no_average_velocity(recipe_file):
    options = {"num_classes": 10, "patch_size": 2, **TINY}
    for wrong in ({"use_meanflow": True, "prediction": "noise"}, {"use_meanflow": True, "path": "ddpm"}):
        with pytest.raises(InputError, match="use_meanflow with path="):
            create_model(None, **options, **wrong)
    with pytest.raises(InputError, match=r"trained_guidance=2: only a MeanFlow model has it"):
        create_model(None, **options, trained_guidance=2)
    with pytest.raises(ValueError, match="timestep_r is for a MeanFlow model"):
        create_model(None, **options)(torch.zeros(1, 1, 8, 8), 0.0, torch.tensor([0]), timestep_r=1.0)


def test_losses_under_autocast_are_near(recipe_file):
    made = objective(recipe_file(meanflow={"share": 1.0}, model={"token_mixer": "hybrid"}))
    noisy(made.model)
    batch = batch_of(made)
    exact, near = (
        losses(made, batch, autocast)[0] for autocast in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16))
    )
    torch.testing.assert_close(near, exact, rtol=0.1, atol=0.02)


def test_the_flow_model_builds_as_before(recipe_file):
    config = build_model(load_recipe(recipe_file()), DIGITS).config
    assert (config.use_meanflow, config.trained_guidance) == (False, 1.0)
