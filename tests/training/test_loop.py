"""The loop: what it computes, that a restart changes nothing, and that processes share the work exactly."""

import json
import math
import signal
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import another_process_has, assert_same_bits, log_rows, run_recipe, slowly, weights
from PIL import Image
from sampled import item, sampled

from sit_atconv import SiTTransformer2DModel
from sit_atconv.config import Preview, Train, load_recipe
from sit_atconv.flow.path import LinearPath
from sit_atconv.latents.codecs import IdentityCodec, VaeCodec
from sit_atconv.models.cost import count_macs
from sit_atconv.runtime import draws
from sit_atconv.runtime.draws import Stream
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.signals import StopSignals
from sit_atconv.sampling.sampling import CAPTION
from sit_atconv.training import activities, checkpoint
from sit_atconv.training.ema import read_snapshots
from sit_atconv.training.facts import Facts
from sit_atconv.training.folder import lock
from sit_atconv.training.loop import train
from sit_atconv.training.objectives.flow import FlowObjective, build_model
from sit_atconv.training.optimizer import learning_rate, make_optimizer
from sit_atconv.training.plan import dry_run
from sit_atconv.training.trainer import Trainer


def test_other_threads_are_recorded_and_said(recipe_file, capsys, monkeypatch):
    first = run_recipe(recipe_file(), "train.max_steps=2")
    before = torch.get_num_threads()
    assert json.loads((first / "manifest.json").read_text())["threads"] == before
    run_recipe(recipe_file(), "train.max_steps=3")
    assert "threads" not in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    last = run_recipe(recipe_file(), "train.max_steps=4")
    said = f"until step 3 the run had {before} CPU threads, now {before + 1}"
    assert said in capsys.readouterr().err
    assert json.loads((last / "manifest.json").read_text())["threads"] == before + 1


