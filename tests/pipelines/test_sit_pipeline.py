"""The pipeline: the same flow as our own samplers, and what the testers of diffusers' pipelines check."""

import contextlib
import inspect
import io
import json

import numpy as np
import pytest
import torch
from conftest import slowly
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.hooks import FirstBlockCacheConfig

import train_sit
from sit_atconv import SiTPipeline, SiTTransformer2DModel
from sit_atconv.flow.guidance import GuidedVelocity
from sit_atconv.flow.path import LinearPath
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.times import sampling_interval, time_grid
from sit_atconv.latents.codecs import IdentityCodec, VaeCodec
from sit_atconv.runtime.pictures import NotFinite, to_uint8
from sit_atconv.sampling.sampling import generate
from sit_atconv.sampling.settings import Sampling

MIXERS = ("attention", "atconv", "hybrid")
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "umbrella"}


def make_transformer(mixer="hybrid", **options) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    shape = {"sample_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "token_mixer": mixer}
    return SiTTransformer2DModel(**shape | options).eval()


@pytest.fixture(scope="module")
def vae(vae_folder):
    return AutoencoderKL.from_pretrained(vae_folder)


@pytest.fixture
def make_pipe(vae):
    def make(mixer="hybrid", scheduler=None, with_vae=True, **options) -> SiTPipeline:
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        pipe = SiTPipeline(
            make_transformer(mixer, **options), vae if with_vae else None, scheduler=scheduler, id2label=NAMES
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, labels=(1, 4), **options) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "generator": generators(*range(len(labels))), "output_type": "latent"}
    return pipe(list(labels), **settings | options).images


def our_latents(transformer, noise, labels, sampler, steps, scale=1.5, channels="all", interval=(0.0, 1.0)):
    """The same by this library's own samplers."""
    path, prediction = LinearPath(), transformer.config.prediction

    @torch.no_grad()
    def network(x, t, y):
        return transformer(x, t, y).sample

    guided = GuidedVelocity(network, torch.tensor(labels), transformer.null_label, scale, channels, interval)

    def velocity(x, t):
        return path.velocity_from(prediction, guided(x, t), x, t)

    times = time_grid(*sampling_interval(path, prediction), steps)
    return SAMPLERS[sampler](velocity, noise, times), guided.nfe


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "guidance",
    [
        {"scale": 1.0},
        {"scale": 2.5},
        {"scale": 2.5, "channels": "first3"},
        {"scale": 2.5, "interval": (0.3, 0.7)},
    ],
    ids=str,
)
def test_flow_match_euler_is_our_euler(make_pipe, mixer, guidance):
    pipe, steps = make_pipe(mixer), 10
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    asked = {f"guidance_{key}": value for key, value in guidance.items()}
    for sigmas in (None, list(np.linspace(1, 1 / steps, steps))):  # None is the same uniform grid
        actual = draw(pipe, (1, 4), num_inference_steps=steps, sigmas=sigmas, latents=noise, **asked)
        expected, nfe = our_latents(pipe.transformer, noise, [1, 4], "euler", steps, **guidance)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert pipe.nfe == nfe
    assert (actual - noise).abs().max() > 0.1  # a network that gives zeros would pass any of this


@pytest.mark.parametrize(
    ("scheduler", "interval", "guided"),
    [
        (FlowMatchEulerDiscreteScheduler(), (0.2, 1.0), 40),
        (FlowMatchEulerDiscreteScheduler(), (0.0, 0.7), 36),
        (FlowMatchHeunDiscreteScheduler(num_train_timesteps=50), (0.3, 1.0), 70),  # two calls of each of 35 levels
    ],
    ids=["euler, low", "euler, high", "heun"],
)
def test_a_level_at_an_end_of_the_guidance_interval_is_guided(make_pipe, scheduler, interval, guided):
    pipe = make_pipe("atconv", scheduler=scheduler)
    draw(pipe, (1,), num_inference_steps=50, guidance_interval=interval)
    assert pipe.nfe == pipe.num_timesteps + guided


