"""A CUDA device that computes nothing, on a machine without one, and an error wherever the host would wait for it.

    with fake_cuda() as cuda:
        model = cuda.moved(model)                          # a copy whose weights are on cuda:0
        x = torch.randn(2, 4, 8, 8, device="cuda")
        with cuda.no_synchronisation():                    # raises Synchronisation where the host waits
            model(x, t, labels).sample.mean().backward()

Tensors of cuda:0 are fake: they have a shape, a dtype and a device, and no values; a custom operator on them runs its
fake function alone. Tensors of the CPU are real, so grids of times, draws and decisions made of them are what they are.
What is copied from the device to the host, which `no_synchronisation` allows into pinned memory alone, is zeros there.

The host waits where it reads a value of the device (`.item()`, `.tolist()`, `bool`, `float`, `int`, a shape that
depends on values), where it copies without `non_blocking` or from memory that is not pinned, as indexing by a list and
`torch.tensor(..., device="cuda")` do, and where it says so (`torch.cuda.synchronize`). A number that stands on the CPU
(0-d) goes to a kernel as an argument: `x * t` waits for nothing. An event may be waited for in a later
`no_synchronisation` than the one that it was recorded in: the device has had something else to do since.
Autocast, backward passes and torch's optimisers work as on a device. It is not seen where a library of its own (cuDNN,
a kernel of Triton) would wait, nor what torch.compile makes.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten, DEVICE = torch.ops.aten, torch.device("cuda:0")
READ, DECIDE, SHAPE = "reads a value", "reads a value to decide by", "has a shape that depends on values"
PRINT, HOST = "prints values", "copies to the host"
# Methods of a tensor of the device; some of them a fake tensor answers before the dispatcher is asked.
METHODS = {
    "item": READ, "tolist": READ, "__float__": READ, "__int__": READ, "__index__": READ, "__complex__": READ,
    "__bool__": DECIDE, "__contains__": DECIDE, "__repr__": PRINT, "__str__": PRINT, "__format__": PRINT,
    "cpu": HOST, "numpy": HOST, "__array__": HOST,
}  # fmt: skip
OPERATIONS = {
    aten._local_scalar_dense: READ, aten.is_nonzero: DECIDE, aten.equal: DECIDE, aten.allclose: DECIDE,
    aten.nonzero: SHAPE, aten.masked_select: SHAPE, aten._unique2: SHAPE, aten.unique_dim: SHAPE,
    aten.unique_consecutive: SHAPE, aten.bincount: SHAPE,
}  # fmt: skip
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)


class Synchronisation(AssertionError):
    """The host would wait for the device."""


class FakeCuda:
    """The device, see above; made by `fake_cuda`."""

    def __init__(self):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.block: object | None = None  # of the `no_synchronisation` that is open
        self.latest: list[torch.Tensor] = []  # what torch's latest call has made
        self._pinned: dict[int, torch.Tensor] = {}
        self._accumulators: list[Any] = []
        self._told_to_autograd = False

    @contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """Raises Synchronisation, an AssertionError, where the host would wait for the device."""
        before, self.block = self.block, object()
        try:
            yield
        finally:
            self.block = before

    def moved(self, module: nn.Module) -> nn.Module:
        """A copy of the module with its parameters and buffers on the device; tied ones stay tied."""
        module, parameters = copy.deepcopy(module), {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in parameters:
                        parameters[parameter] = self.parameter(parameter.data.to(DEVICE), parameter.requires_grad)
                    part._parameters[name] = parameters[parameter]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to(DEVICE)
        return module

    def parameter(self, data: torch.Tensor, requires_grad: bool = True) -> nn.Parameter:
        """A parameter of data on the device, which a backward pass can reach."""
        parameter = nn.Parameter(data, requires_grad)
        if requires_grad:
            self._told_to_autograd = True
            with torch.enable_grad():
                self._accumulators.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
            self._told_to_autograd = False
        return parameter

    def waits(self, what: str, why: str) -> None:
        """Told of everything that makes the host wait."""
        if self.block is not None:
            raise Synchronisation(f"{what} {why}: the host waits for the device")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, of the CPU, which counts as pinned from now on, and its views with it."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept: no other tensor gets its memory
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        real = not isinstance(tensor, FakeTensor)
        return real and tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._pinned

    def copied_to_host(self, what: str, pinned: bool, non_blocking: bool) -> None:
        if not (pinned and non_blocking):
            self.waits(what, "copies to the host, not into pinned memory with non_blocking")

    def copied_to_device(self, what: str, source: torch.Tensor, non_blocking: bool) -> None:
        if source.numel() and not self.is_pinned(source):
            self.waits(what, "copies to the device from memory that is not pinned")
        elif source.numel() and not non_blocking:
            self.waits(what, "copies to the device without non_blocking")

    def device_of(self, tensor: FakeTensor) -> torch.device:
        """What torch's C++ is told. Autograd would ask CUDA for a stream: in a backward pass and of what was just made,
        which it writes down for one, it is told that tensors are on "meta". Autocast has to be told the truth."""
        backward = self._told_to_autograd or torch._C._current_graph_task_id() != -1
        if self.mode.in_kernel_invocation or backward or any(each is tensor for each in self.latest):
            return torch.device("meta")
        return tensor.fake_device


def _on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class _Calls(TorchFunctionMode):
    """What torch is asked for by name: some of it the dispatcher never sees."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, cuda = dict(kwargs or {}), self.cuda
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if not name.endswith("__get__") and func is not torch.ops.prim.device.default:
            cuda.latest.clear()
        method = name.removeprefix("torch.Tensor.")
        if method != name and _on_device(args[0]):
            if method in METHODS:
                cuda.waits(name, METHODS[method])
            if method in ("__getitem__", "__setitem__"):
                self._check_index(name, args[1])
        if name in ("torch.tensor", "torch.as_tensor", "torch.asarray"):
            self._check_numbers(name, args[0], kwargs.get("device"))
        if method == "new_tensor":
            self._check_numbers(name, args[1], kwargs.get("device") or args[0].device)
        if method == "pin_memory":
            return args[0] if cuda.is_pinned(args[0]) else cuda.pin(args[0].clone())
        if method == "is_pinned":
            return cuda.is_pinned(args[0])
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        cuda.latest += _tensors(made)  # of a call that found nothing to do, too
        return cuda.pin(made) if pinned else made

    def _check_numbers(self, name: str, numbers: Any, device: Any) -> None:
        if device is not None and torch.device(device).type == "cuda" and not isinstance(numbers, torch.Tensor):
            self.cuda.waits(name, "copies numbers to the device")

    def _check_index(self, name: str, index: Any) -> None:
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, list | tuple | range | np.ndarray):
                self.cuda.waits(name, f"by a {type(each).__name__} copies it to the device")
            if isinstance(each, torch.Tensor) and each.ndim and not _on_device(each):
                self.cuda.waits(name, "by a tensor of the CPU copies it to the device")
            if _on_device(each) and each.dtype in (torch.bool, torch.uint8):
                self.cuda.waits(name, "by a mask counts what is true")


