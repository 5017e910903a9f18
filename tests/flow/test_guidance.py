"""Guidance against its formula and golden vectors."""

import json
from itertools import product

import pytest
import torch
from golden_vectors import assert_golden, golden

from sit_atconv import create_model
from sit_atconv.flow.guidance import Evaluations, GuidedVelocity, Reuse
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


def test_the_classes_go_in_one_batch_or_in_two():
    batches = {1: [], 2: []}
    for number, seen in batches.items():

        def counted(x, t, labels, s, seen=seen):
            seen.append((labels.tolist(), t.tolist(), s.tolist()))
            return network(x, t, labels)

        velocity = GuidedVelocity(counted, torch.tensor([2, 3]), null_label=0, scale=3.0, batches=number)
        output = velocity(torch.zeros(2, 1, 1, 1), torch.tensor(0.5), torch.tensor(0.75))
        assert output.flatten().tolist() == [6, 9]
        assert velocity.nfe == 2
    ends = [0.5] * 4, [0.75] * 4
    assert batches[1] == [([2, 3, 0, 0], *ends)]
    assert batches[2] == [([2, 3], *(each[:2] for each in ends)), ([0, 0], *(each[:2] for each in ends))]


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


def test_sums_of_evaluations_keep_those_of_the_guide():
    for found in (sum([Evaluations(2, 1), Evaluations(3, 1)]), 3 + Evaluations(2, 2), Evaluations(2, 2) + 3):
        assert (found, found.of_guide) == (5, 2)


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


def strong(x, t, labels):
    """A prediction of state, time and label."""
    return x.sin() + t.reshape(-1, 1, 1, 1) * (1 + labels.reshape(-1, 1, 1, 1))


def weak(x, t, labels):
    return 0.3 * x.cos() - t.reshape(-1, 1, 1, 1) * (2 + labels.reshape(-1, 1, 1, 1))


def velocity_of(path, prediction, output, x, t):
    """The velocity by the definitions of the path alone: x = alpha data + sigma noise, score = -noise / sigma."""
    if prediction == "velocity":
        return output
    noise = output if prediction == "noise" else -path.sigma(t) * output
    return path.d_alpha(t) * (x - path.sigma(t) * noise) / path.alpha(t) + path.d_sigma(t) * noise


@pytest.mark.parametrize("channels", ["all", "first3"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("prediction", "guide_prediction"), [*product(("velocity", "score", "noise"), repeat=2)])
def test_a_guide_is_guided_away_from_as_a_velocity(path, prediction, guide_prediction, channels):
    path, t = PATHS[path](), torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, scale, seen = torch.tensor([2, 1]), 2.5, []

    def guide(*inputs):
        seen.append(inputs)
        return weak(*inputs)

    guided = GuidedVelocity(
        strong, labels, None, scale, channels, (0.4, 0.7), guide, path, prediction, guide_prediction
    )
    own = velocity_of(path, prediction, strong(x, t.expand(2), labels), x, t)
    other = velocity_of(path, guide_prediction, weak(x, t.expand(2), labels), x, t)
    expected = other + scale * (own - other)
    if channels == "first3":
        expected[:, 3:] = own[:, 3:]
    torch.testing.assert_close(guided(x, t), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0][2], labels)  # the class wanted, and never the null class
    assert (guided.nfe, guided.nfe.of_guide) == (2, 1)


def test_beyond_its_interval_a_guide_is_not_evaluated():
    labels, x = torch.tensor([2]), torch.ones(1, 4, 1, 1)
    guided = GuidedVelocity(strong, labels, 3, 2.0, interval=(0.25, 0.5), guide=weak)
    for number in (0.0, 0.25, 0.4, 0.5, 0.75):
        t = torch.tensor(number)
        own, other = (network(x, t.expand(1), labels) for network in (strong, weak))
        expected = 2 * own - other if 0.25 <= number <= 0.5 else own
        torch.testing.assert_close(guided(x, t), expected)
    assert (guided.nfe, guided.nfe.of_guide) == (5 + 3, 3)


def test_of_one_network_the_null_class_is_its_guide():
    """Classifier-free guidance is autoguidance by the network's own null class; the batch is one of twice the size."""
    x, t, labels, sizes = torch.randn(2, 4, 2, 2), torch.tensor(0.3), torch.tensor([0, 2]), []

    def network(x, t, labels):
        sizes.append(len(x))
        return strong(x, t, labels)

    def unconditional(x, t, labels):
        return strong(x, t, torch.full_like(labels, 3))

    free, auto = (GuidedVelocity(network, labels, 3, 1.7, guide=guide) for guide in (None, unconditional))
    torch.testing.assert_close(free(x, t), auto(x, t))
    assert sizes == [4, 2]
    assert (free.nfe, free.nfe.of_guide, auto.nfe, auto.nfe.of_guide) == (2, 0, 2, 1)


def test_a_guide_that_would_be_idle_is_refused():
    with pytest.raises(ValueError, match="leaves the guide idle"):
        GuidedVelocity(strong, torch.tensor([1]), 3, 1.0, guide=weak)


def test_counts_of_evaluations_add_up():
    total = Evaluations() + Evaluations(2, 1) + 3 + Evaluations(2)
    assert (total, total.of_guide, json.dumps(total)) == (7, 1, "7")


@pytest.mark.parametrize("guide", [None, weak], ids=["null class", "guide"])
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_between_the_evaluations_of_guidance_its_last_difference_is_reused(guide, prediction):
    path, labels, x = PATHS["linear"](), torch.tensor([2, 0]), torch.randn(2, 4, 1, 1, dtype=torch.float64)

    def velocities(t):
        own = velocity_of(path, prediction, strong(x, t.expand(2), labels), x, t)
        if guide is None:
            return own, velocity_of(path, prediction, strong(x, t.expand(2), torch.full_like(labels, 3)), x, t)
        return own, weak(x, t.expand(2), labels)

    reuse, nfe = Reuse(3), Evaluations()
    every = {"channels": "first3", "interval": (0.15, 0.65), "guide": guide, "prediction": prediction, "reuse": reuse}
    # t = 0.1 and 0.7 are outside; 0.2 and 0.5 are guided afresh, the others with the difference of the last one.
    for number, scale in ((0.1, 2.5), (0.2, 2.5), (0.3, 2.5), (0.4, 4.0), (0.5, 2.5), (0.6, 2.5), (0.7, 2.5)):
        t = torch.tensor(number, dtype=torch.float64)
        guided = GuidedVelocity(strong, labels, 3, scale, **every)  # one of a step, as the pipeline has it
        own, other = velocities(t)
        if number in (0.2, 0.5):
            difference = own - other
        if number not in (0.1, 0.7):
            own[:, :3] += (scale - 1) * difference[:, :3]
        torch.testing.assert_close(guided(x, t), own, rtol=1e-12, atol=1e-12)
        nfe += guided.nfe
    assert (nfe, nfe.of_guide) == (7 + 2, 0 if guide is None else 2)
