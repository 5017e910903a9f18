"""python tests/installed.py: every command of the installed package, from a new and empty folder.

Run it by the Python of an environment that holds the wheel. It prints a table: exit status, seconds, command, and the
last line that the command said.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hub_server import TOKEN, serving_hub  # beside this file
from tiny_vae import save_vae

BRIEF = "train.max_steps=4 train.warmup_steps=0 checkpoint.every=4 preview.every=0"
SMALL = "model.hidden_size=16 model.depth=1 model.num_heads=2"
POWER = "ema.kind=power ema.decay=null ema.snapshot_every=1"
COMMANDS = (
    "recipes",
    "recipes digits",
    "recipes --keys",
    "recipes --keys classify",
    f"train digits {SMALL} {BRIEF} --dry-run",
    f"train digits {SMALL} {BRIEF} {POWER}",
    "sample --ckpt runs/digits-attention --classes 3 1 4 --steps 2 --out grid.png",
    "generate --ckpt runs/digits-attention --num 20 --steps 2 --out runs/digits-attention/samples/euler2",
    "score runs/digits-attention/samples/euler2 --ref digits",
    "extract runs/digits-attention/samples/euler2 --extractor digits --out features",
    "build-ref features --out reference.npz",
    "score features --ref reference.npz --out score.json",
    "table runs/digits-attention/samples/euler2/metrics.json --out table.md",
    "report runs/digits-attention --out report.html",
    "likelihood --ckpt runs/digits-attention --num 2 --sampler euler --steps 2 --out likelihood.json",
    "posthoc runs/digits-attention --std 0.1 --out averaged",
    "convert averaged --to public --out public.pt",
    "app --help",
    "calibrate averaged --num 2",
    "convert public.pt --num-heads 2 --sample-size 8 --out converted",
    "export runs/digits-attention --out exported",
    "push runs/digits-attention --repo digits",
    "pull someone/digits --out pulled",
    "watch runs/digits-attention",
    "classify digits_attnet train.epochs=0.05 train.warmup_epochs=0",
    "principles runs/digits-attention --num 2 --times 1",
    "swap-check DiTTransformer2DModel --grid 4 4 --no-timing",
    "frontier runs/digits-attention --grid grid.yaml --ref digits --num 20 --out frontier",
    "speed --models SiT-ATConv-S/8 --sizes 64 --rounds 1 --baselines attention --out speed",
    "encode images.yaml --out cache",
    "verify cache",
)
IMAGES = """
base: imagefolder
data: {root: images, image_size: 16}
latents: {vae: vae}
"""
LINE = "import sit_atconv; print(sit_atconv.__version__, sit_atconv.__file__)"


def main() -> int:
    program = Path(sys.executable).with_name("sit-atconv")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    failed = 0
    with tempfile.TemporaryDirectory() as folder, serving_hub() as hub:
        # xet: a protocol that the stand-in of the hub does not speak
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{folder}/home",
            "HF_HUB_DISABLE_XET": "1",
        }
        told = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        where = subprocess.run([sys.executable, "-c", LINE], **told)
        print(where.stdout + where.stderr, end="", flush=True)
        place(Path(folder))
        print("| exit | seconds | sit-atconv ... | last line |\n| --- | ---: | --- | --- |", flush=True)
        for command in COMMANDS:
            begun = time.monotonic()
            done = subprocess.run([program, *shlex.split(command)], **told)
            said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
            cells = (str(done.returncode), f"{time.monotonic() - begun:.1f}", f"`{command}`", said[-1].strip(" |"))
            print(f"| {' | '.join(cells)} |", flush=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
            failed += done.returncode != 0
    print(f"{len(COMMANDS) - failed} of {len(COMMANDS)} commands passed")
    return failed


def place(folder: Path) -> None:
    """What a user brings: images in class folders, an autoencoder, and a recipe that names both."""
    from PIL import Image

    for index in range(4):
        (folder / "images" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * index, 90, 120)).save(folder / "images" / "ab"[index % 2] / f"{index}.png")
    save_vae(folder / "vae")
    (folder / "images.yaml").write_text(IMAGES)
    (folder / "grid.yaml").write_text("- {sampler: [euler, heun], steps: 2}\n")


if __name__ == "__main__":
    sys.exit(main())
