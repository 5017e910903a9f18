"""The main job on the embedded digits: train, sample, score, time; ends with a table of what lies where."""

import shlex
import subprocess
import sys
from pathlib import Path

from sit_atconv.runtime.files import scratch
from sit_atconv.runtime.reading import read_json

OUT = Path("runs/demo")


def call(line: str) -> None:
    """Run a command line of `sit-atconv`, showing it; stop the demo with its exit status when it fails."""
    print(f"\n$ sit-atconv {line}", flush=True)
    status = subprocess.run([sys.executable, "-m", "sit_atconv", *shlex.split(line)]).returncode
    if status:
        sys.exit(status)


def main() -> None:
    scratch(OUT)
    run, grid, samples, speed = OUT / "run", OUT / "grid.png", OUT / "samples", OUT / "speed"
    call(f"train digits model.token_mixer=atconv run.out={run}")
    call(f"sample --ckpt {run} --classes 0 1 2 3 4 5 6 7 8 9 --rows 8 --steps 20 --out {grid}")
    call(f"generate --ckpt {run} --num 1000 --steps 20 --out {samples}")
    call(f"score {samples} --ref digits")
    call(f"speed --models SiT-ATConv-S/2 --sizes 256 --baselines attention --dtype fp32 --out {speed}")
    metrics = read_json(samples / "metrics.json")["metrics"]
    scores = {name: metric["value"] for name, metric in metrics.items()}
    rows = read_json(speed.with_suffix(".json"))["rows"]
    table = [
        ("result", "value", "file"),
        ("grid of samples", "80 digits, 8 of each class", grid),
        ("classes recognised", f"{scores['recognised']:.1%} of 1,000", samples / "metrics.json"),
        ("classifier, held-out digits", f"{scores['classifier_heldout_accuracy']:.1%}", samples / "metrics.json"),
        ("Frechet distance", f"{scores['frechet_distance']:.2f}", samples / "metrics.json"),
        *(
            (f"{row['model']} at 256 px", f"{row['ms_per_nfe']:.0f} ms/NFE, {row['vs_attention']:.2f}x", f"{speed}.md")
            for row in rows
        ),
    ]
    print()
    for name, value, file in table:
        print(f"{name:<28} {value:<28} {file}")


if __name__ == "__main__":
    main()
