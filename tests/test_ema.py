import pytest
import torch
from torch import nn

from sit_atconv.ema import EMA


def test_closed_form_and_buffers():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    for _ in range(5):
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, torch.full((2,), 3 + (1 - 3) * 0.9**5))
    assert ema.model.running_mean.tolist() == [7.0, 7.0]
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_a_wrapped_model_is_refused_rather_than_missed():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    with pytest.raises(KeyError, match="tensors differ"):
        ema.update(nn.Sequential(model))
