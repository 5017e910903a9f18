"""What a run is started on: Accelerate's processes, devices and precision."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    is_tensorboard_available,
    is_wandb_available,
)

from sit_atconv.config import Recipe
from sit_atconv.runtime import processes
from sit_atconv.runtime.errors import InputError, told
from sit_atconv.runtime.files import resolved

# How long processes wait for one that works alone: at a score, a checkpoint's hashes, a slow disk. torch's own ten
# minutes would end a run.
PATIENCE = timedelta(hours=1)
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run. Raises InputError for what this machine or number of processes cannot do."""
    train, installed = recipe.train, {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    for tracker in recipe.run.trackers:
        if not installed[tracker]:
            raise InputError(f"run.trackers: {tracker!r} is not installed; pip install {tracker}")
    plugin = GradientAccumulationPlugin(num_steps=train.gradient_accumulation_steps, sync_with_dataloader=False)
    with told(f"accelerate refuses the launch with train.precision={train.precision}", ValueError):
        accelerator = Accelerator(
            mixed_precision={"bf16": "bf16", "fp16": "fp16"}.get(train.precision, "no"),
            gradient_accumulation_plugin=plugin,
            log_with=recipe.run.trackers or None,
            project_dir=str(resolved(recipe.run.out, "run.out")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PATIENCE),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of all gradients
            ],
        )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type not in DISTRIBUTED or accelerator.is_fsdp2 != sharded:
        raise InputError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this trainer runs on one process, "
            "under DDP on CPU or CUDA, or under FSDP with fsdp_version: 2, as `accelerate config` sets it"
        )
    if train.precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("train.precision=fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if train.precision == "fp16" and sharded:
        raise InputError("train.precision=fp16 is not for FSDP; use bf16")
    parts = accelerator.num_processes * train.gradient_accumulation_steps
    if train.batch_size % parts:
        raise InputError(
            f"train.batch_size={train.batch_size} is not divisible by {accelerator.num_processes} processes x "
            f"{train.gradient_accumulation_steps} accumulation steps; choose a multiple of {parts}"
        )
    processes.talk_apart(PATIENCE)
    return accelerator
