"""A forward pass, and sampling from labels on the device to latents there, make the host wait for it nowhere.

But with dopri5, which says so. Shown on a pretended device, for the eager network and for graphs that a stand-in
records; the recording itself, and what comes after, the check of the latents and their decoding, are outside.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import slowly
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from no_synchronisation import Synchronisation, fake_cuda
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sit_atconv import create_model
from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE, SDE_SAMPLERS, last_step
from sit_atconv.pipelines import pipeline_sit
from sit_atconv.pipelines.pipeline_sit import SiTPipeline
from sit_atconv.pipelines.schedulers import set_steps
from sit_atconv.runtime import draws
from sit_atconv.runtime.compat.torch import tree_leaves
from sit_atconv.runtime.draws import Stream
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.noise import steps_ahead
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling

GUIDED = {"guidance_scale": 2.0, "guidance_interval": [0.3, 0.8], "guidance_channels": "first3"}
FIXED = [name for name in SAMPLERS if name != "dopri5"]


class Recorder:
    """In the place of `graphs.Cuda`."""

    kind = "cuda"

    def __init__(self, device: torch.device):
        pass

    def beside(self, call):
        return call()

    def record(self, call):
        result = call()
        return lambda: result.copy_(call()), result


@pytest.fixture
def cuda():
    with fake_cuda() as device:
        yield device


def made(mixer: str = "hybrid", **options):
    sizes = {"patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
    return create_model(None, 8, 3, token_mixer=mixer, **sizes | options).eval()


class OnDevice(TorchDispatchMode):
    """Every tensor of every operation is on the device, as a CUDA graph needs it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        assert all(each.device.type == "cuda" for each in tensors), func
        return result


def shallow(**options):
    """A model without its blocks, which do as much in every evaluation and take long to pretend."""
    model = made("attention", **options)
    model.blocks = nn.ModuleList()
    return model


def sample(cuda, model, sampling: Sampling, graphs: Graphs | None = None) -> list[tuple[int, float]]:
    """Draw two images without waiting; what a watch was told."""
    model, labels, told = cuda.moved(model), torch.zeros(2, dtype=torch.long, device="cuda"), []
    with cuda.no_synchronisation():
        watch = lambda *said: told.append(said)  # noqa: E731
        latents, _ = sample_latents(model, [0, 5], labels, sampling, watch=watch, graphs=graphs)
    assert (latents.shape, latents.dtype, latents.device) == ((2, 4, 8, 8), torch.float32, torch.device("cuda:0"))
    return told


@pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
def test_a_forward_pass_waits_for_nothing_nor_does_its_gradient(cuda, mixer):
    model, x = cuda.moved(made(mixer)), torch.randn(2, 4, 8, 8, device="cuda")
    t, labels = torch.rand(2, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    with cuda.no_synchronisation():
        with OnDevice():
            velocity = model(x, t, labels).sample
        velocity.square().mean().backward()
    assert all(parameter.grad.device == x.device for parameter in model.parameters())


@pytest.mark.parametrize("timestep", [0.5, 1, torch.tensor(0.5)], ids=["number", "whole number", "0-d of the CPU"])
def test_times_and_positions_of_any_kind_wait_for_nothing(cuda, timestep):
    model, labels = cuda.moved(shallow()), torch.zeros(2, dtype=torch.long, device="cuda")
    with cuda.no_synchronisation(), torch.no_grad():
        for grid in ((8, 8), (4, 12)):  # the model's own, and one whose positions are made on the device
            assert model(torch.randn(2, 4, *grid, device="cuda"), timestep, labels).sample.shape[2:] == grid


@pytest.mark.parametrize("sampler", FIXED)
def test_steps_of_an_ode_wait_for_nothing(cuda, sampler):
    assert sample(cuda, shallow(), Sampling(sampler, steps=4, **GUIDED))[-1][1] > 0.6


@pytest.mark.parametrize("sampler", SDE_SAMPLERS)
def test_steps_of_an_sde_wait_for_nothing(cuda, sampler):
    assert sample(cuda, shallow(), Sampling(sampler, steps=4, **GUIDED))[-1][1] > 0.99


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # where weights lie is asked
@pytest.mark.parametrize("sampler", ["rk4", "sde-heun"])
def test_replayed_steps_wait_for_nothing(cuda, sampler):
    sample(cuda, shallow(), Sampling(sampler, steps=5, **GUIDED), Graphs(Recorder))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("replayed", [False, True])
def test_steps_along_average_velocities_wait_for_nothing(cuda, replayed):
    sampling, graphs = Sampling(steps=5, **GUIDED), Graphs(Recorder) if replayed else None
    assert sample(cuda, shallow(use_meanflow=True), sampling, graphs)[-1][0] == 5 + 3  # t = 0.4, 0.6 and 0.8


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_steps_with_a_guide_wait_for_nothing(cuda, prediction, replayed):
    sampling = Sampling(steps=5, **GUIDED, guide=cuda.moved(shallow(prediction=prediction)))
    assert sample(cuda, shallow(), sampling, Graphs(Recorder) if replayed else None)[-1][0] == 5 + 3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_paths_predictions_and_diffusions_wait_for_nothing(cuda, path, prediction):
    path, x, t = PATHS[path](), torch.randn(2, 3, device="cuda"), torch.tensor(0.5)
    with cuda.no_synchronisation():
        for diffusion in DIFFUSIONS:
            SDE(path, diffusion).drift(path.velocity_from(prediction, x, x, t), x, t)
        for kind in LAST_STEPS:
            last_step(kind, lambda x, t: x, x, t, SDE(path))


def test_dopri5_reads_its_error(cuda):
    with pytest.raises(Synchronisation):
        sample(cuda, shallow(), Sampling("dopri5"))


@pytest.mark.parametrize(
    ("scheduler", "watched"),
    [
        (FlowMatchEulerDiscreteScheduler, True), (FlowMatchHeunDiscreteScheduler, False),
        *slowly([(FlowMatchEulerDiscreteScheduler, False), (FlowMatchHeunDiscreteScheduler, True)]),
    ],
)  # fmt: skip
def test_the_loop_of_the_pipeline_waits_for_nothing(cuda, monkeypatch, scheduler, watched):
    pipe, stepped = SiTPipeline(cuda.moved(shallow()), scheduler=scheduler()), []

    @contextmanager
    def loop(total: int):
        with cuda.no_synchronisation():
            yield SimpleNamespace(update=lambda: stepped.append(total))

    def on_cpu(scheduler, steps, sigmas, device, partial):  # the scheduler's own tables need values
        return set_steps(scheduler, steps, sigmas, None, partial)

    monkeypatch.setattr(pipe, "progress_bar", loop)
    monkeypatch.setattr(pipeline_sit, "set_steps", on_cpu)
    monkeypatch.setattr(pipeline_sit, "check_latents", lambda *args, **kwargs: None)
    callback = {"callback_on_step_end": lambda *args: {}} if watched else {}
    pipe([0, 2], 4, guidance_interval=(0.3, 0.8), output_type="latent", **callback)
    assert len(stepped) == stepped[0] == pipe.num_timesteps


@pytest.mark.parametrize(
    ("steps", "drawn"),
    [([0, 1, 2], [0, 1, 2]), ([0, 0, 2, 1], [0, 1, 0, 1, 2, 1, 2]), ([2, 0], [0, 2, 0, 1])],
    ids=["in turn", "again and back", "from the end"],
)
def test_noise_drawn_ahead_is_the_same_and_no_more_is_drawn(monkeypatch, steps, drawn):
    asked, another = [], SimpleNamespace(type="another")  # a device of neither kind: the numbers stay on the CPU

    def draw(step: int) -> torch.Tensor:
        asked.append(step)
        return draws.normal((2, 3), 7, Stream.SAMPLE_STEP, step)

    monkeypatch.setattr("sit_atconv.sampling.noise.brought", lambda numbers, device: numbers)
    with steps_ahead(draw, 3, another) as ahead:
        given = [ahead(step) for step in steps]
    assert asked == drawn
    assert all(
        torch.equal(each, draws.normal((2, 3), 7, Stream.SAMPLE_STEP, i)) for i, each in zip(steps, given, strict=True)
    )
