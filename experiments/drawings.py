"""The drawings of docs/how_it_works.md: the steps of the operator on two digits, and the flow from noise to data.

Nothing in them is drawn by hand: the layer, the path and the samplers of the library compute them, from fixed seeds.
They are narrow, with large letters, so that they can be read on a telephone.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from sit_atconv.runtime.errors import ArgumentParser, add_force, command
from sit_atconv.runtime.files import REPORT, check_out, figure_png, write_out

OUT = Path("docs/pictures")
INK, FAINT_INK, ATCONV, EULER = "#1f2328", "#59636e", "#b8354a", "#1f5fbf"
IMAGES = (0, 3)  # of the digits' held-out images
SEED = 3
MEAN, SHARE = 0.4, 0.9  # of the kernels: what is added to each tap, and how much of the mean is subtracted
STEPS = (
    ("image", "one channel of the tokens"),
    ("1. pool", "the means of nine parts"),
    ("2. route", "a kernel made of them:\nanother for each image"),
    ("3. inhibit", "the kernel without\na share of its mean"),
    ("4. convolve", "the image with\nits own kernel"),
)
PEAKS, DEVIATION = ((-1.6, 0.3), (0.2, 0.3), (1.5, 0.4)), 0.16  # of the data: place and share; and how wide each is
FEW = 5  # steps of Euler
STARTS = (-2.0, -1.25, -0.75, -0.3, 0.15, 0.6, 1.1, 1.7)  # of the paths that are drawn


def operator_steps() -> list[list]:
    """For each of two digits: the image (8, 8), its pooled values, its kernel before and after inhibition (3, 3), and
    the convolved image (8, 8). The layer has one channel; its linear maps of values and output change nothing, and its
    kernels have a mean that can be seen."""
    import torch

    from sit_atconv import ATConv
    from sit_atconv.data.digits import Digits
    from sit_atconv.ops.atconv import pool_tokens

    torch.manual_seed(SEED)
    layer, plain = ATConv(1, pool="grid"), ATConv(1, pool="grid", inhibition="none")
    with torch.no_grad():
        layer.kernel_proj.weight.fill_(3.0)
        layer.kernel_gen.bias.fill_(MEAN)
        layer.x_proj.weight.fill_(1.0)
        layer.proj.weight.fill_(1.0)
        layer.difference_control.fill_(math.log(SHARE / (1 - SHARE)))
        plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
        images = (Digits("test").images[list(IMAGES)].permute(0, 2, 3, 1) + 1) / 2
        columns = (
            images[..., 0],
            pool_tokens(images, 3, "grid").unflatten(1, (3, 3))[..., 0],
            plain.kernels(images).unflatten(1, (3, 3))[..., 0],
            layer.kernels(images).unflatten(1, (3, 3))[..., 0],
            layer(images)[..., 0],
        )
    return [[column[i].numpy() for column in columns] for i in range(len(images))]


def velocity(x, t):
    """The exact velocity at x (B,) and t, on the linear path from N(0, 1) to the peaks; fp64."""
    import torch

    places, shares = torch.tensor(PEAKS, dtype=x.dtype).T
    variance = t**2 * DEVIATION**2 + (1 - t) ** 2
    off = x[:, None] - t * places
    weights = torch.softmax(shares.log() - off**2 / (2 * variance), 1)
    return (weights * (places + (t * DEVIATION**2 - (1 - t)) / variance * off)).sum(1)


def density(x, t):
    """The density of x_t at x (B,) on that path."""
    import torch

    places, shares = torch.tensor(PEAKS, dtype=x.dtype).T
    variance = t**2 * DEVIATION**2 + (1 - t) ** 2
    return (shares * torch.exp(-((x[:, None] - t * places) ** 2) / (2 * variance)) / variance**0.5).sum(1)


def walked(sampler: Callable, x, times):
    """The places of x (B,) at all times (N,), by a sampler that takes a step for each: (N, B)."""
    import torch

    places = [x]
    for step in pairwise(times):
        places.append(sampler(velocity, places[-1], torch.stack(step)))
    return torch.stack(places)


def draw_operator() -> bytes:
    import matplotlib.pyplot as plt

    samples = operator_steps()
    with plt.rc_context({"font.size": 14, "text.color": INK}):
        figure, rows = plt.subplots(
            len(STEPS), 3, figsize=(7, 9.6), width_ratios=(1, 1, 1.9), layout="constrained", facecolor="white"
        )
        for row, panels in enumerate(rows):
            name, text = STEPS[row]
            for panel, sample in zip(panels, samples, strict=False):
                values, kernel = sample[row], row in (2, 3)
                largest = abs(sample[2] if kernel else values).max()
                shown = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest} if row > 1 else {"cmap": "gray"}
                panel.imshow(values, **shown)
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set_color(FAINT_INK)
                for (i, j), value in _cells(values) if kernel else ():
                    ink = "white" if abs(value) > 0.6 * largest else INK
                    panel.text(j, i, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center", color=ink)
            panels[2].axis("off")
            panels[2].text(0.03, 0.7, name, fontsize=18, fontweight="bold", color=ATCONV if row else INK, va="center")
            panels[2].text(0.03, 0.56, text, va="top", linespacing=1.25)
        png = figure_png(figure)
        plt.close(figure)
    return png


def _cells(values):
    return (((i, j), values[i, j]) for i in range(len(values)) for j in range(len(values)))


def draw_flow() -> bytes:
    import matplotlib.pyplot as plt
    import torch

    from sit_atconv.data.digits import Digits
    from sit_atconv.flow.path import LinearPath
    from sit_atconv.flow.samplers import SAMPLERS

    shown = torch.linspace(0, 1, 5)
    image = Digits("test").images[IMAGES[1], 0].expand(5, 8, 8)
    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).expand(5, 8, 8)
    mixed = LinearPath().interpolate(image, noise, shown)
    starts = torch.tensor(STARTS, dtype=torch.float64)
    fine, coarse = (torch.linspace(0, 1, steps + 1, dtype=torch.float64) for steps in (200, FEW))
    exact, euler = walked(SAMPLERS["rk4"], starts, fine), walked(SAMPLERS["euler"], starts, coarse)
    across = torch.linspace(-2.6, 2.6, 261, dtype=torch.float64)
    heat = torch.stack([density(across, t) / density(across, t).max() for t in fine], 1)
    with plt.rc_context({"font.size": 14, "text.color": INK}):
        figure = plt.figure(figsize=(7, 7.6), layout="constrained", facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.6, 5.6))
        for panel, picture, t in zip(top.subplots(1, 5), mixed, shown, strict=True):
            panel.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.set_title({0: "noise", 1: "data"}.get(float(t), f"t = {t:g}"), fontsize=14, pad=8)
        axes = bottom.subplots()
        axes.imshow(
            heat,
            cmap="Greys",
            origin="lower",
            aspect="auto",
            extent=(0, 1, -2.6, 2.6),
            vmax=1.6,
            interpolation="bilinear",
        )
        axes.plot(fine, exact, color=ATCONV, linewidth=1.8)
        axes.plot(coarse, euler, "o--", color=EULER, linewidth=1.3, markersize=4)
        lines = [axes.plot([], [], form, color=color)[0] for form, color in (("-", ATCONV), ("o--", EULER))]
        axes.legend(
            lines, ["exact path", f"{FEW} Euler steps"], loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2,
            frameon=False,
        )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(-2.6, 2.6), yticks=[])
        axes.set_xticks([0, 0.5, 1], ["t = 0\nnoise", "time", "t = 1\ndata"])
        png = figure_png(figure)
        plt.close(figure)
    return png


DRAWINGS = {"operator.png": draw_operator, "flow.png": draw_flow}


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m experiments.drawings", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"(default: {OUT})")
    add_force(parser)
    args = parser.parse_args(argv)
    for name in DRAWINGS:
        check_out(args.out / name, force=args.force, ours=REPORT)
    for name, draw in DRAWINGS.items():
        write_out(args.out / name, draw(), force=args.force)
        print(f"{args.out / name}: {(args.out / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
