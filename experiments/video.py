"""python -m experiments.video: a video model whose attention is swapped, beside the same model with its attention kept.

A small Wan learns the flow of clips in which a digit moves and bounces. Then half of its attentions, or all, are
swapped, by kernels over the volume or factored into space and time: fitted (calibration on real inputs), regressed
blockwise, then the whole model is tuned on the flow; the kept model is tuned as long. Writes to OUT a table, raw JSON
and sampled clips. Runs are kept in RUNS with their result.json; one that is there is not made again.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save
from torch import nn

from experiments.ablation import spread
from experiments.runs import parsed, parser_of, side_by_side
from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_number
from sit_atconv.data.digits import Digits
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import LinearPath
from sit_atconv.flow.samplers import TABLEAUX, runge_kutta
from sit_atconv.layers.atconv import VOLUMES
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError, command
from sit_atconv.runtime.files import figure_png, library_versions, made_here, named, write_atomic, write_out
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.runtime.reading import COUNT, as_stored, read_json, read_tensors
from sit_atconv.swap import regress, swap_attention

KEYS = ("system", "seeds", "settings", "versions", "results")  # of the JSON
FRAMES, SIDE, DIGIT = 8, 16, 8  # of a clip, of a frame and of a digit in pixels
MODEL = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "out_channels": 1,
    "text_dim": 10, "freq_dim": 64, "ffn_dim": 192, "num_layers": 4, "rope_max_seq_len": 32,
}  # fmt: skip
BATCH, RATE, TUNING_RATE, REGRESSION_RATE = 8, 2e-3, 5e-4, 1e-2
HELD_OUT_BATCH = 60  # clips, whose times lie in as many equal parts of [0, 1]
CALIBRATIONS, COMPARED = 8, 2  # batches of a fit, and held-out ones on which layers are compared
HELD_OUT = -1  # the seed of what no run is trained on
SAMPLING_STEPS, SHOWN = 20, 4  # of Heun's method; clips in the picture
STARTS = {  # what a swap starts from: options of swap_attention, less the calibration
    "random": "random", "box": "copy_vo", "closed form, random inputs": "closed_form", "closed form": "closed_form",
}  # fmt: skip
STAGES = ("start", "regressed", "tuned")
STORED, RESULT, CLIPS = "run.json", "result.json", "clips.safetensors"  # in the folders of runs


@dataclass(frozen=True)
class Settings:
    """How long each stage is trained, in steps of BATCH clips."""

    steps: int
    regression: int
    tuning: int


@dataclass(frozen=True)
class Arm:
    """Which share of the attentions is swapped, none where it is 0, and the kernels in their place."""

    share: float
    volume: str | None

    @property
    def name(self) -> str:
        return "kept" if not self.share else f"{'all' if self.share == 1 else 'half'}-{self.volume}"


KEPT = Arm(0.0, None)
ARMS = (KEPT, *(Arm(share, volume) for share in (0.5, 1.0) for volume in VOLUMES))


def clips(digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Clips (B, 1, FRAMES, SIDE, SIDE) in [-1, 1] of digits (B, 1, DIGIT, DIGIT): each starts anywhere, moves by up to
    two pixels a frame along each side, and comes back from the walls."""
    room = SIDE - DIGIT
    start = torch.randint(room + 1, (len(digits), 1, 2), generator=generator)
    speed = torch.randint(-2, 3, (len(digits), 1, 2), generator=generator)
    path = (start + speed * torch.arange(FRAMES)[:, None]) % (2 * room)
    places = torch.where(path > room, 2 * room - path, path)  # (B, FRAMES, 2)
    inside = torch.arange(SIDE) - places[..., None]  # (B, FRAMES, 2, SIDE): the row or column of the digit there
    seen = (inside >= 0) & (inside < DIGIT)
    rows, columns = inside.clamp(0, DIGIT - 1).unbind(2)
    which = torch.arange(len(digits))[:, None, None, None]
    found = digits[which, 0, rows[..., None], columns[..., None, :]]
    both = seen[:, :, 0, :, None] & seen[:, :, 1, None, :]
    return found.where(both, torch.tensor(-1.0))[:, None]


