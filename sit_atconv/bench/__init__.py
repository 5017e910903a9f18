"""Timing, and the speed of models against attention."""

PASSES = ("forward", "backward", "sampling")
BASELINES = ("attention", "paper", "gemm")