class _Operations(TorchDispatchMode):
    """What the dispatcher sees: real operations on the CPU, fake ones on the device, and copies between the two."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, cuda, name = dict(kwargs or {}), self.cuda, str(func)
        if func is torch.ops.prim.device.default:
            return cuda.device_of(args[0])
        target = kwargs.get("device")
        if target == torch.device("meta"):  # autograd, which was told so
            target = kwargs["device"] = DEVICE
        to_device = target is not None and target.type == "cuda"
        if not to_device and not any(isinstance(each, FakeTensor) for each in _tensors(args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._check(name, func, args, kwargs)
        if func is aten._to_copy.default and target is not None:
            non_blocking = kwargs.get("non_blocking", False)
            if target.type == "cpu" and _on_device(args[0]):
                cuda.copied_to_host(name, True, non_blocking)  # with non_blocking, torch takes pinned memory
                with unset_fake_temporarily():
                    return cuda.pin(torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
            if to_device and not _on_device(args[0]):
                cuda.copied_to_device(name, args[0], non_blocking)
        if func is aten.copy_.default:
            (to, source), non_blocking = args[:2], any(args[2:]) or kwargs.get("non_blocking", False)
            if _on_device(to) and not _on_device(source):
                cuda.copied_to_device(name, source, non_blocking)
            if not _on_device(to) and _on_device(source):
                cuda.copied_to_host(name, cuda.is_pinned(to), non_blocking)
                with unset_fake_temporarily():
                    return to.zero_()
        args, kwargs = pytree.tree_map(self._faked, (args, kwargs))
        with cuda.mode:
            made = func(*args, **kwargs)
        cuda.latest += _tensors(made)
        return made

    def _check(self, name: str, func: Any, args: tuple, kwargs: dict) -> None:
        packet = func.overloadpacket
        if packet in OPERATIONS:
            self.cuda.waits(name, OPERATIONS[packet])
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.cuda.waits(name, f"{SHAPE}; give output_size")
        if packet in INDEXING and any(_on_device(each) and each.dtype == torch.bool for each in args[1]):
            self.cuda.waits(name, "by a mask counts what is true")

    def _faked(self, value: Any) -> Any:
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.cuda.mode.from_tensor(value) if real else value


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    L2_cache_size=50 << 20, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
)  # fmt: skip


def _pretended(cuda: FakeCuda) -> dict[str, Any]:
    """By name in torch.cuda, what takes the place of what asks the driver."""

    class Event:
        def __init__(self, *args, **kwargs):
            self.block = None

        def record(self, stream=None) -> None:
            self.block = cuda.block

        def query(self) -> bool:
            return self.block is None or self.block is not cuda.block

        def wait(self, stream=None) -> None:
            """The device waits, not the host."""

        def synchronize(self) -> None:
            if not self.query():
                cuda.waits("torch.cuda.Event.synchronize", "asks for what was just begun")

    class Stream:
        device, cuda_stream = DEVICE, 0

        def __init__(self, *args, **kwargs):
            pass

        def wait_stream(self, stream) -> None:
            pass

        def wait_event(self, event) -> None:
            pass

        def record_event(self, event=None) -> Event:
            event = event or Event()
            event.record()
            return event

        def synchronize(self) -> None:
            cuda.waits("torch.cuda.Stream.synchronize", "asks for it")

    stream = Stream()
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "set_device": None,
        "get_device_properties": PROPERTIES, "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": PROPERTIES.name, "is_bf16_supported": True, "is_current_stream_capturing": False,
        "current_stream": stream, "default_stream": stream, "stream": nullcontext(), "device": nullcontext(),
        "device_of": nullcontext(),
    }  # fmt: skip
    functions = {name: lambda *args, answer=answer, **kwargs: answer for name, answer in answers.items()}
    synchronize = {"synchronize": lambda device=None: cuda.waits("torch.cuda.synchronize", "asks for it")}
    return functions | synchronize | {"Event": Event, "Stream": Stream}


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """A CUDA device, cuda:0, that computes nothing: see above."""
    cuda = FakeCuda()
    with ExitStack() as stack:
        stack.enter_context(cuda.mode)  # first: where it finds no CUDA, it keeps torch from the driver
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", return_value=None))
        stack.enter_context(mock.patch.multiple(torch.cuda, **_pretended(cuda)))
        stack.enter_context(_Operations(cuda))
        stack.enter_context(_Calls(cuda))
        yield cuda
