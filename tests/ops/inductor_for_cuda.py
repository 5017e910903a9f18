"""How many kernels an evaluation launches on CUDA, counted without a GPU.

`python tests/ops/inductor_for_cuda.py` (PYTHONPATH: the project) prints a JSON object: by case, the launches of matrix
products, of this package's kernels, of Inductor's kernels, and of anything else. Models have fake tensors on cuda:0, so
what is chosen by device is chosen; torch.compile takes them through to the code that Inductor would run on an H100.
Operators of this package are counted by what they launch themselves. Nothing is run. Each case has to be one graph.

It reaches into torch's internals, and has a process of its own, which it spoils for anything else.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._inductor.config
import torch._subclasses.fake_tensor as fake
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor.fx_passes import joint_graph, post_grad
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops.ahead_of_time import launches

from sit_atconv.models.sit import SiTTransformer2DModel

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, warp_size=32, total_memory=80 * 2**30, gcnArchName="", L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    max_threads_per_block=1024, uuid="", clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


class Driver:
    """What Inductor asks Triton's driver for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_current_stream(self, *_):
        return 0


@contextmanager
def pretended_device() -> Iterator[None]:
    """Within it, Inductor finds one H100."""
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
        "synchronize": None, "exchange_device": 0, "maybe_exchange_device": 0,
    }  # fmt: skip
    of_torch = answers | {
        "get_device_capability": (9, 0), "get_device_name": H100.name, "is_bf16_supported": True, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }  # fmt: skip
    of_interface = answers | {
        "get_compute_capability": 90, "is_triton_capable": True, "raise_if_triton_unavailable": None,
    }  # fmt: skip
    of_worker = {"get_device_properties": H100, "current_device": 0}
    passes = {"lazy_init": None}  # patterns of attention, which are made with tensors on the device
    with ExitStack() as stack:
        for place, named, kind in (
            (torch.cuda, of_torch, lambda f: f),
            (torch.cuda.device, {"__enter__": None, "__exit__": False}, lambda f: f),
            (CudaInterface, of_interface, staticmethod),
            (CudaInterface.Worker, of_worker, staticmethod),
            (scheduler, {"has_triton": True}, lambda f: f),
            (fake, {"init_gpu_context": None}, lambda f: f),
            (joint_graph, passes, lambda f: f),
            (post_grad, passes, lambda f: f),
        ):
            for name, answer in named.items():
                if hasattr(place, name):  # in this version of torch
                    answered = kind(lambda *_, answer=answer, **__: answer)
                    stack.enter_context(mock.patch.object(place, name, answered))
        driver.set_active(Driver())
        yield


class Generated(Exception):
    """Inductor has made its code."""


def inductor_code(function: Callable, *inputs: torch.Tensor) -> tuple[str, torch.fx.Graph]:
    """Inductor's program for function(*inputs), which must be one graph, and the graph that it was made of."""
    made = []

    def keep(lowering):
        code = lowering.codegen()[0]
        made.append((getattr(code, "value", code), lowering.module.graph))
        raise Generated

    def backend(module, examples):
        with pretended_device():
            return compile_fx.compile_fx(module, examples)

    torch._dynamo.reset()
    with ExitStack() as stack:
        for name in ("compile_to_module", "_compile_to_module"):
            if hasattr(graph.GraphLowering, name):
                stack.enter_context(mock.patch.object(graph.GraphLowering, name, keep))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True, compile_threads=1))
        try:
            torch.compile(function, backend=backend, fullgraph=True)(*inputs)
        except Exception:
            if len(made) != 1:
                raise
    return made[0]


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        result = operator(*arguments, **(named or {}))
        # `contiguous` is a view where it copies nothing.
        if not (operator.is_view and same_memory(result, arguments[0])):
            self.counts.update(launched_by(operator, arguments))
        return result


def same_memory(result, source: torch.Tensor) -> bool:
    first = result[0] if isinstance(result, list | tuple) else result
    return first.untyped_storage()._cdata == source.untyped_storage()._cdata


