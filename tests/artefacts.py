"""What a tree of sources writes, and what a tree makes of it afterwards. Run by test_artefacts.py.

python artefacts.py PLACE COPY   in the root of a tree: writes the artefacts at PLACE, copies them to COPY, and goes on
python artefacts.py PLACE        in the root of any tree: reads those at PLACE; prints {what: what came of it} as JSON

To read, only what both trees have is used: commands, and the public API. PLACE is the same for both, and so are the
commands.
"""

import hashlib
import importlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from unittest.mock import patch

import timm
import torch
from bits import digest, make_inputs
from conftest import reset_accelerate
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel
from tiny_vae import save_vae
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sit_atconv
import sit_atconv.models.attnet  # timm's create_model knows it then
from sit_atconv import SiTPipeline, SiTTransformer2DModel, swap_attention
from sit_atconv.config import Data
from sit_atconv.swap import load_delta, save_delta

STOPPED, STEPS = 6, 10
STD = 0.09  # between those that are tracked, and within what snapshots of six steps can give
TENSORS, IMAGES = "*.safetensors", "*.png"
# A tree that composites transparent images goes on so with what one that did not has begun.
OPAQUE = ["data.background=null"] if "background" in {field.name for field in fields(Data)} else []


def call(module: str, *words: str | float | Path) -> str:
    """What a command of this tree says on stdout. One that refuses ends this program, having said why."""
    reset_accelerate()
    with redirect_stdout(io.StringIO()) as said:
        importlib.import_module(module).main(list(map(str, words)))
    return said.getvalue()


@contextmanager
def stopped() -> Iterator[None]:
    """A run within it gets SIGTERM in its step STOPPED."""
    steps = count(1)

    def step(*_) -> None:
        if next(steps) == STOPPED:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(step)
    try:
        yield
    finally:
        hook.remove()


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name[0] != ".")


@contextmanager
def untouched(*folders: Path, pattern: str = "*") -> Iterator[None]:
    """No file of these folders is written again, be it with the same content, and none comes."""

    def state() -> dict[Path, tuple[int, int]]:
        found = (path for folder in folders for path in files(folder, pattern))
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = state()
    yield
    assert state() == before, folders


