"""Samples belong to their index; the manifest says how they were made."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_recipe
from PIL import Image
from safetensors.torch import save_file

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.times import shifted
from sit_atconv.latents.codecs import IdentityCodec, VaeCodec
from sit_atconv.pipelines.schedulers import set_steps
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import library_versions, sha256
from sit_atconv.runtime.pictures import NotFinite
from sit_atconv.sampling import SCHEDULERS, samples
from sit_atconv.sampling import generate as generate_command
from sit_atconv.sampling import sampling as routine
from sit_atconv.sampling import setup as setting_up
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.noise import noise
from sit_atconv.sampling.sampling import (
    CAPTION,
    caption_of,
    generate,
    grid,
    grid_png,
    random_label,
    sample_latents,
    too_large,
)
from sit_atconv.sampling.schedulers import generate as generate_scheduled
from sit_atconv.sampling.schedulers import make_scheduler
from sit_atconv.sampling.settings import Sampling, in_short


def lively_model(**options):
    torch.manual_seed(0)
    options = {"in_channels": 1, "token_mixer": "hybrid", **options}
    model = create_model(None, 4, 3, patch_size=2, hidden_size=16, depth=2, num_heads=2, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def noise_of(*indices):
    return noise((1, 4, 4), 0, Stream.SAMPLE_NOISE, indices)


def draw(indices, labels, seed=0, **options):
    return generate(lively_model(), IdentityCodec(), indices, labels, Sampling(**{"steps": 4, **options}), seed)


def test_an_image_depends_on_seed_index_and_label_alone():
    together, nfe = draw([0, 1, 2, 3], [0, 1, 2, 0])
    apart, _ = draw([2], [2])
    assert together.dtype == torch.uint8
    assert together.shape == (4, 1, 4, 4)
    assert (apart[0].int() - together[2].int()).abs().max() <= 1  # float rounding may move a pixel by one
    assert nfe == 8
    assert not torch.equal(draw([2], [1])[0], apart)
    assert not torch.equal(draw([3], [2])[0], apart)
    assert not torch.equal(draw([2], [2], seed=1)[0], apart)


def test_equal_blocks_are_equal_to_the_bit():
    assert torch.equal(draw([4, 5], [0, 1])[0], draw([4, 5], [0, 1])[0])


def test_guidance_one_half_of_the_evaluations():
    assert draw([0], [1], guidance_scale=1.0)[1] == 4
    assert draw([0], [1], guidance_scale=2.0, guidance_interval=(0.5, 1.0))[1] == 4 + 2
    assert draw([0], [1], guidance_scale=2.0, guidance_interval=(0.5, 0.5))[1] == 4 + 1
    assert draw([0], [1], sampler="heun")[1] == 16


def test_it_integrates_the_models_velocity():
    model = lively_model()
    sampling = Sampling(steps=3, guidance_scale=1.0)
    x = torch.from_numpy(
        np.random.default_rng(np.random.SeedSequence([0, 6, 7])).standard_normal((1, 4, 4), dtype=np.float32)
    )[None]
    for t in (0.0, 1 / 3, 2 / 3):
        x = x + model(x, t, torch.tensor([2])).sample / 3
    expected = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
    images, _ = generate(model, IdentityCodec(), [7], [2], sampling)
    assert (images.int() - expected.int()).abs().max() <= 1


SDE_SAMPLINGS = [
    {"sampler": "euler-maruyama"},
    {"sampler": "sde-heun", "diffusion": "linear", "last_step": "none"},
    {"sampler": "sde-heun", "diffusion": "constant", "last_step": "tweedie", "last_step_size": 0.1},
]


@pytest.mark.parametrize("options", SDE_SAMPLINGS, ids=str)
def test_the_noise_of_an_sde_belongs_to_image_and_step(options):
    together, _ = draw([0, 1, 2, 3], [0, 1, 2, 0], **options)
    apart, _ = draw([2], [2], **options)
    assert (apart[0].int() - together[2].int()).abs().max() <= 1
    assert not torch.equal(draw([2], [2], **{**options, "diffusion_norm": 0.5})[0], apart)
    assert not torch.equal(draw([2], [2], sampler="euler")[0], apart)


def test_evaluations_of_every_sampler():
    per_step = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "euler-maruyama": 1, "adams4": 1}
    for sampler, stages in per_step.items():
        assert draw([0], [1], sampler=sampler, guidance_scale=1.0)[1] == 4 * stages
        assert draw([0], [1], sampler=sampler)[1] == 8 * stages
    # three steps and the last step, which is one evaluation
    assert draw([0], [1], sampler="sde-heun", guidance_scale=1.0)[1] == 3 * 2 + 1
    assert draw([0], [1], sampler="sde-heun", guidance_scale=1.0, last_step="none")[1] == 4 * 2
    # of t = 0, 0.32, 0.64, 0.96 the last two are guided
    options = {"sampler": "euler-maruyama", "guidance_scale": 2.0, "guidance_interval": (0.5, 1.0)}
    assert draw([0], [1], **options)[1] == 4 + 2


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5", "euler-maruyama", "flow-match-euler"])
def test_a_watch_is_told_of_every_evaluation_and_changes_no_bit(sampler):
    model, told = lively_model(), []
    given = model, IdentityCodec(), [0, 1], [0, 1]
    if sampler in SCHEDULERS:
        draw = partial(generate_scheduled, SiTPipeline(model, scheduler=make_scheduler(sampler, model)))
        sampling = Sampling(steps=4, guidance_scale=2.0)
    else:
        draw, sampling = generate, Sampling(sampler, steps=4, guidance_scale=2.0)
    images, nfe = draw(*given, sampling, watch=lambda *each: told.append(each))
    assert torch.equal(images, draw(*given, sampling)[0])
    assert [each for each, _ in told] == list(range(2, nfe + 1, 2))
    shares = [share for _, share in told]
    assert shares == sorted(shares) or sampler == "dopri5"  # which goes back where its error was too large
    assert 0 <= min(shares) < max(shares) <= 1


def test_progress_within_a_block_is_shown(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sit_atconv.runtime.console.EVERY", 0)
    base = ["--ckpt", str(run_folder), "--steps", "4", "--batch", "3"]
    sample.main([*base, "--num", "3", "--out", str(tmp_path / "grid.png")])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines[:4]] == [f"evaluation {nfe}" for nfe in (2, 4, 6, 8)]
    assert re.fullmatch(r"sample: image 0 of 3, evaluation 6, 50% of the block, .* left", lines[2])
    sampling(["generate", *base, "--num", "5", "--out", str(tmp_path / "samples")])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", ")[0] for line in lines if "evaluation 8" in line] == [
        "generate: image 0 of 5", "generate: image 3 of 5",
    ]  # fmt: skip


def test_it_follows_the_sde_with_noise_of_the_step():
    model = lively_model()
    options = {"diffusion": "linear", "diffusion_norm": 0.5, "last_step": "mean", "last_step_size": 0.1}
    sampling = Sampling("euler-maruyama", steps=3, guidance_scale=1.0, **options)

    def normal(*key):
        numbers = np.random.default_rng(np.random.SeedSequence(key)).standard_normal((1, 4, 4), dtype=np.float32)
        return torch.from_numpy(numbers)[None]

    def drift(x, t):
        v = model(x, t, torch.tensor([2])).sample
        return v + 0.5 * (1 - t) * (t * v - x) / (1 - t)  # score = (t v - x) / (1 - t)

    x = normal(1, 6, 7)
    with torch.no_grad():
        for step, t in enumerate((0.0, 0.45)):
            x = x + 0.45 * drift(x, t) + (2 * 0.5 * (1 - t) * 0.45) ** 0.5 * normal(1, 8, 7, step)
        x = x + 0.1 * drift(x, 0.9)
    latents, _ = sample_latents(model, [7], torch.tensor([2]), sampling, 1)
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_the_models_own_path_and_prediction_are_followed(path, prediction):
    model, sampling = lively_model(path=path, prediction=prediction), Sampling("heun", 6, 2.0)
    x = torch.from_numpy(
        np.random.default_rng(np.random.SeedSequence([0, 6, 3])).standard_normal((1, 4, 4), dtype=np.float32)
    )[None]
    start, end = sampling.interval(model)
    assert (start, end) == (0.0 if path == "vp" else 1e-3, 1 - 1e-3)

    def velocity(x, t):
        outputs = [model(x, t, torch.tensor([label])).sample for label in (1, 3)]
        conditional, unconditional = (PATHS[path]().velocity_from(prediction, out, x, t) for out in outputs)
        return unconditional + 2.0 * (conditional - unconditional)

    with torch.no_grad():
        for t, t_next in pairwise(torch.linspace(start, end, 7)):
            slope = velocity(x, t)
            x = x + (t_next - t) * (slope + velocity(x + (t_next - t) * slope, t_next)) / 2
    latents, _ = sample_latents(model, [3], torch.tensor([1]), sampling)
    assert latents.isfinite().all()
    torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def closed_form(path, t):
    """alpha, sigma and q at t, of the drift variance: v = q (x + score) on the paths that preserve variance."""
    if path == "gvp":
        return math.sin(math.pi * t / 2), math.cos(math.pi * t / 2), math.pi / 2 / math.tan(math.pi * t / 2)
    log_alpha = -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05
    return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)), (0.1 + 19.9 * (1 - t)) / 2


@pytest.mark.parametrize("sampler", ["euler-maruyama", "sde-heun"])
@pytest.mark.parametrize(
    ("path", "prediction", "diffusion", "start"),
    [("vp", "noise", "sbdm", 0), ("vp", "noise", "constant", 0), ("gvp", "score", "sbdm", 0.04),
     ("gvp", "score", "constant", 1e-3)],
)  # fmt: skip
@pytest.mark.parametrize("last", ["mean", "tweedie"])
def test_an_sde_follows_the_models_own_path_written_out(sampler, path, prediction, diffusion, start, last):
    model = lively_model(path=path, prediction=prediction, in_channels=4)
    options = {"diffusion": diffusion, "diffusion_norm": 0.5, "last_step": last, "last_step_size": 0.2}
    sampling = Sampling(sampler, 7, 2.0, "first3", (0.0, 0.5), **options)

    def normal(*key):
        numbers = np.random.default_rng(np.random.SeedSequence(key)).standard_normal((4, 4, 4), dtype=np.float32)
        return torch.from_numpy(numbers)[None].double()

    def score(x, t):
        conditional, without = (model(x.float(), t, torch.tensor([label])).sample.double() for label in (2, 3))
        if t <= 0.5:
            conditional[:, :3] = without[:, :3] + 2 * (conditional[:, :3] - without[:, :3])
        return -conditional / closed_form(path, t)[1] if prediction == "noise" else conditional

    def w(t):
        return 0.5 * (closed_form(path, t)[2] if diffusion == "sbdm" else 1)

    def drift(x, t):
        s = score(x, t)
        return closed_form(path, t)[2] * (x + s) + w(t) * s

    x, h = normal(1, 6, 7), (0.8 - start) / 6
    with torch.no_grad():
        for step in range(6):
            t, kick = start + step * h, normal(1, 8, 7, step)
            kick = (2 * w(t) * h) ** 0.5 * kick
            if sampler == "sde-heun":
                x = x + kick
                slope = drift(x, t)
                x = x + h * (slope + drift(x + h * slope, t + h)) / 2
            else:
                x = x + h * drift(x, t) + kick
        alpha, sigma, _ = closed_form(path, 0.8)
        x = x + 0.2 * drift(x, 0.8) if last == "mean" else (x + sigma**2 * score(x, 0.8)) / alpha
    latents, _ = sample_latents(model, [7], torch.tensor([2]), sampling, 1)
    torch.testing.assert_close(latents.double(), x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def test_what_did_not_act_is_not_described():
    euler = Sampling(guidance_scale=1.0).describe()
    assert euler["guidance_channels"] is euler["guidance_interval"] is euler["diffusion"] is euler["last_step"] is None
    sde = Sampling("euler-maruyama", 250).describe()
    assert {key: sde[key] for key in ("steps", "diffusion", "diffusion_norm", "last_step", "last_step_size")} == {
        "steps": 250, "diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04,
    }  # fmt: skip
    assert Sampling("sde-heun", last_step="none").describe()["last_step_size"] is None
    guided = Sampling(guidance_scale=2.0, guidance_channels="first3", guidance_interval=(0.1, 0.5)).describe()
    assert (guided["guidance_channels"], guided["guidance_interval"]) == ("first3", [0.1, 0.5])
    # What earlier versions did not have is None where it changes nothing: their records lack it.
    assert [euler[key] for key in ("start", "grid", "time_shift", "guidance_every")] == [None] * 4
    few = Sampling("adams3", grid=[0, 0.2, 0.5, 1], time_shift=2.0, guidance_every=2).describe()
    stated = {"steps": 3, "start": "lower", "grid": [0, 0.2, 0.5, 1], "time_shift": 2.0, "guidance_every": 2}
    assert stated.items() <= few.items()


@pytest.mark.parametrize(
    ("model", "options", "acts", "interval"),
    [
        ({}, {}, None, None),
        ({}, {"sampler": "sde-heun"}, None, None),
        ({}, {"sampler": "sde-heun", "last_step": "none"}, 1e-3, (0, 0.99)),
        ({}, {"sampler": "sde-heun", "diffusion": "sbdm"}, 0.04, (0.01, 0.96)),
        ({"path": "vp"}, {}, 1e-3, (0, 0.99)),
        ({"path": "vp"}, {"sampler": "sde-heun", "diffusion": "sbdm"}, None, None),
        ({"path": "vp"}, {"sampler": "sde-heun", "diffusion": "sbdm", "last_step": "none"}, 1e-3, (0, 0.99)),
        ({"path": "gvp", "prediction": "score"}, {"sampler": "sde-heun"}, 1e-3, (0.01, 0.96)),
    ],
)
def test_epsilon_keeps_from_singular_ends_and_is_refused_where_there_are_none(model, options, acts, interval):
    model, stated = lively_model(**model), Sampling(**options, epsilon=0.01)
    assert Sampling(**options).for_model(model).describe()["epsilon"] == acts
    if acts is None:
        with pytest.raises(InputError, match=r"epsilon=0.01 would do nothing"):
            stated.for_model(model)
        return
    assert stated.for_model(model).describe()["epsilon"] == 0.01
    assert stated.interval(model) == interval


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"guidance_scale": 1.0, "guidance_channels": "first3"},
            "guidance_channels=first3: with guidance_scale=1 nothing is",
        ),
        ({"guidance_scale": 1.0, "guidance_interval": (0.0, 0.5)}, "with guidance_scale=1 nothing is guided"),
        ({"epsilon": 0.0}, "epsilon=0.0: must be at least 1e-06 and under 0.5"),
        ({"epsilon": 0.5}, "epsilon=0.5"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"guidance_scale": 1.0, "guidance_every": 2}, "guidance_every=2: with guidance_scale=1 nothing is guided"),
        ({"guidance_scale": 1.0, "guidance_batches": 2}, "guidance_batches=2: with guidance_scale=1 nothing is guided"),
        ({"guide": "runs/weaker", "guidance_batches": 2}, "guidance_batches=2: model and guide have a batch each"),
        ({"guidance_batches": 3}, "guidance_batches=3: must be at least 1 and at most 2"),
        ({"sampler": "dopri5", "guidance_every": 2}, "guidance_every=2: dopri5 chooses its own times"),
        ({"sampler": "dopri5", "time_shift": 2.0}, r"time_shift=2\.0: dopri5 chooses its own times; leave it out"),
        ({"sampler": "dopri5", "grid": "cosine"}, "grid=cosine: dopri5 chooses"),
        ({"sampler": "heun", "start": "rk"}, "start=rk goes with sampler=adams2 or .* or abm3; leave it out"),
        ({"sampler": "adams4", "steps": 3}, "steps=3: adams4 with start=lower needs at least 4.*or a lower order"),
        ({"sampler": "abm2", "steps": 1}, "steps=1: abm2 with .* needs at least 2 steps; take more, or euler$"),
        ({"grid": [0, 0.5, 1], "steps": 3}, "steps=3: grid has the times of 2; leave one of them out"),
        ({"grid": [0, 0.5]}, r"grid=\[0, 0\.5\]: times of a grid must rise strictly, from 0 to 1; give times such as"),
        ({"grid": [0, "x", 1]}, "could not convert string to float: 'x'; give times"),
        (
            {"grid": "cosin"},
            r"grid=cosin: No such file or directory; choose from \['uniform', 'cosine'\], or give a file",
        ),
        ({"grid": 3}, "grid=3: 'int' object"),
        ({"time_shift": 0.0}, "time_shift=0.0: must be at least 0.001"),
        ({"guidance_every": 0}, "guidance_every=0: must be at least 1"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        Sampling(**options)


def test_settings_are_called_as_the_command_line_does():
    with pytest.raises(InputError) as told, in_short():
        raise InputError("steps=3: grid=x with recipe.steps=2, last_step_size=0.1, guidance_every=2 and guide=y")
    called = "--steps=3: --grid=x with recipe.steps=2, --last-step-size=0.1, --cfg-every=2 and --guide=y"
    assert str(told.value) == called


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("by", ["sampler", "pipeline"])
def test_the_two_classes_of_an_evaluation_share_a_batch_or_have_one_each(by, batches):
    model, sizes = lively_model(), []
    settings = Sampling(steps=4, guidance_scale=2.0, guidance_interval=[0.5, 1.0], guidance_batches=batches)
    plain = sample_latents(model, [3, 8], torch.tensor([0, 2]), replace(settings, guidance_batches=1))[0]
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    if by == "sampler":
        drawn, nfe = sample_latents(model, [3, 8], torch.tensor([0, 2]), settings)
    else:
        pipe, given = SiTPipeline(model, scheduler=make_scheduler("flow-match-euler", model)), noise_of(3, 8)
        pipe.set_progress_bar_config(disable=True)
        guided_by = {"guidance_interval": (0.5, 1.0), "guidance_batches": batches}
        drawn = pipe([0, 2], 4, 2.0, latents=given, output_type="latent", **guided_by).images
        nfe = pipe.nfe
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
    assert sizes == [2, 2, *({1: [4], 2: [2, 2]}[batches] * 2)]
    assert nfe == 4 + 2


@pytest.mark.parametrize(
    ("option", "value"), [("--epsilon", "0.1"), ("--grid", "cosine"), ("--start", "rk"), ("--sampler", "adams2")]
)
def test_what_a_scheduler_has_no_use_for_is_refused_by_both_commands(fails, tmp_path, option, value):
    options = ["--ckpt", "nowhere", "--scheduler", "unipc", option, value]
    says = f"{option} {value} does nothing with --scheduler unipc; leave one out"
    assert says in fails(sample.main, *options)
    assert says in fails(sampling, "generate", *options, "--num", "1", "--out", tmp_path / "out")


def test_times_that_fp32_does_not_tell_apart_are_refused():
    close = Sampling("adams2", grid=[0, 0.5, 0.5 + 1e-9, 1])
    with pytest.raises(InputError, match=r"grid: two of its times are the same number.*take fewer steps"):
        close.for_model(lively_model())


def test_settings_that_do_nothing_to_this_model_are_refused():
    first3 = Sampling(guidance_channels="first3")
    with pytest.raises(InputError, match="first3 would do nothing: this model has 3"):
        first3.for_model(lively_model(in_channels=3))
    first3.for_model(lively_model(in_channels=4))
    long = Sampling("sde-heun", diffusion="sbdm", last_step_size=0.97)
    with pytest.raises(InputError, match="leave nothing of"):
        long.for_model(lively_model())


@pytest.mark.parametrize("by", ["file", "numbers"])
@pytest.mark.parametrize("sampler", ["adams2", "euler-maruyama"])
def test_the_times_of_a_grid_are_those_that_the_model_is_asked_at(tmp_path, sampler, by):
    model, asked, unit = lively_model(), [], [0.0, 0.2, 0.3, 0.7, 1.0]
    (tmp_path / "grid").write_text("\n".join(map(str, unit)) + "\n")
    grid = [str(tmp_path / "grid")] if by == "file" else [str(t) for t in unit]  # as a command line gives them
    sampling = Sampling(sampler, grid=grid, time_shift=2.0, guidance_scale=1.0).for_model(model)
    model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1][0].item()))
    _, nfe = sample_latents(model, [0], torch.tensor([1]), sampling)
    end = 1 if sampler == "adams2" else 0.96
    expected = [end * t / (t + 2 * (1 - t)) for t in (unit if end < 1 else unit[:-1])]
    assert asked == pytest.approx(expected, abs=1e-6)
    assert (nfe, sampling.steps) == (len(asked), len(asked))


@pytest.mark.parametrize(("name", "off"), [("flow-match-euler", 1e-6), ("unipc", 2.5e-3), ("dpm++", 2.5e-3)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_levels_of_a_scheduler_are_shifted_once(name, off, shift):
    levels = set_steps(make_scheduler(name, lively_model(), shift), 10)
    expected = 1 - shifted(torch.linspace(0, 1, 11)[:-1], shift)
    torch.testing.assert_close(levels, expected, rtol=0, atol=off)  # two are a thousandth off before the shift


@pytest.mark.parametrize(
    ("scheduler", "shift", "says"),
    [
        ("flow-match-heun", 2, "--time-shift 2.0: --scheduler flow-match-heun does not shift.*take one of flow"),
        ("flow-match-lcm", 0.5, "--time-shift 0.5: --scheduler flow-match-lcm does not shift its last noise levels so"),
        ("unipc", 50, "--time-shift 50.0: scheduler UniPC.* in a single step, even of 1000"),
        ("dpm++", 0.3, "--time-shift 0.3: scheduler DPM.* begins at noise level 0.9967"),
    ],
)  # fmt: skip
def test_a_shift_that_a_scheduler_does_not_make_leaves_no_folder(run_folder, tmp_path, fails, scheduler, shift, says):
    options = ["--num", 2, "--steps", 4, "--scheduler", scheduler, "--time-shift", shift, "--out", tmp_path / "x"]
    assert re.search(says, fails(sampling, "generate", "--ckpt", run_folder, *options))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("start", ["lower", "rk"])
def test_adams_on_a_model_written_out_whatever_else_is_in_the_batch(start):
    model, times = lively_model(), [0.0, 0.1, 0.4, 1.0]
    options = Sampling("adams2", grid=times, guidance_scale=2.0, guidance_every=2, start=start)
    x = torch.from_numpy(
        np.random.default_rng(np.random.SeedSequence([0, 6, 7])).standard_normal((1, 4, 4), dtype=np.float32)
    )[None]
    calls = 0

    def velocity(x, t):
        nonlocal calls, difference
        strong, weak = (model(x, t, torch.tensor([label])).sample for label in (2, 3))
        if calls % 2 == 0:
            difference = strong - weak
        calls += 1
        return strong + difference

    difference, slopes = None, []
    with torch.no_grad():
        for step, (t, t_next) in enumerate(pairwise(times)):
            h, slopes = t_next - t, [velocity(x, t), *slopes]
            if step == 0:
                x = x + h * (slopes[0] if start == "lower" else (slopes[0] + velocity(x + h * slopes[0], t_next)) / 2)
            else:
                ratio = h / (t - times[step - 1])
                x = x + h * (slopes[0] + ratio / 2 * (slopes[0] - slopes[1]))
    alone, nfe = sample_latents(model, [7], torch.tensor([2]), options)
    torch.testing.assert_close(alone, x, rtol=1e-4, atol=1e-4)
    assert nfe == {"lower": 3 + 2, "rk": 4 + 2}[start]
    # In batches of one size an image has the same bits, whatever the others are.
    first, second = (sample_latents(model, [7, other], torch.tensor([2, 0]), options)[0][0] for other in (5, 9))
    assert torch.equal(first, second)


def test_the_first_step_of_sbdm_keeps_the_state_in_reach():
    # With v = 0 the drift is -x / t: a step of 0.02 from t = 1e-3 would multiply the state by 19.
    model = lively_model()
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.zeros_(model.final_layer.linear.bias)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].std().item()))
    sample_latents(model, range(20), torch.zeros(20, dtype=torch.long), Sampling("euler-maruyama", diffusion="sbdm"))
    assert max(seen) < 3


def test_the_manifest_says_what_a_model_of_another_path_is_sampled_by(tmp_path, vae_folder):
    lively_model(path="vp", prediction="noise", in_channels=4).save_pretrained(tmp_path / "model")
    options = ["--ckpt", str(tmp_path / "model"), "--vae", str(vae_folder), "--cfg-channels", "first3", "--steps", "2"]
    sampling(["generate", *options, "--epsilon", "0.02", "--num", "1", "--out", str(tmp_path / "out")])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    expected = {
        "path": "vp", "prediction": "noise", "time_interval": [0.0, 0.98], "epsilon": 0.02,
        "guidance_channels": "first3",
    }  # fmt: skip
    assert expected.items() <= manifest.items()


def test_the_steps_of_a_stochastic_scheduler_draw_for_each_image(monkeypatch):
    first_noise = "sit_atconv.sampling.schedulers.noise"
    monkeypatch.setattr(first_noise, lambda shape, seed, stream, indices: torch.zeros(len(indices), *shape))
    model, sampling = lively_model(), Sampling(steps=3, guidance_scale=1.0)

    def scheduled(indices, seed=0):
        pipe = SiTPipeline(model, scheduler=make_scheduler("flow-match-lcm", model))
        with pytest.warns(UserWarning, match="distilled"):
            return generate_scheduled(pipe, model, IdentityCodec(), indices, [0] * len(indices), sampling, seed)[0]

    first, second = scheduled([4, 5])
    assert not torch.equal(first, second)
    assert torch.equal(scheduled([5, 4])[0], second)
    assert not torch.equal(scheduled([5, 4], seed=1)[0], second)


def test_random_labels_cover_the_classes_evenly():
    labels = [random_label(0, index, 4) for index in range(2000)]
    assert np.bincount(labels, minlength=4).min() > 420
    assert random_label(0, 5, 1000) == random_label(0, 5, 1000) != random_label(1, 5, 1000)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps on digits."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {{out: {folder}/run, seed: 3}}\n"
        "model: {patch_size: 2, hidden_size: 16, depth: 1, num_heads: 2, token_mixer: atconv}\n"
        "train: {max_steps: 2, batch_size: 4}\npreview: {every: 0}\n"
    )
    run_recipe(recipe)
    return folder / "run"


def test_generate_writes_images_by_index_with_their_provenance(run_folder, tmp_path):
    options = ["--ckpt", str(run_folder), "--steps", "3", "--seed", "4", "--cfg", "1.7"]
    options += ["--cfg-interval", "0", "0.5"]
    for name, num, batch in (("a", 13, 5), ("b", 17, 5), ("c", 13, 13)):
        out = str(tmp_path / name)
        sampling(["generate", *options, "--num", str(num), "--batch", str(batch), "--out", out])
    contents = [(tmp_path / "a" / f"{index:06d}.png").read_bytes() for index in range(13)]
    assert len(set(contents)) == 13  # the noise does not begin anew in each block
    for index in range(13):
        a, c = (np.array(Image.open(tmp_path / name / f"{index:06d}.png")).astype(int) for name in ("a", "c"))
        assert abs(a - c).max() <= 1  # nor depend on the block
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert files == [f"{index:06d}.png" for index in range(13)]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert Image.open(tmp_path / "a" / files[0]).size == (8, 8)
    assert Image.open(tmp_path / "a" / files[0]).mode == "L"
    weights = run_folder / "step-0000002/ema/diffusion_pytorch_model.safetensors"
    expected = {
        "num": 13, "labels": [index % 10 for index in range(13)], "sampler": "euler", "steps": 3, "nfe": 5.0, "seed": 4,
        "guidance_scale": 1.7, "guidance_channels": "all", "guidance_interval": [0.0, 0.5], "block": 5,
        "dtype": "fp32", "codec": {"codec": "identity", "scale": 1.0, "shift": 0.0},
        "uint8_rule": "trunc(clamp(127.5 * x + 128, 0, 255))", "weights": "ema", "step": 2, "format": "png",
        "labels_rule": "balanced", "processes": 1, "image_shape": [1, 8, 8], "device": "cpu",
        "checkpoint": str(run_folder / "step-0000002"),
    }  # fmt: skip
    assert expected.items() <= manifest.items()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest["checkpoint_sha256"]["ema/diffusion_pytorch_model.safetensors"] == digest
    assert not list(tmp_path.glob("*.tmp"))


def test_dopri5_records_its_tolerances_and_not_the_steps_it_ignores(run_folder, tmp_path):
    out = tmp_path / "samples"
    sampling(["generate", "--ckpt", str(run_folder), "--num", "2", "--sampler", "dopri5", "--out", str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["steps"], manifest["rtol"], manifest["atol"]) == (None, 1e-3, 1e-6)
    assert manifest["nfe"] > 2


def test_an_sde_records_what_decides_its_images_whatever_the_number(run_folder, tmp_path):
    options = ["--ckpt", str(run_folder), "--sampler", "euler-maruyama", "--steps", "3", "--diffusion", "decreasing"]
    options += ["--last-step", "euler", "--last-step-size", "0.1", "--batch", "2", "--diffusion-norm", "2"]
    for num in (3, 5):
        sampling(["generate", *options, "--num", str(num), "--out", str(tmp_path / str(num))])
    for index in range(3):
        short, long = (tmp_path / str(num) / f"{index:06d}.png" for num in (3, 5))
        assert short.read_bytes() == long.read_bytes()
    manifest = json.loads((tmp_path / "3" / "manifest.json").read_text())
    expected = {
        "sampler": "euler-maruyama", "steps": 3, "diffusion": "decreasing", "diffusion_norm": 2.0,
        "last_step": "euler", "last_step_size": 0.1, "nfe": 6.0, "path": "linear", "prediction": "velocity",
        "time_interval": [0.0, 0.9],
    }  # fmt: skip
    assert expected.items() <= manifest.items()


def test_the_manifest_says_how_the_model_was_trained(run_folder, tmp_path):
    sampling(["generate", "--ckpt", str(run_folder), "--num", "1", "--steps", "1", "--out", str(tmp_path / "a")])
    training = json.loads((tmp_path / "a" / "manifest.json").read_text())["training"]
    model = SiTTransformer2DModel.from_pretrained(run_folder / "step-0000002/ema", use_safetensors=True)
    assert training == {
        "name": None, "token_mixer": "atconv", "seed": 3, "run": str(run_folder), "images_seen": 8,
        "precision": "fp32", "params": sum(tensor.numel() for tensor in model.state_dict().values()), "repa": None,
        "distill": None, "init": None, "lora": None, "meanflow": None,
    }  # fmt: skip
    manifest = run_folder / "step-0000002" / "manifest.json"
    stated = json.loads(manifest.read_text())
    stated["recipe"]["repa"] |= {"encoder": "dinov2_vitb14", "depth": 1, "weight": 0.25}
    stated["recipe"]["lora"] |= {"rank": 4, "alpha": 8.0}
    stated["recipe"]["distill"] |= {"teacher": "teacher", "select": "even"}
    base = {"source": "base", "which": "ema", "step": 1, "codec": stated["codec"], "model": stated["recipe"]["model"]}
    stated["init"] = {"sha256": "ab" * 32, "from": base, "anew": ["y_embedder"]}
    manifest.write_text(json.dumps(stated))
    sampling(["generate", "--ckpt", str(run_folder), "--num", "1", "--steps", "1", "--out", str(tmp_path / "repa")])
    training = json.loads((tmp_path / "repa" / "manifest.json").read_text())["training"]
    assert training["repa"] == {"encoder": "dinov2_vitb14", "depth": 1, "weight": 0.25}
    assert (training["init"], training["lora"]) == ({"anew": ["y_embedder"]}, {"rank": 4, "alpha": 8.0})
    assert training["distill"] == {"select": "even", "control": False}
    lively_model().save_pretrained(tmp_path / "model")
    command = ["generate", "--ckpt", str(tmp_path / "model"), "--num", "1", "--steps", "1"]
    sampling([*command, "--out", str(tmp_path / "b")])
    training = json.loads((tmp_path / "b" / "manifest.json").read_text())["training"]
    assert training.pop("params") > 0
    assert training.pop("token_mixer") == "hybrid"
    assert set(training.values()) == {None}
    linear = lively_model().blocks[0].mlp.fc1
    adapters = {f"blocks.0.mlp.fc1.lora_{part}.weight": torch.ones(shape)
                for part, shape in (("A", (1, linear.in_features)), ("B", (linear.out_features, 1)))}  # fmt: skip
    save_file(adapters, tmp_path / "adapters.safetensors")
    sampling([*command, "--lora", str(tmp_path / "adapters.safetensors"), "--out", str(tmp_path / "lora")])
    training = json.loads((tmp_path / "lora" / "manifest.json").read_text())["training"]
    assert training["lora"] == {"sha256": sha256(tmp_path / "adapters.safetensors")}


@pytest.fixture
def generates(run_folder, tmp_path):
    """Runs `generate` for 7 images in blocks of 3, with more options over its own; returns the folder."""

    def run(*more, name="out"):
        options = ["--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", tmp_path / name, *more]
        sampling(["generate", *map(str, options)])
        return tmp_path / name

    return run


@pytest.fixture
def stopped(generates, monkeypatch, capsys):
    """Runs `generate` until the disk refuses the second block."""

    def run(*more, name="out"):
        refused, original = re.compile(r"00000[3-5]\.png|000001\.npy"), samples.whole

        @contextmanager
        def full(path, synced=True):
            with original(path, synced) as unfinished:
                if refused.fullmatch(path.name):
                    raise OSError(28, "No space left on device")
                yield unfinished

        with monkeypatch.context() as patch:
            patch.setattr(samples, "whole", full)
            with pytest.raises(SystemExit) as stop:
                generates(*more, name=name)
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "No space left on device; the blocks that are there are whole" in error

    return run


def pixels(folder) -> np.ndarray:
    """uint8 (N, H, W) of the PNGs of a folder."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_an_npz_holds_the_pngs_as_adm_reads_them(generates, labels):
    png, npz = (generates("--labels", labels, "--format", kind, name=kind) for kind in ("png", "npz"))
    assert sorted(path.name for path in npz.iterdir()) == ["manifest.json", "samples.npz"]
    with zipfile.ZipFile(npz / "samples.npz") as archive:  # as ADM's evaluator reads it: member by member, streamed
        assert archive.testzip() is None
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        with archive.open("arr_0.npy") as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            header = np.lib.format.read_array_header_1_0(member)
            assert header == ((7, 8, 8, 1), False, np.dtype("uint8"))
            images = np.frombuffer(member.read(), np.uint8).reshape(header[0])
    with np.load(npz / "samples.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], images)
        assert np.array_equal(images[..., 0], pixels(png))
        assert arrays["arr_1"].dtype == np.int64
        manifest = json.loads((npz / "manifest.json").read_text())
        assert arrays["arr_1"].tolist() == manifest["labels"]
    other = json.loads((png / "manifest.json").read_text())
    assert {key for key in manifest if manifest[key] != other[key]} <= {"format", "seconds_per_image"}
    assert (manifest["format"], manifest["labels_rule"]) == ("npz", labels)


def test_colour_and_a_grid_that_is_not_square_keep_their_places(tmp_path):
    images = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for kind in ("png", "npz"):
        made = samples.Samples(tmp_path / kind, {"num": 5, "block": 2, "format": kind, "labels": [0, 1, 2, 3, 4]})
        assert made.claim() == [0, 1, 2]
        for number in (2, 0, 1):
            made.write(number, images[list(made.indices(number))], nfe=number, seconds=1.5)
        manifest = made.finish({"processes": 1})
        assert manifest["nfe"] == (0 * 2 + 1 * 2 + 2 * 1) / 5  # the mean of images, not of blocks
        assert manifest["seconds_per_image"] == 4.5 / 6
        assert manifest["image_shape"] == [3, 4, 6]
    expected = images.permute(0, 2, 3, 1).numpy()
    for index in range(5):
        assert np.array_equal(np.array(Image.open(tmp_path / "png" / f"{index:06d}.png")), expected[index])
    with np.load(tmp_path / "npz" / "samples.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["arr_0"], expected)


def test_an_npz_is_written_a_block_at_a_time(tmp_path):
    num, side = 64, 256
    settings = {"num": num, "block": 4, "format": "npz", "labels": [0] * num}
    made = samples.Samples(tmp_path / "out", settings)
    for number in made.claim():
        made.write(number, torch.full((4, 3, side, side), number, dtype=torch.uint8), nfe=1, seconds=1.0)
    tracemalloc.start()
    made.finish({})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    block = 4 * 3 * side * side
    assert peak < 4 * block < num / 4 * block
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [index // 4 for index in range(num)]
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as archive, open(archive.filename, "rb") as file:
        file.seek(archive.getinfo("arr_0.npy").header_offset + 4)
        assert int.from_bytes(file.read(2), "little") >= 45  # a member may be over 4 GiB: zip64


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_full_disk_leaves_what_the_same_command_goes_on_with(generates, stopped, tmp_path, monkeypatch, kind, capsys):
    whole = generates("--format", kind, name="whole")
    stopped("--format", kind)
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    images = {f"{index:06d}.png" for index in range(3)} if kind == "png" else {"blocks/000000.npy"}
    assert files == {".lock", "settings.json", "blocks", "blocks/000000.json", *images}
    made = count_blocks(monkeypatch)
    monkeypatch.setattr("sit_atconv.runtime.console.EVERY", 0)
    capsys.readouterr()
    generates("--format", kind)
    assert made == [3, 6]
    assert capsys.readouterr().err.startswith("generate: image 3 of 7, evaluation ")  # it starts where the work does
    for path in whole.iterdir():
        if path.name != "manifest.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def count_blocks(monkeypatch) -> list[int]:
    """The first index of every block that is made from now on."""
    made, original = [], routine.generate
    monkeypatch.setattr(
        routine,
        "generate",
        lambda model, codec, indices, *rest, **more: (
            made.append(indices[0]) or original(model, codec, indices, *rest, **more)
        ),
    )
    return made


@pytest.mark.parametrize("labels", ["balanced", "random", "file"])
def test_every_network_call_has_a_whole_block(generates, tmp_path, monkeypatch, labels):
    # Of another batch a multiplication rounds otherwise, and dopri5 takes other steps.
    calls, original = [], routine.generate
    monkeypatch.setattr(
        routine,
        "generate",
        lambda *given, **more: calls.append((list(given[2]), list(given[3]))) or original(*given, **more),
    )
    (tmp_path / "labels").write_text("9\n8\n7\n6\n5\n4\n3\n")
    generates("--labels", tmp_path / "labels" if labels == "file" else labels)
    drawn = [random_label(0, index, 10) for index in range(9)]
    expected = {"balanced": list(range(9)), "random": drawn, "file": [9, 8, 7, 6, 5, 4, 3, 7, 8]}[labels]
    assert [index for indices, _ in calls for index in indices] == list(range(9))
    assert [label for _, given in calls for label in given] == expected
    assert [len(indices) for indices, _ in calls] == [3, 3, 3]


def test_a_disk_that_is_full_for_the_npz_alone_keeps_the_blocks(generates, tmp_path, monkeypatch, fails, run_folder):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(samples.zipfile, "ZipFile", full)
        with pytest.raises(SystemExit):
            generates("--format", "npz")
    assert not list((tmp_path / "out").glob("samples.npz*"))
    made = count_blocks(monkeypatch)
    assert (generates("--format", "npz") / "samples.npz").is_file()
    assert made == []


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no-record", "record-cut", "unfinished", "cut-npy"])
def test_a_block_that_is_not_whole_is_made_again(generates, stopped, tmp_path, monkeypatch, damage):
    kind = "npz" if damage == "cut-npy" else "png"
    whole, out = generates("--format", kind, name="whole"), tmp_path / "out"
    stopped("--format", kind)
    image, record = out / "000001.png", out / "blocks" / "000000.json"
    content = image.read_bytes() if kind == "png" else b""
    if damage == "cut":
        image.write_bytes(content[:-1])
    elif damage == "changed":
        shutil.copy(out / "000000.png", image)
    elif damage == "missing":
        image.unlink()
    elif damage == "no-record":
        record.unlink()
    elif damage == "record-cut":
        record.write_text(record.read_text()[:20])
    elif damage == "unfinished":
        record.rename(f"{record}.tmp")
    else:
        array = record.with_suffix(".npy")
        array.write_bytes(array.read_bytes()[:-1])
    made = count_blocks(monkeypatch)
    generates("--format", kind)
    assert made == [0, 3, 6]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.glob("*.[!j]*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "5"], "seed: 0 -> 5"),
        (["--num", "8"], "num: 7 -> 8"),
        (["--batch", "4"], "block: 3 -> 4"),
        (["--steps", "3"], "steps: 2 -> 3"),
        (["--cfg", "1"], "guidance_scale: 1.5 -> 1.0"),
        (["--cfg-interval", "0", "0.5"], "guidance_interval.1: 1.0 -> 0.5"),
        (["--sampler", "heun"], 'sampler: "euler" -> "heun"'),
        (["--dtype", "bf16"], 'dtype: "fp32" -> "bf16"'),
        (["--format", "npz"], 'format: "png" -> "npz"'),
        (["--labels", "random"], 'labels_rule: "balanced" -> "random"'),
        (["--ckpt", "RUN/model"], 'weights: "ema" -> "model"'),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_other_settings_are_refused_by_name(
    generates, stopped, run_folder, tmp_path, fails, capsys, options, says, complete
):
    generates() if complete else stopped()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    options = [option.replace("RUN", str(run_folder / "step-0000002")) for option in options]
    base = ["--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", tmp_path / "out"]
    error = fails(sampling, "generate", *base, *options)
    assert f"holds samples with other settings, {says}; state it as it was, or choose another folder" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_checkpoint_is_refused_and_what_moved_is_not(tmp_path, fails, vae_folder, capsys):
    model = lively_model(in_channels=4)
    model.save_pretrained(tmp_path / "model")
    base = ["generate", "--num", "2", "--steps", "1", "--out", str(tmp_path / "out")]
    sampling([*base, "--ckpt", str(tmp_path / "model"), "--vae", str(vae_folder)])
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copytree(vae_folder, tmp_path / "vae")
    moved = [*base, "--ckpt", str(tmp_path / "moved"), "--vae", str(tmp_path / "vae")]
    sampling(moved)
    assert "complete already" in capsys.readouterr().out
    with torch.no_grad():
        model.final_layer.linear.bias += 1
    model.save_pretrained(tmp_path / "moved")
    assert "checkpoint_sha256.diffusion_pytorch_model.safetensors: " in fails(sampling, *moved)


def test_complete_samples_are_said_to_be_and_left_alone(generates, run_folder, monkeypatch, capsys):
    out = generates()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "blocks").mkdir()  # of a process that was killed between the manifest and its end
    (out / "blocks" / "000000.json").write_text("{}")
    (out / "settings.json").write_bytes((out / "manifest.json").read_bytes())  # which has all settings
    capsys.readouterr()
    monkeypatch.setattr(generate_command, "library_versions", lambda: {"torch": "99"})
    made = count_blocks(monkeypatch)
    generates()
    assert capsys.readouterr().out == f"7 images in {out}: complete already, with these settings\n"
    assert made == []
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_in_which_another_command_writes_is_left_alone(generates, stopped, tmp_path, fails, capsys, begun):
    whole, out = generates(name="whole"), tmp_path / "out"
    if begun:
        stopped()
    out.mkdir(exist_ok=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out / ".lock")], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        capsys.readouterr()
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        with pytest.raises(SystemExit):
            generates()
        assert f"--out {str(out)!r} is in use by another process; end that one" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        holder.kill()
    generates()  # what is killed lets go
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_samples_that_another_command_completes_meanwhile_are_complete(generates, tmp_path, monkeypatch, capsys):
    whole, original = generates(name="whole"), samples.lock

    def late(folder, name):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        return original(folder, name)

    monkeypatch.setattr(samples, "lock", late)
    made = count_blocks(monkeypatch)
    capsys.readouterr()
    out = generates()
    assert made == []
    assert "complete already" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--num", 99999999999, "--num 99999999999: must be at least 1 and at most 10,000,000"),
        ("--num", 10_000_001, "--num 10000001: must be at least 1 and at most 10,000,000"),
        ("--num", 0, "--num 0: must be at least 1"),
        ("--out", "", "--out '': give the name of a new folder"),
        ("--labels", "", "--labels '': choose from ['balanced', 'random'] or give a file"),
        ("--out", "x" * 300, "x' cannot be written: File name too long; choose another place"),
    ],
)
def test_options_that_cannot_be_are_told(fails, run_folder, tmp_path, monkeypatch, option, value, says):
    monkeypatch.chdir(tmp_path)
    base = ["generate", "--ckpt", run_folder, "--num", 7, "--steps", 1, "--out", tmp_path / "out"]
    message = fails(sampling, *base, option, value)
    assert says in message
    assert "goes on" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_moved_is_the_same_and_another_autoencoder_is_not(
    generates, run_folder, tmp_path, vae_folder, fails, capsys
):  # fmt: skip
    out = generates()
    shutil.copytree(run_folder, tmp_path / "moved")
    generates("--ckpt", tmp_path / "moved")  # its training names another folder
    assert json.loads((out / "manifest.json").read_text())["training"]["run"] == str(run_folder)

    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    lively_model(in_channels=4).save_pretrained(tmp_path / "model")
    base = ["generate", "--ckpt", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "drawn", "--vae"]
    sampling([*map(str, base), str(vae_folder)])
    manifest = json.loads((tmp_path / "drawn/manifest.json").read_text())
    assert manifest["codec"] == VaeCodec(str(vae_folder), 1).describe()
    capsys.readouterr()
    assert "holds samples with other settings, codec.sha256: " in fails(sampling, *base, tmp_path / "vae")


