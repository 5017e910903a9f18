"""python -m experiments.swappable: every class that a swap might be asked for, and what comes of it.

Of diffusers' transformers and U-Nets, timm's models with attention, and transformers' models of images. A class that is
taken is swapped here, as a tiny model of random weights. Writes results/swappable/swappable.json and swappable.md.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sit_atconv.bench.results import Results
from sit_atconv.commands.options import add_out
from sit_atconv.runtime.errors import ArgumentParser, command
from sit_atconv.runtime.files import library_versions, named
from sit_atconv.runtime.markdown import markdown_table
from sit_atconv.swap import swap_attention
from sit_atconv.swap.adapters import SwapAdapter, known_adapters
from sit_atconv.swap.marking import THIN
from sit_atconv.swap.refused import candidates, refusal_of

KEYS = ("rows", "versions")
CALIBRATIONS = 4  # inputs of a fit


def adapters() -> dict[type[nn.Module], SwapAdapter]:
    """The adapter of each class that has one; where a class has several, the one that is used."""
    return {adapter.model: adapter for adapter in reversed(known_adapters())}


def rows() -> list[dict[str, Any]]:
    """A row per class: `library` and `class`, and either `refused`, or what `taken` says of its adapter."""
    known, found = adapters(), []
    of_others = {library: set(classes.values()) for library, classes in candidates().items()}
    for library, classes in of_others.items():
        ours = {cls for cls in known if cls.__module__.split(".")[0] == library}
        for cls in sorted(classes | ours, key=lambda cls: cls.__name__):
            row = {"library": library, "class": cls.__name__}
            base = next((each for each in cls.__mro__ if each in known), None)
            if (reason := refusal_of(cls)) is not None or base is None:
                found.append(row | {"refused": reason or "is not known"})
            elif base is cls and known[cls].tiny is not None:
                found.append(row | taken(known[cls]))
            else:
                found.append(row | {"as": shown_by(known, base).__name__})
    return found


def shown_by(known: dict[type[nn.Module], SwapAdapter], cls: type[nn.Module]) -> type[nn.Module]:
    """The class with a row of its own that has the same attentions as one with an adapter, or that one itself."""
    sites = known[cls].sites
    return next(each for each, adapter in known.items() if adapter.tiny is not None and adapter.sites == sites)


def taken(adapter: SwapAdapter) -> dict[str, Any]:
    """What is swapped in a tiny model of the class, and how near its layers start to their attentions.

    swapped, also: names of attentions, a star for a number, by default and with joint="split" too. grid: what their
    tokens fill. stored: a folder (save_pretrained), or a delta beside the model. error: the median over the layers of
    the relative error of their output on the inputs of the fit, by the closed form and by box kernels.
    """
    torch.manual_seed(0)
    model = adapter.tiny().eval()
    grafts = adapter.find(model)
    patterns: dict[bool, list[str]] = {False: [], True: []}
    for name, graft in grafts.items():
        patterns[graft.joint].append(".".join("*" if part.isdigit() else part for part in name.split(".")))
    errors = {}
    for init in ("closed_form", "copy_vo"):
        torch.manual_seed(0)
        fresh = adapter.tiny().eval()
        calib = [example(adapter, fresh, seed) for seed in range(CALIBRATIONS)]
        swap = swap_attention(fresh, "all", joint="split", init=init, calib=calib)
        errors[init] = statistics.median(row.error for row in swap.report(measure=False).layers)
    return {
        "swapped": list(dict.fromkeys(patterns[False])),
        "also": list(dict.fromkeys(patterns[True])),
        "grid": "volume" if adapter.sides == 3 else "image",
        "stored": "folder" if adapter.model in THIN or hasattr(adapter.model, "register_to_config") else "delta",
        "error": errors,
    }


def example(adapter: SwapAdapter, model: nn.Module, seed: int) -> dict:
    """Inputs on a small grid, or on the model's own."""
    generator = torch.Generator().manual_seed(seed)
    grid = (4, 8, 8)[-adapter.sides :]
    inputs = adapter.example(model, generator, grid=grid, text=7)
    return adapter.example(model, generator, text=7) if inputs is None else inputs


def table(rows: list[dict[str, Any]]) -> str:
    told = []
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library]
        yes = [row for row in own if "error" in row]
        cells = [
            [
                f"`{row['class']}`",
                ", ".join(f"`{name}`" for name in row["swapped"]) or "-",
                ", ".join(f"`{name}`" for name in row["also"]) or "-",
                row["grid"],
                row["stored"],
                f"{row['error']['closed_form']:.2f} ({row['error']['copy_vo']:.2f})",
            ]
            for row in yes
        ]
        titles = ["class", "swapped", 'and with `joint="split"`', "grid", "stored as", "error of the start"]
        told += [f"## {library}: {len(yes)} classes are taken", markdown_table(titles, cells)]
        derived = [f"`{row['class']}` (as `{row['as']}`)" for row in own if "as" in row]
        if derived:
            told.append(
                f"Taken as the class that they derive from, or as one with the same attention: {', '.join(derived)}."
            )
        no = [[f"`{row['class']}`", row["refused"]] for row in own if "refused" in row]
        told += [f"{len(no)} are not:", markdown_table(["class", "why: it"], no)]
    return "\n\n".join(told)


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.swappable", description=__doc__.splitlines()[0])
    add_out(parser, "folder of the table", type=Path, default=Path("experiments/results/swappable"))
    args = parser.parse_args(argv)
    written = Results(named(args.out / "swappable", ".md", ".json"), args.force, *KEYS)
    found = rows()
    report = table(found)
    written.write(report, {"rows": found, "versions": library_versions()})
    print(report)


if __name__ == "__main__":
    main()
