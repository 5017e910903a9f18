"""CUDA graphs of sampling, by a recorder that behaves as CUDA does: a recording gives no values, and a replay runs the
operations alone, on the memory that they were recorded with, and no line of Python."""

import warnings
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sit_atconv import create_model
from sit_atconv.runtime.compat.torch import tree_leaves
from sit_atconv.sampling.graphs import WARM_UPS, Cuda, Graphs, can_record
from sit_atconv.sampling.sampling import sample_latents
from sit_atconv.sampling.settings import Sampling

INDICES, LABELS = [3, 5], torch.tensor([1, 2])


def tensors(*trees) -> list[torch.Tensor]:
    return [each for each in tree_leaves(trees) if isinstance(each, torch.Tensor)]


class Tape(TorchDispatchMode):
    """The operations of a call, which can be run again on the memory that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            read = {each.untyped_storage().data_ptr() for each in tensors(args, kwargs)}
            for own, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                if own.untyped_storage().data_ptr() not in read:  # else a view, or written in place
                    own.copy_(new)


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
        with Tape() as tape:
            result = call()
        result.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, result


class Refusing(Recorder):
    def record(self, call):
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with ...")


class Ending(Recorder):
    """As torch.cuda.graph ends after an error: with an error of its own."""

    def record(self, call):
        try:
            return super().record(call)
        finally:
            raise RuntimeError("capture was invalidated")


def made(**options):
    torch.manual_seed(0)
    sizes = {"patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = create_model(None, 8, 3, **sizes | options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def model():
    return made()


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
    eager, nfe = sample_latents(model, INDICES, LABELS, sampling, graphs=None)
    graphs = Graphs(Recorder)
    replayed, same = sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)
    assert torch.equal(replayed, eager)
    assert nfe == same
    assert graphs._device.replayed > 0


def test_replayed_average_velocities_lead_to_the_same_times():
    average, graphs = made(use_meanflow=True), Graphs(Recorder)
    sampling = Sampling(steps=WARM_UPS + 3, guidance_scale=2.0)
    replayed = sample_latents(average, INDICES, LABELS, sampling, graphs=graphs)[0]
    assert torch.equal(replayed, sample_latents(average, INDICES, LABELS, sampling)[0])
    assert graphs._device.replayed == 3


def test_a_guide_is_replayed_beside_the_model(model):
    torch.manual_seed(1)
    guide = create_model(None, 8, 3, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=2).eval()
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.1)
    sampling = Sampling("euler", steps=2 * WARM_UPS, guidance_interval=[0.3, 1.0], guide=guide)
    graphs = Graphs(Recorder)
    for indices in (INDICES, [8, 1]):
        replayed = sample_latents(model, indices, LABELS, sampling, graphs=graphs)[0]
        assert torch.equal(replayed, sample_latents(model, indices, LABELS, sampling)[0])
    both, guided = (graphs, graphs.beside), 4  # of t = 0, 1/6 ... 5/6
    assert [each._device.eager for each in both] == [WARM_UPS, WARM_UPS]
    assert [each._device.replayed for each in both] == [4 * WARM_UPS - WARM_UPS, 2 * guided - WARM_UPS]
    graphs.clear()
    assert graphs.beside._graphs == {}


def test_graphs_serve_other_noise_labels_and_weights_and_record_once_a_shape(model):
    graphs, sampling = Graphs(Recorder), Sampling("euler", steps=WARM_UPS + 2)

    def equal(indices: list[int], labels: list[int]) -> bool:
        drawn = [
            sample_latents(model, indices, torch.tensor(labels), sampling, graphs=each)[0] for each in (graphs, None)
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


def test_what_python_knew_at_the_recording_stays_in_a_replay(model):
    """So the samples above depend on nothing that is read from the device."""
    factor, x = [1.0], torch.ones(2, 3)
    network = Graphs(Recorder).of(model, lambda x: x * factor[0])
    for _ in range(WARM_UPS + 1):
        network(x)
    factor[0] = 2.0
    assert torch.equal(network(3 * x), 3 * x)


@pytest.mark.parametrize("move", ["to", "assign", "adapter"])
def test_weights_that_lie_elsewhere_are_recorded_anew(model, move):
    graphs, sampling = Graphs(Recorder), Sampling("euler", steps=WARM_UPS + 2)
    sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)
    first, old = graphs._device, list(model.parameters())
    with torch.no_grad():
        if move == "to":
            model.to(torch.float64)
            model.x_embedder.proj.weight.mul_(1.5)
        elif move == "assign":
            model.load_state_dict({key: 1.1 * each for key, each in model.state_dict().items()}, assign=True)
        else:
            layer = model.blocks[0].mlp
            layer.added = nn.Parameter(torch.ones(1))
    replayed = sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)[0]
    assert torch.equal(replayed, sample_latents(model, INDICES, LABELS, sampling)[0])
    assert graphs._device is not first
    assert graphs._device.recorded == 1
    del old


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
    assert torch.equal(*(sample_latents(other, INDICES, LABELS, sampling, graphs=each)[0] for each in (graphs, None)))


def test_a_recording_that_fails_is_told_and_the_last(model):
    sampling, graphs = Sampling("euler", steps=9, guidance_interval=[0.3, 0.8]), Graphs(Refusing)
    expected = sample_latents(model, INDICES, LABELS, sampling)[0]
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted .* capturing$") as told:
        drawn = sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)[0]
    assert len(told) == 1
    assert torch.equal(drawn, expected)
    graphs.clear()
    assert graphs.of(model, model) is model


@pytest.mark.parametrize("refused", [1, 2], ids=["of the model", "of its guide"])
def test_after_a_recording_that_fails_neither_network_is_recorded_or_replayed(model, refused):
    torch.manual_seed(1)
    guide = create_model(None, 8, 3, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=2).eval()
    counted = {"recordings": 0, "replays": 0}

    class Once(Recorder):
        def record(self, call):
            counted["recordings"] += 1
            if counted["recordings"] == refused:
                raise RuntimeError("refused")
            replay, result = super().record(call)

            def counting() -> None:
                counted["replays"] += 1
                replay()

            return counting, result

    sampling, graphs = Sampling("euler", steps=9, guide=guide), Graphs(Once)
    with pytest.warns(UserWarning, match="without CUDA graphs: refused$") as told:
        drawn = sample_latents(model, INDICES, LABELS, sampling, graphs=graphs)[0]
    assert len(told) == 1
    assert torch.equal(drawn, sample_latents(model, INDICES, LABELS, sampling)[0])
    assert counted == {"recordings": refused, "replays": refused - 1}  # the model's own, before its guide's failed
    assert graphs._graphs == graphs.beside._graphs == {}
    for _ in range(2):
        assert graphs.of(model, model) is model
        assert graphs.beside.of(guide, guide) is guide
        graphs.clear()


def test_the_error_of_the_call_is_told_and_not_that_of_the_end(model):
    calls = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == WARM_UPS + 1:
            raise ValueError("the cause")
        return 2 * x

    replayed = Graphs(Ending).of(model, network)
    for _ in range(WARM_UPS):
        replayed(torch.ones(2))
    with pytest.warns(UserWarning, match="without CUDA graphs: the cause$"):
        assert torch.equal(replayed(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(WARM_UPS + 1):
            replayed(torch.ones(3))  # a shape that would be recorded


@pytest.fixture
def streams(monkeypatch):
    """CUDA's streams, where there are none: which is the current one."""
    streams = Mock(current="the current one")

    @contextmanager
    def entered(stream):
        before, streams.current = streams.current, stream
        try:
            yield
        finally:
            streams.current = before

    class Graph:
        """torch.cuda.graph, which leaves its stream the current one where the capture's end fails."""

        def __init__(self, graph, pool, stream, capture_error_mode):
            assert (pool, capture_error_mode) == ("the pool", "thread_local")
            self.stream = stream

        def __enter__(self):
            self.before, streams.current = streams.current, self.stream

        def __exit__(self, *args):
            if args[0]:
                raise RuntimeError("capture was invalidated")
            streams.current = self.before

    for name, value in {
        "Stream": lambda device: streams.side,
        "graph_pool_handle": lambda: "the pool",
        "CUDAGraph": lambda: streams.graph,
        "current_stream": lambda device: streams.current,
        "device": lambda device: entered(streams.current),
        "stream": entered,
        "graph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return streams


def test_the_current_stream_is_current_again_where_a_recording_fails(streams):
    device, seen = Cuda(torch.device("cuda")), []

    def call():
        seen.append(streams.current)
        return "the result"

    assert device.record(call) == (streams.graph.replay, "the result")
    with pytest.raises(RuntimeError, match="invalidated"):
        device.record(lambda: [call(), 1 / 0])
    assert seen == [streams.side, streams.side]
    assert streams.current == "the current one"


def test_calls_beside_the_current_stream_wait_for_it_and_it_for_them(streams):
    streams.current = current = streams.default
    result = Cuda(torch.device("cuda")).beside(lambda: (streams.ran(streams.current), streams.result)[1])
    assert result is streams.result
    assert [each[:2] for each in streams.mock_calls] == [
        ("side.wait_stream", (current,)),
        ("ran", (streams.side,)),
        ("default.wait_stream", (streams.side,)),
        ("result.record_stream", (current,)),
    ]
    assert streams.current is current


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


def test_neither_autocast_is_recorded_nor_what_may_have_graphs_of_its_own(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_record(model, "cpu")
    assert not can_record(torch.compile(model, mode="reduce-overhead"), "cpu")
    model.compile_repeated_blocks(backend="eager")
    assert can_record(model, "cpu")
    model.compile(mode="reduce-overhead")
    assert not can_record(model, "cpu")


def test_an_output_that_is_written_over_changes_no_slope(model):
    """As of torch.compile with graphs of its own: every output lies where the last one did."""
    sampling, places = Sampling("rk4", steps=3, guidance_scale=1.0), []
    expected = sample_latents(model, INDICES, LABELS, sampling)[0]

    def in_place(module, args, output):
        places.append(output[0])
        return (places[0].copy_(output[0]),)

    model.register_forward_hook(in_place)
    assert torch.equal(sample_latents(model, INDICES, LABELS, sampling)[0], expected)
    assert len(places) == 12


def test_a_cpu_has_no_graphs(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Graphs().of(model, model) is model
        sample_latents(model, INDICES, LABELS, Sampling("euler", steps=6), graphs=Graphs())
