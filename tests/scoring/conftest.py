import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of the user's own and puts it on the path; returns its name."""

    def write(text: str) -> str:
        name = f"own_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights in the published file's layout, scaled so that features do not fade with depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        model = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="unused")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)
        nn.init.normal_(model.fc.bias)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path