@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_other_predictions_become_velocities(make_pipe, prediction):
    pipe = make_pipe(prediction=prediction)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sigmas = (1 - time_grid(1e-3, 1 - 1e-3, 40)[:-1]).tolist()
    actual = draw(pipe, (1, 4), sigmas=sigmas, latents=noise)
    expected, _ = our_latents(pipe.transformer, noise, [1, 4], "euler", 40)
    # Ours ends at t = 1 - 1e-3, the scheduler goes on to 1.
    assert (actual - expected).norm() < 0.02 * expected.norm()
    assert draw(pipe, (1, 4), latents=noise).isfinite().all()  # asked at sigma = 1 too, where alpha is 0


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "euler, shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
}


@pytest.mark.parametrize("name", ["heun", "unipc", *slowly(["euler, shifted", "dpm++"])])
def test_every_deterministic_scheduler_follows_the_same_flow(make_pipe, name):
    pipe = make_pipe(scheduler=SCHEDULERS[name]())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected, _ = our_latents(pipe.transformer, noise, [1, 4], "rk4", 50)
    distance = [
        (draw(pipe, (1, 4), num_inference_steps=steps, latents=noise) - expected).norm() / expected.norm()
        for steps in (10, 80)
    ]
    assert distance[1] < 0.02
    assert distance[1] < distance[0]


def test_a_few_step_scheduler_draws_from_the_generators_and_ends_in_data(make_pipe):
    pipe = make_pipe(scheduler=FlowMatchLCMScheduler())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="FlowMatchLCMScheduler draws new noise at every step"):
        first, second = (draw(pipe, latents=noise, num_inference_steps=4) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(pipe, latents=noise, num_inference_steps=4, generator=generators(8, 9)))
    one_step = draw(pipe, latents=noise, num_inference_steps=1)  # x + v at t = 0: the data expected there
    with torch.no_grad():
        guided = GuidedVelocity(
            lambda x, t, y: pipe.transformer(x, t, y).sample, torch.tensor([1, 4]), pipe.transformer.null_label, 1.5
        )
        torch.testing.assert_close(one_step, noise + guided(noise, torch.tensor(0.0)), atol=1e-5, rtol=1e-5)


def test_image_i_depends_on_generator_i_alone(make_pipe):
    pipe = make_pipe()
    both = draw(pipe, (1, 1), generator=generators(5, 6))
    swapped = draw(pipe, (1, 1), generator=tuple(generators(6, 5)))
    torch.testing.assert_close(swapped, both.flip(0))
    other_neighbour = draw(pipe, (1, 1), generator=generators(5, 7))
    torch.testing.assert_close(other_neighbour[0], both[0])
    assert not torch.allclose(other_neighbour[1], both[1])
    torch.testing.assert_close(draw(pipe, (1,), generator=generators(6))[0], both[1])
    assert not torch.equal(both[0], both[1])


def test_what_a_scheduler_draws_for_image_i_is_of_generator_i_too(make_pipe):
    pipe = make_pipe(scheduler=FlowMatchLCMScheduler())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    both = draw(pipe, (1, 1), latents=noise, generator=generators(5, 6))
    assert not torch.allclose(both[0], both[1])  # the same noise and label: all the difference is drawn in the steps
    other_neighbour = draw(pipe, (1, 1), latents=noise, generator=generators(5, 7))
    torch.testing.assert_close(other_neighbour[0], both[0])
    assert not torch.allclose(other_neighbour[1], both[1])
    torch.testing.assert_close(draw(pipe, (1,), latents=noise[:1], generator=generators(6))[0], both[1])


