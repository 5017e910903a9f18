"""What a public checkpoint may be, and which of its weights are read."""

FORMS = ("sit", "repa", "dit")
WEIGHTS = ("ema", "model")  # of a file that holds both
