"""Private parts of accelerate."""

from accelerate import PartialState
from torch import nn


# accelerate 1.15: hooks are put on in public, but not asked for.
def is_dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate offloads the module or brings its inputs to a device."""
    return hasattr(module, "_hf_hook")


# accelerate 1.15: to ask a PartialState makes one, which joins the launch.
def joined_rank() -> int | None:
    """The number that this process joined a launch with, also once its process group is gone; None before it joined."""
    return PartialState._shared_state.get("process_index")
