"""Time models against attention, the paper's form of ATConv, and their own matrix products, interleaved."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from sit_atconv.bench.baselines import MatrixProducts, attention_twin, in_paper_form
from sit_atconv.bench.forms import TOLERANCE, assert_close, on_backend
from sit_atconv.bench.plots import LIMIT, plot_latency
from sit_atconv.bench.results import Results
from sit_atconv.bench.timing import caption, commit, device_name, device_state, measured, memory_kept, peak_bytes, timed
from sit_atconv.layers.attention import Attention
from sit_atconv.models.cost import count_macs, count_parameters, without_weights
from sit_atconv.models.sit import PRESETS, SiTTransformer2DModel, create_model
from sit_atconv.ops.atconv import BACKEND_VARIABLE
from sit_atconv.runtime.devices import import_compiler, numerics, resolve_device
from sit_atconv.runtime.errors import InputError, check_choice, option, said
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.precision import dtype_of
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling

Model = TypeVar("Model", bound=torch.nn.Module)

PIXELS_PER_LATENT = 8  # of the Stable-Diffusion autoencoders
SIZES = {"cpu": [256], "cuda": [256, 512, 1024]}  # image sizes in pixels, where none are given
# diffusers' names of torch's fused attention; which is the fastest depends on device, shape and pass.
FUSED_BACKENDS = ("_native_flash", "_native_cudnn", "_native_efficient")
KEYS = ("rounds", "compiled", "backend", "sampling", "rows")  # by which its JSON is known
PAPER = " (paper's form)"


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share."""

    batch: int
    rounds: int
    dtype: str
    device: torch.device
    compiled: bool
    passes: tuple[str, ...]
    baselines: tuple[str, ...]
    sampling: Sampling

    def describe(self) -> dict:
        """What a file of results says about how they came about."""
        return {
            "dtype": self.dtype,
            "batch": self.batch,
            "rounds": self.rounds,
            "memory_kept": memory_kept(self.device),
            "compiled": self.compiled,
            "backend": os.environ.get(BACKEND_VARIABLE, "auto"),
            "sampling": self.sampling.fitted().describe(),
            "device": device_name(self.device),
            "commit": commit(),
            "versions": library_versions(),
        }


@torch.no_grad()
def with_random_weights(model: Model, vectors: Callable[[str], tuple[float, float]]) -> Model:
    """The model, in eval mode, with weights drawn at random on its device; vectors: mean and deviation of a vector, by
    its name."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for key, parameter in model.named_parameters():
        mean, std = (0.0, parameter[0].numel() ** -0.5) if parameter.ndim > 1 else vectors(key)
        parameter.normal_(mean, std, generator=generator)
    return model.eval()


def random_model(name: str, sample_size: int, device: torch.device | str = "cpu", **options) -> SiTTransformer2DModel:
    """The preset, and options over it, made on the device, with every weight drawn at random: a new model's gates are
    zero, and zeros can be quicker."""
    with torch.device(device):
        model = create_model(name, sample_size, **options)
    return with_random_weights(model, lambda key: (0.0, 0.02))


def usual_batch(size: int, device: torch.device) -> int:
    """Images that fill a device: on CUDA 64 at 256 px, and as many tokens at other sizes; on a CPU one."""
    return max(1, 64 * 256**2 // size**2) if device.type == "cuda" else 1


def attend_by_the_fastest(model: SiTTransformer2DModel, call: Callable[[], object], device: torch.device) -> str | None:
    """Set a model with attention to the backend by which `call` is fastest, and return its name in diffusers.

    None for a model without attention. Raises RuntimeError where none of them runs.
    """
    if not any(isinstance(module, Attention) for module in model.modules()):
        return None
    taken, faults = {}, []
    for backend in FUSED_BACKENDS:
        try:
            model.set_attention_backend(backend)
            taken[backend] = timed({backend: call}, 3, device, backend)[backend].median
        except (RuntimeError, ValueError) as error:  # this device or build of torch lacks it
            faults.append(f"{backend}: {said(error)}")
    if not taken:
        raise RuntimeError(f"no backend of attention runs: {'; '.join(faults)}")
    fastest = min(taken, key=taken.get)
    model.set_attention_backend(fastest)
    return fastest


def contenders(names: list[str], latent: int, setting: Setting) -> dict[str, SiTTransformer2DModel]:
    """The models by name, each after its attention twin and before its paper's form where those are asked for."""
    models = {}
    for name in names:
        check_choice("model", name, PRESETS)
        both = [attention_twin(name), name] if "attention" in setting.baselines else [name]
        for wanted in both:
            if wanted not in models:
                # nn.Module's own `to`: diffusers warns about every cast, of models with nothing to keep in fp32 too.
                model = random_model(wanted, latent, setting.device)
                models[wanted] = torch.nn.Module.to(model, setting.device, dtype_of(setting.dtype))
        if "paper" in setting.baselines and attention_twin(name) != name:
            models[name + PAPER] = in_paper_form(models[name])
    return models


