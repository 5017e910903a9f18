"""An exported pipeline where the package is not installed, against the installed one: the same image to the bit."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_recipe, weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

import train_sit
from sit_atconv import SiTPipeline, create_model
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.pipelines import exporting
from sit_atconv.pipelines.bundle import PACKAGE
from sit_atconv.pipelines.card import _training
from sit_atconv.pipelines.export import main
from sit_atconv.pipelines.exporting import MODEL, PIPELINE, export, open_source
from sit_atconv.training.checkpoint import load_trained

MIXERS = ("attention", "atconv", "hybrid")
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark", 3: "ray", 4: "hen"}
CALL = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}

# What a child begins with: a machine without the package, and without Triton where a test says so.
PRELUDE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sit_atconv":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from diffusers import AutoModel, DiffusionPipeline
torch.set_num_threads({threads})
"""


def pipeline(scheduler=FlowMatchEulerDiscreteScheduler, vae=None, names=NAMES, seed=0, **options) -> SiTPipeline:
    """A pipeline whose images are not grey."""
    torch.manual_seed(seed)
    shape = {"patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 2}
    model = create_model(None, **{"sample_size": 8, "num_classes": 5, **shape, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return SiTPipeline(model.eval(), vae, scheduler=scheduler(), id2label=names)


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(["goldfish", 3], generator=torch.Generator().manual_seed(1), **CALL).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with an export for every mixer and what each draws."""
    folder = tmp_path_factory.mktemp("exported")
    for mixer in ("average", *MIXERS):
        options = {"token_mixer": "hybrid", "use_meanflow": True} if mixer == "average" else {"token_mixer": mixer}
        pipe = pipeline(**options)
        pipe.save_pretrained(folder / "saved" / mixer)
        export(open_source(folder / "saved" / mixer), folder / mixer)
        torch.save(draw(pipe), folder / f"{mixer}.pt")
    return folder


@pytest.fixture
def child(process_server, bare_server, tmp_path):
    """Runs code in a process in which the package cannot be imported, and gives what it said on stderr."""

    def run(code: str, *arguments, absent: bool = True, cwd=tmp_path, **environment) -> str:
        prelude = PRELUDE.format(threads=torch.get_num_threads()) if absent else ""
        end = '\nassert not [name for name in sys.modules if name.startswith("sit_atconv")]\n' if absent else ""
        environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        place = {"environment": environment, "cwd": str(cwd)}
        server = bare_server if absent else process_server
        codes, (said,) = server(prelude + textwrap.dedent(code) + end, tmp_path, arguments, place)
        assert codes == [0], said
        return said

    return run


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("average", "hybrid"), ("attention", "atconv")], ids="-".join)
def test_it_draws_the_same_image_to_the_bit_without_the_package(exported, child, mixers):
    said = child(
        f"""
        folder = sys.argv[1]
        sys.modules["triton"] = None  # neither is that installed
        for mixer in {mixers}:
            pipe = DiffusionPipeline.from_pretrained(f"{{folder}}/{{mixer}}", trust_remote_code=True)
            pipe.set_progress_bar_config(disable=True)
            assert type(pipe).__name__ == "SiTPipeline"
            image = pipe(["goldfish", 3], generator=torch.Generator().manual_seed(1), **{CALL}).images
            assert torch.equal(image, torch.load(f"{{folder}}/{{mixer}}.pt", weights_only=True)), mixer
            assert pipe.get_label_ids("tinca TINCA") == [0]
            assert pipe.nfe == 6
            pipe([1], output_type="latent")
            assert pipe.nfe == (1 if mixer == "average" else 100)  # as it fits the transformer
        # and it asks the same of a scheduler and of an interval
        transformer, scheduler = pipe.transformer, pipe.scheduler
        pipe([1], num_inference_steps=50, guidance_interval=(0.2, 1), output_type="latent")
        assert pipe.nfe == 50 + 40
        from diffusers import DPMSolverMultistepScheduler
        flow = {{"use_flow_sigmas": True, "prediction_type": "flow_prediction"}}
        pipe.scheduler = DPMSolverMultistepScheduler(**flow, use_lu_lambdas=True)
        transformer.forward = None  # not to be called
        try:
            pipe([1])
        except ValueError as error:
            assert "with use_lu_lambdas=True does not follow the flow" in str(error)
        else:
            raise AssertionError("it was accepted")
        del transformer.forward
        pipe.scheduler = scheduler
        pipe.transformer.final_layer.linear.bias.data[0] = float("nan")
        for kind in ("pil", "np", "pt", "latent"):
            try:
                pipe([1], 1, output_type=kind)
            except ValueError as error:
                assert "image 0 is not finite as it comes from FlowMatchEuler" in str(error), error
            else:
                raise AssertionError(kind)
        """,
        exported,
    )
    lines = [line for line in re.split(r"[\r\n]", said) if line and not line.startswith("Loading pipeline")]
    assert lines == []  # no warning either


@pytest.mark.slow
def test_an_export_takes_its_guide_along(child, tmp_path):
    pipe = pipeline(class_dropout_prob=0.0)
    pipe.register_modules(guide=pipeline(seed=1, hidden_size=16, depth=1, class_dropout_prob=0.0).transformer)
    pipe.save_pretrained(tmp_path / "saved")
    export(open_source(tmp_path / "saved"), tmp_path / "out")
    torch.save(draw(pipe), tmp_path / "images.pt")
    card = (tmp_path / "out/README.md").read_text()
    assert "| guide | " in card
    assert "guidance_scale=1.5" in card
    assert "no guidance" not in card
    child(
        f"""
        folder = sys.argv[1]
        pipe = DiffusionPipeline.from_pretrained(f"{{folder}}/out", trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(["goldfish", 3], generator=torch.Generator().manual_seed(1), **{CALL}).images
        assert torch.equal(images, torch.load(f"{{folder}}/images.pt", weights_only=True))
        assert (pipe.nfe, pipe.nfe.of_guide) == (6, 3)
        """,
        tmp_path,
    )
    # and what was exported is a source again
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "again")]) is None
    assert (tmp_path / "again/guide/config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("hybrid",), ("attention", "atconv")], ids="-".join)
def test_the_transformer_alone_trains_compiles_and_is_saved_again(exported, child, tmp_path, mixers):
    child(
        f"""
        import copy, pickle
        folder, out = sys.argv[1:]
        for mixer in {mixers}:
            place = f"{{folder}}/{{mixer}}"
            model = AutoModel.from_pretrained(place, subfolder="transformer", trust_remote_code=True)
            same = AutoModel.from_pretrained(f"{{place}}/transformer", trust_remote_code=True)
            x, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
            def gradients(network):
                model.zero_grad()
                network(x, t, labels, return_dict=False)[0].square().mean().backward()
                return [parameter.grad.clone() for parameter in model.parameters()]
            eager = gradients(model)
            assert all(gradient.any() for gradient in eager)
            if mixer == "hybrid":
                compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
                torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
            assert torch.equal(same(x, t, labels).sample, model(x, t, labels).sample)
            for copied in (copy.deepcopy(same), pickle.loads(pickle.dumps(same))):
                assert torch.equal(copied(x, t, labels).sample, same(x, t, labels).sample)
            pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
            pipe.save_pretrained(f"{{out}}/{{mixer}}")
            again = type(pipe).from_pretrained(f"{{out}}/{{mixer}}")
            assert torch.equal(again.transformer(x, t, labels).sample, same(x, t, labels).sample)
        """,
        exported,
        tmp_path / "again",
    )
    # What was saved there is a source for another export, and so is an export.
    for mixer in mixers:
        for name, source in (("again", tmp_path / "again"), ("twice", exported)):
            (tmp_path / name).mkdir(exist_ok=True)
            export(open_source(source / mixer), tmp_path / name / "out" / mixer)
            assert contents(tmp_path / name / "out" / mixer) == contents(exported / mixer)


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_operators_of_two_copies_two_versions_and_the_package_live_together(exported, child, tmp_path):
    other = tmp_path / "other" / "sit_atconv"
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    native = other / "ops/atconv/native.py"
    source = native.read_text()
    assert source.count("    return _convolve(v, kernels, kernel_size, flip=False)\n") == 1
    line = "return _convolve(v, kernels, kernel_size, flip=False)"
    native.write_text(source.replace(line, line.replace("return ", "return -")))
    ours, theirs = MODEL.text(), replace(MODEL, package=other).text()
    for name, text in (("first", ours), ("second", ours), ("version", theirs)):
        (tmp_path / f"{name}.py").write_text(text)
    child(
        """
        import importlib.util, sys, torch
        from torch.utils.flop_counter import FlopCounterMode

        def file(name):  # as diffusers does it: a file that is loaded twice runs twice in one module
            spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}.py")
            module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
            spec.loader.exec_module(module)
            return importlib.import_module(f"{module.PACKAGE}.ops.atconv")

        package = importlib.import_module

        def check(module, sign):  # output, two orders of gradients, vmap, and the count of operations
            v, kernels = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.rand(2, 9, 5)
            v.requires_grad_()

            def results(backend):
                y = module.dynamic_depthwise_conv(v, kernels, backend=backend)
                (slope,) = torch.autograd.grad(y.pow(3).sum(), v, create_graph=True)
                return [y, slope, *torch.autograd.grad(slope.sum(), v)]

            y, slope, second = results("reference")
            torch.testing.assert_close(results("native")[0], sign * y)
            if sign == 1:
                torch.testing.assert_close(results("native")[1:], [slope, second])
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                torch.vmap(lambda v, k: module.dynamic_depthwise_conv(v, k, backend="native"))(v[None], kernels[None])
            assert counter.get_total_flops() == 2 * v.numel() * 9

        loaded = []
        for load, name in [
            (file, "first"), (file, "first"), (file, "second"), (file, "version"), (package, "sit_atconv.ops.atconv")
        ]:
            loaded.append((load(name), -1 if name == "version" else 1))
            for one in loaded:  # those before, too
                check(*one)
        namespaces = {name for name in dir(torch.ops) if name.startswith("sit_atconv")}
        assert len(namespaces) == 3, namespaces
        """,
        tmp_path,
        absent=False,
    )


def test_exports_of_two_versions_live_in_one_process(exported, child, tmp_path, monkeypatch):
    other = tmp_path / "other" / "sit_atconv"
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new in [
        ("layers/blocks.py", "x, 1 + scale)", "x, 2 + scale)"),
        ("flow/guidance.py", "self.scale * ", "-self.scale * "),
    ]:
        source = (other / path).read_text()
        assert source.count(old) == 1
        (other / path).write_text(source.replace(old, new))
    for name, bundle in (("MODEL", MODEL), ("PIPELINE", PIPELINE)):
        monkeypatch.setattr(exporting, name, replace(bundle, package=other))
    export(open_source(exported / "saved" / "atconv"), tmp_path / "version")
    child(
        f"""
        def image(pipe):
            pipe.set_progress_bar_config(disable=True)
            return pipe(["goldfish", 3], generator=torch.Generator().manual_seed(1), **{CALL}).images

        def velocity(pipe):
            t = torch.ones(1)
            return pipe.transformer(torch.ones(1, 3, 8, 8), t, t.long()).sample

        first, second = (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:])
        before, other = image(first), image(second)
        assert torch.equal(before, torch.load(f"{{sys.argv[1]}}.pt", weights_only=True))
        assert not torch.allclose(velocity(second), velocity(first))
        second.transformer = first.transformer
        assert not torch.allclose(image(second), before)
        again = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert torch.equal(image(again), before)
        assert type(again) is type(first) and type(again.transformer) is type(first.transformer)
        """,
        exported / "atconv",
        tmp_path / "version",
    )


@pytest.mark.slow
def test_the_kernels_of_triton_are_in_the_file(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")
    (tmp_path / "exported.py").write_text(MODEL.text())
    code = """
        import importlib
        sys.path.append(sys.argv[1])
        import exported
        ops = importlib.import_module(f"{exported.PACKAGE}.ops.atconv")
        v, kernels = torch.randn(1, 2, 3, 5, requires_grad=True), torch.randn(1, 9, 5, requires_grad=True)
        def results(backend):
            y = ops.dynamic_depthwise_conv(v, kernels, backend=backend)
            return [y, *torch.autograd.grad(y.square().sum(), (v, kernels))]
        for ours, oracle in zip(results("triton"), results("reference")):
            torch.testing.assert_close(ours, oracle)
    """
    program = [sys.executable, "-I", "-c", PRELUDE.format(threads=1) + textwrap.dedent(code), str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_card_says_what_the_model_is_and_its_example_runs(exported, child, tmp_path):
    folder = tmp_path / "atconv"
    shutil.copytree(exported / "atconv", folder)
    card = (folder / "README.md").read_text()
    model = pipeline(token_mixer="atconv").transformer
    assert card.startswith("---\nlicense: unknown\nlibrary_name: diffusers\npipeline_tag: unconditional-image-gen")
    assert f"| parameters | {count_parameters(model):,}, stored in float32 |" in card
    assert f"| GMACs per network evaluation | {count_macs(model) / 1e9:.4g} |" in card
    assert "in place of self-attention" in card
    assert "nobody said what licence the weights are under" in card
    assert "Trained without class dropout" not in card
    assert "## Training" not in card
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL))
    assert "AutoModel" in code
    child(f"exec({code!r})", cwd=folder)
    assert (folder / "image.png").is_file()


def test_a_run_gives_its_ema_its_class_names_and_its_facts(recipe_file, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train_sit.main([str(recipe_file())])
    capsys.readouterr()
    main([str(run), "--out", str(out), "--license", "cc0-1.0"])
    assert capsys.readouterr().out == f"{out}\n"
    weights = "diffusion_pytorch_model.safetensors"
    ema, written = (load_file(path / weights) for path in (run / "step-0000008" / "ema", out / "transformer"))
    assert ema.keys() == written.keys()
    assert all(torch.equal(ema[name], written[name]) for name in ema)
    index = json.loads((out / "model_index.json").read_text())
    assert index["id2label"]["3"] == "3"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    card = (out / "README.md").read_text()
    assert "license: cc0-1.0\n" in card
    assert "nobody said" not in card
    count = json.loads((run / "step-0000008" / "manifest.json").read_text())["data"]["num_images"]
    for fact in (
        "8, batch 8, 64 images seen",
        f"digits, {count} images, 10 classes",
        "EMA, constant, decay 0.9",
        "fp32",
        "learning rate 0.001",
    ):
        assert fact in card
    for path in out.rglob("*"):  # no path of this machine
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_a_manifest_of_others_writes_nothing_else_into_the_card():
    evil = "x\n# head\n- <script>alert(1)</script> [a](http://b)"
    manifest = {
        "recipe": {"train": {"batch_size": 1, "lr": 1.0, "precision": evil}, "data": {"kind": evil}, "ema": {}},
        "data": {"num_images": evil, "classes": [], "held_out": evil}, "step": 1, "images_seen": 1,
        "versions": dict.fromkeys(("sit_atconv", "torch", "diffusers"), evil),
    }  # fmt: skip
    manifest["recipe"]["meanflow"] = {"share": 0.5, "tangent": evil, "teacher": evil}
    text = _training(manifest, guidance=1.0)
    assert len(text.splitlines()) == 7
    assert all(line.startswith("- ") for line in text.splitlines())
    assert "<script" not in text
    manifest["data"] |= {"num_images": 18, "held_out": 6}
    assert ", 18 images, 6 more held out, 0 classes" in _training(manifest, guidance=1.0)
    assert "[a](" not in text.replace("\\[", "(")


def test_a_latent_model_takes_its_autoencoder_along(vae_folder, tmp_path, fails):
    model, out = tmp_path / "latent", tmp_path / "out"
    pipeline(in_channels=4).transformer.save_pretrained(model)
    assert "--vae" in fails(main, model, "--out", out)
    main([str(model), "--out", str(out), "--vae", str(vae_folder)])
    vae = AutoencoderKL.from_pretrained(out / "vae", use_safetensors=True)
    weights = AutoencoderKL.from_pretrained(vae_folder, use_safetensors=True).state_dict()
    assert vae.config.scaling_factor == 0.5
    assert vae.config.shift_factor == 0.1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vae.state_dict().items())
    assert "of images of 32 x 32 pixels" in (out / "README.md").read_text()
    again = open_source(out).pipeline
    assert type(again.vae).__name__ == "AutoencoderKL"


def test_scheduler_and_dtype_stay_what_they_were(tmp_path):
    pipe = pipeline(FlowMatchHeunDiscreteScheduler, names=None, class_dropout_prob=0.0)
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "saved")
    main([str(tmp_path / "saved"), "--out", str(tmp_path / "out")])
    file = "transformer/diffusion_pytorch_model.safetensors"
    saved, written = load_file(tmp_path / "saved" / file), load_file(tmp_path / "out" / file)
    assert all(tensor.dtype == torch.bfloat16 for tensor in written.values())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in written.items())
    assert type(open_source(tmp_path / "out").pipeline.scheduler) is FlowMatchHeunDiscreteScheduler
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stored in bfloat16" in card
    assert "dtype=torch.bfloat16" in card
    assert "guidance_scale=1.0" in card
    assert "Trained without class dropout: no guidance" in card


def rewrite(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda saved: rewrite(saved / "model_index.json", _class_name="DiTPipeline"), "is a DiTPipeline"),
        (lambda saved: (saved / "model_index.json").write_text("{"), "cannot be read"),
        (lambda saved: (saved / "model_index.json").write_text("[]"), "cannot be read"),
        (lambda saved: rewrite(saved / "model_index.json", id2label={"1": None}), "id2label"),
        (lambda saved: rewrite(saved / "model_index.json", id2label=["tench"]), "id2label"),
        (lambda saved: rewrite(saved / "model_index.json", id2label="tench"), "id2label"),
        (lambda saved: rewrite(saved / "transformer/conversion.json", files={}), "does not list"),
        (lambda saved: rewrite(saved / "model_index.json", scheduler=["os", "system"]), "scheduler system"),
        (
            lambda saved: rewrite(saved / "model_index.json", scheduler=["os", "DDIMScheduler"]),
            "is not one of diffusers",
        ),
        (lambda saved: rewrite(saved / "model_index.json", scheduler=["diffusers", "DiTPipeline"]), "DiTPipeline"),
        (lambda saved: rewrite(saved / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]), "flow matching"),
        (lambda saved: (saved / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json"),
        (lambda saved: (saved / "scheduler/scheduler_config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda saved: (saved / "scheduler/scheduler_config.json").write_text(f"[{'1, ' * 10**6}1]"), "larger than"),
        (
            lambda saved: rewrite(saved / "scheduler/scheduler_config.json", num_train_timesteps=10**6),
            "num_train_timesteps is 1000000, and must be a whole number, 1 to 10000",
        ),
        (
            lambda saved: rewrite(saved / "scheduler/scheduler_config.json", solver_order=10**9),
            "solver_order is 1000000000, and must be at most",
        ),
        (lambda saved: rewrite(saved / "transformer/config.json", _class_name="UNet2DModel"), "SiTTransformer2DModel"),
        (lambda saved: rewrite(saved / "transformer/config.json", path="gvp"), "path='gvp'"),
        (lambda saved: (saved / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"1"), "cannot be read"),
        (lambda saved: shutil.rmtree(saved / "transformer"), "no such folder"),
        (lambda saved: shutil.rmtree(saved), "no such folder"),
    ],
)
def test_sources_that_are_no_pipeline_are_refused(exported, tmp_path, fails, damage, says):
    saved = tmp_path / "saved"
    shutil.copytree(exported / "saved" / "atconv", saved)
    damage(saved)
    assert says in fails(main, saved, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_there_whole_or_not_at_all(exported, tmp_path, fails, monkeypatch, capsys):
    source, out = exported / "saved" / "atconv", tmp_path / "below" / "out"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sit_atconv.pipelines.exporting.model_card", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main([str(source), "--out", str(out)])
    assert "stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # the folder above was made for it
    out.mkdir(parents=True)
    assert "exists already" in fails(main, source, "--out", out)
    assert "exists already" in fails(main, tmp_path / "nowhere", "--out", out)  # before anything is read
    with pytest.raises(ValueError, match="exists already"):
        export(open_source(source), out)
    assert list(out.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file' is no folder" in fails(main, source, "--out", tmp_path / "file" / "out")


@pytest.mark.parametrize("license", ["", "mit\ntags: [x]", "mit: x", "Apache 2"])
def test_a_license_is_one_identifier(exported, tmp_path, fails, license):
    source = exported / "saved" / "atconv"
    assert "give one identifier" in fails(main, source, "--out", tmp_path / "out", "--license", license)
    with pytest.raises(ValueError, match="give one identifier"):
        export(open_source(source), tmp_path / "out", license)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, vae_folder) -> Path:
    """A run of a latent model on images of three named classes, whose autoencoder is in a folder of its own."""
    folder = tmp_path_factory.mktemp("latent")
    shutil.copytree(vae_folder, folder / "vae")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog", "goldfish"):
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "images" / name / "0.png")
    (folder / "recipe.yaml").write_text(
        f"run: {{out: {folder}/run}}\ndata: {{kind: imagefolder, root: {folder}/images, image_size: 32}}\n"
        f"latents: {{codec: vae, vae: {folder}/vae, batch_size: 4}}\npreview: {{every: 0}}\n"
        "model: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}\nema: {decay: 0.5}\n"
        "train: {max_steps: 2, batch_size: 4, lr: 0.1}\n"
    )
    return run_recipe(folder / "recipe.yaml").parent


def test_a_pipeline_from_a_run_has_its_averages_its_autoencoder_and_its_names(latent_run):
    pipe = SiTPipeline.from_run(latent_run)
    checkpoint = latent_run / "step-0000002"
    ema = weights(checkpoint)
    assert all(torch.equal(tensor, ema[name]) for name, tensor in pipe.transformer.state_dict().items())
    vae = AutoencoderKL.from_pretrained(latent_run.parent / "vae", use_safetensors=True).state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in pipe.vae.state_dict().items())
    assert pipe.get_label_ids(["goldfish", 1]) == [2, 1]
    images = [
        SiTPipeline.from_run(place)(["goldfish", 0], 2, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
        for place in (latent_run, str(checkpoint), checkpoint / "ema")
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    raw = SiTPipeline.from_run(checkpoint / "model").transformer.state_dict()
    assert all(torch.equal(tensor, weights(checkpoint, "model")[name]) for name, tensor in raw.items())


def test_a_pipeline_from_a_run_is_told_where_its_autoencoder_lies_today(latent_run, tmp_path):
    run = shutil.copytree(latent_run, tmp_path / "run")
    manifest = run / "step-0000002/manifest.json"
    moved = json.loads(manifest.read_text())
    moved["codec"]["vae"] = str(tmp_path / "gone")
    manifest.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="say with vae where the checkpoint's autoencoder lies"):
        SiTPipeline.from_run(run)
    assert SiTPipeline.from_run(run, vae=str(latent_run.parent / "vae")).vae is not None
    with pytest.raises(ValueError, match="no such folder"):
        SiTPipeline.from_run(tmp_path / "none")


def test_a_pipeline_from_a_pipelines_folder_keeps_its_scheduler_and_names(tmp_path):
    pipeline(FlowMatchHeunDiscreteScheduler).save_pretrained(tmp_path / "saved")
    pipe = SiTPipeline.from_run(tmp_path / "saved")
    assert type(pipe.scheduler) is FlowMatchHeunDiscreteScheduler
    assert pipe.labels == pipeline().labels
    assert load_trained(tmp_path / "saved").id2label == NAMES


def test_an_exported_pipeline_reads_no_runs(exported, child):
    said = child(
        f"pipe = DiffusionPipeline.from_pretrained({str(exported / 'atconv')!r}, trust_remote_code=True)\n"
        "try:\n    type(pipe).from_run('run')\nexcept NotImplementedError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    assert "install it" in said
