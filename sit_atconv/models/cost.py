"""What a model costs: parameters and multiply-accumulates."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models.sit import SiTTransformer2DModel

_counted: dict[tuple[type, str], int] = {}  # MACs by class and options, which runs and tables ask for time and again


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters and persistent position embeddings, as the public checkpoints count them."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def without_weights(model: SiTTransformer2DModel) -> SiTTransformer2DModel:
    """The same model on the meta device: shapes alone."""
    with torch.device("meta"):
        return type(model).from_config(model.config)


def count_macs(model: SiTTransformer2DModel) -> int:
    """Multiply-accumulates of one network evaluation of one latent by `model`, without guidance.

    A model on the meta device is run as it is, another in a copy without weights. Counted as torch's FlopCounterMode
    does: matrix products, convolutions and attention; element-wise work is not counted.
    """
    if model.device.type != "meta":
        key = type(model), model.to_json_string()
        if key not in _counted:
            _counted[key] = count_macs(without_weights(model))
        return _counted[key]
    latent = torch.zeros(1, model.config.in_channels, *model.latent_size, device="meta")
    label = torch.zeros(1, dtype=torch.long, device="meta")
    return count_forward_macs(model, latent, torch.zeros(1, device="meta"), label)


def count_forward_macs(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-accumulates of `model(*inputs)`, counted in the same way."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2
