"""Time network evaluations of several models, interleaved, and compare them with the first."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from sampling.options import DTYPES, add_device_options
from sit_atconv.devices import resolve_device
from sit_atconv.errors import InputError
from sit_atconv.files import library_versions, write_atomic
from sit_atconv.models.cost import count_macs, count_parameters
from sit_atconv.models.sit import SiTTransformer2DModel, create_model

PIXELS_PER_LATENT = 8  # of the Stable-Diffusion autoencoders
SHORTEST = 0.02  # seconds that one measurement lasts at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME", help="the first is the one compared with")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256], metavar="PX", help="image sizes (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="images per network evaluation (default: 1)")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each model, in turn (default: 10)")
    parser.add_argument("--out", default="runs/speed", metavar="STEM", help="writes STEM.json and STEM.md")
    add_device_options(parser)
    parser.set_defaults(run=run)


def interleaved_medians(
    calls: list[Callable[[], None]], rounds: int, synchronize: Callable[[], None] = lambda: None
) -> tuple[list[float], list[float]]:
    """Seconds per call of each function: (medians, interquartile ranges) over `rounds` rounds.

    Every round measures each function once, in turn, so a drift of the machine meets all of them alike. A short
    function is called several times per measurement. Two calls each go before the clock.
    """
    repeats = []
    for call in calls:
        call()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        repeats.append(max(1, math.ceil(SHORTEST / (time.perf_counter() - start))))
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, record in zip(calls, repeats, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            synchronize()
            record.append((time.perf_counter() - start) / count)
    quartiles = [statistics.quantiles(record, n=4) if len(record) > 1 else [record[0]] * 3 for record in seconds]
    return [statistics.median(record) for record in seconds], [q[2] - q[0] for q in quartiles]


def peak_bytes(model: SiTTransformer2DModel, *inputs: torch.Tensor) -> int:
    """Largest total of live tensors, weights included, during one network evaluation."""
    tracker = MemTracker()
    tracker.track_external(model, *inputs)
    with tracker:
        model(*inputs)
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


@torch.no_grad()
def random_model(name: str, sample_size: int) -> SiTTransformer2DModel:
    """The preset with every weight drawn at random: a new model's gates are zero, and zeros can be quicker."""
    model = create_model(name, sample_size).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model


@torch.no_grad()
def measure(
    names: list[str], size: int, batch: int, dtype: str, device: torch.device, rounds: int
) -> list[dict[str, float | int | str]]:
    """A row per model at one image size. Raises InputError for a size that the models do not take."""
    if size % PIXELS_PER_LATENT:
        raise InputError(f"--sizes {size}: give multiples of {PIXELS_PER_LATENT} pixels")
    latent = size // PIXELS_PER_LATENT
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, latent, latent, generator=generator).to(device, DTYPES[dtype])
    inputs = (x, torch.full((batch,), 0.5, device=device), torch.zeros(batch, dtype=torch.long, device=device))
    rows, calls = [], []
    for name in names:
        # nn.Module's own `to`: diffusers warns about every cast, of models with nothing to keep in fp32 too.
        model = torch.nn.Module.to(random_model(name, latent), device, DTYPES[dtype])
        velocity = model(*inputs).sample
        if velocity.shape != x.shape or not velocity.isfinite().all() or not velocity.any():
            raise RuntimeError(f"{name} at {size} px gives a wrong output; not timed")
        rows.append(
            {
                "model": name,
                "size": size,
                "params": count_parameters(model),
                "gmacs": count_macs(model) / 1e9,
                "peak_mib": peak_bytes(model, *inputs) / 2**20,
            }
        )
        calls.append(lambda model=model: model(*inputs))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    medians, spreads = interleaved_medians(calls, rounds, synchronize)
    for row, median, spread in zip(rows, medians, spreads, strict=True):
        row |= {"ms_per_nfe": 1e3 * median, "iqr_ms": 1e3 * spread, "speedup": medians[0] / median}
    return rows


def device_name(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.is_file())
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def to_markdown(result: dict) -> str:
    """The table, with the settings as its caption."""
    lines = [
        f"Network evaluations, {result['dtype']}, batch {result['batch']}, {result['device']}; medians of "
        f"{result['rounds']} interleaved rounds. Speed-up is over {result['rows'][0]['model']}.",
        "",
        "| model | px | params (M) | GMACs | ms/NFE | IQR | speed-up | peak memory (MiB) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['model']} | {row['size']} | {row['params'] / 1e6:.1f} | {row['gmacs']:.1f} | "
            f"{row['ms_per_nfe']:.1f} | {row['iqr_ms']:.1f} | {row['speedup']:.2f}x | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    """Measure, write the JSON and the table, print the table. Raises InputError for unknown models or sizes."""
    device = resolve_device(args.device)
    for option, value in (("--batch", args.batch), ("--rounds", args.rounds)):
        if value < 1:
            raise InputError(f"{option} {value}: must be at least 1")
    rows = [
        row for size in args.sizes for row in measure(args.models, size, args.batch, args.dtype, device, args.rounds)
    ]
    result = {
        "dtype": args.dtype,
        "batch": args.batch,
        "rounds": args.rounds,
        "device": device_name(device),
        "versions": library_versions(),
        "rows": rows,
    }
    stem = Path(args.out)
    write_atomic(stem.with_name(stem.name + ".json"), json.dumps(result, indent=1))
    write_atomic(stem.with_name(stem.name + ".md"), to_markdown(result))
    print(to_markdown(result), end="")
