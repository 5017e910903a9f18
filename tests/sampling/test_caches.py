"""Caches leave blocks out where they may, and nowhere else; nothing of one block of images reaches the next."""

import ast
import json
import math
import re
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import run_recipe
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, MagCacheConfig

import sample
from sampling.__main__ import main as sampling
from sit_atconv import SiTPipeline, create_model
from sit_atconv.__main__ import main
from sit_atconv.layers.atconv import ATConv
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import MAG_RATIOS, sha256
from sit_atconv.sampling import caches, calibration
from sit_atconv.sampling.calibration import calibrate, read_ratios
from sit_atconv.sampling.graphs import can_record
from sit_atconv.sampling.noise import noise
from sit_atconv.sampling.sampling import Stream, sample_latents
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training import checkpoint

LABELS = torch.tensor([0, 2])
INSIDE = {"guidance_scale": 2.0, "guidance_interval": [0.2, 0.6]}
RISING = [1.1] * 12  # ratios that no threshold near 0 lets by


def lively(depth: int = 4, **options):
    torch.manual_seed(0)
    sizes = {"patch_size": 2, "hidden_size": 16, "depth": depth, "num_heads": 2, "in_channels": 1}
    model = create_model(None, 4, 3, **sizes, token_mixer="hybrid", **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def draw(model, indices=(0, 1), labels=LABELS, **options) -> torch.Tensor:
    return sample_latents(model, indices, labels, Sampling(**{"steps": 12, "guidance_scale": 1.0, **options}))[0]


def on(cache: str, ratios=None, **options):
    model = lively(**options)
    caches.enable(model, caches.parse(cache), ratios)
    return model


def counted(model) -> list[list[int]]:
    """Of each block, the sizes of the batches that its mixer was run on, as they come."""
    sizes = [[] for _ in model.blocks]
    for block, own in zip(model.blocks, sizes, strict=True):
        block.attn.register_forward_pre_hook(lambda _, given, own=own: own.append(len(given[0])))
    return sizes


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fist_block:0.1", "did you mean 'first_block'"),
        ("", "choose from"),
        ("first_block", "needs a threshold; give first_block:THRESHOLD"),
        ("mag", "needs a threshold"),
        ("mag:-0.1", r"mag:-0.1'?: the threshold -0.1: must be at least 0"),
        ("first_block:nan", "the threshold nan: must be at least 0"),
        ("first_block:x", "'x' is no number; give first_block:THRESHOLD"),
        ("first_block:1:2", "takes no more than first_block:THRESHOLD"),
        ("taylorseer:0", "the interval 0: must be at least 1"),
        ("taylorseer:2.5", "'2.5' is no whole number"),
        ("taylorseer:4:9", "the order 9: must be at least 0 and at most 5"),
    ],
)
def test_what_is_no_cache_is_told(spec, says):
    with pytest.raises(InputError, match=says):
        caches.parse(spec)


def test_a_cache_says_itself_in_full():
    for spec, told in (("taylorseer", "taylorseer:5:1"), ("taylorseer:4", "taylorseer:4:1"), ("mag:.06", "mag:0.06")):
        assert str(caches.parse(spec)) == told == str(caches.parse(told))


@pytest.mark.parametrize(
    ("cache", "times", "reused", "says"),
    [
        ("taylorseer", [0, 0.3, 0.6], (), "3 evaluations leave taylorseer nothing to leave out; take 4 or more"),
        ("first_block:0.1", [0], (), "take 2 or more"),
        ("taylorseer", [0, 0.5, 0.5, 0.9, 0.9], (), "comes to t = 0.5 twice"),
        ("mag:0.1", [0, 0.3, 0.6], ([0, 0.5],), "guidance in an interval has two"),
        ("mag:0.1", [0, 0.3, 0.6], ([0, 1], 2), "guidance_every=2: .*mag:0.1.* counts evaluations of one size"),
        ("taylorseer", [0, 0.3, 0.6, 0.9], ([0, 1], 3), "guidance_every=3: .*taylorseer:5:1"),
        ("first_block:0.1", [0, 0.3], ([0, 1], 1, 2), "guidance_batches=2: .*first_block:0.1.* by their size"),
    ],
)
def test_a_cache_that_cannot_work_is_refused(cache, times, reused, says):
    with pytest.raises(InputError, match=says):
        caches.check(caches.parse(cache), times, *reused)


