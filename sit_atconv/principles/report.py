"""All measures of a target's layers, and the table of them."""

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from sit_atconv.layers.atconv import KernelGenerator
from sit_atconv.principles import measures
from sit_atconv.principles.layers import Seen, factors, find_layers, recording, unmeasured
from sit_atconv.principles.targets import Target
from sit_atconv.runtime.console import Progress
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.markdown import markdown_table

FIELD_SAMPLES = 8  # at most, that receptive fields are averaged over: each takes a backward pass per layer
MAP_SIDE = 56  # of a receptive field in a report; the radii are those of the whole one
SHARES = (0.5, 0.9)


def time_grid(number: int) -> list[float]:
    """The middles of as many equal parts of [0, 1]: a path may be singular at its ends."""
    return [(part + 0.5) / number for part in range(number)]


def measure(target: Target, times: int, batch: int, device: torch.device) -> dict:
    """The report of a target whose images are there: facts, and a dictionary for each layer that its passes reach.

    times: of a SiT's grid of t; another model has none. batch: samples at once.
    Raises InputError for a model with nothing to measure.
    """
    target.model.to(device).requires_grad_(False)
    names, passed_over = find_layers(target.model), unmeasured(target.model)
    if passed_over:
        some = ", ".join(passed_over[:3]) + (", ..." if len(passed_over) > 3 else "")
        warnings.warn(
            f"{target.name}: {len(passed_over)} layers mix positions and are of no kind measured here: {some}",
            stacklevel=2,
        )
    grid = time_grid(times) if target.has_times else [None]
    bar = Progress(total=len(grid) * 2, desc=target.name, unit="pass", delay=1)
    observed = _observe(target, names, grid, batch, device, bar)
    fields = _fields(target, names, grid, batch, device, bar)
    bar.close()
    layers = [
        {"name": name, "kind": names[name], **observed[name], "receptive_field": fields[name]}
        for name in names
        if name in observed
    ]
    return {
        "target": target.name, **target.facts, "input": list(target.images.shape[1:]), "num": len(target.images),
        "times": grid if target.has_times else None, "field_samples": min(FIELD_SAMPLES, len(target.images)),
        "layers": layers, "unmeasured": passed_over,
    }  # fmt: skip


def _parts(number: int, batch: int) -> Iterator[slice]:
    return (slice(first, min(first + batch, number)) for first in range(0, number, batch))


@torch.no_grad()
def _observe(
    target: Target, names: dict[str, str], grid: Sequence[float | None], batch: int, device: torch.device, bar: Progress
) -> dict[str, dict]:
    """Kernels and feature maps of every layer over all samples and times, measured."""
    kept: dict[str, list[list[Seen]]] = {}  # of a layer, by time and batch; what it mixed goes into its products
    products: dict[str, torch.Tensor] = {}
    places: dict[str, int] = {}
    for at, t in enumerate(grid):
        for part in _parts(len(target.images), batch):
            with recording(target.model, names, target.grid()) as seen:
                target.run(target.inputs(part, t, device), part, t)
            for name, each in seen.items():
                if not (each.kernels.isfinite().all() and each.mixed.isfinite().all()):
                    raise InputError(
                        f"{target.name}: what {name} gives is not finite, and nothing can be measured of it; check the "
                        "model's weights"
                    )
                flat = each.mixed.double().transpose(0, 1).flatten(1)
                products[name] = products.get(name, 0) + flat @ flat.T
                places[name] = places.get(name, 0) + flat.shape[1]
                kept.setdefault(name, [[] for _ in grid])[at].append(each.without_mixed())
        bar.update()
    result = {}
    for name, times in kept.items():
        layer, own = target.model.get_submodule(name), _joined(times, "kernels")
        varies = measures.routing(own)
        distinct = own if any(varies.values()) else own[:1, :1]
        attends = names[name] == "attention"
        varies["over_positions"] = measures.over_positions(own, _joined(times, "squares")) if attends else 0.0
        result[name] = {
            "kernel_taps": own.shape[2],
            "kernels": own.shape[3],
            "channels": len(products[name]),
            "routing": varies,
            "kernel_mean": measures.mean_share(own),
            "inhibition": _inhibition(layer, times),
            "kernel_redundancy": measures.kernel_redundancy(distinct),
            "channel_redundancy": measures.channel_redundancy(products[name].cpu(), places[name]),
            "within_window": measures.share_within(own, times[0][0].grid) if attends else None,
        }
    return result