def results(model: SiTTransformer2DModel, inputs: tuple, passes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What the checks compare: the velocity, and for the pass "backward" the gradient of the latents through it."""
    x, *others = inputs
    if "backward" not in passes:
        with torch.no_grad():
            return {"velocity": model(x, *others).sample}
    leaf = x.clone().requires_grad_()
    velocity = model(leaf, *others).sample
    (gradient,) = torch.autograd.grad(velocity, leaf, x)
    with torch.no_grad():  # the graph that is compiled for inference is another one
        return {"velocity": model(x, *others).sample, "trained velocity": velocity.detach(), "gradient": gradient}


def check(what: str, actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: str) -> None:
    for key, tensor in actual.items():
        assert_close(f"{what}: the {key}", tensor, expected[key], TOLERANCE[dtype])


def evaluations(sampling: Sampling) -> int | None:
    """Network evaluations per image of a run with a fixed number of steps, counted on a model that predicts zero."""
    if sampling.sampler == "dopri5":
        return None
    model = create_model(None, 1, num_classes=1, patch_size=1, in_channels=1, hidden_size=4, depth=1, num_heads=1)
    return sample_latents(model, [0], torch.zeros(1, dtype=torch.long), sampling)[1]


def make_call(
    model: SiTTransformer2DModel, name: str, inputs: tuple, setting: Setting, graphs: Graphs | None = None
) -> Callable[[], object]:
    """The pass `name` of a model as a function without arguments. "sampling" returns the evaluations per image.

    graphs: with which "sampling" replays the network; the first calls record them.
    """
    x, _, labels = inputs

    @torch.no_grad()
    def forward():
        model(*inputs)

    def backward():
        model(*inputs).sample.backward(x)
        model.zero_grad(set_to_none=True)

    def sampling():
        return sample_latents(model, range(len(x)), labels, setting.sampling, graphs=graphs)[1]

    return {"forward": forward, "backward": backward, "sampling": sampling}[name]


def measure(names: list[str], size: int, setting: Setting) -> list[dict]:
    """Rows for one image size: a row per pass and model. Raises InputError for a size that the models do not take."""
    if size < PIXELS_PER_LATENT or size % PIXELS_PER_LATENT:
        raise InputError(f"{option('sizes', size)}: give multiples of {PIXELS_PER_LATENT} pixels")
    latent, batch, device = size // PIXELS_PER_LATENT, setting.batch, setting.device
    generator = torch.Generator(device).manual_seed(0)
    inputs = (
        torch.randn(batch, 4, latent, latent, generator=generator, device=device).to(dtype_of(setting.dtype)),
        torch.full((batch,), 0.5, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    models = contenders(names, latent, setting)
    few_steps = replace(setting, sampling=replace(setting.sampling, steps=setting.sampling.least_steps))
    facts, products = {}, {}

    def peaks(model: SiTTransformer2DModel) -> dict[str, float]:
        calls = {p: make_call(model, p, inputs, few_steps) for p in setting.passes}
        return {p: peak_bytes(call, model, *inputs) / 2**20 for p, call in calls.items()}

    # Every model compiles for its own shapes alone, however many there are.
    torch.compiler.reset()
    with torch.compiler.config.patch(automatic_dynamic_shapes=False, recompile_limit=256):
        for name, model in models.items():
            with on_backend("reference"):
                expected = results(models[name.removesuffix(PAPER)], inputs, setting.passes)
            check(f"{name} at {size} px", results(model, inputs, setting.passes), expected, setting.dtype)
            shapes = without_weights(model)
            facts[name] = {
                "params": count_parameters(model),
                "gmacs": count_macs(in_paper_form(shapes) if name.endswith(PAPER) else shapes) / 1e9,
                "attention": None,
            }
            if device.type == "cuda":
                call = make_call(model, setting.passes[0], inputs, few_steps)
                facts[name]["attention"] = attend_by_the_fastest(model, call, device)
            if "gemm" in setting.baselines and not name.endswith(PAPER):
                for p in set(setting.passes) - {"sampling"}:
                    products[name, p] = MatrixProducts(model, *inputs, backward=p == "backward")
            if device.type != "cuda":
                facts[name]["peak_mib"] = peaks(model)
            if setting.compiled:
                import_compiler()
                model.compile_repeated_blocks(fullgraph=True)
                check(f"{name} at {size} px, compiled", results(model, inputs, setting.passes), expected, setting.dtype)
            if device.type == "cuda":
                facts[name]["peak_mib"] = peaks(model)
        return [row for p in setting.passes for row in _rows(p, models, facts, products, inputs, size, setting)]


def _rows(p: str, models: dict, facts: dict, products: dict, inputs: tuple, size: int, setting: Setting) -> list[dict]:
    """Time one pass of every model, and its matrix products, in turn."""
    replayed = p == "sampling" and setting.device.type == "cuda"  # as the commands do; recorded before the clock
    calls = {
        name: make_call(model, p, inputs, setting, Graphs() if replayed else None) for name, model in models.items()
    }
    bounds = {name + LIMIT: product for (name, of), product in products.items() if of == p}
    graphs = () if p == "sampling" else None  # a run decides by its times what comes next
    found = measured(calls | bounds, setting.rounds, setting.device, f"{p} at {size} px", graphs)
    state, taken = device_state(setting.device) or {}, {name: each.call for name, each in found.items()}
    rows = []
    for name in calls:
        timing, limit = taken[name], taken.get(name + LIMIT)
        model = name.removesuffix(PAPER)
        twin, paper = taken.get(attention_twin(model)), taken.get(model + PAPER)
        nfe = evaluations(setting.sampling)
        if nfe is None and p == "sampling":
            nfe = calls[name]()
        per_evaluation = timing.median / (nfe if p == "sampling" else 1)
        images = setting.batch / (nfe * per_evaluation) if nfe and p != "backward" else None
        rows.append(
            {
                "model": name,
                "size": size,
                "batch": setting.batch,
                "pass": p,
                "attention": facts[name]["attention"],
                "params": facts[name]["params"],
                "gmacs": facts[name]["gmacs"],
                **found[name].facts(),
                "replayed": replayed,
                **state,
                "nfe": nfe,
                "ms_per_nfe": 1e3 * per_evaluation,
                "images_per_s": images,
                "peak_mib": facts[name]["peak_mib"][p],
                "vs_attention": twin.median / timing.median if twin else None,
                "vs_paper": paper.median / timing.median if paper else None,
                "gemm_ms": 1e3 * limit.median if limit else None,
                "gemm_iqr_ms": 1e3 * limit.iqr if limit else None,
                "of_gemm_limit": limit.median / timing.median if limit else None,
            }
        )
    return rows


def batch_text(result: dict) -> str:
    """What a caption says of the batch."""
    return "batch by size" if result["batch"] is None else f"batch {result['batch']}"


def to_markdown(result: dict) -> str:
    """The table, with the settings and the meaning of its columns as its caption."""

    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    s = result["sampling"]
    steps = f", {s['steps']} steps" if s["steps"] else ""
    lines = [
        f"{result['device']}; {result['dtype']}, {'compiled blocks' if result['compiled'] else 'eager'}, "
        f"{batch_text(result)}; medians of {result['rounds']} interleaved rounds{caption(result)}. ms/NFE: one network "
        "evaluation of the batch; in the pass `backward`, forward and backward together. images/s: of a run with "
        f"{s['sampler']}{steps}, guidance {s['guidance_scale']:g}; measured in the pass `sampling` (on CUDA with "
        "the network replayed as CUDA graphs), else from ms/NFE. "
        "Peak memory: weights, inputs and what is alive at once; on a CPU of the eager form, and without what an "
        "operator uses inside. GEMM limit: the time of the model's own matrix products alone, as a share of its time.",
        "",
    ]
    by_size = result["batch"] is None
    head = [
        "model", "px", *(["batch"] if by_size else []),
        "pass", "params (M)", "GMACs", "ms/NFE", "IQR", "images/s", "peak memory (MiB)",
        "attention / this", "paper's form / this", "of GEMM limit",
    ]  # fmt: skip
    rows = (
        [
            row["model"], str(row["size"]), *([str(row["batch"])] if by_size else []),
            row["pass"], f"{row['params'] / 1e6:.1f}", f"{row['gmacs']:.1f}",
            f"{row['ms_per_nfe']:.1f}", f"{row['iqr_ms'] * row['ms_per_nfe'] / row['ms']:.1f}",
            show(row["images_per_s"], ".3g"), f"{row['peak_mib']:.0f}", show(row["vs_attention"], ".2f"),
            show(row["vs_paper"], ".2f"), show(row["of_gemm_limit"], ".0%"),
        ]
        for row in result["rows"]
    )  # fmt: skip
    return "\n".join([*lines, markdown_table(head, rows, text=("model", "pass"))]) + "\n"


def plot(result: dict) -> bytes:
    """A PNG: ms/NFE against resolution, a panel per pass; dashed: the model's matrix products alone."""
    points = []
    for row in result["rows"]:
        points.append((row["pass"], row["model"], row["size"], row["ms_per_nfe"]))
        if row["gemm_ms"]:
            points.append((row["pass"], row["model"] + LIMIT, row["size"], row["gemm_ms"]))
    mode = "compiled" if result["compiled"] else "eager"
    title = f"{result['device']}; {result['dtype']}, {mode}, {batch_text(result)}"
    return plot_latency(points, title, "image size (px)", "ms per network evaluation")


@numerics()
def run(args: argparse.Namespace) -> None:
    """Measure size by size; after each, write the JSON, the table and the plot of what there is. Print the table."""
    device = resolve_device(args.device)
    sizes = args.sizes or SIZES.get(device.type, SIZES["cpu"])
    by_size = args.batch is None and device.type == "cuda"
    setting = Setting(
        args.batch or 1,
        args.rounds,
        args.dtype,
        device,
        args.compile,
        tuple(args.passes),
        tuple(args.baselines),
        args.sampling,
    )
    result = setting.describe() | ({"batch": None} if by_size else {}) | {"rows": []}
    files = Results(named(args.out, ".json", ".md", ".png"), args.force, *KEYS)
    for size in sizes:
        here = replace(setting, batch=usual_batch(size, device)) if by_size else setting
        result["rows"] += measure(args.models, size, here)
        files.write(result, to_markdown(result), plot(result))
    print(to_markdown(result), end="")