@pytest.mark.parametrize("with_vae", [True, False])
def test_it_draws_what_sample_py_draws(make_pipe, with_vae, vae_folder):
    pipe = make_pipe(with_vae=with_vae, in_channels=4 if with_vae else 1)
    sampling = Sampling("euler", steps=4)
    codec = VaeCodec(str(vae_folder), 2) if with_vae else IdentityCodec()
    expected, nfe = generate(pipe.transformer, codec, [0, 1], [3, 0], sampling, 7)
    from sit_atconv.runtime.draws import Stream, normal

    shape = (pipe.transformer.config.in_channels, 8, 8)
    noise = torch.stack([normal(shape, 7, Stream.SAMPLE_NOISE, index) for index in range(2)])
    images = pipe([3, 0], num_inference_steps=4, latents=noise).images
    size = 32 if with_vae else 8
    assert [(image.mode, image.size) for image in images] == [("RGB" if with_vae else "L", (size, size))] * 2
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).reshape(2, size, size, -1)
    difference = (pixels.permute(0, 3, 1, 2).int() - expected.int()).abs()
    assert difference.max() <= 1  # a value that lies on the border of two may be rounded either way
    assert (difference == 0).float().mean() > 0.99
    assert pipe.nfe == nfe


def test_output_types_are_one_image(make_pipe):
    pipe = make_pipe()
    pt, np_, pil, latent = (draw(pipe, output_type=kind) for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (2, 3, 32, 32)
    assert latent.shape == (2, 4, 8, 8)
    assert pt.min() >= 0
    assert pt.max() <= 1
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), np_)
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / 0.5 + 0.1).sample
    torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1))
    for image, expected in zip(pil, to_uint8(decoded), strict=True):
        assert np.array_equal(np.array(image), expected.permute(1, 2, 0).numpy())
    (images,) = pipe([1, 4], num_inference_steps=3, generator=generators(0, 1), output_type="pt", return_dict=False)
    assert torch.equal(images, pt)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_image_of_any_type(make_pipe, vae, value):
    broken = AutoencoderKL.from_config(vae.config)
    broken.load_state_dict(vae.state_dict())
    with torch.no_grad():
        broken.decoder.conv_out.bias[2] = value
    pipe = make_pipe()
    pipe.vae = broken
    for kind in ("pil", "np", "pt"):
        with pytest.raises(NotFinite, match=r"image 0 .* the autoencoder: .*another .*in float32 already"):
            draw(pipe, output_type=kind)
    assert draw(pipe).isfinite().all()
    with torch.no_grad():
        pipe.transformer.y_embedder.embedding_table.weight[4] = value  # of the second image
    for kind in ("pil", "np", "pt", "latent"):
        with pytest.raises(NotFinite, match="image 1 is not finite as it comes from FlowMatchEulerDiscreteScheduler"):
            draw(pipe, output_type=kind)


def test_an_autoencoder_that_overflows_in_half_precision_is_named(make_pipe, vae):
    pipe = make_pipe()
    pipe.vae = AutoencoderKL.from_config(vae.config)
    pipe.vae.load_state_dict(vae.state_dict())
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias.fill_(6e4)
        pipe.vae.decoder.conv_in.weight.mul_(1e5)
    assert draw(pipe, output_type="pt").isfinite().all()
    pipe.vae.to(torch.float16)
    with pytest.raises(NotFinite, match=r"the autoencoder in float32 \(it is in float16\), since the latents"):
        draw(pipe, output_type="pt")


def test_labels_are_ids_or_names(make_pipe):
    pipe = make_pipe()
    assert pipe.get_label_ids("umbrella") == [4]
    assert pipe.get_label_ids(["Goldfish", 3, "tinca tinca", "tench", "tench, Tinca tinca"]) == [1, 3, 0, 0, 0]
    assert pipe.get_label_ids([[1], ["umbrella"]]) == pipe.get_label_ids(torch.tensor([1, 4])) == [1, 4]
    assert pipe.get_label_ids(np.int64(2)) == [2]
    assert pipe.get_label_ids(range(1, 3)) == [1, 2]
    assert torch.equal(draw(pipe, ("goldfish", "umbrella")), draw(pipe, (1, 4)))
    assert torch.equal(pipe(4, **{"generator": generators(0), "output_type": "latent"}).images, pipe(
        "umbrella", generator=generators(0), output_type="latent").images)  # fmt: skip


def test_images_of_one_prompt_stand_together(make_pipe):
    pipe = make_pipe()
    images = draw(pipe, (1, 4), num_images_per_prompt=2, generator=generators(0, 1, 2, 3))
    assert len(images) == 4
    torch.testing.assert_close(images, draw(pipe, (1, 1, 4, 4)))


