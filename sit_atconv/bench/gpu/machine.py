"""What the machine is, and its ceilings: how fast it copies and multiplies when nothing else is asked of it."""

import torch

from sit_atconv.bench.gpu.worker import Bench
from sit_atconv.bench.timing import nvidia_smi

COPIED, SIDE = 2**32, 8192  # bytes; of the square matrices


def run(bench: Bench) -> None:
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    bench.row("machine", nvidia_smi=nvidia_smi(bench.device, *fields, units=True))
    size, side = (2**16, 64) if bench.rehearsal else (COPIED, SIDE)
    bench.attempt("copying", lambda: copy(bench, size), needs=2 * size)
    bench.attempt("multiplying", lambda: multiply(bench, side), needs=6 * side * side)


def copy(bench: Bench, size: int) -> None:
    """Bytes read and written a second, from one tensor to another."""
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    facts = bench.times({"copy": lambda: target.copy_(source)})["copy"]
    bench.row("ceilings", what=f"copy of {size / 2**30:.3g} GiB", gb_per_s=2 * size / facts["ms"] / 1e6, **facts)


def multiply(bench: Bench, side: int) -> None:
    """Floating-point operations a second of square products of random numbers; zeros would take less power."""
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        facts = bench.times({"product": lambda: torch.mm(left, right, out=out)})["product"]  # noqa: B023
        name = str(dtype).removeprefix("torch.")
        bench.row(
            "ceilings", what=f"{side} x {side} product in {name}", tflops=2 * side**3 / facts["ms"] / 1e9, **facts
        )
