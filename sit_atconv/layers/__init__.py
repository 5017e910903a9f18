"""Building blocks (nn.Module) of the models."""