def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches without end: data and noise (B, 1, FRAMES, SIDE, SIDE), times t (B,), classes (B, 1, 10)."""
    digits, generator = Digits("train"), torch.Generator().manual_seed(seed)
    labels = torch.tensor(digits.labels)
    while True:
        some = torch.randint(len(digits), (BATCH,), generator=generator)
        yield batch(digits.images[some], labels[some], torch.rand(BATCH, generator=generator), generator)


def batch(images, labels, t: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    data = clips(images, generator)
    return {
        "data": data, "noise": torch.randn(data.shape, generator=generator), "t": t, "classes": one_hot(labels),
    }  # fmt: skip


def held_out() -> list[dict[str, torch.Tensor]]:
    """Batches of a clip of each held-out digit, at times that are spread evenly, the same for every run."""
    digits, generator, found = Digits("test"), torch.Generator().manual_seed(HELD_OUT), []
    labels = torch.tensor(digits.labels)
    for some in torch.arange(len(digits)).split(HELD_OUT_BATCH):
        t = (torch.arange(len(some)) + torch.rand(len(some), generator=generator)) / len(some)
        found.append(batch(digits.images[some], labels[some], t, generator))
    return found


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    """(B, 1, 10): the class, as the one token of a text."""
    return nn.functional.one_hot(labels, 10)[:, None].float()


def call(x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A call of the model. x (B, 1, FRAMES, SIDE, SIDE) at times t (B,) in [0, 1], 0 for noise."""
    return {"hidden_states": x, "timestep": 1000 * t, "encoder_hidden_states": classes}