def _joined(times: list[list[Seen]], key: str) -> torch.Tensor:
    """What layers did in the passes of each time: (S, T, ...)."""
    return torch.stack([torch.cat([getattr(each, key) for each in parts]) for parts in times], 1)


def _inhibition(layer: torch.nn.Module, times: list[list[Seen]]) -> dict | None:
    if not isinstance(layer, KernelGenerator):
        return None
    before = _joined(times, "before")
    return {"setting": layer.inhibition, **measures.inhibition(before, factors(layer, before.shape[3]))}


def _fields(
    target: Target, names: dict[str, str], grid: Sequence[float | None], batch: int, device: torch.device, bar: Progress
) -> dict[str, dict]:
    """The receptive field of every layer, from the model's input to it, a mean over samples and times."""
    number = min(FIELD_SAMPLES, len(target.images))
    fields: dict[str, list[torch.Tensor]] = {}
    for t in grid:
        for part in _parts(number, batch):
            inputs = target.inputs(part, t, device).requires_grad_()
            with torch.enable_grad(), recording(target.model, names, target.grid()) as seen:
                target.run(inputs, part, t)
            for name, each in seen.items():
                fields.setdefault(name, []).append(measures.receptive_field(each.mixed, inputs).cpu())
        bar.update()
    return {name: describe_field(measures.mean_field(torch.cat(each))) for name, each in fields.items()}


def describe_field(field: torch.Tensor) -> dict:
    """Radii of a receptive field (H, W) about its centroid, and the field, shrunk.

    radius_50 and radius_90 in pixels of the input; share_...: over half of the input's longer side. map: its sides at
    most MAP_SIDE, its sum 1.
    """
    size = tuple(field.shape)
    centre = measures.centroid(field)
    found = {f"radius_{share:.0%}"[:-1]: measures.radius(field, centre, share) for share in SHARES}
    half = max(size) / 2
    shares = {key.replace("radius", "share"): None if each is None else each / half for key, each in found.items()}
    shrunk = F.adaptive_avg_pool2d(field[None, None], [min(side, MAP_SIDE) for side in size])[0, 0]
    total = shrunk.sum().item()
    rounded = [[float(f"{value / total if total else 0:.4g}") for value in row] for row in shrunk.tolist()]
    return {**found, **shares, "centre": list(centre), "size": list(size), "map": rounded}


COLUMNS = (
    "#", "layer", "kind", "varies over samples", "over t", "over positions", "inhibition, mean ± std", "min to max",
    "kernel mean before", "after", "kernel cosine", "its rms", "kernel rank", "channel cosine", "its rms",
    "channel rank", "50 % within", "90 % within",
)  # fmt: skip


def table(report: dict) -> str:
    """Markdown: a row per layer of a report by `measure`."""
    rows = []
    for number, layer in enumerate(report["layers"], 1):
        inhibition, field = layer["inhibition"] or {}, layer["receptive_field"]
        kernels, channels = layer["kernel_redundancy"], layer["channel_redundancy"]
        share = inhibition.get("mean")
        rows.append([
            str(number), layer["name"], layer["kind"],
            *(_number(layer["routing"][f"over_{what}"]) for what in ("samples", "times", "positions")),
            "" if share is None else f"{share:.3f} ± {inhibition['std']:.3f}",
            "" if share is None else f"{inhibition['min']:.3f} to {inhibition['max']:.3f}",
            _number(inhibition.get("mean_before")), _number(inhibition.get("mean_after", layer["kernel_mean"])),
            _number(kernels["cosine"]), _number(kernels["cosine_rms"]),
            f"{kernels['rank']:.2f} of {kernels['rank_limit']}",
            _number(channels["cosine"]), _number(channels["cosine_rms"]),
            f"{channels['rank']:.1f} of {channels['rank_limit']}",
            _number(field["radius_50"], ".1f"), _number(field["radius_90"], ".1f"),
        ])  # fmt: skip
    return markdown_table([*COLUMNS], rows, text=COLUMNS[1:3])


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)
