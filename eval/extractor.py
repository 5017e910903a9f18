"""Inception features as ADM's protocol takes them, through torch-fidelity."""

import io
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from tqdm import tqdm

from sit_atconv.errors import InputError

PROTOCOL = "inception-2015-12-05-pool3"


def inception_weights(path: str | None) -> Path:
    """The weights file: the one given, else the one in torch's hub cache. Raises InputError when it is not there."""
    name = URL_INCEPTION_V3.rpartition("/")[2]
    weights = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not weights.is_file():
        raise InputError(
            f"Inception weights {str(weights)!r} are not there; download {URL_INCEPTION_V3} and give it with --weights"
        )
    return weights


def load_inception(weights: Path, device: torch.device) -> FeatureExtractorInceptionV3:
    """torch-fidelity's Inception with these weights, fp32. Raises InputError for a file that is not its state dict."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle the file without restraint; it gets tensors that were read safely instead.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=safe)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Inception weights {str(weights)!r} cannot be read: {reason}") from None
    return model.to(device)


@torch.no_grad()
def extract(model: FeatureExtractorInceptionV3, pixels: torch.Tensor, batch_size: int = 64) -> np.ndarray:
    """Pool features (N, 2048) of uint8 images (N, C, H, W), in true fp32; grey ones are repeated to three channels."""
    device = next(model.buffers()).device
    features = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in tqdm(pixels.split(batch_size), desc="features", unit="batch"):
            features.append(model(part.expand(-1, 3, -1, -1).to(device))[0].cpu().numpy())
    return np.concatenate(features)