def launched_by(operator, arguments: tuple) -> Counter:
    """What one call of an operator launches; its arguments may be fake."""
    namespace, _, operation = operator.name().partition(".")[0].partition("::")
    if namespace == "sit_atconv":
        return launched_within(operator, arguments)
    if namespace == "prim" or "empty" in operation or operation in ("detach", "_unsafe_view", "lift_fresh"):
        return Counter()
    return Counter({"product" if operation in PRODUCTS else "torch": 1})


def launched_within(operator, arguments: tuple) -> Counter:
    """What this package's operator launches: Triton kernels, and beside them torch's. Nothing is computed."""

    def on_cpu(a):
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype) if isinstance(a, torch.Tensor) else a

    with fake.unset_fake_temporarily():
        arguments = [on_cpu(a) for a in arguments]
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # not those of the mode, which would see the operator
        with Calls() as calls:
            seen = launches(lambda: operator.redispatch(keys, *arguments))
    return calls.counts + Counter({"own": len(seen)})


def compiled(function: Callable, *inputs: torch.Tensor) -> Counter:
    """What function(*inputs) launches under torch.compile."""
    code, made_of = inductor_code(function, *inputs)
    body = code[code.index("def call(") :]
    counts = Counter({"inductor": len(re.findall(r"^\s+triton_\w+\.run\(", body, re.M))})
    for name in re.findall(r"extern_kernels\.(\w+)\(", body):
        counts["product" if name in PRODUCTS else "torch"] += 1
    counts["torch"] += len(re.findall(r"torch\.ops\.aten\.\w+", body))
    own = [node for node in made_of.nodes if str(node.target).startswith("sit_atconv")]
    assert len(own) == len(re.findall(r"torch\.ops\.sit_atconv\.\w+", body.replace("'torch.ops", "")))
    for node in own:
        counts += launched_by(node.target, torch.fx.map_arg(node.args, lambda argument: argument.meta["val"]))
    return counts


def eager(function: Callable, *inputs: torch.Tensor) -> Counter:
    """What function(*inputs) launches without torch.compile."""
    with Calls() as calls:
        function(*inputs)
    return calls.counts


def on_cuda(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def model(depth: int, width: int) -> SiTTransformer2DModel:
    """In bf16, with fake weights."""
    with fake.unset_fake_temporarily(), torch.device("meta"):
        network = SiTTransformer2DModel(hidden_size=width, depth=depth, token_mixer="atconv").to(torch.bfloat16)
    for module in network.modules():  # `Module.to` cannot exchange fake tensors
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(on_cuda(weight.shape, weight.dtype), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, on_cuda(buffer.shape, buffer.dtype))
    return network.eval()


def evaluation(network: SiTTransformer2DModel, batch: int) -> tuple:
    def evaluate(latents, t, labels):
        return network(latents, t, labels, return_dict=False)[0]

    labels = on_cuda((batch,), torch.int64)
    return evaluate, on_cuda((batch, 4, 32, 32)), on_cuda((batch,), torch.float32), labels


def cases(width: int = 1152, batch: int = 2, depth: int = 28) -> dict[str, Counter]:
    """A block at 16x16, and an evaluation of so many: by the difference that one block makes."""
    block = model(1, width).blocks[0]
    found = {
        "block, eager": eager(block, on_cuda((batch, 16, 16, width)), on_cuda((batch, width))),
        "block, compiled": compiled(block, on_cuda((batch, 16, 16, width)), on_cuda((batch, width))),
    }
    for name, count in (("eager", eager), ("compiled", compiled)):
        two, three = (count(*evaluation(model(n, width), batch)) for n in (2, 3))
        found[f"evaluation, {name}"] = Counter({k: two[k] + (depth - 2) * (three[k] - two[k]) for k in two | three})
    return found


if __name__ == "__main__":
    with fake.FakeTensorMode(), torch.no_grad():
        print(json.dumps(cases(), indent=1))
