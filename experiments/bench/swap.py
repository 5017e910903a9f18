"""python -m experiments.bench.swap: time swapped layers against the attention (SDPA) that they take the place of.

Layers of the widths of published models, with random weights, at the tokens of an image or a video; before and after
take turns, and the median of rounds counts. The layer's whole work is timed: maps, norms, mixing. Beside them stands
how many times faster the whole model can become by arithmetic.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch

from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import device_name
from sit_atconv.commands.options import add_device_options, add_out
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.swap.checking import check_swap

KEYS = ("device", "dtype", "rows", "versions")  # of the JSON


@dataclass(frozen=True)
class Case:
    """A model of a class of diffusers, configured as published, on a grid of tokens. text: tokens beside them."""

    said: str
    model: str
    grid: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    text: int | None = None

    def made(self) -> torch.nn.Module:
        """The whole model, on the meta device."""
        with torch.device("meta"):
            return getattr(diffusers, self.model)(**self.config)


DIT_XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
WAN = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
SIDES = (16, 32, 64)
CASES = (
    *(Case("DiT-XL/2", "DiTTransformer2DModel", (side, side), DIT_XL | {"sample_size": 2 * side}) for side in SIDES),
    *(Case("Flux.1", "FluxTransformer2DModel", (side, side), {"guidance_embeds": True}, 512) for side in SIDES),
    Case("Flux.2", "Flux2Transformer2DModel", (64, 64), text=512),
    Case("Qwen-Image", "QwenImageTransformer2DModel", (64, 64), text=512),
    Case("Z-Image", "ZImageTransformer2DModel", (64, 64), text=512),
    Case("LTX-Video 2B", "LTXVideoTransformer3DModel", (16, 16, 24)),
    Case("Wan2.1 1.3B", "WanTransformer3DModel", (10, 15, 26), WAN),
    Case("Wan2.1 1.3B", "WanTransformer3DModel", (21, 30, 52), WAN),
)  # fmt: skip


def rows_of(case: Case, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row per kind of attention that is swapped: its figures, and those of the whole model."""
    check = check_swap(case.made(), case.grid, case.text, device, dtype)
    whole = {"model": case.said, "class": case.model, "batch": check.batch, "grid": case.grid, "text": case.text}
    whole |= {"share": check.share, "limit": check.limit}
    return [asdict(kind) | whole | {"layer": kind.name} for kind in check.kinds if kind.timing is not None]


def markdown(result: dict[str, Any]) -> str:
    head = ["model", "layer", "layers", "tokens", "attention (ms)", "swapped (ms)", "ratio"]
    head += ["GMACs of a layer", "N^2 of the model", "limit of the model"]
    rows = []
    for row in result["rows"]:
        time = row["timing"]
        figures = [f"{time['before']:,.1f}", f"{time['after']:,.1f}", f"{time['before'] / time['after']:.2f}x"]
        macs = f"{row['macs_before'] / 1e9:,.1f} -> {row['macs_after'] / 1e9:,.1f}"
        grid = f"{' x '.join(map(str, row['grid']))} = {torch.Size(row['grid']).numel():,}"
        whole = [f"{row['share']:.0%}", f"{row['limit']:.2f}x"]
        rows.append([row["model"], f"`{row['layer']}`", str(row["layers"]), grid, *figures, macs, *whole])
    texts = sorted({row["text"] for row in result["rows"] if row["text"]})
    told = (
        f"{result['device']}, {result['dtype']}; one image or video, DiT two; attention is SDPA; models of joint "
        f"attention have {' or '.join(map(str, texts))} tokens of text. Medians of rounds that take turns. N^2: of the "
        "model's multiply-accumulates, those between tokens and tokens. Limit: its multiply-accumulates before over "
        "after the swap of all these layers."
    )
    return f"{told}\n\n{markdown_table(head, rows, text=head[:2])}\n"


@command
@numerics()
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.swap", description=__doc__.partition(": ")[2])
    models = list(dict.fromkeys(case.said for case in CASES))
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="those to time (default: all)")
    add_device_options(parser, ("fp32", "bf16"))
    add_out(parser, "writes STEM.json and .md", default="runs/swap", metavar="STEM")
    args: argparse.Namespace = parser.parse_args(argv)
    device, dtype = resolve_device(args.device), dtype_of(args.dtype)
    files = Results(named(args.out, ".json", ".md"), args.force, *KEYS)
    rows = []
    for case in Progress([case for case in CASES if case.said in args.models], desc="models", unit="model"):
        rows += rows_of(case, device, dtype)
    result = {"device": device_name(device), "dtype": args.dtype, "rows": rows, "versions": library_versions()}
    files.write(result, markdown(result))
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
