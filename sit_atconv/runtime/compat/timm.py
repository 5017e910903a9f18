"""Private parts of timm."""

from timm.models import _features

# timm 1.0: which of a model's feature maps are meant, as all of timm's `forward_intermediates` understand it.
feature_take_indices = _features.feature_take_indices
