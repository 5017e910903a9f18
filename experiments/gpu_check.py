"""make test-gpu: the gpu tests, then 20 bf16 steps, a resume, a sample and the timings on the device."""

import subprocess
import sys
from pathlib import Path

import torch

from sit_atconv.files import scratch

RUN = Path("runs/gpu_check/run")


def call(*arguments: str) -> None:
    status = subprocess.run([sys.executable, *arguments]).returncode
    if status:
        sys.exit(status)


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device on this machine")
        return
    scratch(RUN.parent)
    train = ("train_sit.py", "experiments/recipes/digits_sit_atconv.yaml", f"run.out={RUN}", "train.precision=bf16")
    train += ("train.lr_schedule=constant", "train.warmup_steps=0")
    call("-m", "pytest", "-m", "gpu")
    call(*train, "train.max_steps=20")
    call(*train, "train.max_steps=30")
    call("sample.py", "--ckpt", str(RUN), "--classes", *map(str, range(10)), "--dtype", "bf16", "--out", f"{RUN}.png")
    call("-m", "experiments.bench.op", "--dtype", "bf16", "--out", f"{RUN}-op")
    speed = ("--models", "SiT-ATConv-XL/2", "--dtype", "bf16", "--compile", "--out", f"{RUN}-speed")
    call("-m", "sampling", "speed", *speed)
    print(f"passed on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
