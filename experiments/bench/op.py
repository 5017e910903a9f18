"""Time the ATConv layer and its operator against the layer's two linears: python -m experiments.bench.op."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch

from sampling.baselines import PaperForm
from sampling.options import DTYPES, add_device_options
from sampling.speed import assert_close
from sampling.timing import Timing, append_csv, commit, device_name, interleaved
from sit_atconv import ATConv
from sit_atconv.devices import resolve_device
from sit_atconv.errors import ArgumentParser, InputError, command
from sit_atconv.layers.attention import Attention
from sit_atconv.ops.atconv import dynamic_depthwise_conv

PASSES = ("forward", "backward")
SHAPES = ("4x16x16", "1x32x32", "1x64x64")
LINEARS = "two linears"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxHxW", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--dim", type=int, default=1152, help="channels, in heads of 72 for attention (default: 1152)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="backward: forward and backward")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each, in turn (default: 10)")
    parser.add_argument("--csv", type=Path, default=Path("runs/op.csv"), help="appended to (default: %(default)s)")
    add_device_options(parser)


def parse_shape(text: str) -> tuple[int, int, int]:
    """(batch, height, width) of "4x16x16". Raises InputError for anything else."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"--shapes {text}: give BATCHxHEIGHTxWIDTH, such as 4x16x16")
    batch, height, width = map(int, text.split("x"))
    return batch, height, width


def layers(dim: int, x: torch.Tensor, grid: tuple[int, int]) -> dict[str, tuple[Callable, torch.nn.Module]]:
    """Name -> (function of tokens, the module whose weights it uses); all but attention share the ATConv layer's."""
    torch.manual_seed(0)
    layer = ATConv(dim).to(x.device, x.dtype)
    attention = Attention(dim, max(1, dim // 72)).to(x.device, x.dtype)
    paper = PaperForm(layer)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, grid), fullgraph=True)
    return {
        LINEARS: (lambda x: layer.proj(layer.x_proj(x)), layer),
        "ATConv": (lambda x: layer(x, grid), layer),
        "ATConv compiled": (compiled, layer),
        "paper's form": (lambda x: paper(x, grid), layer),
        "attention": (attention, attention),
    }


def operators(v: torch.Tensor, grid: tuple[int, int]) -> dict[str, Callable]:
    """Name -> the operator alone as a function of (v, kernels)."""
    backends = ("native", "conv", "triton") if v.is_cuda else ("native", "conv")
    forms = {f"operator {name}": lambda v, k, name=name: dynamic_depthwise_conv(v, k, grid, name) for name in backends}
    return {
        **forms,
        "operator compiled": torch.compile(lambda v, k: dynamic_depthwise_conv(v, k, grid), fullgraph=True),
    }


def calls(step: str, upstream: torch.Tensor, forms: dict[str, tuple[Callable, list]]) -> dict[str, Callable]:
    """Each form (a function and its leaves) without arguments: forward, or forward and the gradients of its leaves."""

    def make(form: Callable, leaves: list[torch.Tensor]) -> Callable[[], object]:
        if step == "forward":
            return torch.no_grad()(form)
        return lambda: torch.autograd.grad(form(), leaves, upstream, allow_unused=True)

    return {name: make(form, leaves) for name, (form, leaves) in forms.items()}


def csv_row(
    device: torch.device, dtype: str, what: str, shape: str, step: str, timing: Timing, base: str, base_timing: Timing
) -> dict[str, str]:
    """A row of the CSV file; its ratio is the median over that of `base` in the same run."""
    return {
        "commit": commit(),
        "device": device_name(device),
        "dtype": dtype,
        "what": what,
        "shape": shape,
        "pass": step,
        "median_ms": f"{1e3 * timing.median:.3f}",
        "iqr_ms": f"{1e3 * timing.iqr:.3f}",
        "ratio": f"{timing.median / base_timing.median:.3f}",
        "ratio_to": base,
    }


def measure(shape: str, dim: int, dtype: str, device: torch.device, passes: list[str], rounds: int) -> list[dict]:
    """Rows for one shape and dtype, after checking every output against the layer on its oracle."""
    batch, height, width = parse_shape(shape)
    grid = (height, width)
    x = torch.randn(batch, height * width, dim, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype])
    x.requires_grad_()
    modules = layers(dim, x, grid)
    layer = modules[LINEARS][1]
    with torch.no_grad():
        v, kernels = layer.x_proj(x), layer.kernels(x, grid).contiguous()
        oracle = dynamic_depthwise_conv(v, kernels, grid, "reference")
        expected = {"operator": oracle, "ATConv": layer.proj(oracle), "paper's": layer.proj(oracle)}
    v.requires_grad_(), kernels.requires_grad_()
    forms = {name: (lambda f=f: f(x), [x, *module.parameters()]) for name, (f, module) in modules.items()}
    forms |= {name: (lambda f=f: f(v, kernels), [v, kernels]) for name, f in operators(v, grid).items()}
    for name, (form, _) in forms.items():
        if name.split()[0] in expected:
            assert_close(f"{name} at {shape}", form().detach(), expected[name.split()[0]], dtype)
    rows = []
    for step in passes:
        ready = calls(step, x.detach(), forms)
        timings = interleaved(list(ready.values()), rounds, device, f"{step} {shape} {dtype}")
        taken = dict(zip(ready, timings, strict=True))
        rows += [
            csv_row(device, dtype, name, f"{shape}x{dim}", step, timing, LINEARS, taken[LINEARS])
            for name, timing in taken.items()
        ]
    return rows


def to_markdown(rows: list[dict[str, str]]) -> str:
    """A table per dtype: the two linears in ms, everything else as a multiple of them."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        columns = list(dict.fromkeys((row["shape"], row["pass"]) for row in own))
        cells = {(row["what"], row["shape"], row["pass"]): row for row in own}
        lines += ["| " + " | ".join([dtype, *(f"{shape} {step}" for shape, step in columns)]) + " |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for what in dict.fromkeys(row["what"] for row in own):
            taken = [cells[what, *column] for column in columns]
            shown = [
                f"{float(r['median_ms']):.1f} ms" if what == LINEARS else f"{float(r['ratio']):.2f}" for r in taken
            ]
            lines.append("| " + " | ".join([what, *shown]) + " |")
        lines.append("")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.op", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    for option, value in (("--dim", args.dim), ("--rounds", args.rounds)):
        if value < 1:
            raise InputError(f"{option} {value}: must be at least 1")
    for shape in args.shapes:
        parse_shape(shape)
    rows = []
    for shape in args.shapes:
        new = measure(shape, args.dim, args.dtype, device, args.passes, args.rounds)
        append_csv(args.csv, new)
        rows += new
    print(to_markdown(rows), end="")


if __name__ == "__main__":
    main()
