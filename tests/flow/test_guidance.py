"""Guidance against its formula and golden vectors."""

import pytest
import torch
from golden_vectors import assert_golden, golden

from sit_atconv import create_model
from sit_atconv.flow.guidance import GuidedVelocity
from sit_atconv.flow.path import PATHS
from sit_atconv.flow.samplers import SAMPLERS
from sit_atconv.flow.times import time_grid


def network(x, t, labels):
    """A velocity that tells its label."""
    return x * 0 + labels.reshape(-1, 1, 1, 1).float()


@pytest.mark.parametrize(("channels", "expected"), [("all", [6] * 5), ("first3", [6, 6, 6, 2, 2])])
def test_guidance_formula_and_channels(channels, expected):
    velocity = GuidedVelocity(network, torch.tensor([2, 2]), null_label=0, scale=3.0, channels=channels)
    output = velocity(torch.zeros(2, 5, 1, 1), torch.tensor(0.5))
    assert output[0].flatten().tolist() == expected  # 0 + 3 * (2 - 0)


def test_guidance_interval_is_in_t_and_saves_evaluations():
    velocity = GuidedVelocity(network, torch.tensor([2]), null_label=0, scale=3.0, interval=(0.25, 0.5))
    outputs = [velocity(torch.zeros(1, 1, 1, 1), torch.tensor(t)).item() for t in (0.0, 0.25, 0.5, 0.75)]
    assert outputs == [2, 6, 6, 2]
    assert velocity.nfe == 1 + 2 + 2 + 1


@pytest.mark.parametrize(
    ("steps", "interval", "guided"),
    [(50, (0.2, 1), 40), (50, (0, 0.7), 36), (10, (0.3, 0.7), 5), (30, (0.1, 0.9), 25), (3, (1 / 3, 2 / 3), 2)],
)
def test_both_ends_of_the_interval_are_guided(steps, interval, guided):
    velocity = GuidedVelocity(network, torch.tensor([2]), null_label=0, scale=3.0, interval=interval)
    SAMPLERS["euler"](velocity, torch.zeros(1, 1, 1, 1), time_grid(0, 1, steps))
    assert velocity.nfe == steps + guided


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


@pytest.mark.parametrize("path", [path() for path in PATHS.values()], ids=list(PATHS))
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_guiding_a_prediction_is_guiding_its_velocity(path, prediction):
    x, t = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)

    def outputs(x, t, labels):
        return x.sin() * labels.reshape(-1, 1, 1, 1)

    def velocities(x, t, labels):
        return path.velocity_from(prediction, outputs(x, t, labels), x, t)

    labels, options = torch.tensor([2, 1]), {"null_label": 3, "scale": 2.5, "channels": "first3"}
    before = path.velocity_from(prediction, GuidedVelocity(outputs, labels, **options)(x, t), x, t)
    torch.testing.assert_close(before, GuidedVelocity(velocities, labels, **options)(x, t), rtol=1e-4, atol=1e-5)
