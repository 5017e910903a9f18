"""Autoguidance where images are drawn: against a loop of its own, what is refused, and what is recorded."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run_recipe
from safetensors.torch import load_file, save_file

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.latents.codecs import IdentityCodec, check_same_codec, differing
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.sampling import trained
from sit_atconv.sampling.samples import Samples
from sit_atconv.sampling.sampling import generate, sample_latents
from sit_atconv.sampling.schedulers import generate as generate_scheduled
from sit_atconv.sampling.schedulers import make_scheduler
from sit_atconv.sampling.settings import Sampling
from sit_atconv.sampling.setup import setup
from sit_atconv.training.checkpoint import load_trained, write_conversion

LABELS = [1, 2]


def made(seed=0, size=4, classes=3, **options) -> SiTTransformer2DModel:
    torch.manual_seed(seed)
    shape = {"patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = create_model(None, size, classes, token_mixer="atconv", **shape | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def velocity(model, x, t):
    """On the linear path noise = x - t v, so a predicted noise is the velocity (x - noise) / t."""
    with torch.no_grad():
        output = model(x, torch.full((len(x),), t), torch.tensor(LABELS)).sample
    return output if model.config.prediction == "velocity" else (x - output) / t


def by_hand(model, guide, steps, scale, interval, start=0.0, end=1.0, seed=5):
    """Euler's method, with w v + (1 - w) v_guide where the interval says so."""
    x = torch.stack([draws.normal((1, 4, 4), seed, Stream.SAMPLE_NOISE, index) for index in (3, 8)])
    for step in range(steps):
        t = start + (end - start) * step / steps
        v = velocity(model, x, t)
        if interval[0] - 1e-6 <= t <= interval[1] + 1e-6:
            v = scale * v + (1 - scale) * velocity(guide, x, t)
        x = x + v * (end - start) / steps
    return x


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.5)])
def test_it_integrates_the_guided_velocity(dropout, interval):
    model, guide = made(class_dropout_prob=dropout), made(1, hidden_size=8, class_dropout_prob=0.0)
    settings = Sampling(steps=8, guidance_scale=1.8, guidance_interval=list(interval), guide=guide)
    latents, nfe = sample_latents(model, [3, 8], torch.tensor(LABELS), settings.for_model(model), 5)
    torch.testing.assert_close(latents, by_hand(model, guide, 8, 1.8, interval))
    guided = 8 if interval == (0.0, 1.0) else 3
    assert (nfe, nfe.of_guide) == (8 + guided, guided)


def test_a_guide_may_predict_something_else_and_keeps_from_its_own_singular_ends():
    model, guide = made(), made(1, prediction="noise")
    settings = Sampling(steps=6, guidance_scale=2.0, guide=guide).for_model(model)
    assert settings.interval(model) == (0.001, 0.999)
    assert Sampling(steps=6).for_model(model).interval(model) == (0.0, 1.0)
    latents, _ = sample_latents(model, [3, 8], torch.tensor(LABELS), settings, 5)
    torch.testing.assert_close(latents, by_hand(model, guide, 6, 2.0, (0, 1), 0.001, 0.999), rtol=1e-4, atol=1e-4)


def test_diffusers_schedulers_are_guided_alike():
    model, guide = made(), made(1, hidden_size=8)
    settings = Sampling(steps=8, guidance_scale=1.8, guidance_interval=[0.25, 0.5], guide=guide)
    given = (model, IdentityCodec(), [3, 8], LABELS, settings, 5)
    pipe = SiTPipeline(model, guide=guide, scheduler=make_scheduler("flow-match-euler", model))
    images, nfe = generate_scheduled(pipe, *given)
    ours, _ = generate(*given)
    assert (images.int() - ours.int()).abs().max() <= 1
    assert (nfe, nfe.of_guide) == (8 + 3, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"in_channels": 4}, "guide: it has in_channels=4, the model that it is to guide in_channels=1; give one"),
        ({"size": 8}, r"guide: it has sample_size=\[8, 8\], the model that it is to guide sample_size=\[4, 4\]"),
        ({"classes": 5}, "guide: it has num_classes=5, the model that it is to guide num_classes=3"),
        ({"path": "gvp"}, "guide: it has path=gvp, the model that it is to guide path=linear"),
    ],
)
def test_a_guide_of_something_else_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        Sampling(guide=made(1, **options)).for_model(made())


