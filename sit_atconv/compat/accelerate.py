"""Private parts of accelerate."""

from torch import nn


# accelerate 1.15: hooks are put on in public, but not asked for.
def is_dispatched(module: nn.Module) -> bool:
    """Whether a hook of accelerate offloads the module or brings its inputs to a device."""
    return hasattr(module, "_hf_hook")