def test_caches_with_little_to_do_are_let_by():
    caches.check(caches.parse("first_block:0.1"), [0, 0.5, 0.5], [0, 0.5])
    caches.check(caches.parse("first_block:0.1"), [0, 0.5, 0.5], [0, 1], 2)
    caches.check(caches.parse("mag:0.1"), [0, 0.3, 0.6], [0, 0.9])
    with pytest.raises(InputError, match="a single block"):
        on("first_block:0.1", depth=1)


@pytest.mark.parametrize(
    ("cache", "options"), [("first_block:0", INSIDE), ("taylorseer:1", INSIDE), ("mag:0", {"guidance_scale": 2.0})]
)
def test_the_strictest_cache_changes_no_bit_and_goes_without_a_trace(cache, options):
    plain, model = draw(lively(), **options), on(cache, RISING)
    assert torch.equal(draw(model, **options), plain)
    caches.disable(model)
    assert torch.equal(draw(model, **options), plain)
    assert can_record(model, "cpu")  # diffusers by itself leaves a forward on every block


def test_each_cache_runs_the_blocks_that_it_is_said_to_run():
    for cache, first, last in (
        ("first_block:1000", 12, 1),
        ("taylorseer:4", 5, 5),  # in evaluations 0, 1, 2, and 4, 8
        ("mag:1000", 4, 4),  # in the first fifth, 0 and 1, and then in one of four, 5 and 9
    ):
        model = on(cache, RISING)
        runs = counted(model)
        draw(model)
        assert [len(each) for each in runs] == [first, last, last, last], cache


def test_evaluations_with_and_without_guidance_have_states_of_their_own():
    model = on("first_block:1000")
    runs = counted(model)
    draw(model, **INSIDE)  # guided at t = 3/12 to 7/12
    assert runs[0] == [2] * 3 + [4] * 5 + [2] * 4
    assert runs[-1] == [2, 4]  # what is kept of the first [2] serves after the interval too


@pytest.mark.parametrize("cache", ["first_block:0.3", "taylorseer:4:2", "mag:0.5"])
def test_images_depend_on_none_that_were_drawn_before(cache):
    model, alone = on(cache, RISING), draw(on(cache, RISING), (4, 5))
    assert not torch.equal(alone, draw(lively(), (4, 5)))
    draw(model)
    assert torch.equal(draw(model, (4, 5)), alone)

    def stops(nfe, share):
        if nfe == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_latents(model, [0, 1], LABELS, Sampling(steps=12, guidance_scale=1.0), watch=stops)
    assert torch.equal(draw(model, (4, 5)), alone)
    if not cache.startswith("first_block"):  # which decides for the whole batch
        torch.testing.assert_close(draw(model, [4], LABELS[:1]), alone[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["first_block:0.3", "taylorseer:4"])
def test_compiled_blocks_draw_with_a_cache_what_they_draw_as_they_are(cache):
    drawn, ran = [], []
    for compiled in (False, True):
        model = on(cache)
        if compiled:
            model.compile_repeated_blocks()
        runs = counted(model)
        drawn.append(draw(model, **INSIDE))
        ran.append([len(each) for each in runs])
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)
    assert ran[0] == ran[1]
    assert ran[0][-1] < 12


def kept(ratios, times):
    return {"times": times, "ratios": ratios, "weights": {}}


