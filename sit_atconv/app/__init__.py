"""A page on which people draw images from trained models: the form, what draws, and the pictures."""