class Artefacts:
    """The artefacts at a place. The command that made one is given again to read it."""

    def __init__(self, place: Path):
        self.place, self.inputs, self.vae = place, place / "inputs", place / "inputs/vae"
        self.samples, self.reference, self.cache = place / "samples", place / "reference.npz", place / "cache"

    # The commands.

    def runs(self) -> dict[str, list[str | Path]]:
        """What trains each run, by its name."""
        length, on_cache = f"train.max_steps={STEPS}", ["data.kind=latents", f"data.root={self.cache}"]
        classifier = [f"train.epochs={STEPS * 64 / 1437}", "train.warmup_epochs=0.1", "data.workers=0"]
        return {
            "pixel": ["train_sit", self.inputs / "pixel.yaml", length],
            "repa": ["train_sit", self.inputs / "repa.yaml", length, *OPAQUE],
            "latent": ["train_sit", self.inputs / "latent.yaml", length, *OPAQUE],
            "cached": ["train_sit", self.inputs / "latent.yaml", length, *on_cache],
            "distilled": ["experiments.distill_swap", self.inputs / "distilled.yaml", length],
            "classifier": ["train_attnet", "experiments/recipes/digits_attnet.yaml", *classifier],
        }

    def train(self, name: str, out: str | None = None) -> str:
        """What the run says at its end; out: where it lies, if not under its name."""
        module, *words = self.runs()[name]
        return call(module, *words, f"run.out={self.run(out or name)}")

    def run(self, name: str) -> Path:
        return self.place / "runs" / name

    def checkpoint(self, name: str) -> Path:
        """The one of the step in which the run was stopped."""
        return self.run(name) / f"step-{STOPPED:07d}"

    def generate(self, model: Path, out: Path, num: int = 24, seed: int = 0) -> None:
        sampling = ["--batch", 8, "--steps", 4, "--cfg", 1.5, "--seed", seed]
        call("sampling.__main__", "generate", "--ckpt", model, "--num", num, "--out", out, *sampling)

    def score(self, ref: str | Path) -> dict:
        """The metrics of the samples, but for those that the recorded commit does not have."""
        out = self.place / "score.json"  # not among the samples, where nothing is to change
        call("eval.__main__", "score", self.samples, "--ref", ref, "--out", out)
        found = json.loads(out.read_text())["metrics"]
        return {name: each for name, each in found.items() if name not in ("nearest", "copies")}

    def extract(self, out: Path) -> None:
        call("eval.__main__", "extract", self.samples, "--out", out, "--extractor", EXTRACTOR, "--shard", 8)

    def encode(self, out: Path) -> None:
        words = [self.inputs / "latent.yaml", "--out", out, "--shard-images", 5, *OPAQUE]
        call("sit_atconv.latents.__main__", "encode", *words)

    def posthoc(self, out: Path) -> None:
        call("sit_atconv.posthoc", self.run("pixel"), "--std", STD, "--step", STOPPED, "--out", out)

    def export(self, source: Path, out: Path, *vae: str | Path) -> None:
        call("sit_atconv.pipelines.export", source, "--out", out, *vae)

    # Making, which only the recorded tree does.

    def make(self) -> None:
        self.make_inputs()
        self.encode(self.cache)
        for name in self.runs():
            with stopped():
                said = self.train(name)
            assert f"stopped at step {STOPPED}," in said, said
        self.posthoc(self.place / "posthoc")
        self.make_samples()
        self.extract(self.place / "features")
        for whole, index in ((self.cache, "index.json"), (self.place / "features", "features.json")):
            begun = shutil.copytree(whole, whole.with_name(f"begun-{whole.name}"))
            for path in (begun / index, files(begun, TENSORS)[1]):
                path.unlink()
        self.make_pipelines()
        for kind in MODELS:
            model = unswapped(kind)
            swap_attention(model, "odd")
            model.save_pretrained(self.place / f"swapped-{kind}")
            save_delta(model, self.place / f"{kind}.safetensors")

    def make_inputs(self) -> None:
        self.inputs.mkdir(parents=True)
        make_inputs(self.inputs)
        save_vae(self.vae)
        pixels = {"patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "token_mixer": "hybrid"}
        pictures = {"kind": "imagefolder", "root": str(self.inputs / "images"), "image_size": 8, "flip": True}
        distill = {"teacher": str(self.checkpoint("pixel")), "calib": 8, "blockwise_steps": 4, "share_steps": 3}
        for name, recipe in {
            "pixel": {
                "data": {"kind": "digits"}, "model": pixels,
                "ema": {"kind": "power", "stds": [0.05, 0.1], "snapshot_every": 1},
            },
            "latent": {
                "data": pictures, "model": {**pixels, "patch_size": 1}, "ema": {"decay": 0.9},
                "latents": {"codec": "vae", "vae": str(self.vae), "batch_size": 3},
            },
            "distilled": {"data": {"kind": "digits"}, "distill": distill, "flow": {"time_stratified": True}},
        }.items():  # fmt: skip
            common = {"run": {"out": str(self.run(name))}, "checkpoint": {"every": 4}, "preview": {"every": 0}}
            recipe = {**common, "train": {"batch_size": 8, "lr": 1e-3}, **recipe}
            (self.inputs / f"{name}.yaml").write_text(json.dumps(recipe))

    def make_samples(self) -> None:
        """Samples with the features of a score, some that were stopped before the end, and a reference of others."""
        from sampling.samples import Samples

        model, others, begun = self.checkpoint("pixel"), self.place / "others", self.place / "begun-samples"
        self.generate(model, self.samples)
        self.score("digits")
        self.generate(model, others, seed=1)
        call("eval.__main__", "build-ref", others, "--out", self.reference, "--extractor", EXTRACTOR)
        self.score(self.reference)
        with patch.object(Samples, "finish", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
            self.generate(model, begun)
        files(begun, IMAGES)[11].unlink()

    def make_pipelines(self) -> None:
        from sit_atconv.pipelines.export import open_source

        self.export(self.run("pixel"), self.place / "exported-pixel")
        self.export(self.run("latent"), self.place / "exported-latent", "--vae", self.vae)
        for name, vae in (("pixel", None), ("latent", self.vae)):
            open_source(self.run(name), vae).pipeline.save_pretrained(self.place / f"saved-{name}")

    # Reading.

    def read(self) -> dict:
        """What comes of all artefacts: equal for trees that read them alike. The runs go on last: they remove older
        checkpoints, of which samples and averages were made."""
        return {
            **self.read_samples(), **self.read_scores(), **self.read_cache(), **self.read_averages(),
            **self.read_pipelines(), **self.read_swaps(), **self.read_runs(),
        }  # fmt: skip

    def read_samples(self) -> dict:
        model, begun = self.checkpoint("pixel"), self.place / "begun-samples"
        with untouched(self.samples):
            self.generate(model, self.samples)
        self.generate(model, begun)
        images = digest(*files(begun, IMAGES))
        assert images == digest(*files(self.samples, IMAGES))
        return {"samples": images}

    def read_scores(self) -> dict:
        features, begun = self.place / "features", self.place / "begun-features"
        with untouched(self.samples, features):
            scores = {f"scores by {ref}": self.score(ref) for ref in ("digits", self.reference)}
            self.extract(features)
        self.extract(begun)
        shards = digest(*files(begun, TENSORS))
        assert shards == digest(*files(features, TENSORS))
        return {**scores, "features": shards}

    def read_cache(self) -> dict:
        begun, before = self.place / "begun-cache", digest(*files(self.cache))
        shutil.copytree(self.run("latent"), self.run("moved"))
        with untouched(self.cache, pattern=TENSORS):
            call("sit_atconv.latents.__main__", "verify", self.cache)
            self.train("cached", out="fresh")
            self.train("cached", out="moved")  # a run on the images goes on from their cache
            self.encode(self.cache)
        self.encode(begun)
        assert digest(*files(begun)) == digest(*files(self.cache)) == before
        return {"cache": before, **{f"run {name}": self.ended(name) for name in ("fresh", "moved")}}

    def read_averages(self) -> dict:
        again, images = self.place / "posthoc-again", self.place / "images-posthoc"
        self.posthoc(again)
        self.generate(self.place / "posthoc", images, num=8)
        return {"posthoc": digest(*files(again, TENSORS)), "images of posthoc": digest(*files(images, IMAGES))}

    def read_pipelines(self) -> dict:
        found = {}
        for name in ("pixel", "latent"):
            exported, again = str(self.place / f"exported-{name}"), str(self.place / f"again-{name}")
            theirs = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
            model = SiTTransformer2DModel.from_pretrained(exported, subfolder="transformer")
            ours = SiTPipeline(model, theirs.vae, scheduler=theirs.scheduler)
            images = {drawn(theirs), drawn(ours), drawn(SiTPipeline.from_pretrained(self.place / f"saved-{name}"))}
            ours.transformer = AutoModel.from_pretrained(exported, subfolder="transformer", trust_remote_code=True)
            self.export(Path(exported), Path(again))
            images |= {drawn(ours), drawn(DiffusionPipeline.from_pretrained(again, trust_remote_code=True))}
            (found[f"images of pipeline {name}"],) = images
        return found

    def read_swaps(self) -> dict:
        found = {}
        for kind, (_, swapped) in MODELS.items():
            load_delta(model := unswapped(kind), self.place / f"{kind}.safetensors")
            outputs = {output(model), output(swapped.from_pretrained(self.place / f"swapped-{kind}"))}
            (found[f"output of swapped {kind}"],) = outputs
        return found

    def read_runs(self) -> dict:
        """Images of the models as they were stopped, and the bits that their runs end with."""
        found = {}
        for name in ("repa", "latent", "distilled"):
            out = self.place / f"images-{name}"
            self.generate(self.checkpoint(name), out, num=8)
            found[f"images of {name}"] = digest(*files(out, IMAGES))
        classifier = timm.create_model(f"local-dir:{self.checkpoint('classifier') / 'ema'}", pretrained=True).eval()
        with torch.no_grad():
            found["logits of classifier"] = digest_of(classifier(noise(1, 32, 32)))
        for name in self.runs():
            self.train(name)
            found[f"run {name}"] = self.ended(name)
        return found

    def ended(self, name: str) -> str:
        """SHA-256 of all tensors that a run ends with: weights, averages, projectors, optimiser, snapshots."""
        run = self.run(name)
        return digest(*files(run / f"step-{STEPS:07d}", TENSORS), *files(run / "snapshots", TENSORS))


def digest_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def drawn(pipe: DiffusionPipeline) -> str:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0)}
    return digest_of(pipe([0, 2], **options, output_type="pt").images)


def _sit() -> SiTTransformer2DModel:
    return SiTTransformer2DModel(sample_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10)


def _dit() -> DiTTransformer2DModel:
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
    return DiTTransformer2DModel(in_channels=4, out_channels=8, **shape)


# What makes a model, and the class of the swapped one.
MODELS = {"sit": (_sit, SiTTransformer2DModel), "dit": (_dit, sit_atconv.ATConvDiTTransformer2DModel)}


def unswapped(kind: str) -> nn.Module:
    """A model whose layers all have a say, always the same."""
    make, _ = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def output(model: nn.Module) -> str:
    with torch.no_grad():
        velocity = model(noise(4, 8, 8), timestep=torch.tensor([0.25, 0.5]), class_labels=torch.tensor([3, 1]))
    return digest_of(velocity.sample)


class Projection(nn.Module):
    """Features of digits, as an extractor of one's own gives them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1).float() / 255 @ self.matrix


EXTRACTOR = f"{Path(__file__).stem}:{Projection.__name__}"


def main(place: str, copy: str | None = None) -> None:
    artefacts = Artefacts(Path(place))
    if copy is not None:
        artefacts.make()
        shutil.copytree(place, copy)
    print(json.dumps(artefacts.read(), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