def test_a_guide_that_would_do_nothing_is_refused():
    model = made()
    with pytest.raises(InputError, match="guide: it is the model itself"):
        Sampling(guide=model).for_model(model)
    with pytest.raises(InputError, match=r"guide=runs/x: with guidance_scale=1 nothing is guided; leave it out"):
        Sampling(guidance_scale=1, guide="runs/x")
    with pytest.raises(InputError, match="guide='runs/x' is a place; load it"):
        generate(model, IdentityCodec(), [0], [0], Sampling(guide="runs/x"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits of four steps, with checkpoints after two and four; without class dropout."""
    return trained_in(tmp_path_factory.mktemp("guide"))


def trained_in(folder, *overrides):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {{out: {folder}/run, seed: 3}}\n"
        "model: {patch_size: 2, hidden_size: 16, depth: 1, num_heads: 2, token_mixer: atconv, class_dropout_prob: 0}\n"
        "train: {max_steps: 4, batch_size: 4, lr: 0.01}\nema: {decay: 0.5}\npreview: {every: 0}\n"
        "checkpoint: {every: 2}\n"
    )
    run_recipe(recipe, *overrides)
    return folder / "run"


def altered(run, folder, **changes):
    """The checkpoint after two steps, with other facts in its manifest, by dotted key."""
    shutil.copytree(run / "step-0000002", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        manifest[section][name] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codec__codec": "vae", "codec__vae": "x", "codec__sha256": "ab" * 32},
         "its latents are of a codec with codec=vae, the model's of one with codec=identity; give a guide that"),
        ({"data__classes": [*"abcdefghix"]}, "its class 9 is 'x', the model's 'j'; give a guide that was trained on"),
    ],
)  # fmt: skip
def test_a_guide_of_another_codec_or_of_other_classes_is_refused(run, tmp_path, changes, says):
    named = altered(run, tmp_path / "named", data__classes=[*"abcdefghij"])
    guide = altered(run, tmp_path / "guide", **changes)
    for opens in (lambda: setup(named, Sampling(guide=str(guide))), lambda: SiTPipeline.from_run(named, guide=guide)):
        with pytest.raises(InputError, match=f"^guide='{guide}': {says}"):
            opens()


def test_a_name_that_is_only_the_id_is_no_other_name():
    unknown = ({1: "ox"}, None), (None, ["ape"]), ({1: "ox"}, {0: "ape"})
    for own, model in (({0: "0", 1: "ox"}, {0: "ape", 1: "1"}), *unknown):
        trained.check_classes(own, model)
    for own, model in (({1: "0"}, {1: "ox"}), ({1: "ox"}, {1: "0"})):
        with pytest.raises(InputError, match="give a guide that was trained on the same classes, or, where both mean"):
            trained.check_classes(own, model)


def test_a_codec_is_told_by_its_weights_scale_and_shift_and_not_by_its_place():
    vae = {"codec": "vae", "vae": "here", "sha256": "ab" * 32, "scale": 0.5, "shift": 0.0}
    for own in (vae | {"vae": "there"}, {"codec": "open", "channels": 4}, None):
        trained.check_codec(own, vae)
        assert differing(own, vae) is differing(vae, own) is None
    assert differing({"codec": "identity", "scale": 1.0, "shift": 0.0}, vae) == differing({}, vae) == "codec"
    for key, value in (("sha256", "cd" * 32), ("scale", 0.6), ("shift", 0.1)):
        with pytest.raises(InputError, match=f"a codec with {key}={value}, the model's of one with {key}={vae[key]}"):
            trained.check_codec(vae | {key: value}, vae)
        with pytest.raises(
            InputError, match=f"not the autoencoder of this checkpoint: {key} is {vae[key]}, was {value}"
        ):
            check_same_codec(vae | {key: value}, vae)


def test_the_model_itself_under_another_name_is_no_guide(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run / "step-0000004/ema", copy)
    weights = copy / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "of": "another file"})
    with pytest.raises(InputError, match="it has the weights of the model itself, and would change nothing; give"):
        setup(run, Sampling(guide=str(copy)))
    write_conversion(copy, {})
    with pytest.raises(InputError, match="it has the weights of the model itself"):
        setup(run, Sampling(guide=str(copy)))


def test_a_guide_is_loaded_as_the_model_is(run):
    ready = setup(run, Sampling(guide=str(run / "step-0000002")), "bf16")
    assert (ready.guide.which, ready.guide.manifest["step"]) == ("ema", 2)
    assert ready.sampling.guide is ready.guide.model
    assert ready.guide.model.dtype == torch.bfloat16
    assert ready.guide.lease is not None
    assert not ready.guide.model.training


def test_a_guide_goes_to_the_models_device(run, monkeypatch):
    monkeypatch.setattr("sit_atconv.sampling.setup.resolve_device", lambda name: torch.device("meta"))
    ready = setup(run, Sampling(guide=str(run / "step-0000002")))
    for model in (ready.trained.model, ready.sampling.guide):
        assert {each.device.type for each in model.parameters()} == {"meta"}


@pytest.mark.parametrize("option", [[], ["--compile"]], ids=["as it is", "compiled"])
def test_the_blocks_of_model_and_guide_are_compiled_where_that_is_asked_for(run, tmp_path, monkeypatch, option):
    compiled = []
    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", lambda model, **how: compiled.append(model))
    options = [
        "--ckpt",
        str(run),
        "--guide",
        str(run / "step-0000002"),
        "--cfg",
        "2",
        "--steps",
        "2",
        "--num",
        "2",
        *option,
    ]
    sample.main([*options, "--out", str(tmp_path / "grid.png")])
    sampling(["generate", *options, "--out", str(tmp_path / "set")])
    assert len({id(model) for model in compiled}) == (4 if option else 0)
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert manifest["compile"] is (True if option else None)


@pytest.mark.slow
def test_compiled_images_differ_by_rounding(run, tmp_path, capsys):
    options = ["generate", "--ckpt", str(run), "--guide", str(run / "step-0000002"), "--cfg", "2", "--num", "4"]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        sampling([*options, "--steps", "5", "--format", "npz", "--out", str(tmp_path / name), *more])
    plain, compiled = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "compiled"))
    assert abs(plain - compiled).max() <= 1
    with pytest.raises(SystemExit):
        sampling([*options, "--steps", "5", "--format", "npz", "--out", str(tmp_path / "plain"), "--compile"])
    assert "compile: null -> true" in capsys.readouterr().err


def test_samples_record_their_guide_and_are_continued_with_it_alone(run, tmp_path, capsys):
    def draw(out, *options):
        words = ["generate", "--ckpt", str(run), "--num", "6", "--batch", "4", "--steps", "4", "--cfg", "1.7"]
        sampling([*words, "--out", str(tmp_path / out), *options])
        return json.loads((tmp_path / out / "manifest.json").read_text())

    guide = run / "step-0000002"
    manifest = draw("a", "--guide", str(guide), "--cfg-interval", "0.5", "1")
    assert "NFE 6 (2 of the guide)" in capsys.readouterr().out
    assert (manifest["nfe"], manifest["guide_nfe"], manifest["guidance_interval"]) == (6, 2, [0.5, 1.0])
    own = load_trained(guide)
    stated = manifest["guide"]
    assert (stated["checkpoint"], stated["weights"], stated["step"]) == (str(guide), "ema", 2)
    assert (stated["checkpoint_sha256"], stated["prediction"]) == (own.files, "velocity")
    assert (stated["training"]["seed"], stated["training"]["images_seen"]) == (3, 8)

    shutil.copytree(run, tmp_path / "moved")  # the same guide, elsewhere
    assert draw("a", "--guide", str(tmp_path / "moved/step-0000002"), "--cfg-interval", "0.5", "1") == manifest
    other = trained_in(tmp_path, "run.seed=4")  # a guide that differs in its weights alone
    measured = ("nfe", "guide_nfe", "seconds_per_image", "image_shape", "processes", "class_names")
    settings = {key: value for key, value in manifest.items() if key not in measured}
    (tmp_path / "begun").mkdir()
    begun = tmp_path / "begun/settings.json"
    begun.write_text(json.dumps(settings))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        draw("begun", "--guide", str(other / "step-0000002"), "--cfg-interval", "0.5", "1")
    said = capsys.readouterr().err
    assert "holds samples with other settings, guide.checkpoint_sha256.ema/diffusion_pytorch_model.safe" in said
    assert said.count("\n") == 1
    begun.write_text(json.dumps(settings | {"guide": None}))
    with pytest.raises(SystemExit):
        draw("begun", "--guide", str(guide), "--cfg-interval", "0.5", "1")
    assert 'other settings, guide.prediction: null -> "velocity"' in capsys.readouterr().err
    begun.write_text(json.dumps(settings))
    draw("begun", "--guide", str(tmp_path / "moved/step-0000002"), "--cfg-interval", "0.5", "1")
    for name in (f"{index:06}.png" for index in range(6)):
        assert (tmp_path / "begun" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_folder_that_was_begun_before_there_were_guides_is_completed(run, tmp_path):
    words = ["generate", "--ckpt", str(run), "--num", "2", "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "a")]
    sampling(words)
    measured = ("nfe", "seconds_per_image", "image_shape", "processes", "class_names", "guide", "compile")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    (tmp_path / "a/settings.json").write_text(json.dumps({k: v for k, v in manifest.items() if k not in measured}))
    (tmp_path / "a/manifest.json").unlink()
    sampling(words)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"000000.png", "000001.png", "manifest.json"}


@pytest.mark.parametrize(
    ("interval", "acts", "settings"),
    [
        ([0.8, 0.9], False, {}),
        ([0.8, 0.9], True, {"steps": 5}),
        ([0.8, 1.0], False, {}),  # Euler's last evaluation is at t = 0.75,
        ([0.8, 1.0], True, {"sampler": "heun"}),  # Heun's at t = 1,
        ([0.8, 0.9], True, {"sampler": "euler-maruyama", "last_step_size": 0.1}),  # a last step's where it begins
        ([0.8, 0.85], False, {"sampler": "euler-maruyama", "last_step_size": 0.1}),
        ([0.8, 0.85], True, {"sampler": "dopri5"}),  # dopri5 chooses its own
    ],
)
@pytest.mark.parametrize("by_guide", [True, False])
def test_guidance_that_no_step_lies_in_is_refused(interval, acts, settings, by_guide):
    model, guide = made(class_dropout_prob=0.1), made(1) if by_guide else None
    asked = Sampling(**{"steps": 4, "guidance_scale": 2.0, "guidance_interval": interval, "guide": guide} | settings)

    def draw(sampling):
        return generate(model, IdentityCodec(), [3, 8], LABELS, sampling)[1]

    if acts:
        plain = draw(replace(asked, guidance_scale=1.0, guide=None, guidance_interval=[0.0, 1.0]))
        assert draw(asked) > plain or asked.sampler == "dopri5"
        return
    with pytest.raises(InputError, match=r"guidance_interval=\[0.8, .*\]: no step evaluates the model at a time in"):
        draw(asked)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (sample.main, []),
        (sample.main, ["--scheduler", "flow-match-euler"]),
        (lambda words: sampling(["generate", *words]), []),
    ],
)
def test_commands_call_an_interval_as_they_do(run, tmp_path, fails, command, more):
    words = ["--ckpt", run, "--guide", run / "step-0000002", "--cfg", 2, "--num", 2, "--steps", 4, *more]
    said = fails(command, *words, "--cfg-interval", 0.8, 0.9, "--out", tmp_path / "out.png")
    assert said.startswith("error: --cfg-interval=[0.8, 0.9]: no step evaluates the model at a time in it, so nothing")
    assert "or --cfg=1" in said
    assert not (tmp_path / "out.png").exists()


def test_samples_that_their_guide_never_guided_say_so(tmp_path):
    settings = {"num": 1, "block": 1, "format": "png", "labels": [0], "guide": {"step": 1}}
    samples = Samples(tmp_path / "a", settings)
    samples.claim()
    samples.write(0, torch.zeros(1, 1, 4, 4, dtype=torch.uint8), nfe=3, guide_nfe=0, seconds=1.0)
    assert samples.finish({})["guide_nfe"] == 0
    samples.close()


def test_what_is_unguided_says_so_and_no_more(run, tmp_path):
    words = ["generate", "--ckpt", str(run), "--num", "2", "--steps", "1", "--cfg", "1", "--out", str(tmp_path / "a")]
    sampling(words)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    assert manifest["guide"] is None
    assert "guide_nfe" not in manifest


def test_a_picture_is_guided_too(run, tmp_path, capsys):
    drawn = []
    for name, options in (("a", []), ("b", ["--guide", str(run / "step-0000002"), "--cfg", "6"])):
        scale = options or ["--cfg", "1"]
        sample.main(["--ckpt", str(run), "--num", "2", "--steps", "2", "--out", str(tmp_path / f"{name}.png"), *scale])
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert "NFE 4 (2 of the guide)" in capsys.readouterr().out
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--guide", "nowhere"], "error: --guide: checkpoint 'nowhere': no such folder; give a run"),
        (["--guide", "nowhere", "--cfg", "1"], "error: --guide=nowhere: with --cfg=1 nothing is guided; leave it out"),
        (
            [],
            "error: --cfg=1.5 needs a null class, and this model was trained without class dropout; use --cfg=1, or a",
        ),
    ],
)
def test_slips_are_told_before_the_work(run, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as end:
        sample.main(["--ckpt", str(run), "--num", "1", "--out", str(tmp_path / "a.png"), *options])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(says)


def test_settings_with_a_guide_stay_settings():
    guide = made(1)
    assert replace(Sampling(guide="a"), guide=guide).guide_model is guide
    assert "guide" not in Sampling(guide=guide).describe()
