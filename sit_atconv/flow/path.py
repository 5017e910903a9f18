"""The paths from noise to data, and the only owner of the time convention: t = 0 is noise, t = 1 is data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    # A velocity takes x (B, ...) and t, (B,) in training and 0-d in sampling, and gives (B, ...).
    Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PREDICTIONS = ("velocity", "score", "noise")


def check_name(what: str, name: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `name` is one of `choices`."""
    choices = sorted(choices)
    if name not in choices:
        raise ValueError(f"{what}={name!r}: choose from {choices}")


def expand_time(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (B,) -> (B, 1, 1, ...) with as many dimensions as `like`; a 0-d t stays, so that it may lie on the CPU."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (like.ndim - 1))


def _nonzero(value: torch.Tensor, name: str, t: torch.Tensor) -> torch.Tensor:
    """`value` as a divisor. Raises ValueError where it is 0 on a CPU: another device would have to be waited for."""
    if value.device.type == "cpu" and (value == 0).any():
        raise ValueError(f"{name} is 0 at t={t[value == 0].flatten()[0].item():g}; keep an epsilon away from that end")
    return value


class Path:
    """x_t = alpha(t) data + sigma(t) noise, with alpha(1) = 1 and sigma(1) = 0; velocity d x_t / dt.

    A subclass gives alpha and sigma at t in [0, 1] and their derivatives, elementwise.
    alpha and sigma are divided by: a method that would divide by zero raises ValueError, naming t, where t is on a CPU.
    On another device it gives what is not finite.
    With W = sigma alpha' - sigma' alpha, which is positive:

        noise = (alpha' x - alpha v) / W,   data = (sigma v - sigma' x) / W,   score = -noise / sigma

    alpha_vanishes: alpha(0) = 0. d_sigma_diverges: sigma' is infinite at t = 1.
    train_epsilon: how far training keeps from an end where it must, as the public SiT code does.
    """

    alpha_vanishes = True
    d_sigma_diverges = False
    train_epsilon = 1e-3

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the data."""
        raise NotImplementedError

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """alpha' = d alpha / dt."""
        raise NotImplementedError

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """sigma' = d sigma / dt."""
        raise NotImplementedError

    def interpolate(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """data and noise (B, ...), t (B,) in [0, 1] -> x_t (B, ...)."""
        t = expand_time(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The target of velocity prediction, d x_t / dt: (B, ...)."""
        t = expand_time(t, data)
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def drift_variance(self, t: torch.Tensor) -> torch.Tensor:
        """q = (alpha' / alpha) sigma^2 - sigma sigma', with v = (alpha' / alpha) x + q score."""
        return self.sigma(t) * self._w(t) / _nonzero(self.alpha(t), "alpha", t)

    def score(self, velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The gradient of the log density of x_t, from the velocity there: (B, ...). Finite at alpha = 0."""
        t = expand_time(t, x)
        sigma = _nonzero(self.sigma(t), "sigma", t)
        return (self.alpha(t) * velocity - self.d_alpha(t) * x) / (sigma * self._w(t))

    def data(self, velocity: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The data expected at x_t, from the velocity there; x / alpha + sigma^2 / alpha score (Tweedie): (B, ...)."""
        t = expand_time(t, x)
        return (self.sigma(t) * velocity - self.d_sigma(t) * x) / self._w(t)

    def velocity_from(self, prediction: str, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity at x_t, from the output of a network that predicts `prediction`: (B, ...)."""
        check_name("prediction", prediction, PREDICTIONS)
        if prediction == "velocity":
            return output
        t = expand_time(t, x)
        noise = output if prediction == "noise" else -self.sigma(t) * output
        return (self.d_alpha(t) * x - self._w(t) * noise) / _nonzero(self.alpha(t), "alpha", t)

    def _w(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma(t) * self.d_alpha(t) - self.d_sigma(t) * self.alpha(t)


class LinearPath(Path):
    """x_t = t data + (1 - t) noise, with velocity data - noise."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return t.new_ones(t.shape)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t.new_full(t.shape, -1)


class GVPPath(Path):
    """Generalised variance preserving: x_t = sin(pi t / 2) data + cos(pi t / 2) noise."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return (math.pi / 2 * t).sin()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (math.pi / 2 * (1 - t)).sin()  # the cosine, and exactly 0 at t = 1

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return -math.pi / 2 * self.alpha(t)


class VPPath(Path):
    """Variance preserving diffusion with a linear beta, run backwards: beta is BETA_MAX at t = 0, BETA_MIN at t = 1.

    log alpha = -(1 - t)^2 (BETA_MAX - BETA_MIN) / 4 - (1 - t) BETA_MIN / 2, sigma^2 = 1 - alpha^2.
    alpha(0) is 0.0066.
    """

    BETA_MIN, BETA_MAX = 0.1, 20.0
    alpha_vanishes = False
    d_sigma_diverges = True
    train_epsilon = 1e-5

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (-(2 * self._log_alpha(t)).expm1()).sqrt()

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self._rate(t) * self.alpha(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return -self._rate(t) * self.alpha(t).square() / _nonzero(self.sigma(t), "sigma", t)

    def _log_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -((1 - t).square()) * (self.BETA_MAX - self.BETA_MIN) / 4 - (1 - t) * self.BETA_MIN / 2

    def _rate(self, t: torch.Tensor) -> torch.Tensor:
        """d log alpha / dt = beta / 2."""
        return (self.BETA_MIN + (1 - t) * (self.BETA_MAX - self.BETA_MIN)) / 2


PATHS = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}
