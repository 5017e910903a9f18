"""make bench: a short standard set. Adds rows to bench.csv, writes bench.md; docs/benchmarks.md quotes both."""

from pathlib import Path

import torch

from experiments.bench import op
from sit_atconv.bench import speed
from sit_atconv.bench.results import append_csv, check_csv
from sit_atconv.bench.timing import caption, device_name, memory_kept
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import command
from sit_atconv.runtime.files import write_atomic
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.sampling.settings import Sampling

HERE = Path(__file__).parent
DIM, MODEL, SIZE = 1152, "SiT-ATConv-XL/2", 256
ROUNDS = {"4x16x16": 15, "1x32x32": 15, "1x64x64": 5}
MODEL_ROUNDS = {"fp32": 5, "bf16": 15}


def dtypes(device: torch.device) -> list[str]:
    """fp32, and bf16 where its matrix products are the faster ones: elsewhere they hide all that is beside them."""
    squares = {name: torch.ones(1024, 1024, dtype=dtype_of(name), device=device) for name in ("fp32", "bf16")}
    taken = speed.timed({name: lambda x=x: x @ x for name, x in squares.items()}, 7, device, "matrix products")
    return ["fp32", "bf16"] if taken["bf16"].median < taken["fp32"].median else ["fp32"]


def model_csv_rows(result: dict, device: torch.device) -> list[dict[str, str]]:
    """The rows of a table of models as rows of bench.csv, each model's matrix products among them."""
    first, mode, rows = result["rows"][0], "compiled" if result["compiled"] else "eager", []
    for row in result["rows"]:
        row = row | {"dtype": result["dtype"], "shape": f"{result['batch']}x{row['size']}px"}
        parts = [row | {"what": f"{row['model']} {mode}"}]
        if row["gemm_ms"]:
            times = {"ms": row["gemm_ms"], "iqr_ms": row["gemm_iqr_ms"]}
            parts.append(row | times | {"what": f"{row['model']} matrix products"})
        rows += [op.csv_row(device, part, first["model"], first["ms"]) for part in parts]
    return rows


@command
@numerics()
def main() -> None:
    device = resolve_device("cuda" if torch.cuda.is_available() else "cpu")
    check_csv(HERE / "bench.csv", op.CSV)
    measured, rows = dtypes(device), []
    for dtype in measured:
        for shape, rounds in ROUNDS.items():
            new = op.measure(shape, DIM, dtype, device, op.PASSES, rounds)
            append_csv(HERE / "bench.csv", op.csv_rows(new, device))
            rows += new
    memory = caption({"memory_kept": memory_kept(device)})
    left_out = "" if "bf16" in measured else " Here bf16 is slower than fp32, and left out."
    text = [
        f"One ATConv layer (C = {DIM}) and its operator alone, as multiples of the layer's two linears; "
        f"{device_name(device)}; medians of {min(ROUNDS.values())} to {max(ROUNDS.values())} interleaved rounds"
        f"{memory}; `backward` is forward and backward.{left_out}\n",
        op.to_markdown(rows),
    ]
    for dtype in measured:
        setting = speed.Setting(1, MODEL_ROUNDS[dtype], dtype, device, True, ("forward",), speed.BASELINES, Sampling())
        result = setting.describe() | {"rows": speed.measure([MODEL], SIZE, setting)}
        append_csv(HERE / "bench.csv", model_csv_rows(result, device))
        text.append(speed.to_markdown(result))
    write_atomic(HERE / "bench.md", "\n".join(text))
    print("\n".join(text), end="")


if __name__ == "__main__":
    main()