def input_of(each: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The call of the model in training on a batch."""
    return call(LinearPath().interpolate(each["data"], each["noise"], each["t"]), each["t"], each["classes"])


def train(model: nn.Module, steps: int, rate: float, seed: int) -> None:
    """The flow's loss, by AdamW at a rate that rises for a twentieth of the steps and falls to 0 by a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    model.train()
    for _, each in zip(range(steps), batches(seed)):  # noqa: B905  (batches have no end)
        losses = flow_loss(network(model, each["classes"]), LinearPath(), each["data"], each["noise"], each["t"])
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def network(model: nn.Module, classes: torch.Tensor):
    return lambda x, t: model(**call(x, t.expand(len(x)), classes), return_dict=False)[0]


@torch.no_grad()
def figures(model: nn.Module, kept: list[torch.Tensor], some: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """On held-out batches: the flow's loss, and the distance of the velocities from those of the model before the swap,
    `kept`, relative to these in norm."""
    loss, count, gap, whole = 0.0, 0, 0.0, 0.0
    for each, theirs in zip(some, kept, strict=True):
        velocity = network(model, each["classes"])(input_of(each)["hidden_states"], each["t"])
        target = LinearPath().velocity(each["data"], each["noise"], each["t"])
        loss += (velocity - target).square().flatten(1).mean(1).sum().item()
        gap += (velocity - theirs).double().square().sum().item()
        whole += theirs.double().square().sum().item()
        count += len(velocity)
    return {"loss": loss / count, "distance": (gap / whole) ** 0.5}


@torch.no_grad()
def sampled(model: nn.Module) -> torch.Tensor:
    """Clips of the first SHOWN classes, of the same noise for every model."""
    classes = one_hot(torch.arange(SHOWN))
    x = torch.randn(SHOWN, 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(HELD_OUT))
    return runge_kutta(TABLEAUX["heun"], network(model, classes), x, torch.linspace(0, 1, SAMPLING_STEPS + 1))


@torch.no_grad()
def velocities(model: nn.Module, some: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [network(model, each["classes"])(input_of(each)["hidden_states"], each["t"]) for each in some]


def folder_of(runs: Path, seed: int) -> Path:
    return runs / f"seed{seed}"


def teach(runs: Path, seed: int, settings: Settings) -> None:
    """Train the model of a seed with its attention, or find it."""
    out = folder_of(runs, seed) / "model"
    wanted = {"steps": settings.steps, "seed": seed, "model": as_stored(MODEL)}
    if (out / STORED).exists():
        there = read_json(out / STORED, {"steps": COUNT, "seed": COUNT, "model": dict})
        if there != wanted:
            raise InputError(f"{str(out)!r} is of other settings ({there}); name another folder, or remove it")
        return
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**MODEL)
    train(model, settings.steps, RATE, seed)
    model.save_pretrained(out)
    write_atomic(out / STORED, json.dumps(wanted))


def swapped(model: nn.Module, arm: Arm, start: str, seed: int):
    """The swap of a model by one of STARTS. Calibration is on training clips, or on the random inputs of the class."""
    torch.manual_seed(seed)
    inputs = [input_of(each) for _, each in zip(range(CALIBRATIONS), batches(1000 + seed))]  # noqa: B905
    calib = random_inputs(inputs) if start.endswith("random inputs") else inputs
    return swap_attention(model, arm.share, init=STARTS[start], volume=arm.volume, calib=calib)


def random_inputs(inputs: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Noise in the place of clips and texts, as a swap without calibration inputs takes it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for each in inputs:
        random = {name: torch.randn(value.shape, generator=generator) for name, value in each.items()}
        found.append(random | {"timestep": torch.randint(1000, each["timestep"].shape, generator=generator)})
    return found


def follow(runs: Path, arm: Arm, seed: int, settings: Settings) -> dict[str, Any]:
    """The result of an arm of a seed, whose model is trained: made, or found."""
    folder = folder_of(runs, seed) / arm.name
    file, wanted = folder / RESULT, {"arm": arm.name, "seed": seed, **asdict(settings)}
    if file.exists():
        there = read_json(file)
        if {name: there.get(name) for name in wanted} != wanted:
            raise InputError(f"{str(file)!r} is of other settings; name another folder, or remove it")
        return there
    some = held_out()
    model = WanTransformer3DModel.from_pretrained(folder_of(runs, seed) / "model", use_safetensors=True).eval()
    kept = velocities(model, some)
    inputs, result = [input_of(each) for each in some[:COMPARED]], dict(wanted)
    if arm.share:
        result["errors"] = {}
        for start in STARTS:
            swap = swapped(model, arm, start, seed)
            result["errors"][start] = swap.errors(inputs)
            if start != list(STARTS)[-1]:
                swap.revert()
        result["start"] = figures(model, kept, some)
        regress(swap, (input_of(each) for each in batches(2000 + seed)), settings.regression, REGRESSION_RATE)
        result["errors"]["regressed"] = swap.errors(inputs)
        result["regressed"] = figures(model, kept, some)
    else:
        result["start"] = figures(model, kept, some)
    train(model, settings.tuning, TUNING_RATE, 3000 + seed)
    result["tuned"] = figures(model, kept, some)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CLIPS, save({"clips": sampled(model)}))
    ours = made_here("arm", "seed", "tuned")
    write_out(file, json.dumps(result, indent=1, allow_nan=False), "result", ours=ours)
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, mean ± standard deviation over seeds: loss and distance of every arm at every stage, and the errors of
    the layers."""
    by_arm = {arm: [each for each in results if each["arm"] == arm.name] for arm in ARMS}
    parts = []
    for figure, said in (
        ("loss", "Held-out loss of the flow (mean squared error of the velocity)"),
        ("distance", "Distance of the velocity from that of the model before the swap, relative to it"),
    ):
        rows = []
        for arm, own in by_arm.items():
            cells = [spread([each[stage][figure] for each in own]) if stage in own[0] else "" for stage in STAGES]
            rows.append([arm.name.replace("-", ", "), *cells])
        parts.append(f"{said}:\n\n{markdown_table(['attentions swapped', *STAGES], rows, text=['attentions swapped'])}")
    rows = []
    for arm, own in by_arm.items():
        if arm.share:
            cells = [spread([mean(each["errors"][start].values()) for each in own]) for start in (*STARTS, "regressed")]
            rows.append([arm.name.replace("-", ", "), *cells])
    head = ["attentions swapped", *STARTS, "regressed"]
    said = "Relative error of a layer's output on held-out clips, mean over the layers:"
    return "\n\n".join([*parts, f"{said}\n\n{markdown_table(head, rows, text=head[:1])}"]) + "\n"


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def draw(runs: Path, seed: int) -> bytes:
    """A PNG: frames of sampled clips in a row, the arms one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + SHOWN * 2.4, 0.45 + 0.36 * len(ARMS)), layout="constrained")
    axes = figure.subplots(len(ARMS), SHOWN, squeeze=False)
    for row, arm in zip(axes, ARMS, strict=True):
        found = read_tensors(folder_of(runs, seed) / arm.name / CLIPS, "sampled clips")[0]["clips"]
        for place, clip in zip(row, found, strict=True):
            place.imshow(torch.cat(list(clip[0]), 1), cmap="gray", vmin=-1, vmax=1)
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(arm.name.replace("-", ", "), rotation=0, ha="right", va="center")
    return figure_png(figure)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("video", __doc__)
    add_number(parser, "--steps", limits.STEPS, 1500, "steps of training with attention")
    add_number(parser, "--regression", limits.STEPS, 150, "steps of blockwise regression")
    add_number(parser, "--tuning", limits.STEPS, 150, "steps of the whole model, swapped or not")
    args = parsed(parser, argv)
    written = Results(named(args.out / "video", ".md", ".json", ".png"), args.force, *KEYS)
    settings = Settings(args.steps, args.regression, args.tuning)
    if args.dry_run:
        files = [folder_of(args.runs, seed) / arm.name / RESULT for seed in args.seeds for arm in ARMS]
        print("\n".join(f"{str(file.parent)!r} is left" for file in files if not file.exists()))
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, torch.set_num_threads, (1,)) as pool:

        def of(work, *given):
            return partial(lambda: pool.submit(work, args.runs, *given, settings).result())

        side_by_side([of(teach, seed) for seed in args.seeds], "training", args)
        results = side_by_side([of(follow, arm, seed) for seed in args.seeds for arm in ARMS], "swapping", args)
    facts = {
        "system": "video", "seeds": args.seeds, "settings": asdict(settings), "model": MODEL,
        "versions": library_versions(), "results": results,
    }  # fmt: skip
    report = table(results)
    written.write(report, facts, draw(args.runs, args.seeds[0]))
    print(report, end="")


if __name__ == "__main__":
    main()