@pytest.mark.parametrize("cache", ["first_block:0.3", "taylorseer:4", "mag:0.5"])
def test_the_pipeline_draws_with_a_cache_what_our_sampler_draws(cache):
    times = [index / 12 for index in range(12)]
    ratios = kept([1.0, *RISING[1:]], times) if cache.startswith("mag") else None
    own, model = on(cache, ratios and caches.ratios_at(ratios, times)), lively()
    expected = draw(own, guidance_scale=2.0)
    pipe = SiTPipeline(model, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_cache(cache, ratios)
    runs, options = counted(model), {"guidance_scale": 2.0, "output_type": "latent"}
    options["latents"] = noise((1, 4, 4), 0, Stream.SAMPLE_NOISE, [0, 1])

    def stops(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe([1, 1], 12, callback_on_step_end=stops, **options)
    runs[-1].clear()
    images = pipe([0, 2], 12, **options).images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert 0 < len(runs[-1]) < 12
    pipe.disable_cache()
    plain = draw(lively(), guidance_scale=2.0)
    torch.testing.assert_close(pipe([0, 2], 12, **options).images, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-4)


def test_the_pipeline_refuses_a_cache_that_cannot_work(tmp_path):
    pipe = SiTPipeline(lively(), scheduler=FlowMatchHeunDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_cache("taylorseer")
    with pytest.raises(InputError, match=r"comes to t = .* twice"):
        pipe(0, 5, output_type="latent")
    for spec, ratios, says in (
        ("mag:0.1", None, "mag needs the ratios"), ("taylorseer", {}, "takes no ratios"),
        ("mag:0.1", {}, "times must rise"),
        ("mag:0.1", kept([1.0, 1.1], [0.5, 0.2]), "times must rise"),
        ("mag:0.1", kept([1.0, -1.1], [0.2, 0.5]), "a ratio over 0 each"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            pipe.enable_cache(spec, ratios)
    pipe.enable_cache("mag:0.1", kept([1.0, 1.1], [0.2, 0.5]))
    with pytest.raises(InputError, match="guidance in an interval"):
        pipe(0, 5, guidance_interval=(0, 0.5), output_type="latent")
    (tmp_path / MAG_RATIOS).write_text(json.dumps(kept([1.0], [0.2])))
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path / MAG_RATIOS, "times must rise")):
        with pytest.raises(InputError, match=f"cannot be read: .*{says}"):
            read_ratios(path)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_ratios_are_those_that_diffusers_measures(scale, capsys):
    model, settings = lively(), Sampling(steps=6, guidance_scale=scale)
    times, ratios = calibrate(model, settings, 3, seed=5)
    assert times == pytest.approx([index / 6 for index in range(6)])
    model.enable_cache(MagCacheConfig(num_inference_steps=6, calibrate=True))
    again = calibrate(model, settings, 3, seed=5)[1]
    said = ast.literal_eval(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")))
    assert ratios == pytest.approx(said, rel=1e-6)
    assert again == ratios
    assert max(map(abs, (each - 1 for each in ratios))) > 0.01
    assert caches.ratios_at({"times": times, "ratios": ratios}, times) == pytest.approx(ratios, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "dopri5"}, "euler"),
        ({"sampler": "heun"}, "euler"),
        ({"steps": 1}, "euler"),
        ({"guidance_scale": 2.0, "guidance_batches": 2}, "guidance_batches=2: .*mag.* tells batches apart"),
        ({"guidance_scale": 2.0, "guidance_every": 2}, "guidance_every=2: .*mag"),
        (INSIDE, "mag.*guidance in an interval has two"),
    ],
    ids=str,
)
def test_ratios_are_of_rising_times_and_of_one_size_of_batch(options, says):
    with pytest.raises(InputError, match=says):
        calibrate(lively(), Sampling(**{"guidance_scale": 1.0, **options}), 1)


def test_blocks_that_add_nothing_or_nan_have_no_ratios():
    for fill, says in ((0.0, "add nothing"), (math.nan, "NaN or infinity, in torch.float32")):
        model = lively()
        for block in model.blocks:
            torch.nn.init.constant_(block.adaLN_modulation[-1].weight, fill)
            torch.nn.init.constant_(block.adaLN_modulation[-1].bias, fill)
        with pytest.raises(InputError, match=says):
            calibrate(model, Sampling(steps=3, guidance_scale=1.0), 1)


def test_ratios_of_a_meanflow_model_need_steps_that_are_stated():
    model = lively(use_meanflow=True)
    with pytest.raises(InputError, match=r"steps=1: .* one step by default; state more, such as steps=4"):
        calibrate(model, Sampling(), 1)
    assert calibrate(model, Sampling(steps=4), 1)[0] == [0, 0.25, 0.5, 0.75]


def test_ratios_at_other_times_follow_the_curve():
    """What the blocks add grows as exp(t / 2): the ratio of two evaluations is exp(h / 2), whatever h, and beyond the
    ends too."""
    found = {"times": [0.1, 0.3, 0.7], "ratios": [1.0, math.exp(0.1), math.exp(0.2)]}
    times = [0.0, 0.2, 0.2, 0.65, 0.9, 1.0]
    expected = [1.0, *(math.exp((b - a) / 2) for a, b in pairwise(times))]
    assert caches.ratios_at(found, times) == pytest.approx(expected, rel=1e-12)


def test_the_ratios_of_a_guide_are_those_between_its_own_evaluations(monkeypatch):
    """A guide is evaluated at every second time of the interval: 0.25, 0.5 and 0.75 of eighths."""
    found, enabled = kept([1.0, 2.0, 4.0, 8.0], [0.0, 0.25, 0.5, 1.0]), []
    monkeypatch.setattr(calibration, "ratios_for", lambda trained, cache: found)
    monkeypatch.setattr(calibration, "enable", lambda model, cache, ratios: enabled.append(ratios))
    model, guide = SimpleNamespace(model=lively()), SimpleNamespace(model=lively(2))
    guidance = {"guidance_scale": 2.0, "guidance_interval": [0.25, 0.8], "guidance_every": 2, "guide": guide.model}
    calibration.enable_for(model, guide, caches.parse("mag:0.1"), Sampling(steps=8, **guidance))
    assert enabled[1] == pytest.approx([1.0, 4.0, 8.0**0.5])
    assert len(enabled[0]) == 8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {{out: {folder}/run, seed: 3}}\n"
        "model: {patch_size: 2, hidden_size: 16, depth: 3, num_heads: 2, token_mixer: atconv}\n"
        "train: {max_steps: 2, batch_size: 4}\npreview: {every: 0}\ncheckpoint: {every: 1}\n"
    )
    run_recipe(recipe)
    return folder / "run"


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_commands_calibrate_and_record_a_cache(run_folder, tmp_path, fails, capsys, monkeypatch):
    generate = ["generate", "--ckpt", run_folder, "--num", 6, "--batch", 4, "--steps", 8]
    ratios = run_folder / "step-0000002" / "ema" / MAG_RATIOS
    assert f"{MAG_RATIOS}' cannot be read" in fails(sampling, *generate, "--cache", "mag:0.1", "--out", tmp_path / "m")
    ratios.write_text('{"thesis": 1}')
    assert "exists already" in fails(main, "calibrate", run_folder)
    ratios.unlink()
    for _ in range(2):  # what is ours is written anew
        main(["calibrate", str(run_folder), "--num", "3"])
    assert capsys.readouterr().out.count("ratios of 50 evaluations") == 2
    assert "--cfg-batches=2" in fails(main, "calibrate", run_folder, "--cfg-batches", 2)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "sample_latents", no_memory)
        assert "--num 5: cpu has not the memory; give a smaller one" in fails(main, "calibrate", run_folder, "--num", 5)
    digest, runs, forward = sha256(ratios), [], ATConv.forward
    monkeypatch.setattr(ATConv, "forward", lambda self, x: [runs.append(self), forward(self, x)][1])
    # Two blocks of images, of eight evaluations each, of which mag runs the first, the second and the sixth.
    for cache, told, expected in (
        ("mag:1000", digest, 2 * 3 * 3), ("first_block:1000", None, 2 * (8 + 2)), (None, None, 2 * 8 * 3),
    ):  # fmt: skip
        runs.clear()
        out = tmp_path / str(cache).partition(":")[0]
        words = [*generate, "--out", out, *(["--cache", cache] if cache else [])]
        sampling([str(word) for word in words])
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["cache"], manifest["mag_ratios"], manifest["nfe"]) == (cache, told, 16)
        assert len(runs) == expected
        assert set(manifest["checkpoint_sha256"]) == {"ema/config.json", "ema/diffusion_pytorch_model.safetensors"}
    capsys.readouterr()
    assert "cache" in fails(sampling, *generate, "--cache", "first_block:0.1", "--out", tmp_path / "mag")
    guided = ["--guide", run_folder / "step-0000001", "--cfg", 2]
    for words, says in (
        (["flow-match-heun", "--cache", "taylorseer", "--steps", 6], r"comes to t = .* twice"),
        (["unipc", "--cache", "mag:0.1", *guided], "--cache mag:0.1: its ratios are not the guide's; take another"),
    ):
        assert re.search(says, fails(sampling, *generate, "--out", tmp_path / "not", "--scheduler", *words))
        assert not (tmp_path / "not").exists()
    said = fails(sampling, *generate, "--out", tmp_path / "not", "--cache", "mag:0.1", *guided)
    assert said.startswith(f"error: --guide: ratios '{run_folder / 'step-0000001'}")

    grid = ["--ckpt", run_folder, "--num", 1, "--out", tmp_path / "grid.png"]
    mag, reads, read = ["--cache", "mag:0.1", "--steps", 6], [], calibration.read_ratios
    monkeypatch.setattr(calibration, "read_ratios", lambda path: [reads.append(path), read(path)][1])
    sample.main([str(word) for word in [*grid, "--force", *mag, "--scheduler", "flow-match-heun"]])
    sampling([str(word) for word in [*generate, *mag, "--scheduler", "unipc", "--out", tmp_path / "unipc"]])
    assert json.loads((tmp_path / "unipc/manifest.json").read_text())["mag_ratios"] == digest
    assert reads == 2 * [ratios]  # once for a command, however many blocks
    capsys.readouterr()
    for words, says in (
        (["--cache", "mag:x"], "'x' is no number"),
        (["--cache", "mag:0.1", "--compile"], "--compile does not go with --cache mag:0.1"),
        (["--cache", "mag:0.1", "--lora", run_folder], "--lora"),
        (["--cache", "first_block:0.1", "--sampler", "dopri5"], "dopri5 sets its steps"),
        (["--cache", "taylorseer", "--sampler", "heun"], "twice"),
        (["--cache", "taylorseer", "--steps", "3"], "take 4 or more"),
        (["--cache", "mag:0.1", "--cfg-interval", "0", "0.5"], "two; guide everywhere or nowhere"),
        (["--cache", "mag:0.1", "--ckpt", run_folder / "step-0000001"], "cannot be read"),
    ):
        assert says in fails(sample.main, *grid, "--force", *words)
    ratios.write_text(ratios.read_text().replace(sha256(ratios.with_name("config.json")), "0" * 64))
    for more in ([], ["--scheduler", "unipc"]):
        assert "are of other weights" in fails(sample.main, *grid, "--force", "--cache", "mag:0.1", *more)
    shutil.copytree(run_folder, copy := tmp_path / "run")
    shutil.copy(ratios, copy / "step-0000001" / "ema")
    checkpoint.prune(copy, newest=2, keep_last=1)
    assert sorted(path.name for path in copy.glob("step-*")) == ["step-0000002"]
