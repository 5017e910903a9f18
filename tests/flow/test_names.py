"""A name that does not exist is refused, with the choices, where the object is made: it never becomes another one."""

import pytest
import torch

from sit_atconv.flow.guidance import GuidedVelocity
from sit_atconv.flow.loss import flow_loss
from sit_atconv.flow.path import LinearPath
from sit_atconv.flow.sde import SDE, last_step
from sit_atconv.flow.times import TimeSampling, sampling_interval, training_interval

PATH, X, T = LinearPath(), torch.ones(2, 3), torch.tensor([0.4, 0.6])
PREDICTIONS = r"='data': choose from \['noise', 'score', 'velocity'\]"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: flow_loss(lambda x, t: x, PATH, X, X, T, "data"), f"prediction{PREDICTIONS}"),
        (lambda: flow_loss(lambda x, t: x, PATH, X, X, T, "noise", "velocty"), "weight='velocty': .*'velocity'"),
        (lambda: flow_loss(lambda x, t: x, PATH, X, X, T, weight="velocty"), "weight='velocty': .*'velocity'"),
        (lambda: PATH.velocity_from("data", X, X, T), f"prediction{PREDICTIONS}"),
        (lambda: training_interval(PATH, "data"), f"prediction{PREDICTIONS}"),
        (lambda: sampling_interval(PATH, "data"), f"prediction{PREDICTIONS}"),
        (lambda: sampling_interval(PATH, "noise", "SBDM"), "diffusion='SBDM': .*'sbdm'"),
        (lambda: last_step("Euler", lambda x, t: x, X, T[0], SDE(PATH)), "last step='Euler': .*'euler'"),
        (lambda: TimeSampling(kind="lognormal"), "kind='lognormal': .*'logit-normal'"),
        (lambda: SDE(PATH, "x"), "diffusion='x': .*'constant'"),
        (lambda: GuidedVelocity(lambda x, t, y: x, T, 0, 2.0, "x"), r"channels='x': choose from \['all', 'first3'\]"),
    ],
)
def test_an_unknown_name_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
