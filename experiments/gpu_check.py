"""make test-gpu: the gpu tests, then 20 bf16 steps, a resume, a sample and the timings on the device."""

from pathlib import Path

import torch

from experiments.demo import call
from sit_atconv.runtime.files import scratch

RUN = Path("runs/gpu_check/run")


def main() -> None:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device on this machine")
        return
    scratch(RUN.parent)
    train = f"train_sit.py experiments/recipes/digits_sit_atconv.yaml run.out={RUN} train.precision=bf16"
    call("-m pytest -m gpu")
    for steps in (20, 30):
        call(f"{train} train.lr_schedule=constant train.warmup_steps=0 train.max_steps={steps}")
    call(f"sample.py --ckpt {RUN} --classes 0 1 2 3 4 5 6 7 8 9 --dtype bf16 --out {RUN}.png")
    call(f"-m experiments.bench.op --dtype bf16 --out {RUN}-op")
    call(f"-m sampling speed --models SiT-ATConv-XL/2 --dtype bf16 --compile --out {RUN}-speed")
    print(f"passed on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
