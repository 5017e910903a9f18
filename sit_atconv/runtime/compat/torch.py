"""Private parts of torch.

Models need what is looked up at import, and exported pipelines look it up too; the rest is looked up when it is used.
"""

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType

import torch
import torch._dynamo
from torch import nn
from torch._functorch import utils as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad, function
from torch.fx.experimental import symbolic_shapes
from torch.utils import _pytree as pytree

# ---- derivatives

# torch 2.11, 2.14: the one base of autograd functions that meets each level of torch.func's transforms by itself.
SingleLevelFunction = function._SingleLevelFunction

# torch 2.11, 2.14: without it a function of that base is refused within a transform.
enable_single_level_autograd_function = functorch.enable_single_level_autograd_function

# torch 2.11, 2.14: switches tangents on or off, as torch.set_grad_enabled does gradients.
set_forward_grad_enabled = forward_ad._set_fwd_grad_enabled

# torch 2.11, 2.14: whether tangents are switched on, as torch.is_grad_enabled tells of gradients.
is_forward_grad_enabled = torch._C._is_fwd_grad_enabled


# torch 2.11, 2.14: what the first tensor with a tangent loads, and warns the user of what torch itself does there.
def load_forward_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


# torch 2.11, 2.14: asks tensors among arguments of any kind, and sees through the wrappers of torch.func.
any_requires_grad = torch._C._any_requires_grad


# torch 2.11, 2.14: a kernel of the key Autograd has no public way to the kernels below it.
def redispatch_below_autograd(operator, keyset: torch._C.DispatchKeySet, arguments: tuple):
    """What the kernels of `operator` under Autograd give; keyset: as its kernel there was called with."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


# torch 2.11, 2.14: dual levels are opened in public, but not asked for.
def in_dual_level() -> bool:
    """Whether a level of dual tensors is open, in whatever thread."""
    return forward_ad._current_level >= 0


# torch 2.11, 2.14: torch.func does not tell whether one of its transforms is at work.
def in_transform() -> bool:
    """Whether `grad`, `vjp`, `jvp` or `vmap` of torch.func is at work here."""
    return torch._C._are_functorch_transforms_active()


# torch 2.11, 2.14: what transforms of torch.func call a function with has no storage, and does not say so.
def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func has wrapped the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


# torch 2.11, 2.14: a hook of a forward has no other way to know that checkpointing runs it again.
def in_backward() -> bool:
    """Whether this thread is within a backward pass."""
    return torch._C._current_graph_task_id() != -1


# ---- torch.compile

# torch 2.11, 2.14: the class of what torch.compile(module) gives.
OptimizedModule = torch._dynamo.OptimizedModule

# torch 2.11, 2.14: a size becomes free in a compiled graph, unless the graph needs it fixed.
maybe_mark_dynamic = torch._dynamo.maybe_mark_dynamic

# torch 2.11, 2.14: compares sizes of a graph without fixing them, as `==` would.
statically_known_true = symbolic_shapes.statically_known_true


# torch 2.11, 2.14: within torch.compile, 2.11 takes torch.compiler.is_exporting() to be true; a constant is not traced.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export is at work; false within torch.compile."""
    return torch.compiler.is_exporting()


# torch 2.11, 2.14: `torch.compile` keeps the module in an attribute.
def uncompiled(module):
    """What torch.compile(module) wraps, or the module."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


# torch 2.11, 2.14: `Module.compile` leaves nothing but what it compiled, in an attribute.
def has_compiled_call(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


# torch 2.11, 2.14: torch.compiler.disable wraps the function, and breaks a graph that would hold it.
def skip_as_frame(*functions: FunctionType) -> None:
    """torch.compile makes no graph that begins with one of the functions; within other graphs they are as ever."""
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    for each in functions:
        set_code_exec_strategy(each.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


# ---- modules and their hooks


# torch 2.11, 2.14: a parameter that is fake is of the class of fake tensors, which is private.
def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter of torch's own class, or a fake one: no quantised, sharded or computed weight."""
    return type(tensor) is nn.Parameter or (isinstance(tensor, FakeTensor) and isinstance(tensor, nn.Parameter))


# torch 2.11, 2.14: hooks are registered in public, but not listed.
def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of the module itself run when it is called, forward or backward."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


# torch 2.11, 2.14: the same.
def forward_pre_hooks(module: nn.Module) -> list[Callable]:
    """The hooks that run before the module's forward, in their order."""
    return list(module._forward_pre_hooks.values())


# torch 2.11, 2.14: every public registration makes a key of its own.
def hook_key() -> int:
    """A key for `put_hooks`, which no other hook has."""
    return torch.utils.hooks.RemovableHandle(OrderedDict()).id


# torch 2.11, 2.14: the same.
def put_hooks(module: nn.Module, key: int, before: Callable, after: Callable) -> None:
    """Have `before` (module, args, kwargs) run first of all at a call, and `after` (module, args, output) always."""
    module._forward_pre_hooks[key], module._forward_hooks[key] = before, after
    module._forward_pre_hooks.move_to_end(key, last=False)
    module._forward_pre_hooks_with_kwargs[key] = module._forward_hooks_always_called[key] = True


# torch 2.11, 2.14: a hook is taken off in public by its handle alone, and a copy of a module has no handles.
def remove_hooks(module: nn.Module, unwanted: Callable[[Callable], bool]) -> None:
    """Take off the hooks of the module's forward that `unwanted` is true of."""
    for hooks, *marks in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key, hook in list(hooks.items()):
            if unwanted(hook):
                for each in (hooks, *marks):
                    each.pop(key, None)


