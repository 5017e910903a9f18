"""Latents: the codecs between images and latents, and the cache of what a codec made of a dataset."""
