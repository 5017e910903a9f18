"""Schedule, groups, and the size of a step against the step itself."""

import copy
import math

import pytest
import torch
from torch import nn

from sit_atconv.config import Train
from sit_atconv.training.optimizer import learning_rate, make_optimizer, step_and_weight_squares


def test_learning_rate_schedules():
    def rates(**options):
        return [learning_rate(step, Train(max_steps=10, lr=1.0, **options)) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup_steps=5, lr_schedule="linear")[5:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(lr_schedule="cosine")[5] == pytest.approx(0.5)
    assert rates(lr_schedule="cosine")[9] == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_size_of_a_step_is_that_of_the_change_in_the_weights(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3)).double()
    optimizer = make_optimizer(model, Train(lr=1e-2, weight_decay=decay, betas=[0.8, 0.95]))
    assert step_and_weight_squares(optimizer).tolist() == [0, 0]
    for step in range(4):
        model(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        before = copy.deepcopy([parameter.detach() for parameter in model.parameters()])
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * (step + 1)
        if step == 3:  # a step may leave parameters out
            model[0].weight.grad = None
        optimizer.step()
        change = sum((new - old).square().sum() for new, old in zip(model.parameters(), before, strict=True))
        weights = sum(old.square().sum() for old in (before if step < 3 else before[1:]))
        torch.testing.assert_close(step_and_weight_squares(optimizer), torch.stack([change, weights]).detach())
        optimizer.zero_grad()


def test_adamw_has_the_recipes_settings():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Train(lr=0.5, betas=[0.8, 0.95], weight_decay=0.1))
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, (0.8, 0.95), 0.1), (0.5, (0.8, 0.95), 0.0),
    ]  # fmt: skip
