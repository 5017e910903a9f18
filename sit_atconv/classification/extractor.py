"""`attnet:RUN`, the kind of extractor that a classifier of one's own is; timm is imported where one is opened."""

from typing import Any

import torch

from sit_atconv.runtime.errors import InputError, option
from sit_atconv.scoring.extractor import Extractor, Kind


def _open(place: str, weights: None, device: torch.device) -> Extractor:
    from sit_atconv.classification.features import open_classifier

    return open_classifier(place, device)


def _recorded(where: str, about: dict[str, Any], spec: str | None) -> str:
    if not (isinstance(spec, str) and spec.startswith("attnet:")):
        raise InputError(
            f"{where} is of features by {about['name']!r}, and does not say where that lies; name it with "
            f"{option('extractor')}"
        )
    return spec


ATTNET = Kind(
    "attnet", "attnet-", ("frechet_distance", "is", "pr", "kid", "nearest", "recognised"), _open, "RUN",
    needed=True, recorded=_recorded,
)  # fmt: skip