def test_images_are_decoded_in_fp32_and_cut_off_to_levels(tmp_path, vae_folder):
    from diffusers import AutoencoderKL

    lively_model(in_channels=4).save_pretrained(tmp_path / "model")
    base = ["--ckpt", tmp_path / "model", "--num", 3, "--steps", 2, "--dtype", "bf16", "--vae", vae_folder]
    sampling(["generate", *map(str, base), "--out", str(tmp_path / "out"), "--format", "npz"])
    drawn = np.load(tmp_path / "out/samples.npz", allow_pickle=False)["arr_0"].astype(int)
    model = lively_model(in_channels=4).to(torch.bfloat16)
    latents, _ = sample_latents(model, range(3), torch.tensor([0, 1, 2]), Sampling(steps=2))
    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True).double()
    with torch.no_grad():
        images = vae.decode(latents.double() / 0.5 + 0.1).sample
    levels = np.floor((127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).numpy())
    assert np.abs(drawn - levels).mean() < 0.02  # rounded, or decoded in bf16, a half of them and more would differ
    assert levels.std() > 5


@pytest.mark.parametrize(("scheduler", "shift"), [("unipc", 2), ("flow-match-lcm", 1)])
@pytest.mark.filterwarnings("ignore:scheduler FlowMatchLCM")
def test_samples_by_a_scheduler_say_so_and_go_on_to_the_bit(
    generates, stopped, run_folder, fails, scheduler, shift, capsys
):
    options = "--scheduler", scheduler, "--time-shift", shift, "--cfg-every", 2
    whole = generates(*options, name="whole")
    manifest = json.loads((whole / "manifest.json").read_text())
    expected = {"sampler": None, "scheduler": scheduler, "guidance_every": 2, "nfe": 2 + 1}
    assert expected.items() <= manifest.items()
    assert manifest["time_shift"] == (2.0 if shift == 2 else None)
    stopped(*options)
    assert np.array_equal(pixels(generates(*options)), pixels(whole))
    capsys.readouterr()
    base = ["generate", "--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", whole]
    assert "sampler" in fails(sampling, *base)


