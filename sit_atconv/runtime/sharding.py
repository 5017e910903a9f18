"""State that several processes hold in parts: FSDP2's DTensors, gathered, loaded, and stored as they lie.

A function that is "collective" must be called by all processes.
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import is_main

OPTIMIZER_FILE = "optimizer.safetensors"  # of an unsharded run
OPTIMIZER_SHARDS = "optimizer"  # of a sharded one: a folder with a file per process


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_scalar(tensor: torch.Tensor) -> torch.Tensor:
    """The value of a gradient norm or another result over sharded tensors, as a plain tensor. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_tensors(source: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors of a module's state (or of a dict) on the CPU of the main process, {} elsewhere. Collective.

    One tensor at a time is put together on the device. What lies whole on the CPU is no copy.
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    gathered = {}
    for name, tensor in tensors.items():
        whole = full_scalar(tensor.detach())
        if is_main():
            gathered[name] = whole.cpu().contiguous()
    return gathered


def load_full(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load whole tensors, the same in every process, into a plain or sharded module, strictly.

    Raises RuntimeError for missing, unexpected or differently shaped tensors, and leaves the module undefined then.
    """
    own = module.state_dict()
    placed = {}
    for name, tensor in tensors.items():
        like = own.get(name)
        if isinstance(like, DTensor):
            # Every process cuts its part out of its own copy; the clone lets go of the rest.
            part = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
            tensor = DTensor.from_local(
                part.to_local().clone(), like.device_mesh, like.placements, shape=part.shape, stride=part.stride()
            )
        placed[name] = tensor
    module.load_state_dict(placed, strict=True)


def shard_like(copy: nn.Module, model: nn.Module) -> nn.Module:
    """Shard an unsharded copy of `model`, in place, over the same processes and in the same groups; returns it.

    A model that is not sharded leaves the copy as it is. The copy stays in its own dtype, and its parameters are shards
    again after every forward, so that an average can follow the model's shards.
    """
    mesh = next((parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)), None)
    if mesh is not None:
        groups = [name for name, module in model.named_modules() if name and isinstance(module, FSDPModule)]
        for name in [*reversed(groups), ""]:  # from the inside out; the rest belongs to the root
            fully_shard(copy.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    return copy


def fit_plugin(plugin: Any, model: nn.Module, bf16: bool) -> None:
    """Fit Accelerate's FullyShardedDataParallelPlugin to a model, before `prepare`.

    Of the block classes that it names, those that the model has are sharded by themselves; Accelerate refuses others.
    bf16: the weights travel and multiply in bf16 and gradients are summed in fp32, while inputs keep their dtype: the
    forward pass runs under autocast, and a time rounded to bf16 would be another time.
    Raises InputError where the plugin names blocks and the model has none of them, and for options that its weights,
    names or averages do not go with.
    """
    for option, given, instead in (
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, "every process loads the weights"),
        ("offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "the averages stay on the device"),
        ("activation_checkpointing", plugin.activation_checkpointing, "set train.gradient_checkpointing"),
    ):
        if given:
            raise InputError(f"fsdp_{option}: true does not go with this trainer, make it false: {instead}")
    if plugin.transformer_cls_names_to_wrap is not None:
        named, present = plugin.transformer_cls_names_to_wrap, {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = [name for name in named if name in present]
        if not plugin.transformer_cls_names_to_wrap:
            raise InputError(
                f"fsdp_transformer_layer_cls_to_wrap: the model has none of {named}; see its block classes"
            )
    halved = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "output_dtype": torch.float32}
    options = {**halved, "cast_forward_inputs": False} if bf16 else {}
    plugin.mixed_precision_policy = MixedPrecisionPolicy(**options)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as "<parameter name>.<state name>", sharded like the parameters; `module` names them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward pass without a backward leaves the root whole, in tensors that have no state
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


def save_optimizer(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimiser's state into `folder`: one file by the main process, or of shards one by each. Collective.

    Raises OSError or SafetensorError where the disk does not take it: of shards in every process, else in the main one;
    InputError in the main one where it does not see the others' shards.
    """
    tensors = optimizer_tensors(module, optimizer)
    if is_sharded(module):
        shards = str(folder / OPTIMIZER_SHARDS)
        _checkpointed(dcp.save, tensors, storage_writer=HuggingFaceStorageWriter(shards, save_distributed=True))
        if is_main():
            stored = HuggingFaceStorageReader(shards).read_metadata().state_dict_metadata
            for name, tensor in tensors.items():
                chunks = stored[name].chunks if name in stored else []
                if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
                    raise InputError(f"{str(folder)!r}: not all of {name}; all machines must share the file system")
    elif is_main():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER_FILE)


def load_optimizer(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, untrained: Collection[nn.Parameter] = ()
) -> None:
    """Put back what `save_optimizer` wrote, whatever the number of processes then and now. Collective.

    untrained: parameters of which there may be no state, since no step has changed them yet.
    Nothing happens if no step had been taken. Raises KeyError when the parameters are not the same.
    """
    shards = folder / OPTIMIZER_SHARDS
    reader = HuggingFaceStorageReader(str(shards if shards.is_dir() else folder))
    stored = reader.read_metadata().state_dict_metadata
    if not stored:
        return
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    tensors, states = {}, {}
    for key, found in stored.items():
        name, _, field = key.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or found.size not in ((), parameter.shape):
            raise KeyError(f"optimiser state of other parameters: {key} {tuple(found.size)}")
        dtype = found.properties.dtype
        tensors[key] = torch.zeros_like(parameter, dtype=dtype) if found.size else torch.zeros((), dtype=dtype)
        states.setdefault(name, {})[field] = tensors[key]
    may_lack = {id(parameter) for parameter in untrained}
    if missing := {name for name in parameters.keys() - states.keys() if id(parameters[name]) not in may_lack}:
        raise KeyError(f"optimiser state of other parameters: none of {sorted(missing)[:3]}")
    _checkpointed(dcp.load, tensors, storage_reader=reader)
    # Through load_state_dict, so that the optimiser places every tensor as it wants it.
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: states[name] for index, name in enumerate(order) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _checkpointed(function, *args, **kwargs) -> None:
    """Call torch.distributed.checkpoint, and raise in every process what went wrong in the first that failed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
        try:
            function(*args, **kwargs)
        except CheckpointException as error:
            raise error.failures[min(error.failures)][0] from None
