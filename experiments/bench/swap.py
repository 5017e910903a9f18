"""python -m experiments.bench.swap: time swapped layers against the attention (SDPA) that they take the place of.

Layers of the shapes of DiT-XL/2 and of a Flux block, with random weights, at three token counts; before and after take
turns, and the median of rounds counts. The layer's whole work is timed: maps, norms, mixing.
"""

import argparse

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel

from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import device_name
from sit_atconv.commands.options import add_device_options, add_number, add_out
from sit_atconv.runtime import limits
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.swap import swap_attention

TEXT = 512  # tokens of Flux's text


def dit(side: int, batch: int) -> tuple[torch.nn.Module, dict]:
    """DiT-XL/2 of one layer and side x side tokens, and a call of it."""
    model = DiTTransformer2DModel(num_layers=1, num_attention_heads=16, attention_head_dim=72, sample_size=2 * side)
    call = {
        "hidden_states": torch.randn(batch, 4, 2 * side, 2 * side),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "class_labels": torch.zeros(batch, dtype=torch.long),
    }
    return model, call


def flux(side: int, batch: int) -> tuple[torch.nn.Module, dict]:
    """Flux of one double and one single block, side x side image tokens, and a call of it."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    call = {
        "hidden_states": torch.randn(batch, side * side, 64),
        "encoder_hidden_states": torch.randn(batch, TEXT, 4096),
        "pooled_projections": torch.randn(batch, 768),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, call


def rows_of(name: str, make, side: int, args: argparse.Namespace, device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    model, call = make(side, args.batch)
    dtype = dtype_of(args.dtype)
    torch.nn.Module.to(model, device, dtype).eval()  # diffusers' own warns, with nothing to keep in fp32 too
    call = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in call.items()}
    swap = swap_attention(model, "all", init="copy_vo", calib=[call], joint="split")
    return [
        {
            "model": name,
            "layer": row.name,
            "tokens": side * side,
            "attention_ms": row.ms_before,
            "atconv_ms": row.ms_after,
            "ratio": row.ms_before / row.ms_after,
            "attention_gmacs": row.macs_before / 1e9,
            "atconv_gmacs": row.macs_after / 1e9,
        }
        for row in swap.report().layers
    ]


def markdown(result: dict) -> str:
    lines = [
        f"{result['device']}, {result['dtype']}, batch {result['batch']}; attention is SDPA, "
        f" Flux has {TEXT} tokens of text. Medians of rounds that take turns.",
        "",
    ]
    head = ["model", "layer", "image tokens", "attention (ms)", "swapped (ms)", "ratio", "GMACs"]
    rows = []
    for row in result["rows"]:
        times = f"{row['attention_ms']:.1f}", f"{row['atconv_ms']:.1f}", f"{row['ratio']:.2f}x"
        macs = f"{row['attention_gmacs']:.2f} -> {row['atconv_gmacs']:.2f}"
        rows.append([row["model"], f"`{row['layer']}`", f"{row['tokens']:,}", *times, macs])
    return "\n".join([*lines, markdown_table(head, rows, text=head[:2])]) + "\n"


@command
@numerics()
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.swap", description=__doc__.partition(": ")[2])
    add_number(parser, "--batch", limits.BATCH, 1, "samples per call")
    add_device_options(parser, ("fp32", "bf16"))
    add_out(parser, "writes STEM.json and .md", default="runs/swap", metavar="STEM")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    files = Results(named(args.out, ".json", ".md"), args.force, "device", "dtype", "rows", "versions")
    rows = []
    for name, make, sides in (("DiT-XL/2", dit, (16, 32, 64)), ("Flux", flux, (16, 32, 64))):
        for side in sides:
            for row in rows_of(name, make, side, args, device):
                print(f"{row['model']} {row['layer']} {row['tokens']}: {row['ratio']:.2f}x", flush=True)
                rows.append(row)
    result = {
        "device": device_name(device), "dtype": args.dtype, "batch": args.batch, "rows": rows,
        "versions": library_versions(),
    }  # fmt: skip
    files.write(result, markdown(result))
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
