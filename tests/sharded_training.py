"""What tests/runtime/test_sharding.py looks at: a small model on several processes under FSDP2, saved, loaded, faulted.

    python tests/sharded_training.py FOLDER

FOLDER has run-1/step-0000003 of an unsharded run. Every number of processes is forked from here, so that the libraries
are imported once. FSDP is not enabled by Accelerate on a CPU: its state is told otherwise after it has started, and
from there on `prepare`, `accumulate` and `clip_grad_norm_` are what runs on GPUs.
"""

import copy
import errno
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from sit_atconv import SiTTransformer2DModel, create_model
from sit_atconv.layers.projectors import Projectors, write_projectors
from sit_atconv.runtime import sharding
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.processes import is_main
from sit_atconv.training import checkpoint

STEP, MORE, BATCH, DECAY = 3, 2, 8, 0.9


class Aligned(torch.nn.Module):
    """A model and projectors of its tokens, as the optimiser sees them where REPA's loss is used."""

    def __init__(self, model: SiTTransformer2DModel, projectors: Projectors):
        super().__init__()
        self.model, self.projectors = model, projectors

    def forward(self, x, t, labels):
        tokens = []
        hook = self.model.blocks[0].register_forward_hook(lambda _m, _i, output: tokens.append(output.flatten(1, 2)))
        velocity = self.model(x, t, labels, return_dict=False)[0]
        hook.remove()
        return velocity, self.projectors(tokens[0])[0]


def make(seed: int = 0) -> tuple[Aligned, SiTTransformer2DModel]:
    """A model with projectors, and an average of another past. Tensors of 3, 9 and 21 rows are no even shards."""
    torch.manual_seed(seed)
    model = create_model(
        None, 4, 2, patch_size=2, in_channels=1, hidden_size=12, depth=3, num_heads=2, mlp_ratio=1.75,
        token_mixer="hybrid",
    )  # fmt: skip
    aligned = Aligned(model, Projectors(12, 10, [7], 1))
    for parameter in aligned.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in average.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return aligned, average