def test_latents_of_another_size_are_sampled_at_that_size(make_pipe):
    pipe = make_pipe()
    noise = torch.randn(1, 4, 6, 12, generator=torch.Generator().manual_seed(0))
    assert draw(pipe, (1,), latents=noise).shape == (1, 4, 6, 12)
    assert draw(pipe, (1,), latents=noise, output_type="pt").shape == (1, 3, 24, 48)


def test_given_latents_are_the_noise_that_the_generator_draws(make_pipe):
    pipe = make_pipe()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one = {"generator": torch.Generator().manual_seed(0)}
    assert torch.equal(draw(pipe, **one), draw(pipe, latents=noise))


def test_callbacks_see_and_change_the_tensors(make_pipe):
    pipe = make_pipe()
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return tensors

    draw(pipe, callback_on_step_end=look)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pytest.approx([1000, 2000 / 3, 1000 / 3])
    assert [names for _, _, names in seen] == [["latents"]] * 3
    everything = pipe._callback_tensor_inputs
    seen.clear()
    draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=everything)
    assert seen[0][2] == sorted(everything)

    seen.clear()
    draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=None)
    assert [names for _, _, names in seen] == [[]] * 3

    def clear_at_the_end(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert draw(pipe, callback_on_step_end=clear_at_the_end).abs().sum() == 0

    def relabel(pipe, step, timestep, tensors):
        return {"class_labels": torch.tensor([2, 2])}

    changed = draw(pipe, callback_on_step_end=relabel, callback_on_step_end_tensor_inputs=["class_labels"])
    assert not torch.allclose(changed, draw(pipe))


def test_callbacks_change_guidance_and_interrupt(make_pipe):
    pipe = make_pipe()

    def more(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1
        return tensors

    draw(pipe, guidance_scale=1.0, callback_on_step_end=more)
    assert pipe.guidance_scale == 1.0 + pipe.num_timesteps
    assert pipe.nfe == 1 + 2 + 2
    assert pipe.do_classifier_free_guidance

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    draw(pipe, callback_on_step_end=stop)
    assert pipe.nfe == 2
    draw(pipe)
    assert pipe.nfe == 6


class Relabel(PipelineCallback):
    tensor_inputs = ["class_labels"]  # noqa: RUF012 (diffusers' own type)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert callback_kwargs.keys() >= {"class_labels"}
        callback_kwargs["class_labels"] = torch.full_like(callback_kwargs["class_labels"], 2)
        return callback_kwargs


class Halve(PipelineCallback):
    tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own type)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return callback_kwargs | {"latents": (callback_kwargs["latents"] / 2).half()}  # which the state does not become


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_diffusers_callback_objects_say_themselves_which_tensors_they_take(make_pipe, scale):
    pipe = make_pipe()

    def both(pipe, step, timestep, tensors):
        return {"class_labels": torch.tensor([2, 2]), "latents": (tensors["latents"] / 2).half().float()}

    plain, names = (
        draw(pipe, guidance_scale=scale),
        {"callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs},
    )
    wanted = draw(pipe, guidance_scale=scale, callback_on_step_end=both, **names)
    together = draw(pipe, guidance_scale=scale, callback_on_step_end=MultiPipelineCallbacks([Relabel(), Halve()]))
    assert together.dtype == torch.float32
    assert torch.equal(together, wanted)
    alone = draw(pipe, guidance_scale=scale, callback_on_step_end=Relabel())
    assert not torch.allclose(alone, plain)
    assert not torch.allclose(alone, together)
    with pytest.raises(ValueError, match="tensor_inputs='prompt_embeds'"):
        draw(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("class_labels", torch.tensor([2, 6]), "class id 6; this model has ids 0 to 5"),
        ("class_labels", torch.tensor([-1, 2]), "class id -1"),
        (
            "class_labels",
            torch.tensor([2.0, 3.0]),
            r"floats of shape \(2,\) for class_labels; give a tensor of integers",
        ),
        ("class_labels", [2, 3], "a list for class_labels; give a tensor of integers"),
        ("latents", None, "a NoneType for latents; give a tensor of floats"),
    ],
)
def test_what_a_callback_gives_is_looked_at(make_pipe, name, given, says):
    with pytest.raises(ValueError, match=says):
        draw(make_pipe(), callback_on_step_end=lambda *_: {name: given})


def test_a_callback_may_give_the_null_class(make_pipe):
    pipe = make_pipe()
    null = torch.full((2,), pipe.transformer.null_label)
    assert draw(pipe, guidance_scale=1.0, callback_on_step_end=lambda *_: {"class_labels": null}).isfinite().all()


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_cut_off_of_guidance_as_diffusers_has_it_leaves_the_class(make_pipe, off):
    """Their callbacks set the scale to 0 for none, which by the formula would be the null class alone."""

    class CutOff(SDCFGCutoffCallback):
        tensor_inputs = ["class_labels"]  # noqa: RUF012 (diffusers' own type)

        def callback_fn(self, pipeline, *arguments):
            found = super().callback_fn(pipeline, *arguments)
            pipeline._guidance_scale = max(off, pipeline._guidance_scale)
            return found

    pipe = make_pipe()
    run = {"labels": [3], "num_inference_steps": 4, "guidance_scale": 2.5, "generator": generators(5)}
    found = draw(pipe, callback_on_step_end=CutOff(None, 1), **run)
    assert (pipe.nfe, pipe.guidance_scale, pipe.do_classifier_free_guidance) == (2 * 2 + 2, 1.0, False)
    assert torch.equal(found, draw(pipe, guidance_interval=(0.0, 0.3), **run | {"generator": generators(5)}))
    unconditional = draw(pipe, **run | {"guidance_scale": 0.0, "generator": generators(5)})
    assert pipe.guidance_scale == 0.0
    assert not torch.allclose(unconditional, draw(pipe, **run | {"guidance_scale": 1.0, "generator": generators(5)}))
    with pytest.raises(ValueError, match=r"gave integers of shape \(1,\) for class_labels; .* of shape \(2,\)"):
        draw(pipe, guidance_scale=2.5, callback_on_step_end=CutOff(None, 0))


def test_the_progress_bar_reaches_its_end_and_can_be_silenced(make_pipe):
    pipe = make_pipe()
    for disabled in (False, True):
        pipe.set_progress_bar_config(disable=disabled)
        with io.StringIO() as stderr, contextlib.redirect_stderr(stderr):
            draw(pipe)
            assert ("3/3" in stderr.getvalue()) is not disabled


def test_call_signature_and_components(make_pipe):
    parameters = inspect.signature(SiTPipeline.__call__).parameters
    optional = {name for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {
        "num_inference_steps",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
    } <= optional
    assert "class_labels" in parameters
    assert "class_labels" not in optional
    assert make_pipe().components.keys() == {"transformer", "vae", "guide", "scheduler"}
    assert SiTPipeline._optional_components == ["vae", "guide"]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("safe", [True, False])
def test_saved_and_loaded_it_draws_the_same_bits(make_pipe, tmp_path, mixer, safe):
    pipe = make_pipe(mixer)
    pipe.save_pretrained(tmp_path, safe_serialization=safe)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["sit_atconv.models.sit", "SiTTransformer2DModel"]
    loaded = SiTPipeline.from_pretrained(tmp_path)
    assert loaded.labels == pipe.labels
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, output_type="pt"), draw(pipe, output_type="pt"))
    model = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert isinstance(model, SiTTransformer2DModel)


