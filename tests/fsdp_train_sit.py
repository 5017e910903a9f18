"""train_sit.py under FSDP2 on a CPU, where Accelerate does not enable it: its state is told otherwise at the start."""

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import train_sit
from sit_atconv.config import Recipe
from sit_atconv.training import loop

make_accelerator = loop.make_accelerator


def sharded_accelerator(recipe: Recipe) -> Accelerator:
    accelerator = make_accelerator(recipe)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["SiTBlock", "SiTATConvBlock"],
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


loop.make_accelerator = sharded_accelerator

if __name__ == "__main__":
    train_sit.main()
