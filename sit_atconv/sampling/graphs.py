"""CUDA graphs of the network as sampling calls it: what it launches is recorded once and replayed at every later step.

An evaluation launches some hundreds of kernels, one by one, and a GPU is done with those of a small batch before the
processor has launched them; a replay launches all at once. The kernels and their order are those of the eager call, so
the numbers are the same to the bit.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from sit_atconv.runtime.compat.torch import is_hooked, uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from sit_atconv.flow.guidance import Network

    Call = Callable[[], torch.Tensor]

WARM_UPS = 3  # calls before a recording: by then kernels are compiled, and libraries have their workspaces


class Cuda:
    """What records on a CUDA device: on a stream of its own, into memory of its own."""

    kind = "cuda"

    def __init__(self, device: torch.device):
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def beside(self, call: Call) -> torch.Tensor:
        """call() on the stream, after all that was begun before and before all that is begun later."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Call) -> tuple[Callable[[], None], torch.Tensor]:
        """Record call(); gives what replays it, and its result, which has values after a replay alone."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),  # again the current one where a recording fails
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = call()
        return graph.replay, result


class Graphs:
    """CUDA graphs of one model's network, one for each shape of its input, for as long as this object lives.

    A graph reads the weights where they were when it was recorded: they may change in place. Take new Graphs where
    they are replaced, as by `to` or adapters, and for other switches of precision.
    The graphs share their memory, which they hold until `clear` is called, or this object is gone.

    recorder: what records; a test takes another one.
    """

    def __init__(self, recorder: type[Cuda] = Cuda):
        self._recorder = recorder
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and the model."""
        self._model, self._device, self._graphs = None, None, {}

    def of(self, model: nn.Module, network: Network) -> Network:
        """What to call in the place of `network`, (x, t, labels) -> (B, ...), which calls the model and nothing else.

        Of each shape, WARM_UPS calls run as they are, and the next one is recorded. Of a recording that fails a warning
        tells, and that shape runs as it is. Where a recording would not do what the calls do, see `can_record`, this is
        the network itself. Raises ValueError for another model than before.
        """
        if not can_record(model, self._recorder.kind):
            return network
        if self._model not in (None, model):
            raise ValueError("these graphs are of another model; take new ones")
        self._model = model

        def replayed(*inputs: torch.Tensor) -> torch.Tensor:
            if self._device is None:
                self._device = self._recorder(inputs[0].device)
            key = tuple((each.shape, each.dtype) for each in inputs)
            if key not in self._graphs:
                self._graphs[key] = _Graph(self._device)
            return self._graphs[key](network, inputs)

        return replayed


def can_record(model: nn.Module, kind: str = "cuda") -> bool:
    """Whether a recording of the model's forward does what its calls do: on a CUDA device, with nothing else at work.

    Hooks, and a forward of someone else's (offloading, caches, sharded weights), act at every call. Under autocast,
    copies of the weights live shorter than a recording; and nothing is recorded within a recording.
    """
    model = uncompiled(model)
    return (
        all(each.device.type == kind for each in model.parameters())
        and not any(is_hooked(each) or "forward" in vars(each) for each in model.modules())
        and not torch.is_autocast_enabled(kind)
        and not (kind == "cuda" and torch.cuda.is_current_stream_capturing())
    )


class _Graph:
    """The recording for one shape: none at first, and then one whose inputs and output stay where they are."""

    def __init__(self, device: Cuda):
        self.device, self.calls, self.replay = device, 0, None

    def __call__(self, network: Network, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.calls == WARM_UPS:
            self._record(network, inputs)
        self.calls += 1
        if self.replay is None:
            return self.device.beside(lambda: network(*inputs))
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.output.clone()  # the next replay writes over it

    def _record(self, network: Network, inputs: tuple[torch.Tensor, ...]) -> None:
        own = [each.clone() for each in inputs]
        try:
            self.replay, self.output = self.device.record(lambda: network(*own))
        except RuntimeError as error:  # what records CUDA's calls refuses some in many ways
            reason = str(error).partition("\n")[0]
            warnings.warn(f"sampling goes on without a CUDA graph: {reason}", stacklevel=2)
        else:
            self.inputs = own
