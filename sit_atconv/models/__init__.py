"""Model classes and their presets."""
