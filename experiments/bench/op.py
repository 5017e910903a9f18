"""Time one ATConv layer and its operator against the layer's two linears, attention and the paper's form."""

import re
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.bench.forms import COMPILED, HEAD, LINEARS, PAPER, Form, best_attention, check, forms, make_call
from sit_atconv.bench.plots import plot_latency
from sit_atconv.bench.results import Results, append_csv, check_csv
from sit_atconv.bench.timing import commit, device_name, device_state, measured, peak_bytes
from sit_atconv.commands.options import add_device_options, add_number, add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import ArgumentParser, InputError, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.precision import dtype_of

PASSES = ("forward", "backward")
# On a GPU: 75 million values, of which no L2 cache holds many, and a small batch.
SHAPES = {
    "cpu": ("4x16x16", "1x32x32", "1x64x64"),
    "cuda": ("256x16x16", "64x32x32", "16x64x64", "2x64x64"),
}
CSV = ("commit", "device", "dtype", "what", "shape", "pass", "median_ms", "iqr_ms", "ratio", "ratio_to")


def parse_shape(text: str) -> tuple[int, int, int]:
    """(batch, height, width) of "4x16x16". Raises InputError for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"--shapes {text}: give BATCHxHEIGHTxWIDTH, such as 4x16x16")
    batch, height, width = map(int, text.split("x"))
    return batch, height, width


def cost(form: Form, call: Callable[[], object]) -> dict[str, float | None]:
    """Giga multiply-accumulates of a pass and its peak memory; None where compiled code hides them."""
    if form.name.endswith(COMPILED):
        return {"gmacs": None, "peak_mib": None}
    with FlopCounterMode(display=False) as counter:
        call()
    weights = torch.nn.ParameterList(form.leaves[1:])
    peak = peak_bytes(call, weights, form.leaves[0].detach())
    return {"gmacs": counter.get_total_flops() / 2e9, "peak_mib": peak / 2**20}


def measure(shape: str, dim: int, dtype: str, device: torch.device, passes: list[str], rounds: int) -> list[dict]:
    """Rows for one shape and dtype, after checking every form."""
    batch, height, width = parse_shape(shape)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, height, width, dim, generator=generator, device=device).to(dtype_of(dtype))
    torch.compiler.reset()
    candidates = forms(x)
    for form in candidates:
        if form.oracle:
            check(form, shape, x, dtype)
    rows = []
    for step in passes:
        calls = {form.name: make_call(form, step, x) for form in candidates}
        taken = measured(calls, rounds, device, f"{step} {shape} {dtype}")
        state, timings = device_state(device) or {}, {name: each.call for name, each in taken.items()}
        for name, timing in timings.items():
            attention = best_attention(name, timings)
            rows.append(
                {
                    "dtype": dtype,
                    "what": name,
                    "shape": f"{shape}x{dim}",
                    "pass": step,
                    **taken[name].facts(),
                    **state,
                    "over_linears": timing.median / timings[LINEARS].median,
                    "attention": attention,
                    "vs_attention": timings[attention].median / timing.median,
                    "vs_paper": timings[PAPER].median / timing.median,
                }
            )
    # After the clock: the memory tracker leaves hooks behind.
    costs = [cost(form, make_call(form, step, x)) for step in passes for form in candidates]
    return [row | paid for row, paid in zip(rows, costs, strict=True)]


def csv_row(device: torch.device, row: dict, base: str, base_ms: float) -> dict[str, str]:
    """A row of bench.csv; its ratio is to `base`, whose median is `base_ms`."""
    stated = (row[key] for key in ("dtype", "what", "shape", "pass"))
    figures = (f"{figure:.3f}" for figure in (row["ms"], row["iqr_ms"], row["ms"] / base_ms))
    return dict(zip(CSV, (commit(), device_name(device), *stated, *figures, base), strict=True))


def csv_rows(rows: list[dict], device: torch.device) -> list[dict[str, str]]:
    """Rows of bench.csv: the median, and its ratio to that of the two linears in the same run."""
    return [csv_row(device, row, LINEARS, row["ms"] / row["over_linears"]) for row in rows]


def to_markdown(rows: list[dict]) -> str:
    """A table per dtype: the two linears in ms, everything else as a multiple of them."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        columns = list(dict.fromkeys((row["shape"], row["pass"]) for row in own))
        cells = {(row["what"], row["shape"], row["pass"]): row for row in own}
        head, table = [dtype, *(f"{shape} {step}" for shape, step in columns)], []
        for what in dict.fromkeys(row["what"] for row in own):
            taken = [cells[what, *column] for column in columns]
            shown = (f"{row['ms']:.1f} ms" if what == LINEARS else f"{row['over_linears']:.3f}" for row in taken)
            table.append([what, *shown])
        lines += [markdown_table(head, table, text=(dtype,)), ""]
    return "\n".join(lines)


def plot(rows: list[dict], title: str) -> bytes:
    """A PNG: ms per image against tokens per image, a panel per pass."""
    points = []
    for row in rows:
        batch, height, width, _ = map(int, row["shape"].split("x"))
        points.append((row["pass"], row["what"], height * width, row["ms"] / batch))
    return plot_latency(points, title, "tokens per image", "ms per image")


@command
@numerics()
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.op", description=__doc__)
    default = "; ".join(f"{' '.join(shapes)} on {kind}" for kind, shapes in SHAPES.items())
    parser.add_argument("--shapes", nargs="+", metavar="BxHxW", help=f"default: {default}")
    add_number(parser, "--dim", limits.CHANNELS, 1152, f"channels, a multiple of {HEAD}")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="backward: forward and backward")
    add_number(parser, "--rounds", limits.ROUNDS, 10, "measurements of each, in turn")
    add_out(parser, "writes STEM.json, .md, .csv and .png", default="runs/op", metavar="STEM")
    add_device_options(parser)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    if args.dim < HEAD or args.dim % HEAD:
        raise InputError(f"--dim {args.dim}: give a multiple of {HEAD}, the channels of a head")
    shapes = args.shapes or SHAPES.get(device.type, SHAPES["cpu"])
    for shape in shapes:
        parse_shape(shape)
    *beside, table = named(args.out, ".json", ".md", ".png", ".csv")
    files = Results(beside, args.force, "device", "commit", "rounds", "rows")
    check_csv(table, CSV)
    result = {"device": device_name(device), "commit": commit(), "rounds": args.rounds, "versions": library_versions()}
    rows = []
    for shape in shapes:
        new = measure(shape, args.dim, args.dtype, device, args.passes, args.rounds)
        rows += new
        picture = plot(rows, f"{result['device']}; {args.dtype}, C = {args.dim}")
        files.write({**result, "rows": rows}, to_markdown(rows), picture)
        append_csv(table, csv_rows(new, device))
    print(to_markdown(rows), end="")


if __name__ == "__main__":
    main()
