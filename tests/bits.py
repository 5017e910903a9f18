"""The bits of what a tree of sources makes: its trained weights, images and scores. Run by test_bits.py.

python bits.py INPUTS OUT      in the root of a tree; prints {what: SHA-256} as JSON
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

STEPS = 40


def make_inputs(folder: Path) -> None:
    """Images for REPA, and its encoder: made once, read by both trees."""
    from tiny_vit import save_vit

    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        image = folder / "images" / "abc"[index % 3] / f"{index:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(image)
    save_vit(folder / "vit")
    repa = {
        "data": {"kind": "imagefolder", "root": str(folder / "images"), "image_size": 8, "flip": True},
        "model": {"patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 2, "class_dropout_prob": 0.1},
        "train": {"batch_size": 8}, "preview": {"every": 0},
        "repa": {"encoder": f"local-dir:{folder / 'vit'}", "depth": 1, "projector_dim": 12, "weight": 0.7},
    }  # fmt: skip
    (folder / "repa.yaml").write_text(json.dumps(repa))


def call(*words: str | Path, processes: int = 1) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-2000:]}")


def digest(*files: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def recorded(inputs: Path, out: Path) -> dict[str, str | list[str]]:
    """SHA-256 of all that is made."""
    found, recipes = {}, Path("experiments/recipes")

    def train(name: str, script: str, recipe: Path, *overrides: str, processes: int = 1) -> Path:
        run = out / f"{name}-{processes}"
        call(script, recipe, f"run.out={run}", "checkpoint.every=40", *overrides, processes=processes)
        last = sorted(run.glob("step-*"))[-1]
        # JSON beside them may come to say more than it did.
        stored = sorted(last.rglob("*.safetensors"))
        found[f"files of {name}, {processes} process(es)"] = [path.relative_to(last).as_posix() for path in stored]
        found[f"{name}, {processes} process(es)"] = digest(*stored)
        return last

    steps = f"train.max_steps={STEPS}"
    quiet = ("preview.every=0", "score.every=0", "train.warmup_steps=5")
    for processes in (1, 2):
        sit = train("digits_sit", "train_sit.py", recipes / "digits_sit.yaml", steps, *quiet, processes=processes)
        atconv = train(
            "digits_sit_atconv", "train_sit.py", recipes / "digits_sit_atconv.yaml", steps, *quiet, processes=processes
        )
        train(
            "digits_attnet", "train_attnet.py", recipes / "digits_attnet.yaml", f"train.epochs={STEPS * 64 / 1437}",
            "train.warmup_epochs=0.2", "train.gradient_accumulation_steps=2", processes=processes,
        )  # fmt: skip
        train("repa", "train_sit.py", inputs / "repa.yaml", steps, processes=processes)
        train(
            "distillation", "experiments/distill_swap.py", recipes / "digits_distill.yaml", steps, *quiet,
            f"distill.teacher={sit}", "distill.blockwise_steps=20", "distill.share_steps=10", processes=processes,
        )  # fmt: skip
    for name, sampler in (("ODE", "heun"), ("SDE", "euler-maruyama")):
        images = out / name
        words = ["generate", "--ckpt", atconv, "--num", "64", "--sampler", sampler, "--steps", "8", "--out", images]
        call("-m", "sampling", *words)
        found[f"64 images, {name}"] = digest(*sorted(images.rglob("*.png")))
        call("-m", "eval", "score", images, "--ref", "digits", "--out", out / f"{name}.json")
        metrics = json.loads((out / f"{name}.json").read_text())["metrics"]
        metrics = {key: each for key, each in metrics.items() if key not in ("nearest", "copies")}  # both are new
        found[f"scores, {name}"] = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(recorded(Path(sys.argv[1]), Path(sys.argv[2])), indent=1))