def make_optimizer(module: torch.nn.Module) -> torch.optim.AdamW:
    """Two groups, so that the optimiser's order is not the module's."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4)


def losses(module: torch.nn.Module, step: int, rank: int, world: int, parts: int = 1):
    """The losses of a process's share of a step's batch, in `parts`."""
    generator = torch.Generator().manual_seed(step)
    x, t = torch.randn(BATCH, 1, 4, 4, generator=generator), torch.rand(BATCH, generator=generator)
    labels = torch.randint(3, (BATCH,), generator=generator)
    share = BATCH // world // parts
    for part in range(parts):
        mine = slice((rank * parts + part) * share, (rank * parts + part + 1) * share)
        velocity, z = module(x[mine], t[mine], labels[mine])
        yield (velocity - x[mine]).square().mean() + 0.5 * z.square().mean()


def follow(average: torch.nn.Module, model: torch.nn.Module) -> None:
    new = [parameter.detach() for parameter in model.parameters()]
    torch._foreach_lerp_(list(average.parameters()), new, 1 - DECAY)


def save(run: Path, aligned: Aligned, average: torch.nn.Module, optimizer, step: int = STEP) -> Path:
    models = {"model": aligned.model, "ema": average}
    parts = [checkpoint.Part(name, model, checkpoint.write_pretrained) for name, model in models.items()]
    parts.append(checkpoint.Part("model", aligned.projectors, write_projectors))
    return checkpoint.save(run, step, parts, aligned, optimizer, {"skipped": 0}, {})


def accelerator_with_fsdp2(precision: str, parts: int) -> Accelerator:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SiTBlock", "SiTATConvBlock"],
    )
    accelerator.state.fsdp_plugin, accelerator.state.distributed_type = plugin, DistributedType.FSDP
    return accelerator


def prepare(seed: int = 0, precision: str = "no", parts: int = 1):
    """Everything as a training loop has it after `prepare`, sharded."""
    accelerator = accelerator_with_fsdp2(precision, parts)
    aligned, average = make(seed)
    optimizer = make_optimizer(aligned)
    sharding.fit_plugin(accelerator.state.fsdp_plugin, aligned, bf16=precision == "bf16")
    prepared, wrapped = accelerator.prepare(aligned, optimizer)
    assert prepared is aligned
    sharding.shard_like(average, aligned.model)
    return accelerator, aligned, average, wrapped


def train(accelerator, aligned, average, optimizer, steps: range, parts: int = 1) -> list[list[float]]:
    """[loss, gradient norm] of every step, over all processes."""
    figures = []
    for step in steps:
        sums = []
        shares = losses(aligned, step, accelerator.process_index, accelerator.num_processes, parts)
        for _ in range(parts):
            with accelerator.accumulate(aligned):
                with accelerator.autocast():
                    loss = next(shares)
                accelerator.backward(loss)
            sums.append(loss.detach())
        norm = sharding.full_scalar(accelerator.clip_grad_norm_(aligned.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        follow(average, aligned.model)
        figures.append([float(accelerator.reduce(torch.stack(sums).mean(), "mean")), float(norm)])
    return figures


def store(file: Path, aligned: Aligned, average: torch.nn.Module, optimizer) -> None:
    """Everything whole, in one file, written by the main process."""
    state = sharding.optimizer_tensors(aligned, optimizer)
    parts = {"trained": aligned, "ema": average, "optimizer": state}
    tensors = {f"{part}.{name}": x for part, it in parts.items() for name, x in sharding.full_tensors(it).items()}
    if is_main():
        save_file(tensors, file)


def load(folder: Path, aligned: Aligned, average: torch.nn.Module, optimizer) -> None:
    checkpoint.load_weights(folder / "model", aligned.model)
    checkpoint.load_weights(folder / "ema", average)
    sharding.load_full(aligned.projectors, Projectors.load(folder / "model").state_dict())
    checkpoint.load_optimizer(folder, aligned, optimizer)


def error_of(function, *arguments) -> str:
    try:
        function(*arguments)
    except (InputError, RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def faults(out: Path) -> dict[str, str]:
    """What every process says to faults that one of them meets."""
    accelerator, aligned, average, wrapped = prepare(seed=3)
    optimizer, rank, says = wrapped.optimizer, dist.get_rank(), {}
    train(accelerator, aligned, average, wrapped, range(1))

    def fails(*_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    # The shards of one process alone, and the last file, which the main process alone writes.
    for name, place, function, where in (
        ("full", sharding.HuggingFaceStorageWriter, "write_data", 1),
        ("main", checkpoint.files, "library_versions", 0),
    ):
        whole = getattr(place, function)
        setattr(place, function, fails if rank == where else whole)
        says[name] = error_of(save, out, aligned, average, optimizer)
        setattr(place, function, whole)

    # A machine that does not share the disk: what it writes lies elsewhere, where the main process does not see it.
    elsewhere = out.with_name("elsewhere") if rank == 1 else out
    says["apart"] = error_of(save, elsewhere, aligned, average, optimizer)

    part = sharding.local(average.blocks[1].mlp.fc1.bias)
    if rank == 1:
        part[0] = float("nan")
    says["nan"] = error_of(save, out, aligned, average, optimizer)

    state = make()[0].model.state_dict()
    says["shape"] = error_of(sharding.load_full, aligned.model, {**state, "blocks.0.mlp.fc1.bias": torch.zeros(20)})
    state.pop("final_layer.linear.bias")
    says["missing"] = error_of(sharding.load_full, aligned.model, state)
    return says


def bf16_figures() -> dict[str, list]:
    """[loss, gradient norm] of the first step: fp32, bf16 autocast on one process, and bf16 under FSDP."""
    figures = {}
    for name in ("no", "bf16"):
        aligned, _ = make()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            loss = next(losses(aligned, 0, 0, 1))
        loss.backward()
        figures[name] = [float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(aligned.parameters(), 1.0))]
    everything = prepare(precision="bf16")
    figures["sharded"] = train(*everything, range(1))[0]
    figures["dtypes"] = sorted({str(parameter.dtype) for parameter in everything[1].parameters()})
    return figures


def work(rank: int, world: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    results, out = {}, folder / f"run-{world}-sharded"
    if world == 2:
        everything = prepare()
        _accelerator, aligned, average, optimizer = everything
        results["groups"] = [name for name, module in aligned.named_modules() if isinstance(module, FSDPModule)]
        results["ema groups"] = [name for name, module in average.named_modules() if isinstance(module, FSDPModule)]
        results["ema"] = sharding.is_sharded(average)
        results["from the start"] = train(*everything, range(STEP))
        with torch.no_grad():  # leaves the root's parameters whole in the model, and not in the average
            list(losses(aligned, 0, rank, world))
            average(torch.zeros(1, 1, 4, 4), 0.5, torch.tensor([0]))
        results["states"] = len(sharding.optimizer_tensors(aligned, optimizer.optimizer))
        results["parameters"] = len(list(aligned.parameters()))
        results["whole after a forward"] = sum(not isinstance(p, sharding.DTensor) for p in average.parameters())
        results["faults"] = faults(out)
        results["left"] = [path.name for path in out.iterdir()] if out.exists() else []
        save(out, aligned, average, optimizer.optimizer)
        store(folder / "saved.safetensors", aligned, average, optimizer.optimizer)
        results["goes on"] = train(*everything, range(STEP, STEP + MORE))
        results["bf16"] = bf16_figures()
        everything = prepare(parts=2)
        results["accumulated"] = train(*everything, range(STEP), parts=2)
    for source in ("run-1", "run-2-sharded"):
        checkpointed = folder / source / f"step-{STEP:07d}"
        everything = prepare(seed=7)
        load(checkpointed, *everything[1:3], everything[3].optimizer)
        store(folder / f"{source}-on-{world}.safetensors", *everything[1:3], everything[3].optimizer)
        results[source] = train(*everything, range(STEP, STEP + MORE))
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in (2, 4, 1):
        torch.multiprocessing.start_processes(
            work, args=(world, Path(sys.argv[1])), nprocs=world, start_method="fork", join=True
        )