def test_it_loads_in_a_fresh_process(make_pipe, bare_server, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(draw(pipe, output_type="pt"), tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "from sit_atconv import SiTPipeline\n"
        "pipe = SiTPipeline.from_pretrained(sys.argv[1] + '/pipe')\n"
        "generators = [torch.Generator().manual_seed(seed) for seed in range(2)]\n"
        "images = pipe([1, 'umbrella'], num_inference_steps=3, generator=generators, output_type='pt').images\n"
        "assert torch.equal(images, torch.load(sys.argv[1] + '/images.pt', weights_only=True))\n"
    )
    codes, said = bare_server(code, tmp_path, [tmp_path])
    assert codes == [0], said


def test_without_a_vae_it_stays_without_one(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.vae = None
    images = draw(pipe, output_type="pt")
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, output_type="pt"), images)


def test_variants_dtypes_and_device_maps_of_the_parts(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    loaded = SiTPipeline.from_pretrained(tmp_path / "variant", variant="fp16", device_map="cpu")
    for ours, theirs in zip(pipe.transformer.parameters(), loaded.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="`variant=fp16`"):
        SiTPipeline.from_pretrained(tmp_path / "plain", variant="fp16")
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = SiTPipeline.from_pretrained(tmp_path / "plain", dtype=dtypes)
    assert (loaded.transformer.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_half_precision_the_state_stays_fp32(vae_folder, mixer):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    pipe = SiTPipeline(make_transformer(mixer), vae, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    full = draw(pipe)
    pipe.to(dtype=torch.bfloat16)
    assert {component.dtype for component in (pipe.transformer, pipe.vae)} == {torch.bfloat16}
    half = draw(pipe)
    assert half.dtype == torch.float32
    assert 0 < (half - full).norm() < 0.02 * full.norm()
    assert draw(pipe, output_type="pt").isfinite().all()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert draw(pipe).isfinite().all()


def test_group_offload_changes_nothing(make_pipe):
    pipe = make_pipe()
    images = draw(pipe)
    for kind in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        offloaded = make_pipe()
        offloaded.transformer.enable_group_offload(torch.device("cpu"), **kind)
        torch.testing.assert_close(draw(offloaded), images)


def test_a_cache_with_guidance_in_an_interval(make_pipe):
    pipe = make_pipe(depth=4)
    options = {"num_inference_steps": 12, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.6)}
    images, runs = draw(pipe, **options), []
    pipe.transformer.blocks[-1].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = draw(pipe, **options)
    assert 0 < len(runs) < 12
    assert (cached - images).norm() < 0.2 * images.norm()
    assert torch.equal(draw(pipe, **options), cached)  # nothing is left of the first run
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, **options), images)