def test_two_steps_equal_a_loop_written_out(recipe_file):
    """AdamW, EMA, draws, class dropout and schedule against plain torch."""
    model_options = {"class_dropout_prob": 0.5}
    path = recipe_file(
        model=model_options,
        train={"max_steps": 3, "warmup_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.2, "lr_schedule": "cosine"},
        checkpoint={"every": 3},
    )
    recipe = load_recipe(path)
    from sit_atconv.data.digits import Digits

    facts = Facts((1, 8, 8), 10, 1437)
    model = build_model(recipe, facts)
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, recipe.train)
    samples = sampled(Digits(), (1, 8, 8), 8, drop=0.5)
    losses = []
    for step in range(3):
        items = [item(samples, step * 8 + j) for j in range(8)]
        image, noise, t = (torch.stack([item[key] for item in items]) for key in ("image", "noise", "t"))
        labels = torch.tensor([item["label"] for item in items])
        for group in optimizer.param_groups:
            group["lr"] = [5e-4, 1e-3, 1e-3][step]
        x_t = t[:, None, None, None] * image + (1 - t[:, None, None, None]) * noise
        loss = (model(x_t, t, labels).sample - (image - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        averaged = {name: 0.9 * averaged[name] + 0.1 * value for name, value in model.state_dict().items()}

    last = train(recipe)
    assert [row["loss"] for row in log_rows(last.parent)] == pytest.approx(losses, rel=1e-6)
    for name, value in weights(last, "model").items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)
    for name, value in weights(last).items():
        torch.testing.assert_close(value, averaged[name], rtol=1e-5, atol=1e-7)


def test_a_resumed_run_ends_with_the_same_bits_and_one_log(recipe_file, tmp_path):
    path = recipe_file()
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    run_recipe(path, "train.max_steps=5", "checkpoint.every=2")
    parts = run_recipe(path)
    assert_same_bits(whole, parts)

    def timeless(rows):
        return [
            {key: row[key] for key in ("step", "images_seen", "loss", "grad_norm", "lr", "skipped")} for row in rows
        ]

    assert timeless(log_rows(parts.parent)) == timeless(log_rows(whole.parent))


def test_starting_a_finished_run_again_changes_nothing(recipe_file):
    last = run_recipe(recipe_file())
    before = {path: path.stat().st_mtime_ns for path in last.rglob("*") if path.is_file()}
    assert run_recipe(recipe_file()) == last
    assert {path: path.stat().st_mtime_ns for path in last.rglob("*") if path.is_file()} == before


def test_a_damaged_newest_checkpoint_is_passed_over(recipe_file, tmp_path, capsys):
    whole = run_recipe(recipe_file(), f"run.out={tmp_path / 'whole'}")
    last = run_recipe(recipe_file())
    (last / "optimizer.safetensors").write_bytes(b"")
    again = run_recipe(recipe_file())
    assert "optimizer.safetensors" in capsys.readouterr().err
    assert again == last
    assert_same_bits(whole, again)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(recipe_file):
    last = run_recipe(recipe_file(), "checkpoint.keep_last=1")
    (last / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint left"):
        run_recipe(recipe_file())
    assert (last / "ema" / "config.json").exists()


def test_falling_back_keeps_what_is_trained_from_there(recipe_file):
    last = run_recipe(recipe_file())
    (last / "optimizer.safetensors").write_bytes(b"")
    again = run_recipe(recipe_file(), "train.max_steps=7", "checkpoint.every=1", "checkpoint.keep_last=1")
    assert again.name == "step-0000007"
    assert [path.name for path in checkpoint.step_folders(again.parent)] == ["step-0000007"]


def test_killed_in_a_step_and_run_again(process_server, recipe_file, tmp_path):
    path = recipe_file(train={"max_steps": 24}, checkpoint={"every": 3})
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    for moment in (8, 14):  # in a step, of the second start from step 6 on
        codes, said = process_server("train_sit", tmp_path, [path], {"at": ["evaluate", moment, "KILL"]})
        assert codes == [-signal.SIGKILL], said
    parts = run_recipe(path)
    assert_same_bits(whole, parts)
    assert [row["step"] for row in log_rows(parts.parent)] == list(range(1, 25))


@pytest.mark.parametrize(
    "override", ["train.gradient_accumulation_steps=4", "data.workers=2", "train.gradient_checkpointing=true"]
)
def test_what_must_not_change_the_result(recipe_file, tmp_path, override):
    plain = run_recipe(recipe_file(), f"run.out={tmp_path / 'plain'}")
    other = run_recipe(recipe_file(), override)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_reaches_the_model(recipe_file, monkeypatch):
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    run_recipe(recipe_file(), "train.max_steps=1", "train.gradient_checkpointing=true")
    assert len(calls) == 2


def test_bf16_trains_with_fp32_weights(recipe_file, tmp_path):
    plain = run_recipe(recipe_file(), f"run.out={tmp_path / 'plain'}")
    low = run_recipe(recipe_file(), "train.precision=bf16")
    assert {value.dtype for value in weights(low).values()} == {torch.float32}
    first, second = log_rows(plain.parent), log_rows(low.parent)
    assert second[-1]["loss"] == pytest.approx(first[-1]["loss"], rel=0.02)
    assert second[-1]["loss"] != first[-1]["loss"]


@pytest.mark.slow
def test_compiled_training_equals_eager(recipe_file, tmp_path):
    plain = run_recipe(recipe_file(), f"run.out={tmp_path / 'plain'}")
    compiled = run_recipe(recipe_file(), "train.compile=true")
    assert weights(compiled).keys() == weights(plain).keys()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-3, atol=1e-4)


def test_compile_reaches_the_model(recipe_file, monkeypatch):
    calls = []
    monkeypatch.setattr(SiTTransformer2DModel, "compile_repeated_blocks", lambda self: calls.append(self))
    run_recipe(recipe_file(), "train.max_steps=1")
    assert not calls
    run_recipe(recipe_file(), "train.max_steps=2", "train.compile=true", "run.out=" + str(recipe_file().parent / "b"))
    assert len(calls) == 1


def test_flip_reaches_the_samples(recipe_file, tmp_path):
    plain = run_recipe(recipe_file(), "train.max_steps=1", f"run.out={tmp_path / 'plain'}")
    flipped = run_recipe(recipe_file(), "train.max_steps=1", "data.flip=true")
    assert log_rows(plain.parent)[0]["loss"] != log_rows(flipped.parent)[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tf32_is_on_exactly_when_asked_for(recipe_file, precision, monkeypatch):
    seen = []

    def look(self):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    monkeypatch.setattr(FlowObjective, "begin_step", look)
    run_recipe(recipe_file(), "train.max_steps=1", f"train.precision={precision}")
    assert seen == [(precision == "tf32",) * 2]


def test_the_residual_stream_is_fp32_under_autocast(recipe_file):
    dtypes = []
    facts = Facts((1, 8, 8), 10, 1)
    for mixer in ("attention", "atconv"):
        model = build_model(load_recipe(recipe_file(model={"token_mixer": mixer})), facts)
        for block in model.blocks:
            block.register_forward_hook(lambda _m, inputs, output: dtypes.extend([inputs[0].dtype, output.dtype]))
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long))
    assert set(dtypes) == {torch.float32}


