"""Scores of image folders. Nothing here knows how the images were made."""