def test_a_training_checkpoints_ema_is_the_transformer(recipe_file, tmp_path):
    train_sit.main([str(recipe_file())])
    ema = tmp_path / "run" / "step-0000008" / "ema"
    pipe = SiTPipeline(SiTTransformer2DModel.from_pretrained(ema), scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe(3, num_inference_steps=2).images
    assert (image.mode, image.size) == ("L", (8, 8))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"class_labels": 5}, "class id 5 is out of range; this model has classes 0 to 4"),
        ({"class_labels": [0, -1]}, "class id -1"),
        ({"class_labels": "umbrela"}, "class='umbrela': did you mean 'umbrella'"),
        ({"class_labels": "crane"}, r"class 'crane' is the name of \[2, 3\]; give an id"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [1.5]}, r"class_labels holds 1\.5"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents of shape \(2, 4, 8, 8\): give \(1, 4, H, W\)"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 7)}, "multiples of 2"),
        ({"latents": torch.zeros(4, 8, 8)}, r"\(4, 8, 8\)"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"output_type": "pli"}, "output_type='pli': did you mean 'pil'"),
        ({"guidance_channels": "first2"}, "did you mean 'first3'"),
        ({"guidance_interval": (0.7, 0.2)}, "0 <= low <= high <= 1"),
        ({"guidance_interval": None}, "guidance_interval=None"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: must be at least -1,000 and at most 1,000"),
        ({"sigmas": []}, "falling noise levels"),
        ({"sigmas": [0.1, 0.5]}, "falling noise levels"),
        ({"sigmas": [14.0, 7.0]}, "from 1 at the most"),
        ({"sigmas": [1.0, float("nan")]}, "falling noise levels"),
        ({"sigmas": [1.0, 0.0]}, "above 0"),
        ({"latents": torch.zeros(1, 4, 0, 8)}, r"\(1, 4, 0, 8\)"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, "image 0 is not finite as it comes from FlowMatchEuler"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs='noise'"),
    ],
)
def test_what_does_not_fit_is_named(make_pipe, options, says):
    with pytest.raises(ValueError, match=says):
        make_pipe()(**{"class_labels": 1, **options})


