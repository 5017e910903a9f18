"""Classifier-free guidance around a class-conditional network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sit_atconv.flow.path import check_name
from sit_atconv.flow.times import within

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CHANNELS = {"all": slice(None), "first3": slice(0, 3)}


class GuidedVelocity:
    """v = v_uncond + scale * (v_cond - v_uncond), as a velocity for the samplers; counts network evaluations.

    A score or noise prediction is guided alike: the velocity is affine in it, so guiding before or after the
    conversion is the same.

    network: called with x (B, C, H, W), t (B,) and labels (B,), gives the velocity (B, C, H, W).
    labels (B,): the classes wanted. null_label: the class that means "none"; None for a network without one.
    channels: "all", or "first3" as the public SiT code does (the other channels keep v_cond).
    interval: guidance acts where t lies `within` it, both ends included, with t = 0 noise and t = 1 data.
    Called with x (B, C, H, W) and t, 0-d: of the CPU, it is an argument of a kernel on another device, which waits for
    nothing; of the device, as dopri5's is, it is read where guidance acts.
    `nfe` is the number of network evaluations per image so far: two where guidance acts, else one.
    Raises ValueError for guidance without a null class, and for unknown channels.
    """

    def __init__(
        self,
        network: Network,
        labels: torch.Tensor,
        null_label: int | None,
        scale: float = 1.0,
        channels: str = "all",
        interval: tuple[float, float] = (0.0, 1.0),
    ):
        check_name("channels", channels, CHANNELS)
        if scale != 1 and null_label is None:
            raise ValueError(f"guidance scale {scale} needs a null class; this network has none, use scale 1")
        self.network, self.scale, self.channels, self.interval = network, scale, CHANNELS[channels], interval
        self.labels = labels
        self.both_labels = None if scale == 1 else labels.repeat(2)
        if scale != 1:
            self.both_labels[len(labels) :] = null_label
        self.nfe = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = t.expand(len(x)) if t.device == x.device else x.new_full((len(x),), float(t), dtype=t.dtype)
        if self.scale == 1 or not within(t, self.interval):
            self.nfe += 1
            return self.network(x, times, self.labels)
        self.nfe += 2
        conditional, unconditional = self.network(x.repeat(2, 1, 1, 1), times.repeat(2), self.both_labels).chunk(2)
        guided = conditional.clone()
        difference = conditional[:, self.channels] - unconditional[:, self.channels]
        guided[:, self.channels] = unconditional[:, self.channels] + self.scale * difference
        return guided