def test_vectors_are_not_decayed(recipe_file):
    model = build_model(load_recipe(recipe_file()), Facts((1, 8, 8), 10, 1))
    decayed, kept = make_optimizer(model, Train(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert "blocks.1.attn.difference_control" in {names[parameter] for parameter in kept["params"]}
    assert all(names[parameter].endswith("weight") for parameter in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def poison_steps(monkeypatch, steps: set[int]) -> None:
    """Make the loss NaN in the given steps (0-based), counted by calls of the path."""
    calls = [0]
    target = LinearPath.velocity

    def velocity(self, data, noise, t):
        calls[0] += 1
        return target(self, data, noise, t) * (float("nan") if calls[0] - 1 in steps else 1.0)

    monkeypatch.setattr(LinearPath, "velocity", velocity)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(recipe_file, tmp_path, monkeypatch):
    poison_steps(monkeypatch, {3})
    last = run_recipe(recipe_file(), "checkpoint.every=1", "checkpoint.keep_last=9")
    before, after = (weights(last.with_name(f"step-{step:07d}"))["final_layer.linear.bias"] for step in (3, 5))
    assert not torch.equal(before, after)
    assert not last.with_name("step-0000004").exists()
    assert [row["skipped"] for row in log_rows(last.parent)] == [0, 0, 0, 1, 1, 1, 1, 1]
    run_recipe(recipe_file(), "train.max_steps=9")
    assert log_rows(last.parent)[-1]["skipped"] == 1  # the count goes on after a restart


def test_a_checkpoint_before_the_first_step_can_be_gone_on_from(recipe_file, tmp_path, monkeypatch):
    whole = run_recipe(recipe_file(), f"run.out={tmp_path / 'whole'}")
    monkeypatch.setattr(StopSignals, "__enter__", lambda self: setattr(self, "received", "SIGTERM") or self)
    assert run_recipe(recipe_file()).name == "step-0000000"
    monkeypatch.undo()
    assert_same_bits(run_recipe(recipe_file()), whole)


def test_skipped_steps_of_a_checkpoint_of_earlier_versions_count(recipe_file, monkeypatch):
    last = run_recipe(recipe_file(), "train.max_steps=4")
    trainer, manifest = (json.loads((last / name).read_text()) for name in ("trainer.json", "manifest.json"))
    (last / "trainer.json").write_text(json.dumps(trainer | {"skipped": 2, "skipped_in_a_row": 2}))
    manifest["files"]["trainer.json"] = sha256(last / "trainer.json")
    (last / "manifest.json").write_text(json.dumps(manifest))
    poison_steps(monkeypatch, set(range(99)))
    with pytest.raises(InputError, match="for 4 steps, up to step 6"):
        run_recipe(recipe_file(), "train.max_steps=20", "train.max_skipped=4")
    with pytest.raises(InputError, match="the last 2 of 4 steps were skipped"):
        run_recipe(recipe_file(), "train.max_steps=4")


def power_recipe(recipe_file):
    path = recipe_file(ema={"kind": "power"})
    path.write_text(path.read_text().replace("decay: 0.9", "decay: null"))
    return path


def test_a_power_average_counts_the_updates_and_not_the_skipped_steps(recipe_file, monkeypatch):
    poison_steps(monkeypatch, {0})
    last = run_recipe(power_recipe(recipe_file), "train.max_steps=2", "ema.snapshot_every=2")
    assert {snapshot.updates for snapshot in read_snapshots(last.parent)} == {1}
    assert all(torch.equal(value, weights(last)[name]) for name, value in weights(last, "model").items())


def test_every_average_goes_on_from_its_own(recipe_file, tmp_path):
    path = power_recipe(recipe_file)
    whole = run_recipe(path, f"run.out={tmp_path / 'whole'}")
    run_recipe(path, "train.max_steps=5")
    parts = run_recipe(path)
    for name in ("ema", "ema-0.100"):
        expected = weights(whole, name)
        assert all(torch.equal(value, expected[key]) for key, value in weights(parts, name).items())
    assert any(not torch.equal(value, weights(whole)[key]) for key, value in weights(whole, "ema-0.100").items())


def test_means_go_on_over_a_restart(recipe_file, tmp_path, monkeypatch):
    path = recipe_file(run={"log_every": 8}, checkpoint={"every": 3})
    whole = log_rows(run_recipe(path, f"run.out={tmp_path / 'whole'}").parent)
    optimize = Trainer._optimize

    def stop(self, *arguments):
        if self.step == 5:
            raise KeyboardInterrupt
        return optimize(self, *arguments)

    monkeypatch.setattr(Trainer, "_optimize", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(path)
    monkeypatch.undo()
    parts = log_rows(run_recipe(path).parent)
    assert [row["step"] for row in parts] == [8]
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
    assert parts[0]["loss_by_time"] == pytest.approx(whole[0]["loss_by_time"], rel=1e-6)


def test_checkpoints_of_keep_every_stay(recipe_file):
    last = run_recipe(recipe_file(checkpoint={"every": 2, "keep_last": 1, "keep_every": 4}), "train.max_steps=10")
    assert [checkpoint.step_of(folder) for folder in checkpoint.step_folders(last.parent)] == [4, 8, 10]


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_another_process_has_is_left_alone(recipe_file, tmp_path, begun):
    run = tmp_path / "run"
    if begun:
        run_recipe(recipe_file(), "train.max_steps=4")
    with another_process_has(lock, run):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(InputError, match="is in use by another process; end that one"):
            run_recipe(recipe_file())
        assert "refused: run.out=" in dry_run(load_recipe(recipe_file())).splitlines()[-1]
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert run_recipe(recipe_file()).name == "step-0000008"


def test_a_folder_that_cannot_be_made_is_one_line(recipe_file, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run.out='.*file/run' cannot be written: Not a directory"):
        run_recipe(recipe_file(), f"run.out={tmp_path / 'file' / 'run'}")


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"\xff\xfe", b"a: ["])
def test_a_damaged_recipe_in_the_folder_is_named(recipe_file, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(content)
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(InputError, match=r"its recipe\.yaml is damaged"):
        run_recipe(recipe_file())


@pytest.mark.parametrize("schedule", ["cosine", *slowly(["linear"])])
def test_a_decaying_learning_rate_ends_where_it_was_to_end(recipe_file, schedule):
    path = recipe_file(train={"lr_schedule": schedule})
    last = run_recipe(path)
    rates = [learning_rate(step, load_recipe(path).train) for step in range(8)]
    assert [row["lr"] for row in log_rows(last.parent)] == pytest.approx(rates)
    assert rates[-1] < rates[0] / 5
    with pytest.raises(InputError, match=r"another recipe \(train\.max_steps: 8 -> 9\)"):
        run_recipe(path, "train.max_steps=9")
    assert run_recipe(path) == last


def test_training_stops_after_a_run_of_them_and_keeps_the_last_good_checkpoint(recipe_file, tmp_path, monkeypatch):
    poison_steps(monkeypatch, set(range(4, 999)))
    with pytest.raises(InputError, match=r"no finite loss and gradient for 20 steps, up to step 24"):
        run_recipe(recipe_file(), "train.max_steps=100", "checkpoint.every=4", "checkpoint.keep_last=1")
    assert [folder.name for folder in checkpoint.step_folders(tmp_path / "run")] == ["step-0000004"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "step-0000004").values())


def test_previews_come_from_the_ema_and_show_every_class(recipe_file, tmp_path, monkeypatch):
    seen = []
    generate = activities.generate

    def record(model, codec, indices, labels, sampling, seed):
        seen.append((model, labels, sampling, seed))
        return generate(model, codec, indices, labels, sampling, seed)

    monkeypatch.setattr(activities, "generate", record)
    run_recipe(recipe_file(preview={"every": 4, "num": 12, "steps": 2, "guidance_scale": 2.0}), "run.seed=3")
    assert sorted(path.name for path in (tmp_path / "run/previews").iterdir()) == [
        "step-0000004.png", "step-0000008.png",
    ]  # fmt: skip
    assert seen[0][1] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert seen[0][2:] == (Preview("euler", 2, 2.0, every=4, num=12), 3)
    assert not any(parameter.requires_grad for parameter in seen[0][0].parameters())
    last = np.array(Image.open(tmp_path / "run/previews/step-0000008.png"))
    assert last.shape == (3 * (68 + CAPTION) + 4, 4 * 68 + 4, 3)
    model = SiTTransformer2DModel.from_pretrained(tmp_path / "run/step-0000008/ema", use_safetensors=True)
    images, _ = generate(model.eval(), IdentityCodec(), [*range(12)], seen[0][1], seen[0][2], 3)
    for index, image in enumerate(images):
        y, x = 4 + index // 4 * (68 + CAPTION), 4 + index % 4 * 68
        assert np.array_equal(last[y : y + 64 : 8, x : x + 64 : 8, 0], image[0].numpy())
        strip = last[y + 64 : y + 64 + CAPTION, x : x + 64]
        assert np.array_equal(strip, last[4 + 64 : 4 + 64 + CAPTION, 4:68]) == (index % 10 == 0)  # the class's name
        assert strip.min() < 64


def test_the_first_loss_is_the_recipes_flow_in_closed_form(recipe_file):
    # A new model gives 0: the loss of noise prediction is then w(t) noise^2, w = (beta / 2) / sigma^2 on the VP path.
    flow = {"path": "vp", "prediction": "noise", "loss_weight": "likelihood", "time_sampling": "logit-normal"}
    flow |= {"time_mean": 0.5, "time_std": 0.8, "time_shift": 2.0}
    last = run_recipe(recipe_file(flow=flow), "train.max_steps=1")
    expected = 0
    for sample in range(8):
        u = NormalDist().inv_cdf(float(draws.uniforms((), 0, Stream.TIME, 0, sample)))
        noise_level = 1 - 1 / (1 + math.exp(-(0.5 + 0.8 * u)))
        t = (1 - 1e-5) * (1 - 2 * noise_level / (1 + noise_level))
        beta, log_alpha = 0.1 + 19.9 * (1 - t), -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05
        noise = draws.normal((1, 8, 8), 0, Stream.NOISE, 0, sample)
        expected += beta / 2 / (1 - math.exp(2 * log_alpha)) * noise.square().mean().item() / 8
    assert log_rows(last.parent)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    stored = json.loads((last / "ema/config.json").read_text())
    assert (stored["path"], stored["prediction"]) == ("vp", "noise")


def test_previews_can_follow_an_sde(recipe_file, tmp_path):
    preview = {"every": 8, "num": 4, "steps": 3, "sampler": "euler-maruyama", "last_step": "tweedie"}
    run_recipe(recipe_file(preview=preview, flow={"path": "gvp", "prediction": "score"}))
    assert (tmp_path / "run/previews/step-0000008.png").exists()


def test_log_has_rates_that_fit_together(recipe_file):
    rows = log_rows(run_recipe(recipe_file(), "run.log_every=3").parent)
    assert [row["step"] for row in rows] == [3, 6, 8]
    model = build_model(load_recipe(recipe_file()), Facts((1, 8, 8), 10, 1))
    flops = 6 * count_macs(model)
    for row in rows:
        assert row["flops_per_second"] == pytest.approx(row["images_per_second"] * flops)


def test_imagefolder_through_a_vae_and_back_to_images(tmp_path, recipe_file, vae_folder):
    import sample
    from sampling.__main__ import main as sampling

    generator = torch.Generator().manual_seed(0)
    for index, size in enumerate([(40, 30), (33, 64), (90, 41), (32, 32), (128, 70), (31, 35)]):
        folder = tmp_path / "images" / ("cat", "dog", "eel")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    path = recipe_file(
        data={"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 32, "flip": True},
        latents={"codec": "vae", "vae": str(vae_folder), "batch_size": 3},
        preview={"every": 8, "num": 4, "steps": 2},
    )
    last = run_recipe(path)
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["codec"]["scale"] == 0.5
    assert manifest["codec"]["vae"] == str(vae_folder)
    config = json.loads((last / "ema/config.json").read_text())
    assert (config["sample_size"], config["in_channels"], config["num_classes"]) == (8, 4, 3)
    grid = tmp_path / "grid.png"
    sample.main(["--ckpt", str(last), "--classes", "0", "1", "2", "--steps", "2", "--out", str(grid)])
    assert Image.open(grid).size == (3 * 68 + 4, 68 + CAPTION + 4)
    sampling(["generate", "--ckpt", str(last.parent), "--num", "4", "--steps", "2", "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/000003.png").size == (32, 32)
    assert Image.open(tmp_path / "out/000003.png").mode == "RGB"


@pytest.mark.parametrize(
    ("step", "own", "seen"),
    [("tf32", None, "tf32"), ("bf16", None, "tf32"), ("fp32", "bf16", "bf16"), ("bf16", "fp32", "ieee")],
)
def test_an_autoencoder_has_a_precision_of_its_own(recipe_file, image_folder, vae_folder, monkeypatch, step, own, seen):
    def look() -> str:
        return "bf16" if torch.is_autocast_enabled("cpu") else torch.backends.cudnn.conv.fp32_precision

    found, moments, forward = {}, VaeCodec.moments, SiTTransformer2DModel.forward

    def encoding(self, images):
        found["vae"] = look()
        return moments(self, images)

    def training(self, *args, **kwargs):
        found["step"] = look()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VaeCodec, "moments", encoding)
    monkeypatch.setattr(SiTTransformer2DModel, "forward", training)
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 16}
    latents = {"codec": "vae", "vae": str(vae_folder), "precision": own}
    last = run_recipe(recipe_file(data=data, latents=latents, train={"max_steps": 1, "precision": step}))
    assert found == {"vae": seen, "step": {"fp32": "ieee"}.get(step, step)}
    stored = checkpoint.read_manifest(last)["recipe"]["latents"]["precision"]
    assert stored == {"ieee": "fp32"}.get(seen, seen)


def test_a_run_goes_on_from_the_cache_of_its_images(recipe_file, tmp_path, image_folder, vae_folder):
    from sit_atconv.latents.encode import encode

    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 16, "flip": True}
    path = recipe_file(data=data, latents={"codec": "vae", "vae": str(vae_folder)})
    cache = ("data.kind=latents", f"data.root={tmp_path / 'cache'}")
    encode(load_recipe(path), tmp_path / "cache", "fp32")
    encode(load_recipe(path, ["data.image_size=32"]), tmp_path / "other", "fp32")
    whole = log_rows(run_recipe(path, f"run.out={tmp_path / 'whole'}").parent)
    run_recipe(path, "train.max_steps=4")
    with pytest.raises(InputError, match=r"data.image_size: 16 -> 32"):
        run_recipe(path, "data.kind=latents", "data.image_size=null", f"data.root={tmp_path / 'other'}")
    for steps in ("6", "8"):  # and from there on as a run of latents
        last = run_recipe(path, *cache, f"train.max_steps={steps}")
    losses = [[row["loss"] for row in rows] for rows in (whole, log_rows(last.parent))]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def test_a_number_in_the_environment_makes_no_process_of_a_launch(recipe_file, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as a scheduler may leave it
    last = run_recipe(recipe_file(), "train.max_steps=1")
    assert checkpoint.read_manifest(last)["step"] == 1