# torch 2.11, 2.14: `state_dict` and `load_state_dict` pass it on in an attribute.
def metadata_of(state_dict: dict) -> dict | None:
    """By the name of a module, what a state dict says of it beside its tensors; None where it says nothing."""
    return getattr(state_dict, "_metadata", None)


# ---- tensors

# torch 2.11, 2.14: the trees of arguments that torch.export takes; no public module has them.
keystr = pytree.keystr
tree_leaves = pytree.tree_leaves
tree_leaves_with_path = pytree.tree_leaves_with_path
tree_map = pytree.tree_map


# torch 2.11, 2.14: torch's own optimisers work on lists of tensors by such calls; the public ones take one at a time.
def lerp_each(tensors: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
    """Move each tensor towards its end by that share of the way, in place."""
    torch._foreach_lerp_(tensors, ends, weight)


# torch 2.11, 2.14: the same.
def copy_each(tensors: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy to each tensor its source, in place."""
    torch._foreach_copy_(tensors, sources)


# torch 2.11, 2.14: `torch.backends.mkldnn` says whether oneDNN is there, not which dtypes it takes on this processor.
def onednn_takes_bf16() -> bool:
    """Whether this processor has oneDNN's convolutions in bf16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- what calls take


# torch 2.11, 2.14: FlopCounterMode does not know the CPU's fused attention, and gives shapes to formulas of others.
def formulas_of_attention() -> dict:
    """For FlopCounterMode's `custom_mapping`: the CPU's fused attention counts as the fused attention of a GPU."""
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten

    def of_cpu(*args, out_val=None, **kwargs) -> int:
        return flop_registry[aten._scaled_dot_product_flash_attention](*args, out_val=out_val, **kwargs)

    of_cpu._get_raw = True  # the arguments, tensors and all: that formula finds their shapes by itself
    return {aten._scaled_dot_product_flash_attention_for_cpu: of_cpu}


def flops_between_tokens(counts: Mapping) -> int:
    """Of the counts by operator of a FlopCounterMode, those of products in which both factors depend on the input:
    queries with keys, and shares with values."""
    aten = torch.ops.aten
    products = {
        aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_flash_attention_for_cpu,
    }  # fmt: skip
    return sum(count for operator, count in counts.items() if operator in products)


# torch 2.11, 2.14: a mode that sees every operator has no public base class, and autocast refuses the meta device.
@contextmanager
def without_weights() -> Iterator[None]:
    """For passes of a model on the meta device with inputs that are real: what is made of these alone is computed, and
    all that a weight has a part in has shapes only. Models read lengths, positions and masks as numbers.

    One at a time: autocast is another one in all threads meanwhile."""
    small, largest = 2**12, 2**28  # values of what is worked out
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            if any(each.is_meta for each in tensors):
                if function is torch.ops.aten.index.Tensor:
                    args = args[0], [place for each in args[1] for place in places(each)]
                return on_meta(function, args, kwargs)
            # A mask of all queries over all keys may fill memory.
            if sum(each.numel() for each in tensors) > small and not function._schema.is_mutable:
                with suppress(NotImplementedError, RuntimeError):  # what has no shape of its own, such as `nonzero`
                    made = on_meta(function, args, kwargs)
                    if any(isinstance(x, torch.Tensor) and x.numel() > largest for x in tree_leaves(made)):
                        return made
            return function(*args, **kwargs)

    def on_meta(function, args: tuple, kwargs: dict):
        args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))
        kwargs |= {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
        return function(*args, **kwargs)

    def places(index: torch.Tensor | None) -> tuple:
        """An index as it is, or where a mask that is real is true: how many these are, its shape does not tell."""
        mask = index is not None and index.dtype == torch.bool and not index.is_meta
        return index.nonzero(as_tuple=True) if mask else (index,)

    def dtype_of_meta(device_type: str):
        return asked(torch.device("cpu").type if device_type == "meta" else device_type)

    def begun(self, device_type: str, *args, **kwargs):
        begin(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    asked, begin = torch.get_autocast_dtype, torch.autocast.__init__
    try:
        torch.get_autocast_dtype, torch.autocast.__init__ = dtype_of_meta, begun
        with Shapes():
            yield
    finally:
        torch.get_autocast_dtype, torch.autocast.__init__ = asked, begin


# torch 2.11, 2.14: there is no public count of the memory of a CPU's tensors; builds without distributed lack this one.
def memory_tracker():
    """A new MemTracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    return MemTracker()


# ---- loader processes; `iterator`: iter(DataLoader) with such processes


# torch 2.11, 2.14: a DataLoader does not tell its processes.
def loader_processes(iterator) -> list:
    """The processes, as multiprocessing has them; none of an iterator that reads by itself, or of None."""
    return getattr(iterator, "_workers", [])


# torch 2.11, 2.14: a signal handler raises in whatever the main process does when one of these processes has died.
def ignore_deaths(iterator) -> None:
    """torch's handler of SIGCHLD looks at these processes no more."""
    torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False


# torch 2.11, 2.14: the iterator's own end waits on locks that a killed process may hold.
def consider_ended(iterator) -> None:
    """For processes that are gone: the iterator's thread ends, and its own end does nothing."""
    if iterator._pin_memory:
        iterator._pin_memory_thread_done_event.set()
    iterator._shutdown = True
