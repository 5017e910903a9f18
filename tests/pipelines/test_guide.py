"""The guide of a pipeline: an optional component, which guidance is away from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.flow.guidance import GuidedVelocity
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.times import time_grid
from sit_atconv.pipelines.opening import open_as
from sit_atconv.runtime.errors import InputError


def weaker(seed=1, width=16, **options) -> SiTTransformer2DModel:
    torch.manual_seed(seed)
    shape = {"patch_size": 2, "in_channels": 3, "hidden_size": width, "depth": 1, "num_heads": 2}
    model = create_model(None, **{"sample_size": 8, "num_classes": 5, **shape, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pipeline(**options) -> SiTPipeline:
    return SiTPipeline(weaker(0, 24, **options), scheduler=FlowMatchEulerDiscreteScheduler())


def guided(guide=None, **options) -> SiTPipeline:
    pipe = pipeline(**options)
    pipe.register_modules(guide=guide or weaker())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    return pipe([1, 3], generator=torch.Generator().manual_seed(1), **settings | options).images


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize(
    ("dropout", "prediction", "weak"),
    [(0.0, "velocity", "velocity"), (0.1, "velocity", "noise"), (0.1, "noise", "velocity"), (0.0, "score", "noise")],
)
def test_it_follows_the_guided_velocity(dropout, prediction, weak, interval):
    pipe = guided(weaker(prediction=weak), class_dropout_prob=dropout, prediction=prediction)
    labels, singular = torch.tensor([1, 3]), {prediction, weak} != {"velocity"}
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    calls = [lambda x, t, y, model=model: model(x, t, y).sample for model in (pipe.transformer, pipe.guide)]
    by = {"guide": calls[1], "prediction": prediction, "guide_prediction": weak}
    velocity = GuidedVelocity(calls[0], labels, None, 2.0, interval=interval, **by)
    ends = (0.001, 0.999) if singular else (0.0, 1.0)  # at t = 0 a predicted noise gives no velocity
    with torch.no_grad():
        expected = SAMPLERS["euler"](lambda x, t: velocity(x, t.clamp(*ends)), noise, time_grid(0, 1, 10))
    latents = draw(pipe, num_inference_steps=10, guidance_interval=interval)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (pipe.nfe, pipe.nfe.of_guide) == (velocity.nfe, velocity.nfe.of_guide)
    assert not pipe.do_classifier_free_guidance
    alone = draw(pipe, num_inference_steps=10, guidance_scale=1.0)
    assert (latents - alone).abs().max() > 0.01
    assert (pipe.nfe, pipe.nfe.of_guide) == (10, 0)
    pipe.guide = None  # an idle guide moves no time
    assert torch.equal(draw(pipe, num_inference_steps=10, guidance_scale=1.0), alone)


def test_an_interval_that_no_step_lies_in_is_refused():
    pipe = guided()
    with pytest.raises(InputError, match=r"guidance_interval=\[0.8, 0.9\]: no step evaluates the model at a"):
        draw(pipe, guidance_interval=(0.8, 0.9))
    draw(pipe, guidance_interval=(0.8, 0.9), num_inference_steps=5)
    assert pipe.nfe.of_guide == 1


def test_a_callback_ends_its_guidance():
    pipe = guided()

    def end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if step == 1 else pipe._guidance_scale
        return {}

    draw(pipe, callback_on_step_end=end)
    assert (pipe.nfe, pipe.nfe.of_guide) == (4 + 2, 2)


def test_saved_and_loaded_it_keeps_its_guide(tmp_path):
    pipe = guided()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert index["guide"] == ["sit_atconv.models.sit", "SiTTransformer2DModel"]
    for loaded in (SiTPipeline.from_pretrained(tmp_path / "pipe"), SiTPipeline.from_run(tmp_path / "pipe")):
        assert torch.equal(draw(loaded), expected)
    assert set(loaded.components) == {"transformer", "vae", "guide", "scheduler"}
    loaded.to(torch.bfloat16)
    assert loaded.guide.dtype == torch.bfloat16
    alone = SiTPipeline.from_pretrained(tmp_path / "pipe", guide=None)
    assert alone.guide is None


def test_one_that_is_assigned_is_saved_and_on_the_pipelines_device(tmp_path, vae_folder):
    pipe = pipeline()
    pipe.guide = weaker()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(draw(SiTPipeline.from_pretrained(tmp_path / "pipe")), expected)
    pipe.guide = None
    pipe.save_pretrained(tmp_path / "none")
    assert SiTPipeline.from_pretrained(tmp_path / "none").guide is None
    pipe.guide = weaker(2)  # once more, after there was one
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(draw(SiTPipeline.from_pretrained(tmp_path / "again")), draw(pipe))
    pipe.to("meta")
    for _ in range(2):
        pipe.guide = weaker().to(torch.bfloat16)
        assert (pipe.guide.device.type, pipe.guide.dtype) == ("meta", torch.bfloat16)
    other = pipeline(in_channels=4)  # an autoencoder is lost no more than a guide
    other.vae = AutoencoderKL.from_pretrained(vae_folder)
    other.save_pretrained(tmp_path / "vae")
    assert SiTPipeline.from_pretrained(tmp_path / "vae").vae is not None


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        ("runs/weak", "guide='runs/weak' is a place; give the model in it, as SiTPipeline.from_run does"),
        (Path("runs/weak"), "guide='runs/weak' is a place"),
        (torch.nn.Linear(1, 1), "guide is a Linear; give a SiTTransformer2DModel, or None"),
    ],
)
def test_what_is_no_model_is_refused_as_one(guide, says):
    pipe = pipeline()
    with pytest.raises(InputError, match=says):
        pipe.guide = guide
    with pytest.raises(InputError, match=says):
        SiTPipeline(pipe.transformer, guide=guide, scheduler=pipe.scheduler)


def test_a_pipeline_of_ones_own_that_takes_no_guide_is_opened_as_before(tmp_path):
    class Own(SiTPipeline):
        def __init__(self, transformer, vae=None, *, scheduler, id2label=None):
            super().__init__(transformer, vae, scheduler=scheduler, id2label=id2label)

    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    for folder in (tmp_path / "pipe", tmp_path / "pipe/transformer"):
        assert torch.equal(draw(Own.from_run(folder)), draw(pipe))


def test_a_pipeline_that_was_saved_before_there_were_guides_has_none(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    assert index.pop("guide") == [None, None]
    path.write_text(json.dumps(index))
    for loaded in (SiTPipeline.from_pretrained(tmp_path), SiTPipeline.from_run(tmp_path)):
        assert loaded.guide is None
        assert torch.equal(draw(loaded), draw(pipe))


def test_a_guide_is_named_where_a_pipeline_is_opened(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    weaker().save_pretrained(tmp_path / "weaker")
    opened = SiTPipeline.from_run(tmp_path / "pipe", guide=tmp_path / "weaker")
    assert torch.equal(draw(opened), draw(guided()))
    shutil.copytree(tmp_path / "pipe/transformer", tmp_path / "same")
    with pytest.raises(InputError, match=f"guide='{tmp_path}/same': it has the weights of the model itself"):
        SiTPipeline.from_run(tmp_path / "pipe", guide=tmp_path / "same")
    half = opened.transformer.to(torch.bfloat16)  # the model's weights in another dtype are no weaker
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="it has the weights of the model itself"):
        SiTPipeline.from_run(tmp_path / "pipe", guide=tmp_path / "half")
    weaker(in_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(InputError, match=f"guide='{tmp_path}/four': it has in_channels=4, the model that"):
        SiTPipeline.from_run(tmp_path / "pipe", guide=tmp_path / "four")


def test_transformer_and_guide_keep_their_own_dtypes(tmp_path):
    pipe = guided(weaker().to(torch.float16))
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "pipe")
    weaker().save_pretrained(tmp_path / "weaker")
    opened = SiTPipeline.from_run(tmp_path / "pipe")
    assert (opened.transformer.dtype, opened.guide.dtype) == (torch.bfloat16, torch.float16)
    named = SiTPipeline.from_run(tmp_path / "pipe", guide=tmp_path / "weaker")
    assert (named.transformer.dtype, named.guide.dtype) == (torch.bfloat16, torch.float32)
    assert open_as(SiTPipeline, tmp_path / "pipe").dtype == torch.bfloat16


def test_a_guide_that_does_not_fit_is_refused():
    transformer, scheduler = pipeline().transformer, FlowMatchEulerDiscreteScheduler()
    pipe = SiTPipeline(transformer, scheduler=scheduler)
    for guide, says in ((weaker(num_classes=7), "guide: it has num_classes=7"), (transformer, "the model itself")):
        with pytest.raises(InputError, match=says):
            SiTPipeline(transformer, guide=guide, scheduler=scheduler)
        pipe.guide = guide
        with pytest.raises(InputError, match=says):
            draw(pipe)
