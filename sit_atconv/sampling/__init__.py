"""Sampling: the settings, and the one routine from noise to images."""
