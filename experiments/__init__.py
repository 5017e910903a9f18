"""Recipes, demonstrations and measurements; scripts that call the library, never called by it."""
