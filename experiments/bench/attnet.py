"""python -m experiments.bench.attnet: time AttNet against its published form, ConvNeXt and ViT on the same images.

Inference with random weights, all in turn; the published form is the same function of the same weights, and is compared
with ours before the clock. Then the multiply-accumulates of the whole family, counted without weights.
"""

import copy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from sit_atconv.bench import baselines
from sit_atconv.bench.results import Results
from sit_atconv.bench.speed import TOLERANCE, assert_close, with_random_weights
from sit_atconv.bench.timing import caption, commit, device_name, interleaved, memory_kept
from sit_atconv.commands.options import add_device_options, add_number, add_out
from sit_atconv.models.attnet import ATConv2d, AttNet, GatedMLP
from sit_atconv.models.cost import count_forward_macs
from sit_atconv.ops.atconv.grouped import grouped_convolution
from sit_atconv.runtime import limits
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import ArgumentParser, InputError, check_choice, command
from sit_atconv.runtime.files import library_versions
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.precision import dtype_of

FAMILY = [f"attnet_{size}" for size in ("xxs", "xs", "s", "t1", "t2", "t3", "t4")]
BASELINES = ("convnext_tiny", "vit_small_patch16_224")
PAPER, PAPER_NCHW = " (paper's form)", " (paper's form, NCHW)"
STRIDE = 32  # of the last maps of AttNet and ConvNeXt, and a multiple of ViT's patch
COST_SIZE = 224
TOP1 = {"attnet_t2": 84.4, "convnext_tiny": 82.1, "vit_small_patch16_224": 79.8}
TOP1_SOURCES = (
    "ImageNet-1k top-1 at 224 px, from the literature, none of it measured here: AttNet-T2 as its authors publish it; "
    "ConvNeXt-T from the ConvNeXt paper; ViT-S/16 as DeiT-S (300 epochs, no distillation)."
)


class PaperATConv2d(baselines.PaperForm):
    """The paper's form of an ATConv2d, on maps: 1x1 convolutions, x (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        kernels = self.kernels(pointwise(layer.kernel_proj, x).flatten(2))
        return pointwise(layer.proj, grouped_convolution(pointwise(layer.x_proj, x), kernels))


def pointwise(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolution with the weights of `linear`."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One linear with the outputs of both."""
    linear = nn.utils.skip_init(nn.Linear, first.in_features, first.out_features + second.out_features)
    linear.weight = nn.Parameter(torch.cat([first.weight, second.weight]).detach())
    linear.bias = nn.Parameter(torch.cat([first.bias, second.bias]).detach())
    return linear


