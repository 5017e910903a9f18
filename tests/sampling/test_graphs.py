"""CUDA graphs of sampling, by a recorder that behaves as CUDA does: while recording nothing is computed, a replay reads
the recorded inputs and writes over the recorded output."""

import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from sit_atconv import create_model
from sit_atconv.sampling.graphs import WARM_UPS, Graphs, can_record
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling

INDICES, LABELS = [3, 5], torch.tensor([1, 2])


class Recorder:
    """In the place of `graphs.Cuda`, on the CPU."""

    kind = "cpu"

    def __init__(self, device: torch.device):
        self.recorded, self.replayed, self.eager = 0, 0, 0

    def beside(self, call):
        self.eager += 1
        return call()

    def record(self, call):
        self.recorded += 1
        result = torch.full_like(call(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            result.copy_(call())

        return replay, result


class Refusing(Recorder):
    def record(self, call):
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = create_model(None, 8, 3, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling("euler", steps=6, guidance_scale=1.0),
        Sampling("rk4", steps=3, guidance_interval=[0.3, 0.8], guidance_channels="first3"),
        Sampling("dopri5"),
        Sampling("sde-heun", steps=5, last_step="tweedie"),
    ],
    ids=lambda sampling: sampling.sampler,
)
def test_replayed_samples_are_the_eager_ones_to_the_bit(model, sampling):
    eager, nfe = sample_latents(model, INDICES, LABELS, sampling, graphs=False)
    graphs = Graphs(Recorder)
    replayed, same = sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)
    assert torch.equal(replayed, eager)
    assert nfe == same
    assert graphs._device.replayed > 0


def test_graphs_serve_other_noise_labels_and_weights_and_record_once_a_shape(model):
    graphs, sampling = Graphs(Recorder), Sampling("euler", steps=WARM_UPS + 2)

    def equal(indices: list[int], labels: list[int]) -> bool:
        drawn = [
            sample_latents(model, indices, torch.tensor(labels), sampling, graphs=each)[0] for each in (graphs, False)
        ]
        return torch.equal(*drawn)

    assert equal([0, 1], [2, 0])
    assert (graphs._device.eager, graphs._device.recorded, graphs._device.replayed) == (WARM_UPS, 1, 2)
    assert equal([7, 4], [1, 1])
    with torch.no_grad():
        model.x_embedder.proj.weight.mul_(1.5)
    assert equal([0, 1], [2, 0])
    assert (graphs._device.eager, graphs._device.recorded) == (WARM_UPS, 1)
    assert equal([9], [2])  # a last, smaller batch
    assert (graphs._device.eager, graphs._device.recorded) == (2 * WARM_UPS, 2)


def test_results_are_not_written_over(model):
    network = Graphs(Recorder).of(model, lambda x, t, y: model(x, t, y, return_dict=False)[0])
    inputs = [(torch.full((1, 4, 8, 8), float(i)), torch.full((1,), i / 9), LABELS[:1]) for i in range(WARM_UPS + 3)]
    with torch.no_grad():
        results = [network(*each) for each in inputs]
        for given, result in zip(inputs, results, strict=True):
            assert torch.equal(result, model(*given).sample)


def test_cleared_graphs_serve_another_model_and_others_do_not(model):
    graphs, other = Graphs(Recorder), create_model(None, 8, 3, hidden_size=16, depth=1, num_heads=2)
    sampling = Sampling("euler", steps=6)
    sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)
    with pytest.raises(ValueError, match="these graphs are of another model; take new ones"):
        sample_latents(other, INDICES, LABELS, sampling, graphs=graphs)
    graphs.clear()
    assert graphs._graphs == {}
    assert torch.equal(*(sample_latents(other, INDICES, LABELS, sampling, graphs=each)[0] for each in (graphs, False)))


def test_a_recording_that_fails_is_told_and_sampling_goes_on(model):
    sampling = Sampling("euler", steps=9)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted .* capturing$") as told:
        drawn = sample_latents(model, INDICES, LABELS, sampling, graphs=Graphs(Refusing))[0]
    assert len(told) == 1
    assert torch.equal(drawn, sample_latents(model, INDICES, LABELS, sampling, graphs=False)[0])


@pytest.mark.parametrize(
    "meddle",
    [
        lambda model: model.blocks[0].register_forward_pre_hook(lambda module, args: None),
        lambda model: add_hook_to_module(model.blocks[1].mlp, ModelHook()),
        lambda model: model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32),
        lambda model: model.to("meta"),
    ],
    ids=["hook", "accelerate", "group offload", "layerwise casting", "another device"],
)
def test_what_acts_at_every_call_is_not_recorded(model, meddle):
    assert can_record(model, "cpu")
    meddle(model)
    assert not can_record(model, "cpu")
    assert Graphs(Recorder).of(model, model) is model


def test_autocast_is_not_recorded_and_compiled_models_are(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_record(model, "cpu")
    assert can_record(torch.compile(model, backend="eager"), "cpu")
    model.compile_repeated_blocks(backend="eager")
    assert can_record(model, "cpu")


def test_a_cpu_has_no_graphs(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Graphs().of(model, model) is model
        sample_latents(model, INDICES, LABELS, Sampling("euler", steps=6))
