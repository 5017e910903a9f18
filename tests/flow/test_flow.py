"""Path, loss, samplers and guidance against golden vectors and closed forms."""

import math

import pytest
import torch
from golden_vectors import assert_golden, golden

from sit_atconv import create_model
from sit_atconv.flow.guidance import GuidedVelocity
from sit_atconv.flow.loss import velocity_loss
from sit_atconv.flow.path import LinearPath
from sit_atconv.flow.samplers import SAMPLERS, dopri5, euler, heun


def toy_velocity(x, t):
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x) * (1 - t) * 0.7 - 0.3 * x * t + 0.1


def test_linear_velocity_loss_is_golden():
    _, _, tensors = golden("transport")
    loss = velocity_loss(toy_velocity, LinearPath(), tensors["x1"], tensors["x0"], tensors["t"])
    assert loss.shape == (4,)
    assert_golden(loss, tensors["loss.Linear.velocity.None"])


def test_path_runs_from_noise_to_data_and_velocity_is_its_derivative():
    path = LinearPath()
    data, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(path.interpolate(data, noise, torch.zeros(2)), noise)
    assert torch.equal(path.interpolate(data, noise, torch.ones(2)), data)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    slope = (path.interpolate(data, noise, t + 1e-4) - path.interpolate(data, noise, t - 1e-4)) / 2e-4
    torch.testing.assert_close(path.velocity(data, noise, t), slope, rtol=1e-8, atol=1e-8)


def test_euler_is_golden_with_steps_counting_intervals():
    _, _, tensors = golden("transport")
    assert_golden(euler(toy_velocity, tensors["z"], steps=8), tensors["ode.Linear.velocity.euler.9"])


def test_dopri5_is_golden():
    _, _, tensors = golden("transport")
    assert_golden(dopri5(toy_velocity, tensors["z"]), tensors["ode.Linear.velocity.dopri5.5"])


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_convergence_order_on_a_closed_form(sampler, order):
    # dx/dt = cos(t) x has x(1) = x(0) exp(sin 1).
    x0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    exact = x0 * math.exp(math.sin(1))
    errors = [(sampler(lambda x, t: torch.cos(t.double()) * x, x0, n) - exact).abs().max() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_constant_velocity_is_followed_from_0_to_1(name):
    times = []

    def velocity(x, t):
        times.append(float(t))
        return torch.full_like(x, 3.0)

    x = SAMPLERS[name](velocity, torch.zeros(2, 1, 2, 2), 4)
    torch.testing.assert_close(x, torch.full_like(x, 3.0))
    assert min(times) == 0.0
    assert max(times) <= 1.0
    if name != "dopri5":
        assert len(times) == {"euler": 4, "heun": 8}[name]


def network(x, t, labels):
    """A velocity that tells its label."""
    return x * 0 + labels.reshape(-1, 1, 1, 1).float()


@pytest.mark.parametrize(("channels", "expected"), [("all", [6, 6, 6, 6]), ("first3", [6, 6, 6, 2])])
def test_guidance_formula_and_channels(channels, expected):
    velocity = GuidedVelocity(network, torch.tensor([2, 2]), null_label=0, scale=3.0, channels=channels)
    output = velocity(torch.zeros(2, 4, 1, 1), torch.tensor(0.5))
    assert output[0].flatten().tolist() == expected  # 0 + 3 * (2 - 0)


def test_guidance_interval_is_in_t_and_saves_evaluations():
    velocity = GuidedVelocity(network, torch.tensor([2]), null_label=0, scale=3.0, interval=(0.25, 0.5))
    outputs = [velocity(torch.zeros(1, 1, 1, 1), torch.tensor(t)).item() for t in (0.0, 0.25, 0.5, 0.75)]
    assert outputs == [2, 6, 6, 2]
    assert velocity.nfe == 1 + 2 + 2 + 1


def test_scale_one_is_the_conditional_network_alone():
    calls = []

    def counting(x, t, labels):
        calls.append(len(x))
        return network(x, t, labels)

    velocity = GuidedVelocity(counting, torch.tensor([1, 2]), null_label=None, scale=1.0)
    assert velocity(torch.zeros(2, 1, 1, 1), torch.tensor(0.0)).flatten().tolist() == [1, 2]
    assert (calls, velocity.nfe) == ([2], 1)


def test_guidance_needs_a_null_class():
    with pytest.raises(ValueError, match="null class"):
        GuidedVelocity(network, torch.tensor([1]), null_label=None, scale=1.5)


@pytest.mark.parametrize("name", ["sit_attn", "sit_atconv", "sit_hybrid"])
def test_guided_network_is_golden(name):
    info, state, tensors = golden(name)
    mixer = {"attn": "attention"}.get(info["token_mixer"], info["token_mixer"])
    options = {key: info[key] for key in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")}
    model = create_model(None, info["input_size"], info["num_classes"], token_mixer=mixer, **options)
    model.load_state_dict(state)
    half = len(tensors["cfg_x"]) // 2
    assert tensors["cfg_y"][half:].unique().tolist() == [model.null_label]
    velocity = GuidedVelocity(
        lambda x, t, y: model(x, t, y).sample, tensors["cfg_y"][:half], model.null_label, info["cfg_scale"], "first3"
    )
    assert tensors["cfg_t"].unique().numel() == 1
    output = velocity(tensors["cfg_x"][:half], tensors["cfg_t"][0])
    assert_golden(output, tensors["cfg_out"][:half])
