"""Models of average velocities (MeanFlow) in what samples, stores and refuses."""

import json
import re
from itertools import pairwise

import pytest
import torch
from conftest import run_recipe
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.__main__ import main as command
from sit_atconv.config import load_recipe, to_dict
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.pipelines.card import model_card
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling.noise import noise
from sit_atconv.sampling.sampling import generate, sample_latents
from sit_atconv.sampling.settings import Sampling
from sit_atconv.sampling.trained import describe_training
from sit_atconv.training.checkpoint import load_trained
from sit_atconv.training.drawing import open_drawing
from sit_atconv.training.objectives.distill import load_teacher

LABELS = torch.tensor([1, 2])
CARD = (torch.float32, "x", "mit", set())
NOISE = noise((3, 4, 4), 5, Stream.SAMPLE_NOISE, [3, 8])


def made(seed: int = 0, **options) -> SiTTransformer2DModel:
    torch.manual_seed(seed)
    sizes = {"in_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "token_mixer": "hybrid"}
    model = create_model(None, 4, 3, **sizes | {"use_meanflow": True} | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def drawn(model, settings: Sampling) -> tuple[torch.Tensor, int]:
    return sample_latents(model, [3, 8], LABELS, settings.for_model(model), 5)


def test_one_step_adds_the_average_velocity_to_the_noise():
    model = made()
    with torch.no_grad():
        expected = NOISE + model(NOISE, 0.0, LABELS, timestep_r=1.0).sample
        assert (expected - NOISE - model(NOISE, 0.0, LABELS).sample).abs().max() > 0.1  # the velocity is another
    assert torch.equal(drawn(model, Sampling())[0], expected)
    assert sample_latents(model, [3, 8], LABELS, Sampling(), 5)[1] == 1  # settled or not


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 2.0, "guidance_interval": [0.25, 0.6]}], ids=["", "guided"]
)
def test_steps_lead_from_time_to_time_and_guidance_acts_at_the_first_of_both(path, settings):
    model, x, calls = made(path=path), NOISE, 0
    for t, s in pairwise([0.0, 0.25, 0.5, 0.75, 1.0]):
        with torch.no_grad():
            u = model(x, t, LABELS, timestep_r=s).sample
            calls += 1
            if settings and 0.25 <= t <= 0.6:
                none = model(x, t, torch.full_like(LABELS, 3), timestep_r=s).sample
                u, calls = none + 2 * (u - none), calls + 1
        x = x + (s - t) * u
    found, nfe = drawn(model, Sampling(steps=4, **settings))
    assert nfe == calls == (6 if settings else 4)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_what_fits_a_flow_fits_no_average_velocity():
    average, flow = made(), made(use_meanflow=False)
    assert (Sampling().steps, Sampling().guidance_scale) == (None, None)
    for model, fits in ((average, (1, 1.0)), (flow, (50, 1.5))):
        settled = Sampling().for_model(model)
        assert (settled.steps, settled.guidance_scale) == fits == (settled.describe()["steps"], fits[1])
        asked = Sampling(steps=7, guidance_scale=3).for_model(model)
        assert (asked.steps, asked.guidance_scale) == (7, 3)
    assert average.config.trained_guidance == 1


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        *(({}, {"sampler": name}, f"sampler={name}: .* only euler follows.*use sampler=euler")
          for name in ("heun", "rk4", "dopri5", "euler-maruyama")),
        ({"trained_guidance": 3.0}, {"guidance_scale": 2}, "guidance_scale=2: this model has guidance 3 in its "),
        ({"class_dropout_prob": 0.0}, {"guidance_scale": 2}, "guidance_scale=2 needs a null class"),
        ({}, {"guidance_channels": "first3"}, "guidance_channels=first3: guidance_scale=1 is this model's default"),
        ({}, {"guidance_every": 2, "guidance_scale": 1}, "guidance_every=2: with guidance_scale=1 nothing is guided"),
        ({}, {"guide": {"use_meanflow": False}}, "guide: the model that it is to guide predicts average velocities"),
        ({"use_meanflow": False}, {"guide": {}}, "guide: it predicts average velocities .*leave the guide out"),
    ],
)  # fmt: skip
def test_what_average_velocities_do_not_go_with_is_refused_before_the_work(model, settings, says):
    model = made(**model)
    if "guide" in settings:
        settings = settings | {"guide": made(1, **settings["guide"])}
    model.forward = None  # not to be called
    with pytest.raises(InputError, match=says):
        generate(model, IdentityCodec(), [0], [0], Sampling(**settings))


