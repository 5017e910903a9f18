"""CUDA graphs of the network as sampling calls it: what it launches is recorded once and replayed at every later step.

An evaluation launches some hundreds of kernels, one by one, and a GPU is done with those of a small batch before the
processor has launched them; a replay launches all at once. The kernels and their order are those of the eager call, so
the numbers are the same to the bit by construction. The steps of guidance and sampler are not recorded.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from sit_atconv.runtime.compat.torch import OptimizedModule, has_compiled_call, is_hooked
from sit_atconv.runtime.errors import said

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
        result.record_stream(current)  # its memory is of the other stream, and is used on this one
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
    """CUDA graphs of one model's network, one for each shape of its input, for as long as this object lives; `beside`
    it those of its guide's network.

    A graph reads the weights where they were when it was recorded: they may change in place, and where they lie
    elsewhere, as after `to` or with adapters, the graphs are recorded anew. Take new Graphs for another backend of
    attention, other scales of adapters and other switches of precision: the graphs do not see them.
    The graphs share their memory, which they hold until `clear` is called, or this object is gone.
    After a recording that failed, of either network, nothing more is recorded or replayed, also after `clear`: CUDA may
    take it to be under way still.

    recorder: what records; a test takes another one.
    """

    def __init__(self, recorder: type[Cuda] = Cuda):
        self._recorder, self._faults = recorder, []  # of recordings, shared with `beside`
        self.clear()

    @property
    def beside(self) -> Graphs:
        """Those of the network that guides this one's, in memory of their own."""
        if self._beside is None:
            self._beside = Graphs(self._recorder)
            self._beside._faults = self._faults
        return self._beside

    def clear(self) -> None:
        """Forget all graphs, and the model, and its guide's."""
        self._model, self._places, self._beside = None, None, None
        self._forget()

    def _forget(self) -> None:
        self._device, self._graphs = None, {}

    def of(self, model: nn.Module, network: Network) -> Network:
        """What to call in the place of `network`, (x, t, labels) -> (B, ...), which calls the model and nothing else.

        Of each shape, WARM_UPS calls run as they are, and the next one is recorded. Of a recording that fails a warning
        tells, with the first error, and from then on all runs as it is. Where a recording would not do what the calls
        do, see `can_record`, this is the network itself. Raises ValueError for another model than before.
        """
        if self._faults or not can_record(model, self._recorder.kind):
            return network
        if self._model not in (None, model):
            raise ValueError("these graphs are of another model; take new ones")
        places = [each.data_ptr() for each in (*model.parameters(), *model.buffers())]
        if places != self._places:
            self._forget()
        self._model, self._places = model, places

        def replayed(*inputs: torch.Tensor) -> torch.Tensor:
            if self._faults:
                self._forget()
                return network(*inputs)
            if self._device is None:
                self._device = self._recorder(inputs[0].device)
            key = tuple((each.shape, each.dtype) for each in inputs)
            if key not in self._graphs:
                self._graphs[key] = _Graph(self._device)
            graph = self._graphs[key]
            if graph.calls == WARM_UPS and (fault := graph.record(network, inputs)):
                warnings.warn(f"sampling goes on without CUDA graphs: {said(fault)}", stacklevel=2)
                self._faults.append(fault)
                self._forget()
                return network(*inputs)
            return graph(network, inputs)

        return replayed


def can_record(model: nn.Module, kind: str = "cuda") -> bool:
    """Whether a recording of the model's forward does what its calls do: on a CUDA device, with nothing else at work.

    Hooks, and a forward of someone else's (offloading, caches, sharded weights), act at every call. A model that is
    compiled as a whole may have graphs of its own, and does not tell; one whose blocks are compiled can be recorded.
    Under autocast, copies of the weights live shorter than a recording; and nothing is recorded within a recording.
    """
    return (
        not isinstance(model, OptimizedModule)
        and not has_compiled_call(model)
        and all(each.device.type == kind for each in model.parameters())
        and not any(is_hooked(each) or "forward" in vars(each) for each in model.modules())
        and not torch.is_autocast_enabled(kind)
        and not (kind == "cuda" and torch.cuda.is_current_stream_capturing())
    )


class _Graph:
    """The recording for one shape: none at first, and then one whose inputs and output stay where they are."""

    def __init__(self, device: Cuda):
        self.device, self.calls, self.replay = device, 0, None

    def __call__(self, network: Network, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        self.calls += 1
        if self.replay is None:
            return self.device.beside(lambda: network(*inputs))
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.output.clone()  # the next replay writes over it

    def record(self, network: Network, inputs: tuple[torch.Tensor, ...]) -> Exception | None:
        """Record the call; None, or why that failed: what the call raised, not what CUDA says of it at the end."""
        self.inputs, faults = [each.clone() for each in inputs], []

        def call() -> torch.Tensor:
            try:
                return network(*self.inputs)
            except Exception as fault:
                faults.append(fault)
                raise

        try:
            self.replay, self.output = self.device.record(call)
        except Exception as error:  # what records CUDA's calls refuses some in many ways
            return [*faults, error][0]
        return None
