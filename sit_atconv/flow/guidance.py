"""Guidance: away from what a weaker network would do, classifier-free or by another network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sit_atconv.flow.path import LinearPath, Path, check_name
from sit_atconv.flow.times import within

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Network = Callable[..., torch.Tensor]

CHANNELS = {"all": slice(None), "first3": slice(0, 3)}


class Evaluations(int):
    """Network evaluations per image, of all networks together; `of_guide`: those of a guide among them."""

    def __new__(cls, every: int = 0, of_guide: int = 0):
        made = super().__new__(cls, every)
        made.of_guide = of_guide
        return made

    def __add__(self, other: int) -> Evaluations:
        return Evaluations(int(self) + int(other), self.of_guide + getattr(other, "of_guide", 0))

    __radd__ = __add__  # of sum(), which begins with 0


ALONE, BOTH_CLASSES, WITH_GUIDE = Evaluations(1), Evaluations(2), Evaluations(2, 1)


class Reuse:
    """Guidance that is evaluated at every `every`-th evaluation; what it adds is remembered for those between.

    Of the evaluations in the interval the first is guided afresh, and then each `every`-th. Those between evaluate
    v_strong alone, and take v_strong - v_weak from the last that was guided afresh. A stage of a Runge-Kutta method is
    an evaluation like any other.
    """

    def __init__(self, every: int = 1):
        self.every, self.count, self.difference = every, 0, None

    def due(self) -> bool:
        """Whether the next evaluation is guided afresh; counts it."""
        self.count += 1
        return (self.count - 1) % self.every == 0


class GuidedVelocity:
    """v = v_weak + scale * (v_strong - v_weak), as a velocity for the samplers; counts network evaluations.

    v_strong is the network's for the class wanted. There are two sources of v_weak, of which one acts:
    without a guide the network's own for the null class, classifier-free guidance (Ho and Salimans, arXiv 2207.12598);
    with a guide that network's for the class wanted, autoguidance (Karras et al., arXiv
    2406.02507, equation 3, of which D is the data expected at x: on one path, velocities combine as those do).

    network: called with x (B, C, H, W), t (B,) and labels (B,), gives its prediction (B, C, H, W). One of average
    velocities (MeanFlow, see `flow.meanflow`) is called with s (B,) at last, the time that its average leads to.
    labels (B,): the classes wanted. null_label: the class that means "none"; None for a network without one.
    channels: "all", or "first3" as the public SiT code does (the other channels keep v_strong).
    interval: guidance acts where t lies `within` it, both ends included, with t = 0 noise and t = 1 data.
    guide: a weaker network of the same latents and classes, called alike; it needs no null class, nor does `network`.
    reuse: where guidance is not to be evaluated every time; whoever guides each step by an object of its own hands the
    same to all.
    batches: without a guide, 1 for both classes in one batch of twice the size, 2 for one after the other.
    path, prediction, guide_prediction: how what the networks predict becomes a velocity, see `Path.velocity_from`. The
    two of them may predict different things. A velocity is affine in a prediction, so of one network the predictions
    are guided, and what comes out is converted, unless a difference of velocities is to be reused.
    Called with x (B, C, H, W), t, 0-d, and s of an average velocity, 0-d too. A time of the CPU is an argument of a
    kernel on another device, which waits for nothing; of the device, as dopri5's is, it is read where guidance acts.
    `nfe` is the number of network evaluations per image so far, as `Evaluations`: two where guidance acts, one of them
    the guide's where there is one; else one. However small a guide is, its evaluation counts one.
    Raises ValueError for guidance without null class and guide, for a guide that scale 1 leaves idle, and for unknown
    channels.
    """

    def __init__(
        self,
        network: Network,
        labels: torch.Tensor,
        null_label: int | None,
        scale: float = 1.0,
        channels: str = "all",
        interval: tuple[float, float] = (0.0, 1.0),
        guide: Network | None = None,
        path: Path | None = None,
        prediction: str = "velocity",
        guide_prediction: str = "velocity",
        reuse: Reuse | None = None,
        batches: int = 1,
    ):
        check_name("channels", channels, CHANNELS)
        if scale != 1 and null_label is None and guide is None:
            raise ValueError(f"guidance scale {scale} needs a null class; this network has none, use scale 1")
        if scale == 1 and guide is not None:
            raise ValueError("guidance scale 1 leaves the guide idle; leave it out, or use another scale")
        self.network, self.scale, self.channels, self.interval = network, scale, CHANNELS[channels], interval
        self.guide, self.path = guide, path or LinearPath()
        self.prediction, self.guide_prediction = prediction, guide_prediction
        self.labels, self.reuse = labels, reuse or Reuse()
        self.batches, self.both_labels = batches, None
        if scale != 1 and guide is None:
            self.both_labels = labels.repeat(2)
            self.both_labels[len(labels) :] = null_label
        self.nfe = Evaluations()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        times, end = _of_all(t, x), () if s is None else (_of_all(s, x),)
        acts = self.scale != 1 and within(t, self.interval)
        if not (acts and self.reuse.due()):
            self.nfe += ALONE
            strong = self.path.velocity_from(self.prediction, self.network(x, times, self.labels, *end), x, t)
            return self._guided(strong, strong - self.reuse.difference) if acts else strong
        if self.guide is None:
            self.nfe += BOTH_CLASSES
            strong, weak = self._both_classes(x, times, end)
            if self.reuse.every == 1:
                return self.path.velocity_from(self.prediction, self._guided(strong, weak), x, t)
            strong, weak = (self.path.velocity_from(self.prediction, each, x, t) for each in (strong, weak))
        else:
            self.nfe += WITH_GUIDE
            strong = self.path.velocity_from(self.prediction, self.network(x, times, self.labels), x, t)
            weak = self.path.velocity_from(self.guide_prediction, self.guide(x, times, self.labels), x, t)
        if self.reuse.every > 1:
            self.reuse.difference = strong - weak
        return self._guided(strong, weak)

    def _both_classes(self, x: torch.Tensor, times: torch.Tensor, end: tuple[torch.Tensor, ...]):
        """What the network predicts at x (B, ...), times (B,) for the classes wanted, and for none: each (B, ...)."""
        if self.batches == 2:
            return (self.network(x, times, labels, *end) for labels in self.both_labels.chunk(2))
        both = (x.repeat(2, 1, 1, 1), times.repeat(2), self.both_labels, *(each.repeat(2) for each in end))
        return self.network(*both).chunk(2)

    def _guided(self, strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
        guided = strong.clone()
        difference = strong[:, self.channels] - weak[:, self.channels]
        guided[:, self.channels] = weak[:, self.channels] + self.scale * difference
        return guided


def _of_all(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A time, 0-d, of every item of x: (B,) on its device."""
    return t.expand(len(x)) if t.device == x.device else x.new_full((len(x),), float(t), dtype=t.dtype)