@pytest.mark.parametrize(
    ("id2label", "says"),
    [
        ({1: None}, "give a name for each class id"),
        (["tench"], "give a name for each class id"),
        ({1: ["a", "b"]}, "give a name for each class id"),
        ({"x": "a"}, "give a name for each class id"),
        ({5: "a"}, "id2label names class 5; this model has classes 0 to 4"),
        ({-1: "a"}, "class -1"),
    ],
)
def test_names_of_classes_that_cannot_be(id2label, says):
    with pytest.raises(ValueError, match=says):
        SiTPipeline(make_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), id2label=id2label)


def test_an_empty_name_is_no_name():
    pipe = SiTPipeline(make_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(), id2label={0: "b,", 1: ""})
    assert pipe.labels == {"b,": 0, "b": 0}


def test_a_run_says_where_it_is_and_how_long_it_was(make_pipe):
    pipe = make_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(float(pipe.current_timestep)))
    draw(pipe, num_inference_steps=3)
    assert seen == pipe.scheduler.timesteps.tolist()
    assert pipe.num_timesteps == 5  # two evaluations of every step but the last
    assert pipe.current_timestep is None
    assert pipe.model_cpu_offload_seq == "transformer->vae"


def test_given_latents_in_half_precision_are_carried_in_fp32(make_pipe):
    pipe = make_pipe()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(draw(pipe, latents=noise), draw(pipe, latents=noise.float()))


def test_a_vae_without_a_shift_is_only_scaled(make_pipe, vae):
    pipe = make_pipe()
    unshifted = AutoencoderKL.from_config({**vae.config, "shift_factor": None})
    unshifted.load_state_dict(vae.state_dict())
    pipe.vae = unshifted
    latent = draw(pipe)
    with torch.no_grad():
        decoded = unshifted.decode(latent / 0.5).sample
    torch.testing.assert_close(draw(pipe, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1))


def test_guidance_needs_a_null_class(make_pipe):
    pipe = make_pipe(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"guidance_scale=1\.5 needs a null class.*use guidance_scale=1"):
        draw(pipe)
    assert draw(pipe, guidance_scale=1.0).isfinite().all()
    assert pipe.nfe == 3


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (DDIMScheduler(), "DDIMScheduler is not one for flow matching; use FlowMatchEuler"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler with use_flow_sigmas=False .* use_flow_sigmas=True"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True),
            "prediction_type='epsilon' .* prediction_type='flow_prediction'",
        ),
        (UniPCMultistepScheduler(**FLOW, predict_x0=False), "predict_x0=False"),
        (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "use_karras_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
    ],
)
def test_schedulers_of_other_processes_are_refused_at_once_and_when_swapped_in(make_pipe, scheduler, says):
    with pytest.raises(ValueError, match=says):
        make_pipe(scheduler=scheduler)
    pipe = make_pipe()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=says):
        draw(pipe)


def test_what_the_pipeline_cannot_be_made_of(make_pipe, vae):
    with pytest.raises(ValueError, match="path='vp'"):
        make_pipe(path="vp")
    with pytest.raises(ValueError, match="the vae has 4 latent channels, the transformer 3"):
        make_pipe(in_channels=3)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler takes no sigmas"):
        draw(make_pipe(scheduler=FlowMatchHeunDiscreteScheduler()), sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="latents of 4 channels are no picture without a vae"):
        draw(make_pipe(with_vae=False), output_type="pil")
    with pytest.raises(ValueError, match="path='ddpm'"):
        make_pipe(path="ddpm")
    pipe = make_pipe()
    pipe.vae = AutoencoderKL.from_config({**vae.config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
    with pytest.raises(ValueError, match="latents_mean"):
        draw(pipe)
    pipe.vae = AutoencoderKL.from_config({**vae.config, "latent_channels": 8})
    with pytest.raises(ValueError, match="the vae has 8 latent channels, the transformer 4"):
        draw(pipe)
    plain = SiTPipeline(make_transformer(), scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="the pipeline has no id2label; give ids, 0 to 4"):
        plain("umbrella", output_type="latent")