class PaperMLP(nn.Module):
    """A GatedMLP on maps (B, C, H, W), with 1x1 convolutions and one fc1; nchw: its norm returns NCHW."""

    def __init__(self, mlp: GatedMLP, nchw: bool):
        super().__init__()
        self.fc1, self.nchw = joined(mlp.fc1_g, mlp.fc1_x), nchw
        self.dwconv, self.norm_layer, self.fc2 = mlp.dwconv, mlp.norm_layer, mlp.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = pointwise(self.fc1, x).chunk(2, 1)
        mixed = F.gelu(self.dwconv(gate)) * value
        if not isinstance(self.norm_layer, nn.Identity):
            mixed = self.norm_layer(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            mixed = mixed.contiguous() if self.nchw else mixed
        return pointwise(self.fc2, mixed)


class PaperForm(nn.Module):
    """An AttNet of the same weights with ATConv and MLP in the paper's form, and no memory format asked for.

    nchw: the norms give their output back in NCHW; else later layers run in the format that the norm left.
    """

    def __init__(self, model: AttNet, nchw: bool):
        super().__init__()
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, ATConv2d):
                    setattr(module, name, PaperATConv2d(child))
                elif isinstance(child, GatedMLP):
                    setattr(module, name, PaperMLP(child, nchw))
                elif nchw and isinstance(child, LayerNorm2d):  # which hands on the channels-last view that it works on
                    child.register_forward_hook(lambda norm, args, y: y.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model.pos_embed(self.model.stem(x))
        for stage in self.model.stages:
            x = stage.blocks(stage.downsample(x))
        return self.model.forward_head(x)


def random_attnet(name: str) -> AttNet:
    """The model with weights drawn so that every branch counts: a new one's layer scales hide what a block does."""
    return with_random_weights(timm.create_model(name), lambda key: (float(key.endswith(("weight", "gamma"))), 0.1))


def baseline(name: str, size: int) -> nn.Module:
    """One of BASELINES for images of `size` px."""
    sized = {"img_size": size} if name.startswith("vit") else {}
    return timm.create_model(name, **sized).eval()


def contenders(names: list[str], images: torch.Tensor, dtype: str, device: torch.device) -> dict[str, nn.Module]:
    """What is timed, by name: each model before its two published forms, then the baselines. Raises RuntimeError where
    a form and its model differ, in fp32 or in `dtype`."""
    models = {}
    for name in names:
        model = random_attnet(name).to(device)
        forms = {name: model, name + PAPER: PaperForm(model, False), name + PAPER_NCHW: PaperForm(model, True)}
        with torch.inference_mode():
            expected = forms[name + PAPER](images)
            for what, form in forms.items():
                assert_close(f"{what} at {images.shape[-1]} px in fp32", form(images), expected, TOLERANCE["fp32"])
            model.to(dtype_of(dtype))  # the forms share its weights
            for what, form in forms.items():
                form.to(dtype_of(dtype))
                actual = form(images.to(dtype_of(dtype))).float()
                assert_close(f"{what} at {images.shape[-1]} px in {dtype}", actual, expected, TOLERANCE[dtype])
        models |= forms
    return models | {name: baseline(name, images.shape[-1]).to(device, dtype_of(dtype)) for name in BASELINES}


def cost(model: nn.Module, size: int) -> dict[str, float]:
    """Parameters of a model on the meta device and its giga multiply-accumulates for one image."""
    macs = count_forward_macs(model, torch.zeros(1, 3, size, size, device="meta"))
    return {"params": sum(parameter.numel() for parameter in model.parameters()), "gmacs": macs / 1e9}


def costs(name: str, size: int) -> dict[str, float]:
    """The `cost` of a model of the family, and its multiply-accumulates in the paper's form."""
    model = timm.create_model(name, device="meta").eval()
    return {**cost(model, size), "paper_gmacs": cost(PaperForm(model, False), size)["gmacs"]}


def measure(names: list[str], size: int, batch: int, dtype: str, device: torch.device, rounds: int) -> list[dict]:
    """A row per contender, each against the published form of its own model and against the first model."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    models = contenders(names, images, dtype, device)
    inputs = images.to(dtype_of(dtype))
    calls = [torch.inference_mode()(lambda model=model: model(inputs)) for model in models.values()]
    timings = dict(zip(models, interleaved(calls, rounds, device, f"{size} px"), strict=True))
    rows = []
    for what, timing in timings.items():
        papers = [timings[what + form].median for form in (PAPER, PAPER_NCHW) if what + form in timings]
        rows.append(
            {
                "model": what,
                **cost(models[what].to("meta", torch.float32), size),
                "ms_per_image": 1e3 * timing.median / batch,
                "iqr_ms": 1e3 * timing.iqr / batch,
                "over_first": timing.median / timings[names[0]].median,
                "vs_paper": min(papers) / timing.median if papers else None,
                "top1": TOP1.get(what),
            }
        )
    return rows


def latency_markdown(result: dict) -> str:
    first = result["rows"][0]["model"]
    lines = [
        f"{result['device']}, {result['dtype']}, {result['size']} px, batch {result['batch']}, eager inference with "
        f"random weights; medians of {result['rounds']} interleaved rounds{caption(result)}. The paper's form runs "
        "`kernel_proj` on every position and pools after, with one grouped convolution for the batch; its memory "
        "format is what timm's norms leave behind, or NCHW throughout. The ratio to it is to the faster of the two. "
        + TOP1_SOURCES,
        "",
    ]
    head = [
        "model", "params (M)", "GMACs", "ms/image", "IQR", f"this / {first}", "paper's form / this", "top-1 (%)",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        ratio = "" if row["vs_paper"] is None else f"{row['vs_paper']:.2f}x"
        top1 = "" if row["top1"] is None else f"{row['top1']:.1f}"
        figures = row["params"] / 1e6, row["gmacs"], row["ms_per_image"], row["iqr_ms"], row["over_first"]
        rows.append([row["model"], *(f"{figure:.2f}" for figure in figures), ratio, top1])
    return "\n".join([*lines, markdown_table(head, rows, text=("model",))]) + "\n"


def cost_markdown(result: dict) -> str:
    lines = [
        f"Multiply-accumulates of one image of {result['size']} px, as torch's FlopCounterMode counts them: matrix "
        "products and convolutions.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        figures = row["params"] / 1e6, row["paper_gmacs"], row["gmacs"]
        saved = f"{1 - row['gmacs'] / row['paper_gmacs']:.1%}"
        rows.append([row["model"], *(f"{figure:.2f}" for figure in figures), saved])
    head = ["model", "params (M)", "GMACs, paper's form", "GMACs, pool first", "saved"]
    return "\n".join([*lines, markdown_table(head, rows, text=("model",))]) + "\n"


@command
@numerics()
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.bench.attnet", description=__doc__.partition(": ")[2])
    parser.add_argument("--models", nargs="+", default=["attnet_t2"], metavar="NAME", help="default: attnet_t2")
    add_number(parser, "--size", limits.PIXELS, 224, f"a multiple of {STRIDE}", metavar="PX")
    add_number(parser, "--batch", limits.BATCH, 8, "images per call")
    add_number(parser, "--rounds", limits.ROUNDS, 15, "measurements of each, in turn")
    add_out(parser, "for latency.* and cost.*, .json and .md", default="runs/attnet", metavar="FOLDER")
    add_device_options(parser, ("fp32", "bf16"))
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    for name in args.models:
        check_choice("--models", name, FAMILY)
    if args.size < STRIDE or args.size % STRIDE:
        raise InputError(f"--size {args.size}: give a multiple of {STRIDE} pixels")
    names = ("latency.json", "latency.md", "cost.json", "cost.md")
    files = Results([Path(args.out) / name for name in names], args.force, "size", "commit", "rows")
    made = {"commit": commit(), "versions": library_versions()}
    latency = {
        "device": device_name(device), "dtype": args.dtype, "size": args.size, "batch": args.batch,
        "rounds": args.rounds, "memory_kept": memory_kept(device), "top1": TOP1_SOURCES, **made,
        "rows": measure(args.models, args.size, args.batch, args.dtype, device, args.rounds),
    }  # fmt: skip
    cost = {"size": COST_SIZE, **made, "rows": [{"model": name, **costs(name, COST_SIZE)} for name in FAMILY]}
    tables = latency_markdown(latency), cost_markdown(cost)
    files.write(latency, tables[0], cost, tables[1])
    for table in tables:
        print(table)


if __name__ == "__main__":
    main()