def pipeline(model=None, scheduler=None, **options) -> SiTPipeline:
    pipe = SiTPipeline(model or made(), scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_draws_what_the_sampler_draws_and_again_when_saved(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    again = SiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for settings in ({}, {"steps": 2}, {"steps": 4, "guidance_scale": 2.0, "guidance_interval": [0.2, 0.6]}):
        expected, nfe = drawn(pipe.transformer, Sampling(**settings))
        asked = {"num_inference_steps" if name == "steps" else name: value for name, value in settings.items()}
        for one in (pipe, again):
            assert torch.equal(one(LABELS, latents=NOISE, output_type="latent", **asked).images, expected)
            assert one.nfe == nfe
    # Steps of other lengths lead to the next level, the last one to the data.
    model, x = pipe.transformer, NOISE
    with torch.no_grad():
        x = x + 0.75 * model(x, 0.0, LABELS, timestep_r=0.75).sample
        x = x + 0.25 * model(x, 0.75, LABELS, timestep_r=1.0).sample
    found = pipe(LABELS, latents=NOISE, output_type="latent", sigmas=[1.0, 0.25]).images
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(), FlowMatchLCMScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=["heun", "lcm", "stochastic"],
)  # fmt: skip
def test_another_scheduler_is_refused_at_once_and_when_swapped_in(scheduler):
    says = f"{type(scheduler).__name__} does not follow average velocities.* use FlowMatchEulerDiscreteScheduler"
    with pytest.raises(InputError, match=says):
        pipeline(scheduler=scheduler)
    pipe = pipeline()
    pipe.scheduler, pipe.transformer.forward = scheduler, None
    with pytest.raises(InputError, match=says):
        pipe(1)


def test_the_pipeline_refuses_a_guide_and_guidance_upon_guidance():
    with pytest.raises(InputError, match="guide: the model that it is to guide predicts average velocities"):
        pipeline(guide=made(1, use_meanflow=False))
    with pytest.raises(InputError, match="guide: it predicts average velocities"):
        pipeline(made(use_meanflow=False), guide=made(1))
    pipe = pipeline(made(trained_guidance=3.0))
    with pytest.raises(InputError, match=r"guidance_scale=1\.5: this model has guidance 3 in its weights"):
        pipe(1, guidance_scale=1.5)

    def more(pipe, *_) -> dict:
        pipe._guidance_scale = 2.0
        return {}

    with pytest.raises(InputError, match="guidance_scale=2: this model has guidance 3"):
        pipe(1, 2, output_type="latent", callback_on_step_end=more)


def test_the_pipeline_refuses_settings_of_guidance_beside_its_default_of_none():
    pipe = pipeline()
    for name, value in (("guidance_interval", (0.2, 0.4)), ("guidance_every", 2), ("guidance_batches", 2)):
        with pytest.raises(InputError, match=f"{name}=.*guidance_scale=1 is this model's default"):
            pipe(1, output_type="latent", **{name: value})
    # A scale that is stated may be changed by a callback.
    assert pipe(1, guidance_scale=1.0, guidance_every=2, output_type="latent").images.shape == (1, 3, 4, 4)
    flow = pipeline(made(use_meanflow=False))
    flow(1, 3, guidance_every=2, output_type="latent")
    assert flow.nfe == 5  # guided by default


def test_what_is_recorded_of_it_is_what_its_run_says_and_its_guidance_without_one(tmp_path):
    made(trained_guidance=2.0).save_pretrained(tmp_path)
    trained = load_trained(tmp_path)
    nobody = {"share": None, "guidance": 2.0, "tangent": None, "teacher": None}
    assert describe_training(trained)["meanflow"] == nobody
    for teacher in (None, "x"):
        said = {"share": 0.25, "tangent": "network", "teacher": teacher}
        trained.manifest["recipe"] = {"meanflow": said}
        own = said | {"guidance": 2.0, "teacher": teacher is not None}
        assert describe_training(trained)["meanflow"] == own


def test_the_card_says_how_it_is_used():
    card = model_card(pipeline(made(trained_guidance=3.0)), {}, *CARD)
    row = next(line for line in card.splitlines() if line.startswith("| MeanFlow |"))
    assert "average velocity" in row
    assert "steps 1, 2 or 4; guidance trained in: 3 |" in row
    assert "num_inference_steps=1, guidance_scale=1.0," in card
    assert "the average velocity from t to timestep_r" in card
    assert "guidance trained in" not in model_card(pipeline(), {}, *CARD)


def test_the_card_says_how_it_was_trained_and_no_path():
    manifest = {
        "data": {"num_images": 8, "classes": ["a"]}, "step": 1, "images_seen": 8,
        "versions": dict.fromkeys(("sit_atconv", "torch", "diffusers"), "1"),
    }  # fmt: skip
    stated = ["meanflow", "meanflow.omega=3", "meanflow.teacher=/where/it/lies"]
    cards = [
        model_card(pipeline(model), manifest | {"recipe": to_dict(load_recipe("digits", each))}, *CARD)
        for model, each in ((made(trained_guidance=3.0), stated), (made(), stated[:1]), (made(use_meanflow=False), []))
    ]
    told = [[line for line in card.splitlines() if line.startswith("- MeanFlow")] for card in cards]
    said = "- MeanFlow: two times in a share of 0.25, tangent sample, guidance {}, velocity of {}".format
    assert told == [[said(3, "a teacher")], [said(1, "the samples")], []]
    assert "where" not in cards[0]


@pytest.mark.slow
def test_a_run_of_the_set_is_drawn_from_stored_told_and_refused(recipe_file, tmp_path, capsys, fails):
    flow = run_recipe(recipe_file("flow", run={"out": str(tmp_path / "flow")}, train={"max_steps": 1}))
    settings = {"train": {"max_steps": 2, "init": str(flow)}, "preview": {"every": 2, "num": 2, "guidance_scale": 4.0}}
    start = recipe_file(**settings)
    run = tmp_path / "run"
    command(["train", str(start), "meanflow", "meanflow.omega=2", f"meanflow.teacher={flow}"])
    assert (run / "previews").is_dir()
    trained = load_trained(run)
    told = open_drawing(load_recipe(run / "recipe.yaml"), trained.model).describe(trained.model)
    assert (told["steps"], told["guidance_scale"]) == (1, 1)
    own = {"share": 0.25, "guidance": 2.0, "tangent": "sample", "teacher": True}
    assert describe_training(trained)["meanflow"] == own
    assert describe_training(load_trained(flow))["meanflow"] is None

    sampling(["generate", "--ckpt", str(run), "--num", "4", "--out", str(tmp_path / "images")])
    manifest = json.loads((tmp_path / "images/manifest.json").read_text())
    assert [manifest[key] for key in ("steps", "guidance_scale", "guidance_interval", "nfe")] == [1, 1, None, 1]
    assert manifest["training"]["meanflow"] == own
    sample.main(["--ckpt", str(run), "--num", "1", "--steps", "4", "--out", str(tmp_path / "four.png")])
    assert "NFE 4," in capsys.readouterr().out
    pipe = SiTPipeline.from_run(run)
    assert pipe.transformer.config.trained_guidance == 2

    out, ckpt = tmp_path / "refused", ("--ckpt", run, "--out", tmp_path / "refused.png")
    assert "sampler=heun: this model predicts average" in fails(sample.main, *ckpt, "--sampler", "heun")
    assert "--cfg=2: this model has guidance 2" in fails(sample.main, *ckpt, "--cfg", 2)
    said = fails(sample.main, *ckpt, "--scheduler", "unipc")
    assert "does not follow average velocities, which this model predicts (MeanFlow); use --scheduler flow-m" in said
    assert "[0.2, 0.8]: --cfg=1 is this model's default" in fails(sample.main, *ckpt, "--cfg-interval", 0.2, 0.8)
    assert "has one step by default; state more, such as --steps 4" in fails(command, "calibrate", run)
    assert "guidance 2 in its weights: its flow" in fails(
        command, "likelihood", "--ckpt", run, "--num", 2, "--out", out
    )
    assert "use_meanflow=True: the public sit form has False" in fails(
        command, "convert", run, "--to", "public", "--out", f"{out}.pt"
    )
    student = load_recipe("digits_distill", [f"distill.teacher={run}", f"run.out={out}"])
    with pytest.raises(InputError, match=r"predicts average velocities .*give a teacher of velocities"):
        load_teacher(student, (1, 8, 8), 10)
    assert not out.exists()
    said = f"meanflow.teacher is missing: run.out={str(run)!r} was begun with one; state meanflow.teacher={str(flow)!r}"
    with pytest.raises(InputError, match=re.escape(said)):
        run_recipe(start, "meanflow", "meanflow.omega=2", "train.max_steps=3")