def test_samples_that_a_version_without_some_settings_began_go_on(generates, stopped, tmp_path):
    stopped()
    path = tmp_path / "out/settings.json"
    stored = json.loads(path.read_text())
    later = {"start", "grid", "time_shift", "guidance_every", "scheduler"}
    path.write_text(json.dumps({key: value for key, value in stored.items() if key not in later}))
    assert len(pixels(generates())) == 7


def test_a_scheduler_that_guides_at_no_time_leaves_no_folder(run_folder, tmp_path, fails):
    options = ["--num", 2, "--steps", 2, "--scheduler", "unipc", "--cfg-interval", 0.9, 0.95, "--out", tmp_path / "x"]
    assert "--cfg-interval=[0.9, 0.95]: no step" in fails(sampling, "generate", "--ckpt", run_folder, *options)
    assert not (tmp_path / "x").exists()


def test_the_seconds_of_an_image_are_those_of_its_block_shared(generates, monkeypatch):
    clock = iter(range(0, 1000))  # a block takes one second, and of three there are nine images
    monkeypatch.setattr(generate_command, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    manifest = json.loads((generates() / "manifest.json").read_text())
    assert manifest["seconds_per_image"] == pytest.approx(3 / 9)


def test_a_block_is_no_larger_than_what_is_asked_for(generates, monkeypatch):
    drawn, original = [], routine.generate
    monkeypatch.setattr(
        routine, "generate", lambda model, codec, indices, *rest, **more: (
            drawn.append(len(indices)), original(model, codec, indices, *rest, **more)
        )[1],
    )  # fmt: skip
    manifest = json.loads((generates("--batch", 64) / "manifest.json").read_text())
    assert (drawn, manifest["block"]) == ([7], 7)


def test_half_of_the_samples_by_another_library_are_refused(stopped, fails, run_folder, tmp_path, monkeypatch):
    stopped()
    monkeypatch.setattr(generate_command, "library_versions", lambda: library_versions() | {"torch": "99"})
    base = ["--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", tmp_path / "out"]
    assert f'versions.torch: "{library_versions()["torch"]}" -> "99"' in fails(sampling, "generate", *base)


def test_half_of_the_samples_by_an_earlier_version_go_on_where_its_images_are_the_same(
    stopped, fails, run_folder, tmp_path
):
    stopped()
    base = ["generate", "--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", tmp_path / "out"]
    file = tmp_path / "out" / "settings.json"
    settings = json.loads(file.read_text())
    for version in ("0.0.1", ["0.1.0"], None):
        file.write_text(json.dumps(settings | {"versions": settings["versions"] | {"sit_atconv": version}}))
        assert "versions.sit_atconv" in fails(sampling, *base)
    file.write_text(json.dumps(settings | {"versions": settings["versions"] | {"sit_atconv": "0.1.0"}}))
    sampling(list(map(str, base)))
    assert len(list((tmp_path / "out").glob("*.png"))) == 7


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_complete_samples_with_a_hole_are_not_called_complete(generates, fails, run_folder, kind, capsys):
    out = generates("--format", kind)
    capsys.readouterr()
    lost = "000004.png" if kind == "png" else "samples.npz"
    (out / lost).unlink()
    base = ["--ckpt", run_folder, "--num", 7, "--batch", 3, "--steps", 2, "--out", out, "--format", kind]
    error = fails(sampling, "generate", *base)
    assert f"{lost} is missing; remove the folder and run again" in error


def test_a_folder_of_something_else_is_left_alone(generates, fails, run_folder, tmp_path):
    base = ["generate", "--ckpt", run_folder, "--num", 7, "--steps", 2, "--out"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").write_text("kept")
    assert "exists already" in fails(sampling, *base, tmp_path / "photos")
    assert "exists already" in fails(sampling, *base, tmp_path / "photos" / "000000.png")
    assert "is no folder" in fails(sampling, *base, tmp_path / "photos" / "000000.png" / "x")
    for name in ("settings.json", "manifest.json"):
        for text in ("{", "[1]"):
            (tmp_path / "photos" / name).write_text(text)
            assert f"its {name} is damaged" in fails(sampling, *base, tmp_path / "photos")
    assert (tmp_path / "photos" / "000000.png").read_text() == "kept"


@pytest.mark.parametrize(
    "text",
    ["3\n1\n4\n1\n5\n9\n2\n", "3\n1\n4\n1\n5\n9\n2\n\n", " 3\r\n1\r\n4\r\n1\r\n5\r\n9\r\n2", "[3, 1, 4,\n1, 5, 9, 2]",
     "\ufeff3\n1\n4\n1\n5\n9\n2", "\ufeff[3, 1, 4, 1, 5, 9, 2]"],
)  # fmt: skip
def test_labels_from_a_file(generates, run_folder, tmp_path, text):
    file = tmp_path / "labels"
    file.write_bytes(text.encode())
    out = generates("--labels", file)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["labels"], manifest["labels_rule"]) == ([3, 1, 4, 1, 5, 9, 2], "file")


def test_the_labels_of_a_file_reach_the_images(tmp_path):
    lively_model().save_pretrained(tmp_path / "model")
    (tmp_path / "labels").write_text("2\n0\n2\n1\n")
    command = ["--ckpt", str(tmp_path / "model"), "--num", "4", "--batch", "3", "--steps", "4"]
    sampling(["generate", *command, "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out")])
    expected, _ = draw([0, 1, 2, 3], [2, 0, 2, 1])
    assert np.abs(pixels(tmp_path / "out").astype(int) - expected[:, 0].numpy()).max() <= 1
    (tmp_path / "labels").write_text("2\n0\n1\n1\n")
    with pytest.raises(SystemExit):
        sampling(["generate", *command, "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"0\n" * 6, "ends with line 6: --num 7 needs as many"),
        (b"", "ends with line 0"),
        (b"0\n" * 8, "line 8: there are 8 classes for --num 7"),
        (b"0\n1\n10\n" + b"0\n" * 4, "line 3: class id 10 is out of range; this model has classes 0 to 9"),
        (b"0\n-1\n" + b"0\n" * 5, "line 2: class id -1 is out of range"),
        (b"0\n\n" + b"0\n" * 5, "line 2: '' is no class; give an id or a name"),
        (b"0\n1 2\n" + b"0\n" * 5, "line 2: class='1 2': choose from"),
        (b"0\n1_0\n" + b"0\n" * 5, "line 2: class='1_0': "),
        (b"cat\n", "line 1: class='cat': choose from ['0', '1', "),
        (b"[0, 1, 2.5, 0, 0, 0, 0]", "entry 3: '2.5' is no class;"),
        (b"[0, true, 2, 0, 0, 0, 0]", "entry 2: 'True' is no class;"),
        (b"[0, 1", "labels is no JSON that can be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_labels_that_do_not_fit_are_named_by_line(fails, run_folder, tmp_path, text, says):
    (tmp_path / "labels").write_bytes(text)
    base = ["--ckpt", run_folder, "--num", 7, "--out", tmp_path / "out", "--labels", tmp_path / "labels"]
    assert says in fails(sampling, "generate", *base)
    assert not (tmp_path / "out").exists()


def test_a_labels_file_that_is_not_there(fails, run_folder, tmp_path):
    base = ["generate", "--ckpt", run_folder, "--num", 7, "--out", tmp_path / "out", "--labels"]
    error = fails(sampling, *base, "blanced")
    assert "--labels blanced: No such file or directory; choose from ['balanced', 'random'] or give a file" in error
    assert "--labels" in fails(sampling, *base, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_becomes_no_image(fails, tmp_path, value, capsys):
    model = lively_model()
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[1] = value
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "labels").write_text("0\n0\n0\n2\n1\n0\n")
    base = ["--ckpt", tmp_path / "model", "--num", 6, "--batch", 3, "--steps", 1, "--labels", tmp_path / "labels"]
    with pytest.raises(SystemExit):
        sampling(["generate", *map(str, base), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "image 4 is not finite as it comes from the sampler: no image made of it; try" in error
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"{i:06d}.png" for i in range(3)]
    # What fills the last block up is no image: with four, of which the last is alone in its block.
    (tmp_path / "labels").write_text("0\n0\n0\n2\n")
    base[3] = 4
    sampling(["generate", *map(str, base), "--out", str(tmp_path / "filled")])


def test_only_images_that_are_wanted_must_be_finite():
    model = lively_model()
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[1] = math.nan
    drawn = model, IdentityCodec(), [7, 8, 9], [0, 2, 1], Sampling(steps=1)
    with pytest.raises(NotFinite, match="image 9 is not finite as it comes from the sampler"):
        generate(*drawn)
    images, _ = generate(*drawn, kept=2)
    assert torch.equal(images, generate(lively_model(), *drawn[1:], kept=2)[0])
    assert len(images) == 2


def test_a_decoder_gets_all_of_a_batch_whatever_is_wanted(monkeypatch):
    decoded = []  # of another batch a convolution rounds otherwise
    monkeypatch.setattr(IdentityCodec, "decode", lambda self, latents: decoded.append(len(latents)) or latents)
    images, _ = generate(lively_model(), IdentityCodec(), [7, 8, 9], [0, 2, 1], Sampling(steps=1), kept=2)
    assert (len(images), decoded) == (2, [3])


@pytest.mark.parametrize(
    ("broken", "options", "says"),
    [
        ("weights", [], "image 0 .* the sampler: .* more steps, less guidance .*float32 already"),
        ("weights", ["--sampler", "dopri5"], "image 0 .* the sampler: .*float32 already"),
        ("weights", ["--scheduler", "flow-match-euler"], "image 0 .* FlowMatchEulerDiscreteScheduler: .*float32"),
        ("range", ["--dtype", "fp16"], r"image 0 .* the sampler: .*try the network in float32 \(it is in float16\)"),
        ("range", ["--dtype", "fp16", "--sampler", "dopri5"], r"image 0 .*try the network in float32"),
    ],
)
def test_sample_makes_no_grid_of_what_is_not_finite(tmp_path, capsys, broken, options, says):
    model = lively_model()
    with torch.no_grad():
        if broken == "weights":
            model.final_layer.linear.bias.fill_(math.inf)
        else:  # finite in fp32, over 65504 in fp16
            model.blocks[1].mlp.fc1.weight.mul_(3e3)
            model.blocks[1].mlp.fc2.weight.mul_(3e3)
    model.save_pretrained(tmp_path / "model")
    base = ["--ckpt", str(tmp_path / "model"), "--num", "3", "--steps", "1", "--cfg", "1", "--device", "cpu"]
    out = ["--out", str(tmp_path / "grid.png")]
    with pytest.raises(SystemExit) as stop:
        sample.main([*base, *out, *options])
    (line,) = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert re.search(says, line)
    assert (stop.value.code, (tmp_path / "grid.png").exists()) == (2, False)
    if broken == "range":
        sample.main([*base, *out])


def test_an_autoencoder_that_gives_nan_is_named(tmp_path, vae_folder, capsys):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = math.nan
    vae.save_pretrained(tmp_path / "vae")
    lively_model(in_channels=4).save_pretrained(tmp_path / "model")
    base = [
        "--ckpt",
        tmp_path / "model",
        "--vae",
        tmp_path / "vae",
        "--num",
        2,
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(SystemExit):
        sampling(["generate", *map(str, base)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "image 0 is not finite as it comes from the autoencoder" in error
    assert "another autoencoder (it is in float32 already), since the latents are finite" in error


def test_memory_that_is_not_there_is_one_line(generates, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sit_atconv.sampling.sampling.generate", full)
    with pytest.raises(SystemExit) as stop:
        generates()
    assert stop.value.code == 2
    assert "--batch 3: cpu has not the memory; give a smaller one" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--scheduler", "unipc"]], ids=["sampler", "scheduler"])
def test_memory_that_a_picture_has_not_is_one_line(run_folder, tmp_path, monkeypatch, capsys, more):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sit_atconv.sampling.sampling.generate", full)
    monkeypatch.setattr("sit_atconv.sampling.schedulers.generate", full)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--ckpt", str(run_folder), "--out", str(tmp_path / "grid.png"), "--batch", "3", *more])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("--batch 3: cpu has not the memory; give a smaller one\n")


def test_memory_for_graphs_is_a_remedy_where_there_are_graphs():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    said = [
        str(too_large(3, *each)) for each in ((cpu, "less", Graphs()), (cuda, "less", None), (cuda, "less", Graphs()))
    ]
    assert said[:2] == [f"batch=3: {device} has not the memory; give less" for device in (cpu, cuda)]
    assert said[2] == f"{said[1]}, or take no_cuda_graphs, which holds less"


def test_a_process_of_several_has_its_own_device(run_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(setting_up, "resolve_device", lambda name: (asked.append(name), torch.device("cpu"))[1])
    setting_up.setup(run_folder, Sampling(), device="cuda")
    monkeypatch.setattr("sit_atconv.runtime.processes.count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    setting_up.setup(run_folder, Sampling(), device="cuda", launched=True)
    assert asked == ["cuda", "cuda:1"]


def test_dtype_and_autoencoder_options_reach_the_model(run_folder):
    assert setting_up.setup(run_folder, Sampling(), "bf16").trained.model.dtype == torch.bfloat16
    assert setting_up.setup(run_folder, Sampling()).trained.model.dtype == torch.float32
    with pytest.raises(InputError, match="has no autoencoder"):
        setting_up.setup(run_folder, Sampling(), vae="x")


def test_random_labels_follow_their_index(run_folder, tmp_path):
    base = ["generate", "--ckpt", str(run_folder), "--steps", "1", "--labels", "random", "--cfg", "1"]
    for num in ("3", "6"):
        sampling([*base, "--num", num, "--out", str(tmp_path / num)])
    short, long = (json.loads((tmp_path / num / "manifest.json").read_text())["labels"] for num in ("3", "6"))
    assert long[:3] == short
    sampling([*base, "--num", "6", "--seed", "5", "--out", str(tmp_path / "seed")])
    other = json.loads((tmp_path / "seed" / "manifest.json").read_text())["labels"]
    assert (long, other) == tuple([random_label(seed, index, 10) for index in range(6)] for seed in (0, 5))


def test_a_grid_shows_the_pixels_enlarged_and_large_images_as_they_are(tmp_path):
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "grid.png").write_bytes(grid_png(images, 2))
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 68 + 4, 2 * 68 + 4, 3)
    second = grid[4 : 4 + 64, 72 : 72 + 64]
    assert np.array_equal(second[::8, ::8], images[1].permute(1, 2, 0).numpy())
    assert np.array_equal(second[7::8, 7::8], second[::8, ::8])
    (tmp_path / "large.png").write_bytes(grid_png(torch.zeros(2, 3, 100, 100, dtype=torch.uint8), 1))
    assert Image.open(tmp_path / "large.png").size == (108, 212)


def test_a_grid_says_the_classes_below_the_images():
    images = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = np.array(grid(images, 3))
    for texts in (["1", "goldfish", "1"], ["a name that is far too long for the strip"] * 3):
        told = np.array(grid(images, 3, texts))
        assert np.array_equal(told[: 4 + 64], plain[: 4 + 64])  # the images are as they were
        strips = [told[68 : 68 + CAPTION, 4 + 68 * index : 68 + 68 * index] for index in range(3)]
        assert all(strip.min() < 64 for strip in strips)
        assert np.array_equal(strips[0], strips[2])
        assert np.array_equal(strips[0], strips[1]) == (texts[0] == texts[1])
        assert (told[:, 68:72] == 255).all()  # between them
    assert grid(images[:1], 1, ["1"]).size == (64, 64 + CAPTION)


@pytest.mark.parametrize(
    ("name", "says"),
    [("goldfish", "goldfish"), ("goldfish, Carassius", "goldfish"), ("金魚", "1"), ("\t", "1")],
)
def test_a_caption_is_the_first_name_or_the_id(name, says):
    assert caption_of(1, ["tench", name]) == says
    assert caption_of(2, ["tench", name]) == "2"


def test_sample_draws_one_row_per_round_of_classes(run_folder, tmp_path, capsys):
    out = tmp_path / "grid.png"
    classes = ["--classes", "3", "1", "4"]
    sample.main(["--ckpt", str(run_folder), *classes, "--rows", "2", "--steps", "2", "--out", str(out)])
    assert Image.open(out).size == (3 * 68 + 4, 2 * (68 + CAPTION) + 4)
    named = np.array(grid(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), 3, 2 * ["3", "1", "4"]))
    for top in (68, 2 * 68 + CAPTION):  # the strips below the rows
        assert np.array_equal(np.array(Image.open(out))[top : top + CAPTION], named[top : top + CAPTION])
    assert "6 images, NFE 4, " in capsys.readouterr().out
    other = tmp_path / "other.png"
    base = ["--ckpt", str(run_folder), *classes, "--rows", "2", "--steps", "2"]
    sample.main([*base, "--batch", "2", "--out", str(other)])
    assert abs(np.array(Image.open(out)).astype(int) - np.array(Image.open(other)).astype(int)).max() <= 1
    sample.main([*base, "--seed", "1", "--out", str(other)])
    assert abs(np.array(Image.open(out)).astype(int) - np.array(Image.open(other)).astype(int)).max() > 9
    capsys.readouterr()
    sample.main(["--ckpt", str(run_folder / "step-0000002/ema"), "--num", "5", "--steps", "1", "--out", str(out)])
    assert "5 images" in capsys.readouterr().out


def test_low_precision_networks_still_integrate_in_fp32():
    sampling = Sampling(steps=8)
    full, _ = generate(lively_model(), IdentityCodec(), [0, 1], [0, 1], sampling)
    low, _ = generate(lively_model().to(torch.bfloat16), IdentityCodec(), [0, 1], [0, 1], sampling)
    assert (full.float() - low.float()).abs().mean() < 6

    model, sampling = lively_model().to(torch.bfloat16), Sampling(steps=3, guidance_scale=2.0)
    latents, _ = sample_latents(model, [7], torch.tensor([2]), sampling)
    numbers = np.random.default_rng(np.random.SeedSequence([0, 6, 7])).standard_normal((1, 4, 4), dtype=np.float32)
    x = torch.from_numpy(numbers)[None]
    with torch.no_grad():
        for t in torch.linspace(0, 1, 4)[:-1]:
            both = model(x.to(torch.bfloat16).repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([2, 3])).sample.float()
            x = x + (both[1:] + 2 * (both[:1] - both[1:])) / 3
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)  # bf16 arithmetic is off by 1e-3
