"""The device of tests/no_synchronisation.py: it sees what makes the host wait, and lets the rest through."""

import re

import numpy as np
import pytest
import torch
from no_synchronisation import Synchronisation, fake_cuda
from torch import nn

WAITING = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0, 0]),
    "if": lambda x: 1 if (x > 0).any() else 2,
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "a Python index": lambda x: range(x[0, 0].long()),
    "contains": lambda x: 1 in x,
    "a list as index": lambda x: x[[0, 1]],
    "a list among indices": lambda x: x[:, [0, 1]],
    "setting by a list": lambda x: x.__setitem__((0, [0, 1]), 1),
    "an array as index": lambda x: x[np.array([0, 1])],
    "a tensor of the CPU as index": lambda x: x[torch.tensor([0, 1])],
    "a mask": lambda x: x[x > 0],
    "setting by a mask": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "where of one argument": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), 1),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "one_hot without classes": lambda x: nn.functional.one_hot(x.long()),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "a copy into memory of the CPU": lambda x: torch.empty(3, 4).copy_(x),
    "the same, not blocking": lambda x: torch.empty(3, 4).copy_(x, non_blocking=True),
    "the same, blocking, into pinned memory": lambda x: torch.empty(3, 4, pin_memory=True).copy_(x),
    "torch.tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "torch.as_tensor of a number": lambda x: torch.as_tensor(0.5, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to the device": lambda x: torch.ones(3).to("cuda"),
    "to the device, not blocking, from memory that is not pinned": lambda x: torch.ones(3).to(x, non_blocking=True),
    "cuda": lambda x: torch.ones(3).cuda(),
    "to the device from pinned memory, blocking": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "a 0-d tensor to the device": lambda x: torch.tensor(0.5).to(x.device),
    "a copy into memory of the device": lambda x: x.copy_(torch.ones(3, 4)),
    "setting to a tensor of the CPU": lambda x: x.__setitem__(0, torch.ones(4)),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream": lambda x: torch.cuda.current_stream().synchronize(),
    "an event just recorded": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "print": print,
    "format": lambda x: f"{x[0, 0]:.3f}",
    "inside a function of torch": lambda x: nn.utils.clip_grad_norm_([with_gradient(x)], 1.0, error_if_nonfinite=True),
    "in a backward pass": lambda x: Reading.apply(with_gradient(x)).sum().backward(),
}
FLOWING = {
    "arithmetic": lambda x: (x + 1) * x.mean(),
    "a number of the CPU": lambda x: x * torch.tensor(0.5),
    "full": lambda x: torch.full((3,), 0.5, device="cuda"),
    "slices": lambda x: x[1:, ::2, None],
    "setting to a number": lambda x: x.__setitem__(slice(1), 3.0),
    "indices of the device": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "rows one by one": lambda x: [row.shape for row in x],
    "pinned to the device": lambda x: torch.ones(3).pin_memory()[1:].to("cuda", non_blocking=True),
    "a copy from pinned memory": lambda x: x[0].copy_(torch.empty(4, pin_memory=True), non_blocking=True),
    "a copy into pinned memory": lambda x: torch.ones(3, 4, pin_memory=True).copy_(x, non_blocking=True).tolist(),
    "to the CPU, not blocking": lambda x: x.to("cpu", non_blocking=True).tolist(),
    "the CPU's own affairs": lambda x: [torch.linspace(0, 1, 4)[[0, 2]].tolist(), bool(torch.ones(3).all())],
    "clipping": lambda x: nn.utils.clip_grad_norm_([with_gradient(x)], 1.0),
    "a backward pass": lambda x: Reading.apply(with_gradient(x), False).sum().backward(),
}


class Reading(torch.autograd.Function):
    """Whose gradient reads a value."""

    @staticmethod
    def forward(ctx, x, reads=True):
        ctx.reads = reads
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * upstream.sum().item() if ctx.reads else upstream, None


def with_gradient(x: torch.Tensor) -> nn.Parameter:
    parameter = DEVICES[-1].parameter(x)
    parameter.grad = torch.ones_like(x)
    return parameter


DEVICES = []


@pytest.fixture
def cuda():
    with fake_cuda() as device:
        DEVICES.append(device)
        yield device
    DEVICES.pop()


@pytest.mark.parametrize("name", WAITING)
def test_what_makes_the_host_wait_is_seen(cuda, name):
    x = torch.randn(3, 4, device="cuda")
    with cuda.no_synchronisation(), pytest.raises(Synchronisation, match="the host waits for the device") as caught:
        WAITING[name](x)
    assert re.match(r"(torch|aten)\.\S+ [a-z]", str(caught.value))


@pytest.mark.parametrize("name", FLOWING)
def test_what_does_not_is_let_through(cuda, name):
    x = torch.randn(3, 4, device="cuda")
    with cuda.no_synchronisation():
        FLOWING[name](x)


def test_values_of_the_cpu_are_real_and_those_copied_to_it_zeros(cuda):
    x = torch.randn(2, device="cuda", dtype=torch.bfloat16)
    with cuda.no_synchronisation():
        assert torch.arange(3).tolist() == [0, 1, 2]
        copied = x.to("cpu", torch.float32, non_blocking=True)
    assert (copied.tolist(), copied.dtype) == ([0, 0], torch.float32)


def test_an_event_may_be_waited_for_a_block_later(cuda):
    event = torch.cuda.Event()
    with cuda.no_synchronisation():
        event.record()
        assert not event.query()
    with cuda.no_synchronisation():
        event.synchronize()


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_training_goes_through_under_autocast(cuda, fused):
    model = cuda.moved(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    x = torch.randn(3, 4, device="cuda")
    with cuda.no_synchronisation():
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            y.float().square().mean().backward()
            optimizer.step()
    assert (y.dtype, model[0].weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert model[0].weight.grad.device == torch.device("cuda:0")
    assert not x.is_meta


def test_afterwards_there_is_no_device():
    before = torch.cuda.is_available()
    with fake_cuda():
        assert torch.cuda.is_available()
    assert torch.cuda.is_available() == before
